"""Rotary position embedding (RoFormer, arXiv:2104.09864) in the half-split layout of Llama checkpoints: alone, and with
the write of keys and values into the cache.

Element ``d`` of a head pairs with ``d + D/2``. ``cos`` is ``(T, 1, D)``, the D/2 angles' cosines twice; ``sin`` their
sines, negated in the first half; both float32. The rotation is computed in float32 and rounded once.

Shapes: T tokens, H heads, Hq query heads, Hkv KV heads, D head dimension, S slots of the cache.
"""

from functools import cache

import torch

from kernels import simd
from kernels.simd import Kernel, Target


def apply_rotary_(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> None:
    """Rotates each head of ``x`` in place."""
    T, H, D = x_THD.shape
    if simd.runs(x_THD) and x_THD.stride(1) == D:
        num_tasks, rows_per_task = simd.split_rows(T)
        _compiled(simd.host(), x_THD.dtype, D, False).launch(
            *(num_tasks, T, rows_per_task, cos_T1D, cos_T1D.stride(0), sin_T1D, sin_T1D.stride(0)),
            *(x_THD, x_THD.stride(0), H),
        )
        return
    half = D // 2
    swapped = torch.cat((x_THD[..., half:], x_THD[..., :half]), dim=-1)
    x_THD.copy_((x_THD * cos_T1D).addcmul_(swapped, sin_T1D))


def rotate_into_cache_(
    qkv_THD: torch.Tensor,
    cos_T1D: torch.Tensor,
    sin_T1D: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Rotates queries in place; writes each token's rotated keys, and its values, to its slot of the arenas.

    ``qkv`` is ``(T, Hq + 2 Hkv, D)``, its heads side by side: queries, keys, values. What is left of the keys in it is
    undefined. ``slots`` are int64, each there at most once, and not checked: they are the plan's own, and one beyond
    the arenas would be written all the same.
    """
    T, H, D = qkv_THD.shape
    Hkv = k_SHD.shape[1]
    Hq = H - 2 * Hkv
    if not (simd.runs(qkv_THD, k_SHD, v_SHD) and qkv_THD.stride(1) == D and slots_T.is_contiguous()):
        apply_rotary_(qkv_THD[:, : Hq + Hkv], cos_T1D, sin_T1D)
        k_SHD.index_copy_(0, slots_T, qkv_THD[:, Hq : Hq + Hkv])
        v_SHD.index_copy_(0, slots_T, qkv_THD[:, Hq + Hkv :])
        return
    num_tasks, rows_per_task = simd.split_rows(T)
    _compiled(simd.host(), qkv_THD.dtype, D, True).launch(
        *(num_tasks, T, rows_per_task, cos_T1D, cos_T1D.stride(0), sin_T1D, sin_T1D.stride(0)),
        *(qkv_THD, qkv_THD.stride(0), Hq, Hkv, slots_T),
        *(k_SHD, *k_SHD.stride()[:2], v_SHD, *v_SHD.stride()[:2]),
    )


@cache
def _compiled(target: Target, dtype: torch.dtype, head_dim: int, into_cache: bool) -> simd.CompiledKernel:
    k = Kernel("rotary", target)
    element, half = simd.FLOATS[dtype], head_dim // 2
    with k.rows(0, 1) as token:
        cos, sin = (k.pointer(i, simd.F32) + token * k.integer(i + 1) for i in (2, 4))
        x, num_heads = k.pointer(6, element) + token * k.integer(7), k.integer(8)

        def rotate(source, target_row):
            def rotate_part(i, count):
                a, b = source.load_floats(i, count), (source + half).load_floats(i, count)
                rotated_a = k.fma(b, sin.load_floats(i, count), a * cos.load_floats(i, count))
                rotated_b = k.fma(a, (sin + half).load_floats(i, count), b * (cos + half).load_floats(i, count))
                target_row.store_floats(i, rotated_a, count)
                (target_row + half).store_floats(i, rotated_b, count)

            k.each_vector(half, rotate_part)

        with k.range(0, num_heads) as head:
            rotate(x + head * head_dim, x + head * head_dim)
        if into_cache:
            num_kv_heads, slot = k.integer(9), k.pointer(10, simd.I64)[token]
            k_row, v_row = (k.pointer(i, element) + slot * k.integer(i + 1) for i in (11, 14))
            with k.range(0, num_kv_heads) as head:
                key = x + (num_heads + head) * head_dim
                rotate(key, k_row + head * k.integer(13))
                value, target_row = key + num_kv_heads * head_dim, v_row + head * k.integer(16)
                k.each_vector(
                    head_dim, lambda i, count: target_row.store(i, value.load_padded(i, count, k.lanes), count)
                )
    return k.compile()
