"""Bodies of /v1/completions; what comes of them with a model is in ``test_job.py``."""

from array import array

import pytest

from engine.batch.completion import CompletionBody
from engine.batch.fields import Fields
from engine.batch.refusal import RefusedError
from engine.sampling import SamplingParams


def parse(prompt: object = "x", **fields: object) -> CompletionBody:
    return CompletionBody.parse(Fields({"prompt": prompt} | fields), seed=3)


def test_the_defaults_are_those_of_openai():
    assert parse() == CompletionBody(None, ("x",), SamplingParams(max_tokens=16, seed=3), False, False, False)


def test_every_field():
    made = parse(
        model="any", max_tokens=7, temperature=0, top_p=0.5, n=2, best_of=2, stop=["a", "b"], seed=9, logprobs=4,
        top_k=5, min_p=0.25, ignore_eos=True, stop_token_ids=[8], include_stop_str_in_output=True, user="me",
        return_token_ids=True,
    )  # fmt: skip
    params = SamplingParams(
        n=2, temperature=0.0, top_p=0.5, top_k=5, max_tokens=7, stop_token_ids=(8,), ignore_eos=True, seed=9,
        logprobs=4, min_p=0.25, stop=("a", "b"), include_stop_str_in_output=True,
    )  # fmt: skip
    assert made == CompletionBody("any", ("x",), params, False, False, True)
    assert parse(echo=True, suffix="", presence_penalty=0, stream=False, logit_bias={}).echo


def test_echo_scores_the_prompt_too():
    assert parse(echo=True, logprobs=3).params.prompt_logprobs == 3
    assert parse(echo=True).params.prompt_logprobs is parse(logprobs=3).params.prompt_logprobs is None
    scored = parse(echo=True, logprobs=0, max_tokens=0)
    assert scored.prompt_only and scored.params.max_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", ("one",)),
        (["one", "two"], ("one", "two")),
        ([5, 6], (array("I", [5, 6]),)),
        ([[5, 6], [7]], (array("I", [5, 6]), array("I", [7]))),
    ],
)
def test_prompts(prompt, expected):
    assert parse(prompt).prompts == expected
    assert parse(prompt).num_prompts == len(expected)


@pytest.mark.parametrize(
    "prompt",
    [
        None, "", [], [""], [[]], ["a", ""], ["a", [5]], [[5], 6], [5, "a"], [-1], [True], [2**32], 5, {}, [{}],
        ["a"] * 2049,
    ],
)  # fmt: skip
def test_no_prompts(prompt):
    with pytest.raises(RefusedError, match="prompt is .*; accepted: text, a list of token ids, or a list") as caught:
        parse(prompt)
    assert caught.value.param == "prompt" and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"temperature": -1}, "temperature", "got -1.0; accepted: 0 (greedy) or a number from 1e-5 to 1e5"),
        ({"top_p": 0}, "top_p", "got 0.0"),
        ({"top_k": -2}, "top_k", "-2; accepted: an integer of -1 or more"),
        ({"n": 0}, "n", "0; accepted: an integer from 1 to 2048"),
        ({"n": 1025, "prompt": ["a", "b"]}, "n", "1025; accepted: up to 2048 samples, those of all 2 prompts together"),
        ({"max_tokens": 0}, "max_tokens", "0; accepted: an integer of 1 or more"),
        ({"logprobs": 21}, "logprobs", "21; accepted: an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs", "True; accepted"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": ["a"] * 65}, "stop", "a list of up to 64 texts"),
        ({"seed": -1}, "seed", "-1; accepted: an integer of 0 or more"),
        ({"best_of": 2}, "best_of", "2; accepted: n, 1"),
        ({"stream": True}, "stream", "True; accepted: false or null"),
        ({"suffix": "x"}, "suffix", 'accepted: "" or null, as it is not supported'),
        ({"presence_penalty": 0.5}, "presence_penalty", "0.5; accepted: 0 or null"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "accepted: {} or null"),
        ({"messages": []}, "messages", "not a field that is known here"),
        ({"model": 5}, "model", "5; accepted: text"),
    ],
)
def test_no_option_is_ignored(fields, param, part):
    with pytest.raises(RefusedError) as caught:
        parse(**{"prompt": "x"} | fields)
    assert caught.value.param == param and part in str(caught.value)
