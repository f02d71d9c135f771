"""Hydragen (arXiv:2402.05099), for any prefix tree: a node's keys are stored once and read once for all queries below.

Attention over a sequence is split into attention over each node on its path and over its own suffix. The queries of
all sequences below a node form one block against that node's keys, which turns matrix-vector work into matrix-matrix
work; the partial results merge exactly.
"""

import numpy as np

from engine.attention.method import AttentionMethod, Runs
from engine.attention.placement import Keeps
from kernels import Segment


class Hydragen(AttentionMethod):
    name = "hydragen"
    keeps = Keeps.NODES

    def shared_segments(self, tree, placement, runs):
        table = tree.table
        q_offsets = runs.q_offsets
        segments = []
        for node_of_run in runs.paths:
            if (node_of_run < 0).all():
                continue
            # Runs below one node are neighbours: each stretch of equal entries is one block of queries.
            first = np.flatnonzero(np.diff(node_of_run, prepend=node_of_run[0] - 1))
            nodes = node_of_run[first]
            starts = np.where(nodes >= 0, placement.node_starts[nodes], 0)
            lens = np.where(nodes >= 0, table.node_length[nodes], 0)
            positions = np.where(nodes >= 0, table.node_position[nodes], 0)
            offsets = np.append(q_offsets[first], q_offsets[-1])
            segments.append(Segment(offsets, starts, lens, k_positions=positions))
        return segments

    def own_segments(self, runs: Runs) -> list[Segment]:
        return [Segment(runs.q_offsets, runs.own_starts, runs.own_lens, True, runs.own_rooms, runs.positions)]
