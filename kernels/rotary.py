"""Rotary position embedding (RoFormer, arXiv:2104.09864) in the half-split layout of Llama checkpoints.

Shapes: T tokens, H heads, D head dimension.
"""

import torch


def apply_rotary_(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> None:
    """Rotates each head of ``x`` in place: element ``d`` pairs with ``d + D/2``.

    ``cos`` is ``(T, 1, D)``, the D/2 angles' cosines twice; ``sin`` their sines, negated in the first half; both
    float32. The rotation is computed in float32 and rounded once.
    """
    half = x_THD.shape[-1] // 2
    swapped = torch.cat((x_THD[..., half:], x_THD[..., :half]), dim=-1)
    x_THD.copy_((x_THD * cos_T1D).addcmul_(swapped, sin_T1D))
