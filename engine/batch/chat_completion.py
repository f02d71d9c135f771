"""/v1/chat/completions: a conversation, laid out by the model's chat template."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from engine.batch.endpoint import EncodedPrompt, answer, check_params, choice
from engine.batch.fields import Fields
from engine.batch.logprobs import chat_logprobs
from engine.batch.refusal import RefusedError, refused
from engine.batch.sampling_fields import NEUTRAL, take_params
from engine.batch.token_texts import TokenTexts
from engine.chat import Message, plain_messages
from engine.errors import InputError
from engine.llm import LLM, RequestOutput
from engine.sampling import MAX_LOGPROBS, SamplingParams

URL = "/v1/chat/completions"
_NEUTRAL = NEUTRAL | {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


@dataclass(frozen=True)
class ChatBody:
    """See ``engine.batch.endpoint.Body``."""

    model: str | None
    messages: Sequence[Message]
    params: SamplingParams
    num_top_logprobs: int
    max_tokens_given: bool  # or else fewer will do where the model's positions end before
    return_token_ids: bool

    @classmethod
    def parse(cls, fields: Fields, seed: int, max_tokens: int) -> "ChatBody":
        """``seed`` and ``max_tokens`` are for a request that names none.

        Raises RefusedError for a body that cannot be used.
        """
        messages = _messages(fields.take("messages"))
        asked_for = _either(fields, "max_completion_tokens", "max_tokens")
        top_logprobs = fields.integer("top_logprobs", 0, most=MAX_LOGPROBS)
        logprobs = fields.boolean("logprobs", False)
        if top_logprobs and not logprobs:
            raise refused("top_logprobs", top_logprobs, "0 without logprobs; set logprobs to true, or leave it out")
        params = take_params(
            fields,
            seed=seed,
            max_tokens=max_tokens if asked_for is None else asked_for,
            logprobs=top_logprobs if logprobs else None,
        )
        model, return_token_ids = fields.text("model"), fields.boolean("return_token_ids", False)
        fields.finish(_NEUTRAL)
        return cls(model, messages, params, top_logprobs, asked_for is not None, return_token_ids)

    @property
    def num_prompts(self) -> int:
        return 1

    def encode(self, llm: LLM, now: datetime) -> list[EncodedPrompt]:
        check_params(self.params, llm)
        ids = array("I", llm.encode_chat(self.messages, now))
        room, params = llm.config.max_positions - len(ids), self.params
        if not self.max_tokens_given and 0 < room < params.max_tokens:
            params = replace(params, max_tokens=room)
        return [EncodedPrompt(ids, params)]

    def answer(
        self, request_id: str, model: str, outputs: Sequence[RequestOutput], texts: TokenTexts | None
    ) -> dict[str, Any]:
        choices = []
        for sample in outputs[0].outputs:
            logprobs = None if sample.logprobs is None else chat_logprobs(sample, self.num_top_logprobs, texts)
            message = {"role": "assistant", "content": sample.text, "refusal": None}
            choices.append(choice(sample.index, sample, {"message": message}, logprobs, self.return_token_ids))
        return answer(f"chatcmpl-{request_id}", "chat.completion", model, choices, outputs)


def _messages(value: Any) -> list[dict[str, Any]]:
    try:
        messages = plain_messages(value)
    except InputError as error:
        raise RefusedError(str(error), "messages") from None
    for number, message in enumerate(value):
        _check_names(message, ("role", "content"), f"messages[{number}]")
        for part in message["content"] if isinstance(message["content"], list) else ():
            _check_names(part, ("type", "text"), f"messages[{number}].content")
    return messages


def _check_names(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Others than ``known`` might mean something, which a template would drop without a word."""
    for name, value in given.items():
        if name not in known and value not in (None, [], ""):
            raise refused(f"{where}.{name}", value, f"only {' and '.join(known)}; leave it out")


def _either(fields: Fields, first: str, second: str) -> int | None:
    """The one number under two spellings."""
    a, b = fields.integer(first, least=1), fields.integer(second, least=1)
    if a is not None and b is not None and a != b:
        raise refused(second, b, f"the same as {first}, {a}; leave one of them out")
    return b if a is None else a
