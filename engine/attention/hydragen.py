"""Hydragen (arXiv:2402.05099), for any prefix tree: a node's keys are stored once and read once for all queries below.

Attention over a sequence is split into attention over each node on its path and over its own suffix. The queries of
all sequences below a node form one block against that node's keys, which turns matrix-vector work into matrix-matrix
work; the partial results merge exactly.
"""

import numpy as np

from engine.attention.method import AttentionMethod, Runs
from engine.attention.placement import Keeps, Placement
from engine.prefix_tree import PrefixTree
from kernels import Segment


class Hydragen(AttentionMethod):
    name = "hydragen"
    keeps = Keeps.NODES

    def shared_segments(self, tree, placement, runs):
        segments = (level_segment(tree, placement, runs, level, begins(level)) for level in runs.paths)
        return [segment for segment in segments if segment is not None]

    def own_segments(self, runs: Runs) -> list[Segment]:
        return [Segment(runs.q_offsets, runs.own_starts, runs.own_lens, True, runs.own_rooms, runs.positions)]


def begins(node_of_run: np.ndarray) -> np.ndarray:
    """(R,) bool: where stretches of runs below one node begin. Runs below one node are neighbours."""
    return np.diff(node_of_run, prepend=-2) != 0


def level_segment(
    tree: PrefixTree, placement: Placement, runs: Runs, node_of_run: np.ndarray, is_first: np.ndarray
) -> Segment | None:
    """The keys of the nodes of one level, ``node_of_run`` (R,), -1 for none; None where there is no node at all.

    A row of the segment is one block of queries: the runs from one that ``is_first`` (R,) names up to the next.
    """
    if (node_of_run < 0).all():
        return None
    table, first = tree.table, np.flatnonzero(is_first)
    nodes = node_of_run[first]
    is_node = nodes >= 0
    starts = np.where(is_node, placement.node_starts[nodes], 0)
    lens = np.where(is_node, table.node_length[nodes], 0)
    positions = np.where(is_node, table.node_position[nodes], 0)
    offsets = np.append(runs.q_offsets[first], runs.q_offsets[-1])
    return Segment(offsets, starts, lens, k_positions=positions)
