"""Attention disabled: queries pass through and no key is kept. Its speed is the ceiling for every other method; what it
generates means nothing."""

import numpy as np

from engine.attention.method import AttentionMethod, Placement


class NoAttention(AttentionMethod):
    name = "noattention"
    uses_cache = False

    def ranges(self, tree, rooms, resident, *, uniform=True):
        return []

    def place(self, tree, rooms, resident, starts, *, uniform=True):
        return Placement(
            np.zeros(len(tree.nodes), dtype=np.int64), np.zeros_like(rooms), np.zeros_like(rooms)
        )

    def shared_segments(self, tree, placement, runs):
        return []

    def own_segments(self, runs):
        return []
