"""Rotary position embedding (RoFormer, arXiv:2104.09864) in the half-split layout of Llama checkpoints.

Shapes: T tokens, H heads, D head dimension.
"""

from functools import cache

import torch

from kernels import simd
from kernels.simd import Kernel, Target


def apply_rotary_(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> None:
    """Rotates each head of ``x`` in place: element ``d`` pairs with ``d + D/2``.

    ``cos`` is ``(T, 1, D)``, the D/2 angles' cosines twice; ``sin`` their sines, negated in the first half; both
    float32. The rotation is computed in float32 and rounded once.
    """
    T, H, D = x_THD.shape
    if simd.runs(x_THD) and x_THD.stride(1) == D:
        num_tasks, rows_per_task = simd.split_rows(T)
        _compiled(simd.host(), x_THD.dtype, D).launch(
            *(num_tasks, T, rows_per_task, x_THD, x_THD.stride(0), H),
            *(cos_T1D, cos_T1D.stride(0), sin_T1D, sin_T1D.stride(0)),
        )
        return
    half = D // 2
    swapped = torch.cat((x_THD[..., half:], x_THD[..., :half]), dim=-1)
    x_THD.copy_((x_THD * cos_T1D).addcmul_(swapped, sin_T1D))


@cache
def _compiled(target: Target, dtype: torch.dtype, head_dim: int) -> simd.CompiledKernel:
    k = Kernel("rotary", target)
    half = head_dim // 2
    with k.rows(0, 1) as token:
        x = k.pointer(2, simd.FLOATS[dtype]) + token * k.integer(3)
        cos = k.pointer(5, simd.F32) + token * k.integer(6)
        sin = k.pointer(7, simd.F32) + token * k.integer(8)

        with k.range(0, k.integer(4)) as head:
            lower, upper = x + head * head_dim, x + head * head_dim + half

            def rotate(i, count):
                a, b = lower.load_floats(i, count), upper.load_floats(i, count)
                rotated_a = k.fma(b, sin.load_floats(i, count), a * cos.load_floats(i, count))
                rotated_b = k.fma(a, (sin + half).load_floats(i, count), b * (cos + half).load_floats(i, count))
                lower.store_floats(i, rotated_a, count)
                upper.store_floats(i, rotated_b, count)

            k.each_vector(half, rotate)
    return k.compile()
