"""What an attention method is: where it keeps tokens, and which segments it plans.

Tables are numpy arrays on the host, made once per forward pass and evaluated in every layer by ``kernels``.

Shapes: R runs of new tokens, A depth of the prefix tree, N nodes, B sequences.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.prefix_tree import Node, PrefixTree
from kernels import Segment


@dataclass(frozen=True)
class Placement:
    """Where the tokens of a tree lie in the arena."""

    node_starts: np.ndarray  # (N,) int64, slot of each node's first token
    suffix_starts: np.ndarray  # (B,) int64, slot of each sequence's first own token
    suffix_rooms: np.ndarray  # (B,) int64, slots of each sequence for its suffix and what it generates


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
    def q_offsets(self) -> np.ndarray:
        """(R + 1,) int64: where each run's queries begin."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.num_new)])


class AttentionMethod(ABC):
    """Plans the segments of a forward pass. Stateless: one instance serves every call."""

    name: str
    uses_cache = True  # whether keys and values are kept at all
    own_node_ranges = False  # whether each node that is not resident has a range of its own, which can outlive the call

    @abstractmethod
    def ranges(
        self, tree: PrefixTree, rooms: np.ndarray, resident: Mapping[int, int], *, uniform: bool = True
    ) -> list[int]:
        """Lengths of the contiguous arena ranges that ``place`` needs, in its order.

        ``rooms`` (B,) is what each sequence needs for its suffix and new tokens; ``resident`` maps the nodes whose
        keys and values are in the arena already to their slots. ``uniform`` allows rooms to be padded to equal ones,
        which is faster; without it the ranges are as short as can be.
        """

    @abstractmethod
    def place(
        self,
        tree: PrefixTree,
        rooms: np.ndarray,
        resident: Mapping[int, int],
        starts: Sequence[int],
        *,
        uniform: bool = True,
    ) -> Placement:
        """Lays the tree out over those ranges, which begin at ``starts``. ``uniform`` is what ``ranges`` was given."""

    def copies(self, tree: PrefixTree, placement: Placement, node: Node) -> list[int]:
        """Slots to which a node's keys and values are copied before any run below it reads them."""
        return []

    @abstractmethod
    def shared_segments(self, tree: PrefixTree, placement: Placement, runs: Runs) -> list[Segment]:
        """Segments that depend on the runs' paths only, and so hold from one decode step to the next."""

    @abstractmethod
    def own_segments(self, runs: Runs) -> list[Segment]:
        """Segments that depend on the runs' own lengths, which grow with every step."""


def uniform_rooms(rooms: np.ndarray) -> np.ndarray:
    """Rooms (B,) made equal where that costs at most half as much again.

    Equal rooms put the sequences at a constant stride, which lets a CPU evaluate them in one call.
    """
    if len(rooms) and rooms.max() * len(rooms) <= 1.5 * rooms.sum():
        return np.full_like(rooms, rooms.max())
    return rooms
