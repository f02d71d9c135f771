"""The attention of one forward pass as a method plans it, all sequences at once, with nobody else in the KV arena.

Shapes: B sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.attention.method import AttentionMethod, Runs
from engine.attention.placement import Placement, place_in_order
from engine.prefix_tree import PrefixTree, build_from_levels
from kernels import Segment


@dataclass(frozen=True)
class PassPlan:
    """Where the keys lie, and which segments read them for the new tokens of ``runs``."""

    tree: PrefixTree
    runs: Runs
    placement: Placement
    num_slots: int  # of the arena that holds them
    own: list[Segment]
    shared: list[Segment]

    @property
    def segments(self) -> list[Segment]:
        """In the order in which the engine evaluates them."""
        return self.own + self.shared


def one_prompt(shared_len: int, batch: int) -> PrefixTree:
    """A tree of ``batch`` sequences below one prompt of ``shared_len`` tokens."""
    return build_from_levels([[np.zeros(shared_len, dtype=np.int64)], [[0]] * batch])


def plan_pass(
    method: AttentionMethod, tree: PrefixTree, unique_len: int, room: int, num_new: int = 1
) -> PassPlan:
    """Every sequence has ``num_new`` new tokens, the last of ``unique_len`` keys of its own, whatever suffix the tree
    gives it, and room for ``room`` of them: one of them in a decode step, all of them where a prompt is read."""
    sequences = np.arange(tree.num_sequences)
    placement, num_slots = place_in_order(tree, method.keeps, np.full_like(sequences, room))
    runs = Runs(
        num_new=np.full_like(sequences, num_new),
        positions=tree.table.suffix_position,
        own_starts=placement.suffix_starts(sequences),
        own_lens=np.full_like(sequences, unique_len),
        own_rooms=placement.suffix_rooms(sequences),
        paths=tree.paths(tree.table.leaf_node),
    )
    shared = method.shared_segments(tree, placement, runs)
    return PassPlan(tree, runs, placement, num_slots, method.own_segments(runs), shared)


def count_keys(segments: Sequence[Segment]) -> tuple[int, int]:
    """``(keys read, pairs of query and key)`` of segments without a causal mask, or with one query a row: a row's keys
    are read once for all of its queries."""
    keys_read = sum(int(s.k_lens.sum()) for s in segments)
    return keys_read, sum(int((np.diff(s.q_offsets) * s.k_lens).sum()) for s in segments)
