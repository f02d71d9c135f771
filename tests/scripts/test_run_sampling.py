"""The options of ``scripts/run.py`` that choose tokens and end completions, and what its JSON lines say of them."""

import json

import pytest
from commands import Command, assert_mistake

from engine import SamplingParams

run = Command("scripts/run.py")


@pytest.fixture
def complete(tiny_folder):
    """The command with the model, and what its JSON lines hold."""

    def command(*arguments):
        return [line["outputs"] for line in lines(tiny_folder, *arguments)]

    return command


def lines(model, *arguments):
    done = run(model, "--max-tokens", 8, "--device", "cpu", "--jsonl", *arguments)
    assert (done.status, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_min_p(complete, llm):
    (outputs,) = complete("--prompts", "one", "--min-p", 0.3, "--num-samples", 4)
    ((expected,), (other,)) = (
        llm.generate(["one"], SamplingParams(n=4, max_tokens=8, min_p=min_p)) for min_p in (0.3, 0.0)
    )
    assert [tuple(o["token_ids"]) for o in outputs] == [o.token_ids for o in expected.outputs]
    assert [o.token_ids for o in expected.outputs] != [o.token_ids for o in other.outputs]


@pytest.mark.parametrize("count", [0, 2])
def test_logprobs(complete, llm, count):
    (outputs,) = complete("--prompts", "one", "--logprobs", count)
    (expected,) = llm.generate(["one"], SamplingParams(max_tokens=8, logprobs=count))
    (found,), (sample,) = outputs, expected.outputs
    assert found["logprobs"] == pytest.approx(sample.logprobs)
    assert ("top_logprobs" in found) == (count > 0)
    for top, its in zip(found.get("top_logprobs", ()), sample.top_logprobs or (), strict=True):
        assert [int(token) for token in top] == list(its)  # the keys of JSON are strings
        assert list(top.values()) == pytest.approx(list(its.values()))


@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs(tiny_folder, llm, count):
    (line,) = lines(tiny_folder, "--prompts", "one", "--prompt-logprobs", count)
    (expected,) = llm.generate(["one"], SamplingParams(max_tokens=8, prompt_logprobs=count))
    assert line["prompt_logprobs"][0] is None and len(line["prompt_logprobs"]) == len(expected.prompt_token_ids)
    assert line["prompt_logprobs"][1:] == pytest.approx(expected.prompt_logprobs[1:])
    assert ("prompt_top_logprobs" in line) == (count > 0)
    if count:
        found = [list(map(int, top)) for top in line["prompt_top_logprobs"][1:]]
        assert found == [list(top) for top in expected.prompt_top_logprobs[1:]]


def test_without_being_asked_for_they_are_not_there(tiny_folder):
    (line,) = lines(tiny_folder, "--prompts", "one")
    assert line.keys() == {"prompt", "outputs"}
    assert line["outputs"][0].keys() == {"text", "token_ids", "finish_reason"}


def test_stop(complete, llm):
    ((free,),) = complete("--prompts", "one", "--ignore-eos", "--max-tokens", 40)
    stop = ("never to be found", free["text"][2:4])
    ((output,),) = complete(
        "--prompts", "one", "--ignore-eos", "--max-tokens", 40, "--stop", stop[0], "--stop", stop[1]
    )  # fmt: skip
    assert output["finish_reason"] == "stop"
    assert output["text"] == free["text"][: free["text"].index(stop[1])]
    assert free["token_ids"][: len(output["token_ids"])] == output["token_ids"] < free["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--min-p", 1.5], ["min_p: got 1.5; accepted: a number from 0 to 1"]),
        (["--stop", ""], ["stop: got ('',); accepted: a text or a list of texts, none of them empty"]),
        (["--logprobs", 21, "--jsonl"], ["logprobs: got 21", "from 0 (the token's own alone) to 20"]),
        (["--logprobs", 2], ["--logprobs 2 has no place in text; add --jsonl"]),
        (["--prompt-logprobs", 2], ["--prompt-logprobs 2 has no place in text; add --jsonl"]),
    ],
)
def test_mistakes(tiny_folder, arguments, parts):
    assert_mistake(run(tiny_folder, "--prompts", "a", "--device", "cpu", *arguments), *parts)
