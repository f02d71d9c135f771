"""Attention disabled: queries pass through and no key is kept. Its speed is the ceiling for every other method; what it
generates means nothing."""

from engine.attention.method import AttentionMethod
from engine.attention.placement import Keeps


class NoAttention(AttentionMethod):
    name = "noattention"
    keeps = Keeps.NOTHING

    def shared_segments(self, tree, placement, runs):
        return []

    def own_segments(self, runs):
        return []
