"""StreamingLLM (arXiv:2309.17453): each query sees the first few keys, *sinks*, and a window of the last ones, as it
would if all other keys had been evicted from the cache.

Positions are those within such a cache. Between a query and the window they are as ever. To a sink the distance grows
no further once the cache is full: for the sinks, queries behind that point are turned back to it. Keys stay as they
were rotated, so one arena serves both; no key is dropped, and no slot given back.

Shapes: R runs, T new tokens.
"""

from dataclasses import dataclass, replace

import numpy as np

from engine.attention.hydragen import Hydragen
from engine.attention.method import Runs
from kernels import Segment
from kernels.window import within_window


@dataclass(frozen=True)
class Streaming(Hydragen):
    """``n_init`` sinks and a window of ``n_local`` keys, the query's own among them."""

    n_init: int = 4
    n_local: int = 1020

    name = "streaming"
    moves = True

    def __post_init__(self) -> None:
        for field, least in (("n_init", 0), ("n_local", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; accepted: {least} or more")

    def shared_segments(self, tree, placement, runs):
        return self._parts(super().shared_segments(tree, placement, runs), runs)

    def own_segments(self, runs):
        return self._parts(super().own_segments(runs), runs)

    def _parts(self, segments: list[Segment], runs: Runs) -> list[Segment]:
        positions = runs.q_positions
        last = self.n_init + self.n_local - 1  # of a full cache
        turns = np.maximum(positions - last, 0)
        # A window that ends no sooner than the sinks do: it has none of them.
        windows = [part for s in segments for part in within_window(s, np.maximum(positions, last), self.n_local)]
        sinks = [part for s in segments for part in self._sinks(s, positions)]
        return [*windows, *(replace(part, q_turns=turns if turns.any() else None) for part in sinks)]

    def _sinks(self, segment: Segment, positions: np.ndarray) -> list[Segment]:
        """Of a segment the keys that are sinks: for the queries after them all, and for those that are among them."""
        num_sinks = np.clip(self.n_init - segment.k_positions, 0, segment.k_lens)
        if not num_sinks.any():
            return []
        # Rows divided where the first query is behind all sinks.
        starts, ends = segment.q_offsets[:-1], segment.q_offsets[1:]
        is_behind = np.concatenate([[0], np.cumsum(positions >= self.n_init)])
        num_behind = is_behind[ends] - is_behind[starts]
        middle = ends - num_behind
        offsets = np.append(np.stack([starts, middle], 1).ravel(), segment.num_queries)
        row = np.repeat(np.arange(segment.num_rows), 2)
        is_second = np.arange(len(row)) % 2 == 1
        behind = replace(
            segment,
            q_offsets=offsets,
            k_starts=segment.k_starts[row],
            k_lens=np.where(is_second, num_sinks[row], 0 if segment.causal else num_sinks[row]),
            causal=False,
            k_rooms=None,
            k_positions=segment.k_positions[row],
        )
        if not segment.causal or not (middle > starts).any():
            return [behind]
        # The last of the queries among the sinks sees the keys up to its own.
        seen = np.maximum(segment.k_lens - num_behind, 0)
        among = replace(behind, k_lens=np.where(is_second, 0, seen[row]), causal=True)
        return [behind, among]
