"""A decode step of a whole tree, as a method plans it, for programs that measure or predict one."""

from dataclasses import dataclass

import numpy as np

from engine.attention.method import AttentionMethod, Runs
from engine.attention.placement import place_in_order
from engine.prefix_tree import PrefixTree
from kernels import Segment


@dataclass(frozen=True)
class DecodeStep:
    """One query for each sequence, in depth-first order."""

    segments: list[Segment]
    runs: Runs
    num_slots: int  # of the arena, from slot 0 on


def plan_decode_step(method: AttentionMethod, tree: PrefixTree, own_len: int, room: int | None = None) -> DecodeStep:
    """All sequences of ``tree`` with ``own_len`` keys of their own each, whatever suffix the tree gives them.

    ``room`` is the slots that each has for its own, ``own_len`` if not given, and one at least.
    """
    sequences = np.arange(tree.num_sequences)
    rooms = np.full_like(sequences, max(1, own_len if room is None else room))
    placement, num_slots = place_in_order(tree, method.keeps, rooms)
    runs = Runs(
        num_new=np.ones_like(sequences),
        positions=tree.table.suffix_position,
        own_starts=placement.suffix_starts(sequences),
        own_lens=np.full_like(sequences, own_len),
        own_rooms=placement.suffix_rooms(sequences),
        paths=tree.paths(tree.table.leaf_node),
    )
    segments = method.own_segments(runs) + method.shared_segments(tree, placement, runs)
    return DecodeStep(segments, runs, num_slots)
