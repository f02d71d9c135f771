"""Which queries a sparse attention has, where they stand in their sequences, and where the keys before them lie.

Shapes: T queries (packed), S keys of the arena, R rows, P pieces of a row's history.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TILE = 64  # positions of a tile of queries or of keys: tile i is positions 64 i to 64 i + 63


@dataclass(frozen=True)
class SparseRows:
    """Row ``r`` is queries ``q_offsets[r] : q_offsets[r + 1]`` of a sequence, at positions from ``q_positions[r]`` on.

    Their keys are those of the sequence from position 0 up to the last query's, in pieces: ``k_lens[r, p]`` keys from
    slot ``k_starts[r, p]`` on. Pieces follow each other in the sequence; those that a row lacks have length 0.
    """

    q_offsets: np.ndarray  # (R + 1,) int64, rising from 0 to T
    q_positions: np.ndarray  # (R,) int64
    k_starts: np.ndarray  # (R, P) int64
    k_lens: np.ndarray  # (R, P) int64

    def __post_init__(self) -> None:
        assert self.k_starts.shape == self.k_lens.shape and len(self.k_lens) == len(self.q_positions), "unlike tables"
        assert len(self.q_offsets) == self.num_rows + 1 and self.q_offsets[0] == 0, "query offsets begin with 0"
        assert (self.q_lens >= 0).all() and (self.k_lens >= 0).all() and (self.k_starts >= 0).all(), "negative numbers"
        has_queries = self.q_lens > 0
        assert (self.k_starts + self.k_lens).max(initial=0) < 2**31, "kernels have 32-bit slots"
        assert (self.num_keys == self.q_positions + self.q_lens)[has_queries].all(), "a key for every position"

    @classmethod
    def contiguous(cls, q_lens: Sequence[int], k_starts: Sequence[int], k_lens: Sequence[int]) -> "SparseRows":
        """Rows whose keys lie in one piece; their queries are at the last positions."""
        q_lens, starts, lens = (np.asarray(x, dtype=np.int64) for x in (q_lens, k_starts, k_lens))
        return cls(np.append(0, np.cumsum(q_lens)), lens - q_lens, starts[:, None], lens[:, None])

    @property
    def num_rows(self) -> int:
        return len(self.q_positions)

    @property
    def num_queries(self) -> int:
        return int(self.q_offsets[-1])

    @property
    def q_lens(self) -> np.ndarray:
        """(R,)"""
        return np.diff(self.q_offsets)

    @property
    def num_keys(self) -> np.ndarray:
        """(R,): all of a row, which its last query sees without a mask."""
        return self.k_lens.sum(1)

    @property
    def k_positions(self) -> np.ndarray:
        """(R, P): the position of each piece's first key."""
        return np.cumsum(self.k_lens, 1) - self.k_lens

    @property
    def first_tile(self) -> np.ndarray:
        """(R,): that of the row's first query."""
        return self.q_positions // TILE

    @property
    def num_tiles(self) -> np.ndarray:
        """(R,): tiles that hold queries of the row."""
        last = (self.q_positions + self.q_lens - 1) // TILE
        return np.where(self.q_lens > 0, last - self.first_tile + 1, 0)

    def slots(self, row: int) -> np.ndarray:
        """The arena slot of every key of a row, by position."""
        pieces = zip(self.k_starts[row].tolist(), self.k_lens[row].tolist(), strict=True)
        return np.concatenate([np.arange(start, start + length) for start, length in pieces])
