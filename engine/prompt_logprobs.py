"""Log-probabilities of the prompts' own tokens, from the hidden states of their prefill.

What sequences share is scored once: a node's tokens depend on those before them alone.

Shapes: B sequences, N nodes, T tokens of a run (a node or a suffix), C likeliest tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.model import Transformer
from engine.prefix_tree import PrefixTree
from engine.requests import Request
from engine.sampling import logprobs

# Entries of logits that are made at a time, unless a row has more.
_CHUNK = 2**23
_FLOAT32 = 4
_FLOAT32_COPIES = 3  # of the logits, while they are scored


@dataclass(frozen=True)
class TokenLogprobs:
    """Of each token of a text, given those before it. The first token of a prompt follows nothing: its are None."""

    chosen: list[float | None]  # natural log
    top: list[dict[int, float] | None] | None  # those of the likeliest ones by id, best first, and its own

    def first_undefined(self) -> int | None:
        """The first token that has none, as the logits before it are not finite."""
        return next((i for i, value in enumerate(self.chosen) if value is not None and math.isnan(value)), None)


@dataclass(frozen=True)
class _Scores:
    """Of a run's tokens but the first of a prompt, on the host."""

    chosen: np.ndarray  # (T,)
    top_ids: np.ndarray  # (T, C)
    top: np.ndarray  # (T, C)


class PromptLogprobs:
    """What the prefill of a tree's sequences has to find out, and has found out.

    ``requests`` go by depth-first numbers. Those of one prompt share what the first of them gets.
    """

    def __init__(self, model: Transformer, tree: PrefixTree, requests: Sequence[Request]):
        self._model, self._tree = model, tree
        asked = [-1 if r.params.prompt_logprobs is None or r.sample else r.params.prompt_logprobs for r in requests]
        self._asked = np.array(asked, dtype=np.int64)  # (B,) likeliest tokens; -1: nothing
        table = tree.table
        self._asked_below = np.array(  # (N,) the most that a sequence below asks for
            [self._asked[first:last].max() for first, last in zip(table.node_first, table.node_last)], dtype=np.int64
        )
        self._of_node: dict[int, _Scores] = {}
        self._of_suffix: dict[int, _Scores] = {}

    @property
    def activation_bytes(self) -> int:
        """What scoring takes beside the prefill that it follows, whose hidden states it copies."""
        weight, table = self._model.head.weight, self._tree.table
        longest = int(max(table.node_length.max(initial=0), table.suffix_length.max()))
        entries = min(longest, _rows_at_a_time(weight)) * weight.shape[0]
        return entries * (weight.dtype.itemsize + _FLOAT32_COPIES * _FLOAT32)

    def nodes_asked(self, nodes: np.ndarray) -> np.ndarray:
        """Which of ``nodes`` are to be scored: a mask."""
        return self._asked_below[nodes] >= 0

    def suffixes_asked(self, sequences: np.ndarray) -> np.ndarray:
        """Which of the suffixes of ``sequences`` are to be scored: a mask."""
        return self._asked[sequences] >= 0

    def score_node(self, node: int, before: torch.Tensor | None, hidden: torch.Tensor) -> None:
        """``hidden`` (T, hidden) are the states at a node's tokens, ``before`` (hidden,) at the one before, if any."""
        tokens = self._tree.nodes[node].tokens
        self._of_node[node] = self._score(tokens, before, hidden, int(self._asked_below[node]))

    def score_suffix(self, sequence: int, before: torch.Tensor | None, hidden: torch.Tensor) -> None:
        """Likewise for a suffix."""
        tokens = self._tree.suffixes[sequence]
        self._of_suffix[sequence] = self._score(tokens, before, hidden, int(self._asked[sequence]))

    def take(self, sequences: np.ndarray) -> dict[int, TokenLogprobs]:
        """Those that some of ``sequences`` ask for. Those before them were taken already, or never will be."""
        found = {i: self._whole(i) for i in sequences[self._asked[sequences] >= 0].tolist()}
        last = int(sequences[-1]) + 1
        for node in [node for node in self._of_node if self._tree.table.node_last[node] <= last]:
            del self._of_node[node]
        return found

    def _whole(self, sequence: int) -> TokenLogprobs:
        runs = [self._of_node[node] for node in self._tree.leaf_path(sequence)]
        if sequence in self._of_suffix:
            runs.append(self._of_suffix.pop(sequence))
        count = int(self._asked[sequence])
        chosen = [None, *(value for run in runs for value in run.chosen.tolist())]
        if count == 0:
            return TokenLogprobs(chosen, None)
        tokens = self._tree.sequence_tokens(sequence).tolist()
        ids = [row for run in runs for row in run.top_ids[:, :count].tolist()]
        top = [row for run in runs for row in run.top[:, :count].tolist()]
        likeliest = [
            {i: value for i, value in zip(row_ids, row, strict=True) if value > -math.inf} | {token: own}
            for row_ids, row, token, own in zip(ids, top, tokens[1:], chosen[1:], strict=True)
        ]
        return TokenLogprobs(chosen, [None, *likeliest])

    def _score(self, tokens: np.ndarray, before: torch.Tensor | None, hidden: torch.Tensor, count: int) -> _Scores:
        model = self._model
        if before is None:
            states, tokens = hidden[:-1], tokens[1:]
        else:
            states = torch.cat([before[None], hidden[:-1]])
        wanted = torch.from_numpy(np.array(tokens)).to(states.device)
        rows = _rows_at_a_time(model.head.weight)
        parts = []
        for first in range(0, len(tokens), rows):
            logits, ids = model.logits(states[first : first + rows]), wanted[first : first + rows]
            found = logprobs(logits, ids, count, model.head.first, model.group, model.operations_backend)
            parts.append([part.cpu().numpy() for part in (found.chosen, found.top_ids, found.top)])
        if not parts:
            return _Scores(np.empty(0), np.empty((0, count), dtype=np.int64), np.empty((0, count)))
        return _Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _rows_at_a_time(head: torch.Tensor) -> int:
    return max(1, _CHUNK // head.shape[0])
