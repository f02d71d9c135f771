"""Bodies of /v1/chat/completions; what comes of them with a model is in ``test_job.py``."""

import pytest

from engine.batch.chat_completion import ChatBody
from engine.batch.fields import Fields
from engine.batch.refusal import RefusedError
from engine.sampling import SamplingParams

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]


def parse(messages: object = MESSAGES, **fields: object) -> ChatBody:
    return ChatBody.parse(Fields({"messages": messages} | fields), seed=3, max_tokens=100)


def test_defaults():
    params = SamplingParams(max_tokens=100, seed=3)
    assert parse() == ChatBody(None, MESSAGES, params, 0, False, False)


def test_every_field():
    made = parse(
        model="any", max_completion_tokens=7, temperature=0.5, top_p=0.5, n=2, stop="a", seed=9, logprobs=True,
        top_logprobs=3, top_k=5, min_p=0.25, ignore_eos=True, stop_token_ids=[8], include_stop_str_in_output=True,
        user="me", metadata={"a": "b"}, return_token_ids=True,
    )  # fmt: skip
    params = SamplingParams(
        n=2, temperature=0.5, top_p=0.5, top_k=5, max_tokens=7, stop_token_ids=(8,), ignore_eos=True, seed=9,
        logprobs=3, min_p=0.25, stop=("a",), include_stop_str_in_output=True,
    )  # fmt: skip
    assert made == ChatBody("any", MESSAGES, params, 3, True, True)


def test_content_may_be_in_parts():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    assert parse([MESSAGES[0], {"role": "user", "content": parts}]).messages == MESSAGES


def test_both_spellings_of_max_tokens():
    assert parse(max_tokens=5).params.max_tokens == 5
    assert parse(max_tokens=5, max_completion_tokens=5).params.max_tokens == 5
    with pytest.raises(RefusedError, match="max_tokens is 6; accepted: the same as max_completion_tokens, 5"):
        parse(max_tokens=6, max_completion_tokens=5)


def test_logprobs():
    assert parse(logprobs=False).params.logprobs is None
    assert parse(logprobs=True).params.logprobs == 0
    assert parse(top_logprobs=0).params.logprobs is None


def test_options_that_ask_for_nothing():
    neutral = dict(tools=[], tool_choice="none", response_format={"type": "text"}, stream=False, logit_bias=None)
    assert parse(**neutral) == parse()


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"messages": None}, "messages", "messages are a NoneType; accepted: a list of"),
        ({"messages": []}, "messages", "messages are empty"),
        ({"messages": [{"role": "user", "content": "a", "name": "bob"}]}, "messages[0].name", "only role and content"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls", "leave it out"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"a": 1}}]}]},
            "messages[0].content.cache_control",
            "only type and text",
        ),
        ({"messages": [{"role": "user"}]}, "messages", "message 0 has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "accepted: {"),
        ({"max_tokens": 0}, "max_tokens", "0; accepted: an integer of 1 or more"),
        ({"logprobs": 5}, "logprobs", "5; accepted: true or false"),
        ({"top_logprobs": 5}, "top_logprobs", "5; accepted: 0 without logprobs"),
        ({"tools": [{"type": "function"}]}, "tools", "accepted: [] or null, as it is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", 'accepted: {"type": "text"} or null'),
        ({"prompt": "x"}, "prompt", "not a field that is known here"),
        ({"n": 2049}, "n", "accepted: an integer from 1 to 2048"),
    ],
)
def test_no_option_is_ignored(fields, param, part):
    with pytest.raises(RefusedError) as caught:
        parse(**{"messages": MESSAGES} | fields)
    assert caught.value.param == param and part in str(caught.value)
