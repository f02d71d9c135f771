"""Where the tokens of a tree lie in the KV arena.

Shapes: N nodes, B sequences, R of them.
"""

from enum import Enum, auto

import numpy as np

from engine.prefix_tree import PrefixTree


class Keeps(Enum):
    """What of a tree has keys and values in the arena, each in one piece."""

    NODES = auto()  # a node once, for all sequences below it; of a sequence the tokens that are its own
    HISTORIES = auto()  # of each sequence all tokens: its own copy of the nodes above it, and what follows them
    NOTHING = auto()


class Placement:
    """Slots of a tree's nodes and sequences, of which any part may be in the arena: -1 is the slot of one that is not.

    A sequence has a range of slots: for its suffix and what it generates, and before these for its copy of the nodes
    above it where ``keeps`` is ``HISTORIES``.
    """

    def __init__(self, tree: PrefixTree, keeps: Keeps):
        self.tree, self.keeps = tree, keeps
        num_nodes, num_sequences = len(tree.nodes), tree.num_sequences
        self.node_starts = np.full(num_nodes, -1, dtype=np.int64)  # slot of each node's first token
        self.sequence_starts = np.full(num_sequences, -1, dtype=np.int64)  # first slot of each sequence's range
        self.sequence_slots = np.zeros(num_sequences, dtype=np.int64)  # length of the range
        copied = keeps is Keeps.HISTORIES
        self._num_copied = tree.table.suffix_position if copied else np.zeros(num_sequences, dtype=np.int64)

    def slots_for(self, rooms: np.ndarray) -> np.ndarray:
        """(B,) slots that each sequence takes whose suffix and new tokens need ``rooms`` (B,)."""
        return np.zeros_like(rooms) if self.keeps is Keeps.NOTHING else self._num_copied + rooms

    def suffix_starts(self, sequences: np.ndarray) -> np.ndarray:
        """(R,) slots of the first own tokens of ``sequences`` (R,)."""
        return self.sequence_starts[sequences] + self._num_copied[sequences]

    def suffix_rooms(self, sequences: np.ndarray) -> np.ndarray:
        """(R,) slots from there on that belong to each sequence."""
        return self.sequence_slots[sequences] - self._num_copied[sequences]

    def copies(self, node: int, sequences: np.ndarray) -> np.ndarray:
        """Slots of the copies of a node's first token that those of ``sequences`` (ascending) below it have."""
        if self.keeps is not Keeps.HISTORIES:
            return np.empty(0, dtype=np.int64)
        table = self.tree.table
        first, last = np.searchsorted(sequences, (table.node_first[node], table.node_last[node]))
        return self.sequence_starts[sequences[first:last]] + table.node_position[node]


def place_in_order(tree: PrefixTree, keeps: Keeps, rooms: np.ndarray) -> tuple[Placement, int]:
    """The whole tree laid out from slot 0 on, nodes first, and its number of slots. ``rooms`` as in ``slots_for``."""
    placement = Placement(tree, keeps)
    lengths = tree.table.node_length if keeps is Keeps.NODES else np.zeros(len(tree.nodes), dtype=np.int64)
    slots = placement.slots_for(rooms)
    ends = np.cumsum(np.concatenate([lengths, slots]))
    starts = ends - np.concatenate([lengths, slots])
    placement.sequence_starts[:], placement.sequence_slots[:] = starts[len(lengths) :], slots
    placement.node_starts[:] = starts[: len(lengths)]
    if keeps is Keeps.HISTORIES:  # a node lies in the range of the first sequence below it
        placement.node_starts[:] = placement.sequence_starts[tree.table.node_first] + tree.table.node_position
    return placement, int(ends[-1])


def equal_where_cheap(slots: np.ndarray) -> np.ndarray:
    """Lengths (B,) made equal where that costs at most half as much again.

    Any range can then take the place of any other, and sequences lie at a constant stride, which lets PyTorch's CPU
    attention evaluate them in one call.
    """
    if len(slots) and slots.max() * len(slots) <= 1.5 * slots.sum():
        return np.full_like(slots, slots.max())
    return slots
