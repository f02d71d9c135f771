"""The generation loop of one wave: choose a token for every sequence, drop the finished ones, run the model, repeat.

Shapes: B sequences, R active ones, V vocabulary (local to the rank unless said otherwise).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.distributed import TPGroup
from engine.errors import InputError
from engine.executor import Executor
from engine.sampling import Logprobs, NotFiniteError, RowParams, SamplingParams, greedy, logprobs, sample, uniforms
from engine.stopping import StopChecker


@dataclass(frozen=True)
class Request:
    """What one sequence is to generate."""

    prompt: int  # the caller's number of it
    params: SamplingParams
    stop_ids: frozenset[int]  # a token that ends the sequence
    draw_key: int  # 64 bits, signed; the random numbers of the sequence depend on nothing else
    forced: tuple[int, ...] = ()  # tokens that are taken instead of chosen ones, from the first on
    sample: int = 0  # which of the prompt's samples
    stop_text: StopChecker | None = None  # told every token; what finds ``params.stop``

    def __post_init__(self):
        if self.params.stop and self.stop_text is None:
            raise InputError(
                f"stop: got {self.params.stop!r}, but there is no tokenizer to tell the text; accepted: () without "
                "one; use stop_token_ids, or add the model's tokenizer.json"
            )


@dataclass
class Generated:
    """What one sequence generated."""

    token_ids: list[int] = field(default_factory=list)  # a stop token included
    logprobs: list[float] | None = None  # of each token, natural log, before temperature; where they were asked for
    # For each token the log-probabilities of the likeliest ones, best first, and its own; where they were asked for.
    top_logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None  # "stop" or "length"
    logits: list[torch.Tensor] | None = None  # for each token the (V,) float32 logits it was chosen from


class DecodingError(RuntimeError):
    """A sequence's logits are not finite after ``token_ids``, what it has generated."""

    def __init__(self, sequence: int, token_ids: list[int]):
        super().__init__(f"the logits of sequence {sequence} are not finite after {len(token_ids)} new tokens")
        self.sequence, self.token_ids = sequence, token_ids


def full_logits(logits_RV: torch.Tensor, vocab_size: int, group: TPGroup) -> torch.Tensor:
    """``(R, vocab_size)`` float32 on every rank, from the ranks' parts."""
    parts = group.all_gather(logits_RV.float())
    return parts.transpose(0, 1).reshape(logits_RV.shape[0], -1)[:, :vocab_size]


def _nothing_yet(params: SamplingParams, keep_logits: bool) -> Generated:
    return Generated(
        logprobs=None if params.logprobs is None else [],
        top_logprobs=[] if params.logprobs else None,
        logits=[] if keep_logits else None,
    )


def _finish_reason(request: Request, token_ids: Sequence[int]) -> str | None:
    """Of the sequence that just got the last of ``token_ids``; None while it goes on."""
    if token_ids[-1] in request.stop_ids:
        return "stop"
    if request.stop_text is not None and request.stop_text.ends(token_ids):
        return "stop"
    return "length" if len(token_ids) == request.params.max_tokens else None


