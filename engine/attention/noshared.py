"""The baseline that shares nothing: each sequence attends to a contiguous copy of its whole history.

This is FlashAttention as in a system without prefix sharing. A node's tokens are computed once, in the range of one
sequence, and copied to the others before anything below reads them: memory and reads are those of the baseline,
and prompts need not be prefilled once per sequence.
"""

import numpy as np

from engine.attention.method import AttentionMethod, Runs
from engine.attention.placement import Keeps
from kernels import Segment


class HydragenNoShared(AttentionMethod):
    name = "hydragen_noshared"
    keeps = Keeps.HISTORIES

    def shared_segments(self, tree, placement, runs):
        return []

    def own_segments(self, runs: Runs) -> list[Segment]:
        starts, lens, rooms = (
            runs.own_starts - runs.positions,
            runs.own_lens + runs.positions,
            runs.own_rooms + runs.positions,
        )
        return [Segment(runs.q_offsets, starts, lens, True, rooms, np.zeros_like(starts))]
