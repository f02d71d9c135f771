"""The generation loop of one wave: choose a token for every sequence, drop the finished ones, run the model, repeat.

Shapes: B sequences, R active ones, V vocabulary (local to the rank unless said otherwise).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.distributed import TPGroup
from engine.executor import Executor
from engine.sampling import RowParams, SamplingParams, greedy, logprob_of, sample, uniforms


@dataclass(frozen=True)
class Request:
    """What one sequence is to generate."""

    prompt: int  # the caller's number of it
    params: SamplingParams
    stop_ids: frozenset[int]  # a token that ends the sequence
    draw_key: int  # 64 bits, signed; the random numbers of the sequence depend on nothing else
    forced: tuple[int, ...] = ()  # tokens that are taken instead of chosen ones, from the first on


@dataclass
class Generated:
    """What one sequence generated."""

    token_ids: list[int] = field(default_factory=list)  # a stop token included
    logprobs: list[float] | None = None  # of each token, natural log, before temperature; where they were asked for
    finish_reason: str | None = None  # "stop" or "length"
    logits: list[torch.Tensor] | None = None  # for each token the (V,) float32 logits it was chosen from


def full_logits(logits_RV: torch.Tensor, vocab_size: int, group: TPGroup) -> torch.Tensor:
    """``(R, vocab_size)`` float32 on every rank, from the ranks' parts."""
    parts = group.all_gather(logits_RV.float())
    return parts.transpose(0, 1).reshape(logits_RV.shape[0], -1)[:, :vocab_size]


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


def decode(
    executor: Executor,
    first_logits_BV: torch.Tensor,
    requests: Sequence[Request],
    *,
    return_logits: bool = False,
    on_tokens: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Generates until every sequence has ended. ``first_logits_BV`` are those of the first new token.

    ``on_tokens(new tokens, sequences that ended)`` is called after every step.
    """
    model, group = executor.model, executor.model.group
    chooser = _Chooser(requests, model.head.first, group)
    wants_logprobs = any(request.params.logprobs is not None for request in requests)
    results = [
        Generated(logprobs=None if request.params.logprobs is None else [], logits=[] if return_logits else None)
        for request in requests
    ]
    active = np.arange(len(requests))
    logits = first_logits_BV
    step = 0
    while True:
        tokens = chooser.choose(logits, step)
        logprobs = None
        if wants_logprobs:
            logprobs = logprob_of(logits, tokens, model.head.first, group).tolist()
        kept_logits = full_logits(logits, model.config.vocab_size, group) if return_logits else None
        going_on = np.ones(len(active), dtype=bool)
        for row, (i, token) in enumerate(zip(active.tolist(), tokens.tolist(), strict=True)):
            request, result = requests[i], results[i]
            result.token_ids.append(token)
            if request.params.logprobs is not None:
                result.logprobs.append(logprobs[row])
            if kept_logits is not None:
                result.logits.append(kept_logits[row])
            if token in request.stop_ids:
                result.finish_reason = "stop"
            elif len(result.token_ids) == request.params.max_tokens:
                result.finish_reason = "length"
            going_on[row] = result.finish_reason is None
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