class _Chooser:
    """Chooses tokens for the sequences of a wave that are still active."""

    def __init__(self, requests: Sequence[Request], vocab_start: int, group: TPGroup):
        self.requests, self.vocab_start, self.group = requests, vocab_start, group
        self.all_greedy = all(request.params.temperature == 0 for request in requests)
        self.any_forced = any(request.forced for request in requests)
        self.keep(np.arange(len(requests)))

    def keep(self, active: np.ndarray) -> None:
        """From now on only the sequences ``active`` (R,) are chosen for."""
        self.active = [self.requests[i] for i in active]
        device = self.group.device
        self.row_params = RowParams.of([request.params for request in self.active], device)
        self.keys = torch.tensor([request.draw_key for request in self.active], dtype=torch.int64, device=device)
        self.num_logprobs = max(
            (request.params.logprobs for request in self.active if request.params.logprobs is not None), default=None
        )

    def choose(self, logits_RV: torch.Tensor, step: int) -> torch.Tensor:
        """``(R,)`` token ids, the same on every rank."""
        if self.all_greedy:
            tokens = greedy(logits_RV, self.vocab_start, self.group)
        else:
            draws = uniforms(self.keys, torch.full_like(self.keys, step))
            tokens = sample(logits_RV, self.row_params, draws, self.vocab_start, self.group)
        if self.any_forced:
            for row, request in enumerate(self.active):
                if step < len(request.forced):
                    tokens[row] = request.forced[step]
        return tokens

    def logprobs(self, logits_RV: torch.Tensor, tokens: torch.Tensor) -> "_RowLogprobs | None":
        """Those of ``tokens`` (R,) and the likeliest ones, as many as any sequence asks for; None where none does."""
        if self.num_logprobs is None:
            return None
        return _RowLogprobs(logprobs(logits_RV, tokens, self.num_logprobs, self.vocab_start, self.group))


class _RowLogprobs:
    """A step's log-probabilities on the host."""

    def __init__(self, found: Logprobs):
        self.chosen, self.top_ids, self.top = found.chosen.tolist(), found.top_ids.tolist(), found.top.tolist()

    def add(self, row: int, token: int, count: int, result: "Generated") -> None:
        """Appends those of ``row`` to what its sequence has, with ``count`` of the likeliest."""
        result.logprobs.append(self.chosen[row])
        if count > 0:
            pairs = zip(self.top_ids[row][:count], self.top[row][:count], strict=True)
            likeliest = {top: logprob for top, logprob in pairs if logprob > -math.inf}
            result.top_logprobs.append(likeliest | {token: self.chosen[row]})


def decode(
    executor: Executor,
    first_logits_BV: torch.Tensor,
    requests: Sequence[Request],
    *,
    return_logits: bool = False,
    on_tokens: Callable[[int, int], None] | None = None,
    on_ended: Callable[[Request, Generated], None] | None = None,
) -> list[Generated]:
    """Generates until every sequence has ended. ``first_logits_BV`` are those of the first new token.

    ``on_ended(request, what it generated)`` is called for each sequence as soon as it ends, ``on_tokens(new tokens,
    sequences that ended)`` after every step. Raises DecodingError when logits are not finite.
    """
    model, group = executor.model, executor.model.group
    chooser = _Chooser(requests, model.head.first, group)
    results = [_nothing_yet(request.params, return_logits) for request in requests]
    active = np.arange(len(requests))
    logits = first_logits_BV
    step = 0
    while True:
        try:
            tokens = chooser.choose(logits, step)
        except NotFiniteError as error:
            raise DecodingError(int(active[error.row]), results[active[error.row]].token_ids) from error
        row_logprobs = chooser.logprobs(logits, tokens)
        kept_logits = full_logits(logits, model.config.vocab_size, group) if return_logits else None
        going_on = np.ones(len(active), dtype=bool)
        for row, (i, token) in enumerate(zip(active.tolist(), tokens.tolist(), strict=True)):
            request, result = requests[i], results[i]
            result.token_ids.append(token)
            if request.params.logprobs is not None:
                row_logprobs.add(row, token, request.params.logprobs, result)
            if kept_logits is not None:
                result.logits.append(kept_logits[row])
            result.finish_reason = _finish_reason(request, result.token_ids)
            going_on[row] = result.finish_reason is None
            if on_ended is not None and not going_on[row]:
                on_ended(request, result)
        if on_tokens is not None:
            on_tokens(len(active), int((~going_on).sum()))
        if not going_on.all():
            active = active[going_on]
            if len(active) == 0:
                return results
            tokens = tokens[torch.from_numpy(going_on).to(tokens.device)]
            chooser.keep(active)
        step += 1
        logits = model.logits(executor.decode(active, np.full(len(active), step), tokens))
