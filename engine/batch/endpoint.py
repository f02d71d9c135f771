"""What the endpoints have in common: bodies that become prompts for the engine, and answers made of its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from engine.batch.refusal import RefusedError
from engine.batch.token_texts import TokenTexts
from engine.errors import InputError
from engine.llm import LLM, CompletionOutput, RequestOutput
from engine.sampling import SamplingParams


@dataclass(frozen=True)
class EncodedPrompt:
    """What the engine is given for one prompt."""

    token_ids: Sequence[int]
    params: SamplingParams


class Body(Protocol):
    """The body of a request, checked as far as that needs no model."""

    model: str | None  # that it names: repeated in the answer, and without effect
    params: SamplingParams  # of each of its prompts, but for the seed and what the model's positions leave

    @property
    def num_prompts(self) -> int: ...

    def encode(self, llm: LLM, now: datetime) -> list[EncodedPrompt]:
        """Its prompts. ``now`` is the same on every rank, for chat templates that state the time.

        Raises InputError where this model has no way to make them.
        """

    def answer(
        self, request_id: str, model: str, outputs: Sequence[RequestOutput], texts: TokenTexts | None
    ) -> dict[str, Any]:
        """The answer's body. ``outputs`` are those of its prompts; ``texts`` is None for a model without tokenizer."""


def check_params(params: SamplingParams, llm: LLM) -> None:
    """Raises RefusedError for what takes a tokenizer where the model has none."""
    if params.stop:
        require_tokenizer(llm, "stop")
    if params.logprobs is not None:
        require_tokenizer(llm, "logprobs")


def require_tokenizer(llm: LLM, name: str) -> None:
    """Raises RefusedError when the model has none, which the field ``name`` asks for."""
    try:
        _ = llm.tokenizer
    except InputError as error:
        raise RefusedError(f"{name}: {error}", name) from None


def choice(index: int, output: CompletionOutput, content: dict[str, Any], logprobs: Any, ids: bool) -> dict[str, Any]:
    """One sample in an answer: ``content`` is its text. With ``ids``, and where there is no text, it has token ids."""
    made = {"index": index} | content | {"logprobs": logprobs, "finish_reason": output.finish_reason}
    return made | {"token_ids": list(output.token_ids)} if ids or output.text is None else made


def answer(
    answer_id: str, kind: str, model: str, choices: list[dict[str, Any]], outputs: Sequence[RequestOutput]
) -> dict[str, Any]:
    """The whole. The same request gets the same answer at any time, so it holds none: ``created`` is 0."""
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return {
        "id": answer_id,
        "object": kind,
        "created": 0,
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
