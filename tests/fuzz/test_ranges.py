from fuzz.documents import by_weight
from fuzz.harness import for_cases, fuzz
from hypothesis import strategies as st

from engine.bench.ranges import MAX_VALUE, MAX_VALUES, parse_range

_NUMBERS = st.one_of(
    st.integers(0, 40).map(str),
    st.integers(0, MAX_VALUE).map(str),
    st.sampled_from([str(MAX_VALUE), str(MAX_VALUE + 1), "007", "0" * 1000 + "5", "9" * 5000]),
)
_SPACES = st.sampled_from(["", "", "", " ", "\t", "\n", "\u2003"])
_LISTS = st.builds(lambda items, comma: comma.join(items), st.lists(_NUMBERS, max_size=6), st.sampled_from([",", ", "]))
_SPANS = st.builds(
    lambda *parts: "".join(parts),
    _NUMBERS, _SPACES, st.just(":"), _SPACES, _NUMBERS, st.just(":"), st.sampled_from(["", "x"]), _NUMBERS,
)  # fmt: skip
_SMALL_SPANS = st.builds(
    "{}:{}:{}{}".format, st.integers(0, 9), st.integers(0, 9000), st.sampled_from(["", "x"]), st.integers(0, 9)
)
_LONG = st.builds(
    lambda piece, count, end: piece * count + end,
    st.sampled_from(["1,", "1 ,", "9", " ", "1 ", ":", "1:", ",", "x", "\n", "\ud800", "\U0001f600"]),
    st.sampled_from([50, 10_000, 200_000]),
    st.sampled_from(["", "1", "x", ":2:3"]),
)
_DISTINCT = st.integers(1, MAX_VALUES + 5).map(lambda count: ",".join(map(str, range(1, count + 1))))


_PIECES = st.sampled_from([*",:x-+ 09_.٣²\n\0\u2028\ud800", "", "::", "1e3"])


@st.composite
def _edited(draw, texts) -> str:
    text = draw(texts)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.integers(0, 2))
        text = text[:start] + draw(_PIECES | st.text(max_size=2)) + text[end:]
    return text


_TEXTS = by_weight(
    (2, _LISTS), (2, _SPANS), (3, _SMALL_SPANS), (2, _edited(_SMALL_SPANS | _LISTS)), (1, _LONG), (1, _DISTINCT),
    (1, st.text()),
)  # fmt: skip


@for_cases
def test_ranges(num_cases):
    def parse(case: tuple[str, bool]) -> None:
        text, allow_zero = case
        values = parse_range(text, allow_zero=allow_zero, name="NUM_SHARED")
        assert 0 < len(values) == len(set(values)) <= MAX_VALUES
        assert all(type(value) is int and (not allow_zero) <= value <= MAX_VALUE for value in values)

    outcomes = fuzz(num_cases, st.tuples(_TEXTS, st.booleans()), parse)
    assert outcomes.accepted_share > 0.05
    assert outcomes.share("cannot be read|is empty") < 0.6
    problems = "is empty|cannot be read|holds 0|twice|multiplies|a factor|a step|no values|more than 1|number above"
    outcomes.assert_reached(problems.split("|"))
