"""The baseline that shares nothing: each sequence attends to a contiguous copy of its whole history.

This is FlashAttention as in a system without prefix sharing. A node's tokens are computed once, in the room of its
first sequence, and copied to the others before anything below reads them: memory and reads are those of the baseline,
and prompts need not be prefilled once per sequence.
"""

import numpy as np

from engine.attention.method import AttentionMethod, Placement, Runs, uniform_rooms
from kernels import Segment


def _history_lens(tree) -> np.ndarray:
    """(B,) int64: tokens above each sequence's suffix."""
    return np.array([tree.suffix_start(i) for i in range(tree.num_sequences)], dtype=np.int64)


class HydragenNoShared(AttentionMethod):
    name = "hydragen_noshared"

    def ranges(self, tree, rooms, resident, *, uniform=True):
        rooms = _history_lens(tree) + rooms
        return [int((uniform_rooms(rooms) if uniform else rooms).sum())]

    def place(self, tree, rooms, resident, starts, *, uniform=True):
        history = _history_lens(tree)
        rooms = uniform_rooms(history + rooms) if uniform else history + rooms
        sequence_starts = starts[0] + np.cumsum(rooms) - rooms
        node_starts = [sequence_starts[node.first_leaf] + node.start for node in tree.nodes]
        return Placement(np.array(node_starts, dtype=np.int64), sequence_starts + history, rooms - history)

    def copies(self, tree, placement, node):
        leaves = range(node.first_leaf, node.first_leaf + node.num_leaves)
        return [int(placement.suffix_starts[i]) - tree.suffix_start(i) + node.start for i in leaves]

    def shared_segments(self, tree, placement, runs):
        return []

    def own_segments(self, runs: Runs) -> list[Segment]:
        starts, lens, rooms = (
            runs.own_starts - runs.positions,
            runs.own_lens + runs.positions,
            runs.own_rooms + runs.positions,
        )
        return [Segment(runs.q_offsets, starts, lens, True, rooms, np.zeros_like(starts))]
