import re

import pytest

from engine.bench.ranges import GRAMMAR, MAX_VALUES, parse_range
from engine.errors import InputError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", (1,)),
        ("256,32,128", (256, 32, 128)),
        (" 1, 2 ,3\n", (1, 2, 3)),
        ("16:65:16", (16, 32, 48, 64)),
        ("16:64:16", (16, 32, 48)),  # stop is exclusive
        ("5:6:100", (5,)),
        ("32:129:x2", (32, 64, 128)),
        ("32:128:x2", (32, 64)),
        ("1 : 100 : x10", (1, 10)),
        ("3:100:x3", (3, 9, 27, 81)),
        ("007", (7,)),
        ("2147483647", (2**31 - 1,)),
    ],
)
def test_accepted(text, values):
    assert parse_range(text) == values


def test_zero_only_where_it_means_something():
    assert parse_range("0:513:256", allow_zero=True) == (0, 256, 512)
    assert parse_range("0", allow_zero=True) == (0,)
    for text in ("0", "1,0", "0:3:1"):
        with pytest.raises(InputError, match="holds 0"):
            parse_range(text)
    with pytest.raises(InputError, match="multiplies from 0"):  # would never end
        parse_range("0:9:x2", allow_zero=True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("32:", "cannot be read"),
        ("a,b", "cannot be read"),
        ("1,", "cannot be read"),
        ("1,,2", "cannot be read"),
        ("-1", "cannot be read"),
        ("-1:5:1", "cannot be read"),
        ("5:1:-1", "cannot be read"),
        ("1.5", "cannot be read"),
        ("1e3", "cannot be read"),
        ("1_000", "cannot be read"),
        ("٣", "cannot be read"),  # a digit to str.isdigit
        ("1:5", "cannot be read"),
        ("1:5:x", "cannot be read"),
        ("1:5:1:1", "cannot be read"),
        ("1:5:1,9", "cannot be read"),  # the three forms do not mix
        ("0:9:x2", "multiplies from 0"),
        ("1:5:x1", "factor 1"),
        ("1:5:x0", "factor 0"),
        ("1:5:0", "step 0"),
        ("5:5:1", "holds no values"),
        ("9:5:x2", "holds no values"),
        ("2,3,2", "holds 2 twice"),
        ("2,02", "holds 2 twice"),
        ("2147483648", "above 2147483647"),
        ("1:9999999999:x2", "above 2147483647"),
        ("9" * 100_000, "above 2147483647"),
        ("1:2147483647:1", f"more than {MAX_VALUES}"),
    ],
)
def test_refused_in_one_line_that_shows_the_grammar(text, problem):
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        parse_range(text, name="NUM_SHARED")
    message = str(caught.value)
    assert message.startswith("NUM_SHARED '")
    assert GRAMMAR in message
    assert "\n" not in message
    assert len(message) < 300
