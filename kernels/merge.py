"""Exact merge of two attention states over disjoint keys.

A state is ``(out (T, H, D), lse (T, H))`` with natural-log lse; the empty state is ``(0, -inf)``.
"""

import torch


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the union of both key sets, in float32.

    ``out = w * out_a + (1 - w) * out_b`` with ``w = exp(lse_a) / (exp(lse_a) + exp(lse_b)) = sigmoid(lse_a - lse_b)``
    (FlashAttention, arXiv:2205.14135, section 3.1, for two blocks). Two empty states merge to the empty state.
    """
    # -inf - -inf is NaN: both are empty, any weight will do, since both outputs are 0.
    difference = (lse_a - lse_b).nan_to_num_(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
    out = torch.lerp(out_b.float(), out_a.float(), difference.sigmoid_().unsqueeze(-1))
    return out, torch.logaddexp(lse_a, lse_b)
