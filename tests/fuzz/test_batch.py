"""Lines of a batch file that are damaged, forged or nonsense, and files of results likewise."""

import json
import pickle
from dataclasses import replace

import pytest
from batches import chat, completion, message, results, save_chat_model
from fuzz.documents import by_weight, changed, odd_values
from fuzz.harness import for_cases, fuzz
from hypothesis import strategies as st

from engine import LLM
from engine.batch.input_file import MAX_LINE_BYTES, InputFile
from engine.batch.job import BatchJob
from engine.batch.refusal import RefusedError, error_body
from engine.batch.request import BatchRequest, Defaults, Origin, parse_line, read_body
from engine.batch.result import ANSWERED, REFUSED, parse_result, result_line
from engine.batch.results_file import ResultsFile
from engine.distributed import TPGroup
from engine.errors import InputError

_OPTIONS = {
    "model": "any", "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop": ["a"], "seed": 3,
    "stop_token_ids": [7], "ignore_eos": True, "include_stop_str_in_output": True, "user": "me", "stream": False,
    "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "return_token_ids": True,
}  # fmt: skip
_REQUESTS = [
    completion("a", "one", **_OPTIONS, logprobs=3, best_of=2, suffix=""),
    completion("b", ["one", "two"], **_OPTIONS | {"logprobs": 3}, echo=True),
    completion("c", [5, 6, 7]),
    completion("d", [[5, 6], [7]], n=2),
    chat("e", "one", **_OPTIONS, logprobs=True, top_logprobs=2, max_completion_tokens=4, tools=[]),
    chat("f", "é", response_format={"type": "text"}, metadata={"a": "b"}),
]
_NAMES = sorted({name for request in _REQUESTS for name in (*request, *request["body"])} | {"modalities", "tools"})

# Text that stands for a line, or for a part of one.
_TEXTS = [
    "", "null", "5", '"a"', "[]", "{}", "[" * 5000, '{"a":' * 5000, '{"custom_id": "a"' + " " * 9999,
    '{"custom_id": "a", "custom_id": "b"}', '{"custom_id": NaN}', '{"custom_id": "\\ud800"}', '{"custom_id": "\\udc0"}',
    '{"custom_id": "a", "x": ' + "9" * 5000 + "}", '{"custom_id": "a", "x": 1e999}', "\x00", "\ufeff{}", "{'a': 1}",
    '{"custom_id": "a", "body": ' + "[" * 40 + "]" * 40 + "}",
]  # fmt: skip


@st.composite
def _edited(draw) -> str:
    """A line of which a piece is lost, doubled or replaced."""
    text = json.dumps(draw(st.sampled_from(_REQUESTS)), ensure_ascii=draw(st.booleans()))
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.sampled_from([0, 1, 5, 10**6])))
    piece = draw(st.sampled_from([*'{}[]",:\\ \r-e', "", "\\u", "\x00", "\ud800", "null", text]) | st.text(max_size=3))
    return text[:start] + piece + text[end:]


def _lines() -> st.SearchStrategy[bytes]:
    documents = by_weight(
        (4, changed(st.sampled_from(_REQUESTS), _NAMES, ["a", 1, 0.5, True, [], {}, ["a"], [[5]]])),
        (1, st.sampled_from(_REQUESTS)),
        (1, odd_values()),
    )
    texts = by_weight((4, documents.map(json.dumps)), (2, _edited()), (1, st.sampled_from(_TEXTS)), (1, st.text()))
    return by_weight((9, texts.map(lambda text: text.encode("utf-8", "surrogatepass"))), (1, st.binary()))


@for_cases
def test_requests(num_cases, tmp_path):
    path = tmp_path / "in.jsonl"

    def read(content: bytes) -> None:
        """What rank 0 does with a line, and what the other ranks and the file of results get of it."""
        path.write_bytes(content)
        refusals = []
        for line in InputFile(path).lines():
            custom_id = None
            try:
                parsed = parse_line(line)
                custom_id = parsed.custom_id()
                parsed.check()
                origin = Origin(line.number, line.request_id, custom_id)
                request = BatchRequest(origin, read_body(parsed.value, Defaults()))
            except RefusedError as error:
                refusals.append(error)
                status, body = REFUSED, error_body(error)
            else:
                assert pickle.loads(pickle.dumps(request)) == request
                assert 1 <= request.body.num_prompts * request.body.params.n <= 2048
                status, body = ANSWERED, {"model": request.body.model}
            origin = Origin(line.number, line.request_id, custom_id)
            written = result_line(origin, status, body)
            assert written.count(b"\n") == 1
            assert parse_result(written).origin == origin
        for error in refusals:
            raise error

    outcomes = fuzz(num_cases, _lines(), read)
    assert outcomes.accepted_share > 0.1
    assert outcomes.share("is not JSON|is not UTF-8") < 0.5
    problems = "is not JSON|is not UTF-8|holds a|custom_id is|method is|url is|body is|prompt is|message|temperature"
    outcomes.assert_reached([*problems.split("|"), "n is", "not a field", "not supported", "nested more", "surrogate"])


