"""What an attention method is: what it keeps of a tree, and which segments it plans.

Tables are numpy arrays on the host, made once per forward pass and evaluated in every layer by ``kernels``.

Shapes: R runs of new tokens, A depth of the prefix tree, N nodes, B sequences.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from engine.attention.placement import Keeps, Placement
from engine.prefix_tree import PrefixTree
from kernels import Segment


@dataclass(frozen=True)
class Runs:
    """New tokens of one forward pass: R runs, packed, in depth-first order. A run belongs to a node or a sequence.

    *Own* tokens are those of that node or sequence, up to and including the new ones; ``paths`` are the nodes above.
    """

    num_new: np.ndarray  # (R,) int64
    positions: np.ndarray  # (R,) int64, position of the first own token: the number of tokens above
    own_starts: np.ndarray  # (R,) int64, slot of the first own token
    own_lens: np.ndarray  # (R,) int64
    own_rooms: np.ndarray  # (R,) int64, slots from own_starts on that belong to the run
    paths: np.ndarray  # (A, R) int64, node at each depth above the run, -1 past the last one

    @property
    def q_positions(self) -> np.ndarray:
        """(T,) int64: each new token's position in its sequence."""
        within = np.arange(int(self.num_new.sum())) - np.repeat(self.q_offsets[:-1], self.num_new)
        return np.repeat(self.positions + self.own_lens - self.num_new, self.num_new) + within

    @property
    def q_offsets(self) -> np.ndarray:
        """(R + 1,) int64: where each run's queries begin."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.num_new)])

    def padded(self, num_runs: int) -> "Runs":
        """With runs of one new token at the end, up to ``num_runs``, that belong to nobody and see no key."""
        more = num_runs - len(self.num_new)

        def pad(values: np.ndarray, filler: int) -> np.ndarray:
            return np.append(values, np.full(more, filler, dtype=np.int64))

        return Runs(
            num_new=pad(self.num_new, 1),
            positions=pad(self.positions, 0),
            own_starts=pad(self.own_starts, 0),
            own_lens=pad(self.own_lens, 0),
            own_rooms=pad(self.own_rooms, 0),
            paths=np.pad(self.paths, ((0, 0), (0, more)), constant_values=-1),
        )


class AttentionMethod(ABC):
    """Plans the segments of a forward pass. Stateless: one instance serves every call."""

    name: str
    keeps: Keeps
    moves = False  # whether segments over shared nodes change from one decode step to the next

    @abstractmethod
    def shared_segments(self, tree: PrefixTree, placement: Placement, runs: Runs) -> list[Segment]:
        """Segments that depend on the runs' paths only, and so hold from one decode step to the next, unless it
        ``moves``."""

    @abstractmethod
    def own_segments(self, runs: Runs) -> list[Segment]:
        """Segments that depend on the runs' own lengths, which grow with every step."""
