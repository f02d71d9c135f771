"""Log-probabilities as the two endpoints give them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.batch.token_texts import NO_TEXT, TokenTexts
from engine.llm import CompletionOutput

_LEAST = -9999.0  # JSON has no infinity; OpenAI's API writes this for it


@dataclass(frozen=True)
class ScoredText:
    """A text and the log-probabilities of its tokens; the first token of a prompt has none."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float | None]
    top_logprobs: Sequence[Mapping[int, float] | None] | None  # best first


def completion_logprobs(parts: Sequence[ScoredText], texts: TokenTexts) -> dict[str, Any]:
    """Those of texts that follow each other, for /v1/completions.

    Tokens that read alike share a key of ``top_logprobs``: the likeliest of them has it.
    """

    def by_text(likeliest: Mapping[int, float] | None) -> dict[str, float] | None:
        if likeliest is None:
            return None
        named: dict[str, float] = {}
        for token_id, logprob in likeliest.items():
            named.setdefault(texts.of(token_id), _number(logprob))
        return named

    made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    start = 0
    for part in parts:
        made["tokens"] += map(texts.of, part.token_ids)
        made["token_logprobs"] += [None if value is None else _number(value) for value in part.logprobs]
        made["top_logprobs"] += map(by_text, part.top_logprobs or ())
        made["text_offset"] += [start + offset for offset in texts.offsets(part.token_ids, part.text)]
        start += len(part.text)
    return made | {"top_logprobs": made["top_logprobs"] or None}


def chat_logprobs(output: CompletionOutput, count: int, texts: TokenTexts) -> dict[str, Any]:
    """Those of a sample, with ``count`` of the likeliest tokens, for /v1/chat/completions."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = texts.of(token_id)
        as_bytes = None if text.startswith(NO_TEXT) else list(text.encode())
        return {"token": text, "logprob": _number(logprob), "bytes": as_bytes}

    content = []
    for step, (token_id, logprob) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        likeliest = list(output.top_logprobs[step].items())[:count] if output.top_logprobs is not None else []
        content.append(entry(token_id, logprob) | {"top_logprobs": [entry(*pair) for pair in likeliest]})
    return {"content": content, "refusal": None}


def _number(logprob: float) -> float:
    """With the digits that a float32 has, rather than twice as many."""
    return _LEAST if logprob == -math.inf else float(f"{logprob:.7g}")
