"""Rotary position embedding (RoFormer, arXiv:2104.09864): alone, and with the write of keys and values into the cache.

The first P dimensions of a head are rotated in pairs: element ``d`` with ``d + P/2``, as in Llama checkpoints, or
interleaved, each with its neighbour, as in RoFormer and GLM. ``cos`` and ``sin`` are ``(T, 1, P)`` float32: for each
element its pair's cosine, and its pair's sine, negated for the first of the two. The rotation is computed in float32
and rounded once.

Shapes: T tokens, H heads, Hq query heads, Hkv KV heads, D head dimension, P rotated dimensions, S slots of the cache.
"""

from functools import cache

import torch

from kernels import simd
from kernels.backend import Backend
from kernels.dispatch import choose_backend
from kernels.simd import Kernel, Target


def apply_rotary_(
    x_THD: torch.Tensor,
    cos_T1P: torch.Tensor,
    sin_T1P: torch.Tensor,
    interleaved: bool = False,
    backend: Backend | None = None,
) -> None:
    """Rotates each head of ``x`` in place. Raises ValueError for a ``backend`` that cannot run here."""
    (T, H, D), P = x_THD.shape, cos_T1P.shape[2]
    chosen = choose_backend(backend, x_THD, has_simd=x_THD.stride(1) == D)
    if chosen == Backend.SIMD:
        num_tasks, rows_per_task = simd.split_rows(T)
        _compiled(simd.host(), x_THD.dtype, D, P, interleaved, False).launch(
            *(num_tasks, T, rows_per_task, cos_T1P, cos_T1P.stride(0), sin_T1P, sin_T1P.stride(0)),
            *(x_THD, x_THD.stride(0), H),
        )
    elif chosen == Backend.TRITON:
        from kernels.gpu import rotary  # here, as Triton takes long to import

        rotary.apply_rotary_(x_THD, cos_T1P, sin_T1P, interleaved)
    else:
        x_THP = x_THD[..., :P]
        if interleaved:
            partners = x_THP.unflatten(-1, (P // 2, 2)).flip(-1).flatten(-2)
        else:
            partners = x_THP.roll(P // 2, -1)
        x_THP.copy_((x_THP * cos_T1P).addcmul_(partners, sin_T1P))


def rotate_into_cache_(
    qkv_THD: torch.Tensor,
    cos_T1P: torch.Tensor,
    sin_T1P: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    slots_T: torch.Tensor,
    interleaved: bool = False,
    backend: Backend | None = None,
) -> None:
    """Rotates queries in place; writes each token's rotated keys, and its values, to its slot of the arenas.

    ``qkv`` is ``(T, Hq + 2 Hkv, D)``, its heads side by side: queries, keys, values. What is left of the keys in it is
    undefined. ``slots`` are int64, each there at most once, and not checked: they are the plan's own, and one beyond
    the arenas would be written all the same. Raises ValueError for a ``backend`` that cannot run here.
    """
    T, H, D = qkv_THD.shape
    Hkv = k_SHD.shape[1]
    Hq = H - 2 * Hkv
    has_simd = qkv_THD.stride(1) == D and slots_T.is_contiguous()
    chosen = choose_backend(backend, qkv_THD, k_SHD, v_SHD, has_simd=has_simd)
    if chosen == Backend.SIMD:
        num_tasks, rows_per_task = simd.split_rows(T)
        _compiled(simd.host(), qkv_THD.dtype, D, cos_T1P.shape[2], interleaved, True).launch(
            *(num_tasks, T, rows_per_task, cos_T1P, cos_T1P.stride(0), sin_T1P, sin_T1P.stride(0)),
            *(qkv_THD, qkv_THD.stride(0), Hq, Hkv, slots_T),
            *(k_SHD, *k_SHD.stride()[:2], v_SHD, *v_SHD.stride()[:2]),
        )
    elif chosen == Backend.TRITON:
        from kernels.gpu import rotary

        rotary.rotate_into_cache_(qkv_THD, cos_T1P, sin_T1P, k_SHD, v_SHD, slots_T, interleaved)
    else:
        apply_rotary_(qkv_THD[:, : Hq + Hkv], cos_T1P, sin_T1P, interleaved, Backend.ATEN)
        k_SHD.index_copy_(0, slots_T, qkv_THD[:, Hq : Hq + Hkv])
        v_SHD.index_copy_(0, slots_T, qkv_THD[:, Hq + Hkv :])


@cache
def _compiled(
    target: Target, dtype: torch.dtype, head_dim: int, rotary_dim: int, interleaved: bool, into_cache: bool
) -> simd.CompiledKernel:
    k = Kernel("rotary", target)
    element, half = simd.FLOATS[dtype], rotary_dim // 2
    neighbours = [lane ^ 1 for lane in range(k.lanes)]
    with k.rows(0, 1) as token:
        cos, sin = (k.pointer(i, simd.F32) + token * k.integer(i + 1) for i in (2, 4))
        x, num_heads = k.pointer(6, element) + token * k.integer(7), k.integer(8)

        def copy(source, target_row, length):
            k.each_vector(length, lambda i, count: target_row.store(i, source.load_padded(i, count, k.lanes), count))

        def rotate(source, target_row):
            def rotate_neighbours(i, count):
                a = source.load_floats(i, count)
                b = a.shuffle(a, neighbours)
                rotated = k.fma(b, sin.load_floats(i, count), a * cos.load_floats(i, count))
                target_row.store_floats(i, rotated, count)

            def rotate_halves(i, count):
                a, b = source.load_floats(i, count), (source + half).load_floats(i, count)
                rotated_a = k.fma(b, sin.load_floats(i, count), a * cos.load_floats(i, count))
                rotated_b = k.fma(a, (sin + half).load_floats(i, count), b * (cos + half).load_floats(i, count))
                target_row.store_floats(i, rotated_a, count)
                (target_row + half).store_floats(i, rotated_b, count)

            if interleaved:
                k.each_vector(rotary_dim, rotate_neighbours)
            else:
                k.each_vector(half, rotate_halves)

        with k.range(0, num_heads) as head:
            rotate(x + head * head_dim, x + head * head_dim)
        if into_cache:
            num_kv_heads, slot = k.integer(9), k.pointer(10, simd.I64)[token]
            k_row, v_row = (k.pointer(i, element) + slot * k.integer(i + 1) for i in (11, 14))
            with k.range(0, num_kv_heads) as head:
                key, k_target = x + (num_heads + head) * head_dim, k_row + head * k.integer(13)
                rotate(key, k_target)
                copy(key + rotary_dim, k_target + rotary_dim, head_dim - rotary_dim)
                copy(key + num_kv_heads * head_dim, v_row + head * k.integer(16), head_dim)
    return k.compile()
