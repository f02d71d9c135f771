"""Hydragen where it pays, decided for each node and each forward pass.

Reading a node's keys once for all queries below it takes a block of queries of its own, whose state is merged. For few
queries or a short node that costs more than it saves. The keys of such a node are read by each sequence for itself,
from where they lie: as one more range of its own keys, which kernels take in the same call. Nothing is copied, so the
choice may change from step to step, as sequences end.

Where it pays is measured on the device at hand: see ``engine/calibration.py``.
"""

import numpy as np

from engine.attention.crossover import ALWAYS, Crossover
from engine.attention.hydragen import Hydragen, begins, level_segment
from engine.attention.method import Runs


class Auto(Hydragen):
    """Without a measured crossover every node that has several queries below it is shared."""

    name = "auto"

    def __init__(self, crossover: Crossover = ALWAYS):
        self.crossover = crossover

    def shared_segments(self, tree, placement, runs):
        if (runs.num_new > 1).any():  # a prefill: every row has many queries for itself
            return super().shared_segments(tree, placement, runs)
        is_shared = self.shares(tree, runs)
        together = [np.where(_at(is_shared, level), level, -1) for level in runs.paths]
        alone = [np.where(_at(is_shared, level), -1, level) for level in runs.paths]
        every = np.ones(len(runs.num_new), dtype=bool)
        segments = [level_segment(tree, placement, runs, level, every) for level in alone]
        segments += [level_segment(tree, placement, runs, level, begins(level)) for level in together]
        return [segment for segment in segments if segment is not None]

    def shares(self, tree, runs: Runs) -> np.ndarray:
        """(N,) bool: the nodes of the tree whose keys are read once for all queries of the runs below them."""
        on_path = runs.paths[runs.paths >= 0]
        num_queries = np.bincount(on_path, minlength=len(tree.nodes))
        return self.crossover.pays(num_queries, tree.table.node_length)


def _at(is_shared: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Of each run's node at one depth; False past the last one."""
    return (level >= 0) & is_shared[level]
