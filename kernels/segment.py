"""A segment: which queries attend to which keys, under which mask.

Shapes: T queries (packed), S keys of the arena, R rows of the segment.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segment:
    """Row ``r`` lets queries ``q_offsets[r] : q_offsets[r + 1]`` attend to ``k_lens[r]`` keys from ``k_starts[r]`` on.

    Rows cover all T queries in order; a row without keys has length 0. With ``causal`` the mask is aligned
    bottom-right: the last query of a row sees all of the row's keys, the one before it all but the last, and so on.
    """

    q_offsets: np.ndarray  # (R + 1,) int64, rising from 0 to T
    k_starts: np.ndarray  # (R,) int64
    k_lens: np.ndarray  # (R,) int64
    causal: bool = False
    # (R,) int64: keys from k_starts on that may be read (finite values, masked out) though the row's keys end earlier;
    # lets rows of different lengths share a call. None: nothing past k_lens may be read.
    k_rooms: np.ndarray | None = None
    # (R,) int64: the position of each row's first key in its sequence, for which sliding windows ask.
    k_positions: np.ndarray | None = None
    # (T,) int64: how many positions each query is to be turned back for this segment; None: none. It is for the caller
    # to turn them: kernels take queries as they are.
    q_turns: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows = len(self.k_starts)
        assert len(self.q_offsets) == rows + 1 and len(self.k_lens) == rows, "tables of different lengths"
        assert self.q_offsets[0] == 0 and (np.diff(self.q_offsets) >= 0).all(), "query offsets must rise from 0"
        assert rows == 0 or (self.k_starts.min() >= 0 and self.k_lens.min() >= 0), "negative key start or length"

    @property
    def num_queries(self) -> int:
        return int(self.q_offsets[-1])

    @property
    def num_rows(self) -> int:
        return len(self.k_starts)
