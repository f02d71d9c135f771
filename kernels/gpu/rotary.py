"""Rotary position embedding (RoFormer, arXiv:2104.09864) by Triton kernels: alone, and with the write into the cache.

A program has one token and some of its heads. A thread has both dimensions of a pair, so queries turn in place. These
lie ``GAP`` apart, and neighbouring pairs ``STEP``: half the rotated dimensions and 1, or interleaved 1 and 2.

Shapes: T tokens, H heads, Hq query heads, Hkv KV heads, D head dimension, P rotated dimensions, S slots of the cache.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import on_device

_ELEMENTS_PER_PROGRAM = 1024  # of the heads that it has. Chosen, not measured.


@triton.jit
def _rotate(source, target, is_head, cos, sin, ROTARY_DIM, GAP, STEP, BLOCK_PAIRS: tl.constexpr):
    """Rotates heads from ``source`` to ``target``, (HEADS, 1) pointers to their first dimensions."""
    pair = tl.arange(0, BLOCK_PAIRS)
    is_pair = pair < ROTARY_DIM // 2
    first = pair * STEP
    second = first + GAP
    cos_first, sin_first = tl.load(cos + first, mask=is_pair), tl.load(sin + first, mask=is_pair)
    cos_second, sin_second = tl.load(cos + second, mask=is_pair), tl.load(sin + second, mask=is_pair)
    mask = is_head & is_pair[None, :]
    a = tl.load(source + first[None, :], mask=mask).to(tl.float32)
    b = tl.load(source + second[None, :], mask=mask).to(tl.float32)
    element = target.dtype.element_ty
    rotated_a, rotated_b = a * cos_first + b * sin_first, b * cos_second + a * sin_second
    tl.store(target + first[None, :], rotated_a.to(element), mask=mask)
    tl.store(target + second[None, :], rotated_b.to(element), mask=mask)


@triton.jit
def _copy(source, target, is_head, FIRST, LAST, BLOCK: tl.constexpr):
    """Copies dimensions from ``FIRST`` up to ``LAST`` of heads, (HEADS, 1) pointers to their first dimensions."""
    dim = FIRST + tl.arange(0, BLOCK)[None, :]
    mask = is_head & (dim < LAST)
    tl.store(target + dim, tl.load(source + dim, mask=mask), mask=mask)


@triton.jit
def _rotate_in_place(
    x_ptr,  # (T, H, D)
    cos_ptr,  # (T, 1, P) float32
    sin_ptr,
    x_stride,
    x_head_stride,
    cos_stride,
    sin_stride,
    num_heads,
    ROTARY_DIM: tl.constexpr,
    GAP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    x = x_ptr + token * x_stride + head.to(tl.int64) * x_head_stride
    cos, sin = cos_ptr + token * cos_stride, sin_ptr + token * sin_stride
    _rotate(x, x, head < num_heads, cos, sin, ROTARY_DIM, GAP, STEP, BLOCK_PAIRS)


@triton.jit
def _rotate_into_cache(
    qkv_ptr,  # (T, Hq + 2 Hkv, D)
    cos_ptr,  # (T, 1, P) float32
    sin_ptr,
    k_ptr,  # (S, Hkv, D)
    v_ptr,
    slots_ptr,  # (T,) int64
    qkv_stride,
    qkv_head_stride,
    cos_stride,
    sin_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    slots_stride,
    num_heads,  # Hq
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    GAP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0 where whole heads are rotated
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    qkv = qkv_ptr + token * qkv_stride
    cos, sin = cos_ptr + token * cos_stride, sin_ptr + token * sin_stride
    num_query_blocks = tl.cdiv(num_heads, HEADS)
    block = tl.program_id(1)
    if block < num_query_blocks:
        head = (block * HEADS + tl.arange(0, HEADS))[:, None]
        query = qkv + head.to(tl.int64) * qkv_head_stride
        _rotate(query, query, head < num_heads, cos, sin, ROTARY_DIM, GAP, STEP, BLOCK_PAIRS)
    else:
        head = ((block - num_query_blocks) * HEADS + tl.arange(0, HEADS))[:, None]
        is_head = head < num_kv_heads
        slot = tl.load(slots_ptr + token * slots_stride)
        key = qkv + (num_heads + head).to(tl.int64) * qkv_head_stride
        value = key + tl.cast(num_kv_heads, tl.int64) * qkv_head_stride
        # An arena may hold more than 2^31 elements, and so may what lies between two of its heads.
        k_target = k_ptr + slot * k_stride + head.to(tl.int64) * k_head_stride
        v_target = v_ptr + slot * v_stride + head.to(tl.int64) * v_head_stride
        _rotate(key, k_target, is_head, cos, sin, ROTARY_DIM, GAP, STEP, BLOCK_PAIRS)
        if BLOCK_REST > 0:
            _copy(key, k_target, is_head, ROTARY_DIM, HEAD_DIM, BLOCK_REST)
        _copy(value, v_target, is_head, 0, HEAD_DIM, BLOCK_D)


def apply_rotary_(
    x_THD: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor, interleaved: bool = False
) -> None:
    """Rotates each head of ``x`` in place. The last dimension of all three is contiguous."""
    (T, H, D), P = x_THD.shape, cos_T1P.shape[2]
    if x_THD.numel() == 0:
        return
    heads = _heads_of_program(D)
    with on_device(x_THD):
        _rotate_in_place[(T, triton.cdiv(H, heads))](
            *(x_THD, cos_T1P, sin_T1P, *x_THD.stride()[:2], cos_T1P.stride(0), sin_T1P.stride(0), H),
            **_pairs(P, interleaved),
            HEADS=heads,
        )


def rotate_into_cache_(
    qkv_THD: torch.Tensor,
    cos_T1P: torch.Tensor,
    sin_T1P: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    slots_T: torch.Tensor,
    interleaved: bool = False,
) -> None:
    """As that of ``kernels.rotary``. The last dimension of heads, arenas and angles is contiguous."""
    (T, H, D), P = qkv_THD.shape, cos_T1P.shape[2]
    if qkv_THD.numel() == 0:
        return
    Hkv = k_SHD.shape[1]
    Hq, heads = H - 2 * Hkv, _heads_of_program(D)
    with on_device(qkv_THD):
        _rotate_into_cache[(T, triton.cdiv(Hq, heads) + triton.cdiv(Hkv, heads))](
            *(qkv_THD, cos_T1P, sin_T1P, k_SHD, v_SHD, slots_T),
            *(*qkv_THD.stride()[:2], cos_T1P.stride(0), sin_T1P.stride(0)),
            *(*k_SHD.stride()[:2], *v_SHD.stride()[:2], slots_T.stride(0), Hq, Hkv),
            HEAD_DIM=D,
            **_pairs(P, interleaved),
            BLOCK_REST=0 if P == D else triton.next_power_of_2(D - P),
            BLOCK_D=triton.next_power_of_2(D),
            HEADS=heads,
        )


def _heads_of_program(head_dim: int) -> int:
    return max(1, _ELEMENTS_PER_PROGRAM // triton.next_power_of_2(head_dim))


def _pairs(rotary_dim: int, interleaved: bool) -> dict[str, int]:
    """Where the pairs lie, as constants of the kernels."""
    gap, step = (1, 2) if interleaved else (rotary_dim // 2, 1)
    block = triton.next_power_of_2(rotary_dim // 2)
    return {"ROTARY_DIM": rotary_dim, "GAP": gap, "STEP": step, "BLOCK_PAIRS": block}
