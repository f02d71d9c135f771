import json

import pytest

from engine.batch.chat_completion import ChatBody
from engine.batch.completion import CompletionBody
from engine.batch.input_file import Line
from engine.batch.refusal import RefusedError
from engine.batch.request import Defaults, parse_line, read_body

REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def line(value: object) -> Line:
    return Line(7, "req_", value if isinstance(value, bytes | None) else json.dumps(value).encode())


def body(defaults: Defaults | None = None, **changes: object):
    return read_body(REQUEST | changes, defaults or Defaults())


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (None, "is longer than 8388608 bytes"),
        (b"{", "is not JSON (Expecting property name enclosed in double quotes); accepted: one object a line"),
        (b"\xff", "is not UTF-8 text"),
        (b'{"a": NaN}', "is not JSON (NaN is no number of JSON)"),
        (b"[" * 100_000, "is nested more than 32 deep"),
        (b"[1]", "holds a list; accepted: one object a line"),
        (b'"a"', "holds a str"),
    ],
)
def test_lines_that_are_no_objects(data, part):
    with pytest.raises(RefusedError) as caught:
        parse_line(line(data))
    assert str(caught.value).startswith(f"line 7 {part}") and str(caught.value).isprintable()


def test_objects():
    deep = b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}"
    pair, twice = b'{"a": "\\ud83d\\ude00 \\u00e9"}', b'{"a": [{"b": 1}, {"b": 1}]}'
    for data in (json.dumps(REQUEST).encode(), pair, deep, twice):
        parsed = parse_line(line(data))
        parsed.check()
        assert parsed.value == json.loads(data)


@pytest.mark.parametrize(
    ("field", "part"),
    [
        (b'"a": ' + b"[" * 33 + b"]" * 33, "is nested more than 32 deep"),
        (b'"a": "\\ud800"', "holds half of a surrogate pair"),
        (b'"\\uDFFF": 1', "holds half of a surrogate pair"),
        (b'"a": 1, "a": 1', "has a twice in one object; accepted: once"),
        (b'"a": [{"x\\ny": {}, "x\\ny": []}]', r"has x\ny twice in one object"),
    ],
)
def test_objects_that_cannot_be_used_have_their_custom_id(field, part):
    parsed = parse_line(line(b'{"custom_id": "mine", ' + field + b"}"))
    assert parsed.custom_id() == "mine"
    with pytest.raises(RefusedError) as caught:
        parsed.check()
    assert str(caught.value).startswith(f"line 7 {part}") and str(caught.value).isprintable()


@pytest.mark.parametrize("digits", ["9" * 5000, "-" + "9" * 5000])
def test_an_integer_longer_than_python_reads(digits):
    body = '{"prompt": "x", "n": 2, "max_tokens": ' + digits + "}"
    parsed = parse_line(line(json.dumps(REQUEST).replace('{"prompt": "x"}', body).encode()))
    parsed.check()
    assert parsed.custom_id() == "a" and parsed.value["body"]["n"] == 2
    with pytest.raises(RefusedError, match="max_tokens is inf; accepted: an integer"):
        read_body(parsed.value, Defaults())


@pytest.mark.parametrize("value", [{}, *({"custom_id": wrong} for wrong in (None, 7, ["a"], "\ud800"))])
def test_without_a_custom_id(value):
    with pytest.raises(RefusedError, match="line 7: custom_id is .*; accepted: text") as caught:
        parse_line(line(value)).custom_id()
    assert caught.value.param == "custom_id"


def test_the_url_decides():
    assert isinstance(body(), CompletionBody)
    chat = body(url="/v1/chat/completions", body={"messages": [{"role": "user", "content": "x"}]})
    assert isinstance(chat, ChatBody)


@pytest.mark.parametrize(
    ("changes", "param", "part"),
    [
        ({"method": "GET"}, "method", "'GET'; accepted: POST"),
        ({"method": None}, "method", "None; accepted: POST"),
        ({"url": "/v1/embeddings"}, "url", "'/v1/embeddings'; accepted: /v1/completions or /v1/chat/completions"),
        ({"url": ["/v1/completions"]}, "url", "accepted: /v1/completions"),
        ({"body": "x"}, "body", "'x'; accepted: an object"),
        ({"body": None}, "body", "None; accepted: an object"),
        ({"params": {}}, "params", "not a field that is known here"),
    ],
)
def test_of_another_form(changes, param, part):
    with pytest.raises(RefusedError) as caught:
        body(**changes)
    assert part in str(caught.value) and caught.value.param == param


class TestSeeds:
    def seed(self, run_seed: int = 0, custom_id: str = "a", **fields: object) -> int:
        return body(Defaults(seed=run_seed), custom_id=custom_id, body={"prompt": "x"} | fields).params.seed

    def test_of_the_run_and_the_custom_id(self):
        assert self.seed() == self.seed() == 1605002263755683156  # as long as results are to stay what they were
        assert len({self.seed(), self.seed(1), self.seed(custom_id="b")}) == 3
        # Neither of these is another spelling of the other.
        assert self.seed(1, "1") != self.seed(11, "")

    def test_of_the_request(self):
        assert self.seed(seed=5) == self.seed(1, "b", seed=5) == 5
