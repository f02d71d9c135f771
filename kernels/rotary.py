"""Rotary position embedding (RoFormer, arXiv:2104.09864) in the half-split layout of Llama checkpoints.

Shapes: T tokens, H heads, D head dimension.
"""

import torch


def apply_rotary_(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> None:
    """Rotates each head of ``x`` in place: element ``d`` pairs with ``d + D/2``.

    ``cos`` and ``sin`` are ``(T, 1, D/2)`` float32; the rotation is computed in float32 and rounded once.
    """
    half = x_THD.shape[-1] // 2
    first, second = x_THD[..., :half].float(), x_THD[..., half:].float()
    rotated = (first * cos_T1D).addcmul_(second, sin_T1D, value=-1)
    x_THD[..., half:] = (second * cos_T1D).addcmul_(first, sin_T1D)
    x_THD[..., :half] = rotated
