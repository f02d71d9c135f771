from array import array

import pytest

from engine.batch.fields import Fields
from engine.batch.refusal import RefusedError


def test_null_is_a_field_that_was_left_out():
    fields = Fields({"a": None, "b": None, "c": None, "d": None, "unknown": None})
    assert fields.take("a") is None and fields.text("a") is None
    assert fields.integer("b", 5) == fields.integer("other", 5) == 5
    assert fields.number("c", 0.5) == 0.5
    assert fields.boolean("d", True) is True
    assert fields.texts("e", 2) == () and list(fields.token_ids("f")) == []
    fields.finish({})


def test_values():
    fields = Fields({"n": 3, "t": 1, "p": 0.5, "b": False, "s": "x", "one": "x", "many": ["x", "y"], "ids": [0, 7]})
    assert fields.integer("n", least=1, most=3) == 3
    assert (fields.number("t", 0.0), fields.number("p", 0.0)) == (1.0, 0.5)
    assert fields.boolean("b", True) is False
    assert fields.text("s") == "x"
    assert fields.texts("one", 1) == ("x",) and fields.texts("many", 2) == ("x", "y")
    assert fields.token_ids("ids") == array("I", [0, 7])
    fields.finish({})


@pytest.mark.parametrize(
    ("read", "values", "accepted"),
    [
        (lambda f: f.text("x"), [1, True, [], {}], "text"),
        (lambda f: f.boolean("x", False), [0, 1, "true", []], "true or false"),
        (lambda f: f.integer("x"), [True, 1.0, "1", -1, 2**63, 10**400], "an integer of 0 or more"),
        (lambda f: f.integer("x", least=1, most=9), [0, 10], "an integer from 1 to 9"),
        (lambda f: f.number("x", 0.0), [True, "1", [1], float("inf"), float("nan"), 10**400], "a number"),
        (lambda f: f.texts("x", 2), ["", [""], ["a", 1], ["a"] * 3, 5, {}], "a text, or a list of up to 2 texts"),
        (lambda f: f.token_ids("x"), [5, "5", [-1], [True], [2**32], [1.0]], "a list of token ids"),
    ],
)
def test_of_another_type(read, values, accepted):
    for value in values:
        with pytest.raises(RefusedError, match=f"x is .*; accepted: {accepted}") as caught:
            read(Fields({"x": value}))
        assert caught.value.param == "x"


class TestWhatNobodyHasTaken:
    neutral = {"penalty": (0,), "stream": (False,), "format": ({"type": "text"},), "never": ()}

    @pytest.mark.parametrize(
        "values", [{"penalty": 0}, {"penalty": 0.0}, {"stream": False}, {"format": {"type": "text"}}, {"never": None}]
    )
    def test_may_ask_for_nothing(self, values):
        Fields(values).finish(self.neutral)

    @pytest.mark.parametrize(
        ("name", "value", "accepted"),
        [
            ("penalty", 0.5, "0 or null"),
            ("penalty", False, "0 or null"),
            ("stream", True, "false or null"),
            ("stream", 0, "false or null"),
            ("format", {"type": "json_object"}, '{"type": "text"} or null'),
            ("never", 1, "null"),
        ],
    )
    def test_is_not_supported(self, name, value, accepted):
        with pytest.raises(RefusedError) as caught:
            Fields({name: value}).finish(self.neutral)
        assert str(caught.value).endswith(f"; accepted: {accepted}, as it is not supported; remove it")
        assert caught.value.param == name

    def test_may_be_no_field_at_all(self):
        with pytest.raises(RefusedError, match="^temprature is not a field that is known here; remove it$") as caught:
            Fields({"temprature": 0}).finish(self.neutral)
        assert caught.value.param == "temprature"
        with pytest.raises(RefusedError) as caught:
            Fields({"a\nb" + "x" * 9999: 0}).finish(self.neutral)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
