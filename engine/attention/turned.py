"""Attention of which a part sees the queries at other positions than their own.

Shapes: T queries, S slots, Hq query heads, Hkv KV heads, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels import AttentionPlan, merge_states


@dataclass(frozen=True)
class TurnedPlan:
    """``plain`` sees the queries as they are, ``turned`` as ``turn`` returns them; the two are of unlike keys."""

    plain: AttentionPlan
    turned: AttentionPlan
    turn: Callable[[torch.Tensor], torch.Tensor]

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float, layer: int
    ) -> torch.Tensor:
        """``(T, Hq, D)`` in the queries' dtype."""
        state = self.plain.run_state(q_THD, k_SHD, v_SHD, scale)
        other = self.turned.run_state(self.turn(q_THD), k_SHD, v_SHD, scale)
        return merge_states(*state, *other)[0].to(q_THD.dtype)