class _Brief(LLM):
    """Generates little, whatever it is asked for."""

    def generate(self, prompts, params, **options):
        brief = [replace(p, n=min(p.n, 3), max_tokens=min(p.max_tokens, 3)) for p in params]
        return super().generate(prompts, brief, **options)


@for_cases
def test_with_a_model(num_cases, tmp_path):
    """Every line has one result, whatever it holds."""
    paths = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    llm = _Brief(save_chat_model(tmp_path / "model"), device="cpu", cache_tokens=2000)

    def answer(content: bytes) -> None:
        paths[0].write_bytes(content)
        with BatchJob(*paths, TPGroup(), overwrite=True) as job:
            job.run(llm, "tiny")
        found = results(paths[1])
        assert sorted(found) == [line.number for line in InputFile(paths[0]).lines()]
        for record in found.values():
            if record["response"]["status_code"] == REFUSED:
                raise InputError(message(record))

    outcomes = fuzz(num_cases, _lines(), answer)
    assert outcomes.accepted_share > 0.1
    outcomes.assert_reached(["is not JSON", "holds token id", "more; accepted", "not a field", "not supported"])


@for_cases
def test_results(num_cases, tmp_path):
    path = tmp_path / "out.jsonl"
    origins = [Origin(1, f"req_{0:024}", "a"), Origin(12, f"req_{1:024}", None), Origin(3, f"req_{2:024}", "é")]
    good = [result_line(origin, ANSWERED, {"text": "x"}) for origin in origins]
    documents = st.sampled_from([json.loads(line) for line in good])
    records = changed(documents, ["id", "custom_id"], [200, 400, "a"], most=2)
    bad = by_weight(
        (3, records.map(lambda record: json.dumps(record).encode())),
        (2, st.builds(lambda line, end: line[:end], st.sampled_from(good), st.integers(0, 200))),
        (1, st.binary(max_size=50)),
    )
    ends = st.sampled_from([b"\n", b"\n", b"", b"\r\n", b"\0"])

    def recover(case: tuple[list[bytes], bytes, bytes]) -> None:
        """A file that is refused stays as it was; of any other only whole lines stay."""
        before, line, end = case
        path.write_bytes(b"".join(before) + line + end)
        content = path.read_bytes()
        file = ResultsFile(path)
        try:
            found = list(file.recover())
        except InputError:
            assert path.read_bytes() == content
            raise
        finally:
            file._file.close()
        kept = path.read_bytes()
        assert content.startswith(kept) and kept.count(b"\n") == len(found) >= len(before)
        assert not kept or kept.endswith(b"\n")

    cases = st.tuples(st.lists(st.sampled_from(good), max_size=2), bad, ends)
    outcomes = fuzz(num_cases, cases, recover)
    assert 0.1 < outcomes.accepted_share < 0.9
    outcomes.assert_reached(["line 1 is not the result", "line 2 is not the result", "line 3 is not the result"])


_SLOW_UNITS = [pytest.param(unit, marks=pytest.mark.slow) for unit in (b"[],", b"0.5,", b'"",', b"9e9,")]


@pytest.mark.parametrize("unit", [b"{},", *_SLOW_UNITS])
def test_a_line_of_any_length_takes_little_memory(tmp_path, unit):
    """One that is as long as it may be, of what takes most when it is read; and a longer one."""
    path = tmp_path / "in.jsonl"
    longest = MAX_LINE_BYTES - len(b'{"a":[]}\n')

    def read(unit: bytes) -> None:
        path.write_bytes(b'{"a":[' + (unit * (longest // len(unit) + 1))[:longest].rsplit(b",", 1)[0] + b"]}\n")
        with path.open("ab") as file:
            file.truncate(1 << 28)  # zeros that take no room on the disk
        first, second = InputFile(path).lines()
        assert second.data is None
        parsed = parse_line(first)
        parsed.check()
        parsed.custom_id()

    outcomes = fuzz(1, st.just(unit), read)
    assert outcomes.share("line 1: custom_id is None") == 1
