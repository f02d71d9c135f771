"""Decoding: choose a token for every sequence that runs, let the finished ones go, run the model on the others.

Shapes: n prompts' samples, R sequences that run, V vocabulary (local to the rank unless said otherwise).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.distributed import TPGroup
from engine.executor import Executor
from engine.prompt_logprobs import TokenLogprobs
from engine.requests import Request
from engine.sampling import Logprobs, NotFiniteError, RowParams, SamplingParams, greedy, logprobs, sample, uniforms
from kernels import Backend


@dataclass
class Generated:
    """What one sequence generated."""

    token_ids: list[int] = field(default_factory=list)  # a stop token included
    logprobs: list[float] | None = None  # of each token, natural log, before temperature; where they were asked for
    # For each token the log-probabilities of the likeliest ones, best first, and its own; where they were asked for.
    top_logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None  # "stop" or "length"
    logits: list[torch.Tensor] | None = None  # for each token the (V,) float32 logits it was chosen from
    prompt_logprobs: TokenLogprobs | None = None  # of the first of a prompt's samples, where they were asked for


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
    """Chooses tokens for the sequences of some requests."""

    def __init__(self, requests: Sequence[Request], vocab_start: int, group: TPGroup, backend: Backend | None):
        self.requests, self.vocab_start, self.group, self.backend = requests, vocab_start, group, backend
        self.all_greedy = all(request.params.temperature == 0 for request in requests)
        self.any_forced = any(request.forced for request in requests)
        self.row_params = RowParams.of([request.params for request in requests], group.device)
        self.keys = torch.tensor([request.draw_key for request in requests], dtype=torch.int64, device=group.device)
        self.num_logprobs = max(
            (request.params.logprobs for request in requests if request.params.logprobs is not None), default=None
        )

    def choose(self, logits_RV: torch.Tensor, steps: np.ndarray) -> torch.Tensor:
        """``(R,)`` token ids, the same on every rank; ``steps`` (R,) are the tokens that each sequence has."""
        if self.all_greedy:
            tokens = greedy(logits_RV, self.vocab_start, self.group, self.backend)
        else:
            draws = uniforms(self.keys, torch.from_numpy(steps).to(self.keys.device))
            tokens = sample(logits_RV, self.row_params, draws, self.vocab_start, self.group, self.backend)
        if self.any_forced:
            for row, (request, step) in enumerate(zip(self.requests, steps.tolist(), strict=True)):
                if step < len(request.forced):
                    tokens[row] = request.forced[step]
        return tokens

    def logprobs(self, logits_RV: torch.Tensor, tokens: torch.Tensor) -> "_RowLogprobs | None":
        """Those of ``tokens`` (R,) and the likeliest ones, as many as any sequence asks for; None where none does."""
        if self.num_logprobs is None:
            return None
        found = logprobs(logits_RV, tokens, self.num_logprobs, self.vocab_start, self.group, self.backend)
        return _RowLogprobs(found)


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


class Decoder:
    """Generates for the sequences of a tree, of which any run at a time: they are added, and leave when they end.

    ``requests``, ``starting_logits`` (n, V of the whole vocabulary, which the first tokens are chosen from in place of
    the model's) and ``results`` go by depth-first numbers. ``on_ended(request, what it generated)`` is called for each
    sequence as soon as it ends, ``on_tokens(new tokens, sequences that ended)`` after every choice.
    """

    def __init__(
        self,
        executor: Executor,
        requests: Sequence[Request],
        *,
        starting_logits: torch.Tensor | None = None,
        return_logits: bool = False,
        on_tokens: Callable[[int, int], None] | None = None,
        on_ended: Callable[[Request, Generated], None] | None = None,
    ):
        self._executor, self._model, self._group = executor, executor.model, executor.model.group
        self._requests, self._starting_logits, self._return_logits = requests, starting_logits, return_logits
        self._on_tokens, self._on_ended = on_tokens, on_ended
        self.results: list[Generated | None] = [None] * len(requests)  # None of those that have not begun
        self.active = np.empty(0, dtype=np.int64)  # ascending
        self._num_generated = np.empty(0, dtype=np.int64)  # (R,)
        # (R, hidden): what the next tokens are chosen from; before that, of sequences whose last token was not run yet,
        # these tokens (R,).
        self._hidden: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None
        self._chooser: _Chooser | None = None  # for the active ones

    def add(self, sequences: np.ndarray, hidden: torch.Tensor) -> None:
        """``sequences`` (R,) run from now on; ``hidden`` (R, hidden) is what their prefill gave."""
        for i in sequences.tolist():
            self.results[i] = _nothing_yet(self._requests[i].params, self._return_logits)
        if self._hidden is not None:
            hidden = torch.cat([self._hidden, hidden])
        order = np.argsort(np.concatenate([self.active, sequences]))
        self.active = np.concatenate([self.active, sequences])[order]
        self._num_generated = np.concatenate([self._num_generated, np.zeros_like(sequences)])[order]
        self._hidden = hidden[torch.from_numpy(order).to(hidden.device)]
        self._chooser = None

    def choose(self) -> np.ndarray:
        """Chooses the next token of every active sequence. Those that end with it are active no more: returns them.

        Raises DecodingError when a sequence's logits are not finite; nothing was chosen then.
        """
        if self._chooser is None:
            requests = [self._requests[i] for i in self.active]
            model = self._model
            self._chooser = _Chooser(requests, model.head.first, self._group, model.operations_backend)
        logits = self._logits()
        try:
            tokens = self._chooser.choose(logits, self._num_generated)
        except NotFiniteError as error:
            sequence = int(self.active[error.row])
            raise DecodingError(sequence, self.results[sequence].token_ids) from error
        row_logprobs = self._chooser.logprobs(logits, tokens)
        kept_logits = full_logits(logits, self._model.config.vocab_size, self._group) if self._return_logits else None
        going_on = np.ones(len(self.active), dtype=bool)
        for row, (i, token) in enumerate(zip(self.active.tolist(), tokens.tolist(), strict=True)):
            request, result = self._requests[i], self.results[i]
            result.token_ids.append(token)
            if request.params.logprobs is not None:
                row_logprobs.add(row, token, request.params.logprobs, result)
            if kept_logits is not None:
                result.logits.append(kept_logits[row])
            result.finish_reason = _finish_reason(request, result.token_ids)
            going_on[row] = result.finish_reason is None
            if self._on_ended is not None and not going_on[row]:
                self._on_ended(request, result)
        if self._on_tokens is not None:
            self._on_tokens(len(self.active), int((~going_on).sum()))
        ended = self.active[~going_on]
        self._num_generated += 1
        self._hidden, self._tokens = None, tokens
        self._keep(going_on)
        return ended

    def advance(self) -> None:
        """Runs the model on the tokens that were chosen."""
        if len(self.active):
            self._hidden = self._executor.decode(self.active, self._num_generated, self._tokens)
        self._tokens = None

    def drop(self, sequence: int) -> None:
        """An active sequence does not go on. Called where tokens are to be chosen next."""
        self.results[sequence] = None
        self._keep(self.active != sequence)

    def _keep(self, rows: np.ndarray) -> None:
        """The rows (R,) of a mask stay."""
        if rows.all():
            return
        self.active, self._num_generated, self._chooser = self.active[rows], self._num_generated[rows], None
        mask = torch.from_numpy(rows)
        if self._hidden is not None:
            self._hidden = self._hidden[mask.to(self._hidden.device)] if rows.any() else None
        if self._tokens is not None:
            self._tokens = self._tokens[mask.to(self._tokens.device)]

    def _logits(self) -> torch.Tensor:
        """``(R, V)``: this rank's part of the logits that the next tokens are chosen from."""
        logits = self._model.logits(self._hidden)
        first = np.flatnonzero(self._num_generated == 0)
        if self._starting_logits is not None and len(first):
            head, rows = self._model.head, torch.from_numpy(first).to(logits.device)
            whole = self._starting_logits[torch.from_numpy(self.active[first]).to(self._starting_logits.device)]
            mine = whole[:, head.first : head.first + head.num_real].to(logits.device, torch.float32)
            padding = (0, logits.shape[1] - head.num_real)
            logits = logits.float().index_copy(0, rows, torch.nn.functional.pad(mine, padding, value=-math.inf))
        return logits
