"""Root-mean-square normalisation (arXiv:1910.07467), alone and after a sum, by a Triton kernel.

A row is one block, which stays in registers between the sum of squares and the product, or is passed through twice
where it is too long for that. Short rows share a program.

Shapes: T tokens, H heads, I features.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import on_device

# Features that stay in registers, 32 a thread. Longer rows are read twice.
_MAX_BLOCK = 16384
# Elements of a program that handles several rows, and of a warp. Chosen, not measured.
_ELEMENTS_PER_PROGRAM = 1024
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16


@triton.jit
def _load(x_rows, y_rows, features, mask, ADDS: tl.constexpr):
    """A block of ``x``, or of the sum as it will be stored, which is what later layers see."""
    x = tl.load(x_rows + features, mask=mask, other=0.0)
    if ADDS:
        y = tl.load(y_rows + features, mask=mask, other=0.0)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _normalised(x, scale, weight_ptr, features, is_feature):
    weight = tl.load(weight_ptr + features, mask=is_feature, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * scale[:, None] * weight).to(x.dtype)


@triton.jit
def _rms_norm(
    x_ptr,  # (T, H, I)
    y_ptr,  # (T, H, I), added to x; None: nothing is
    weight_ptr,  # (I,)
    out_ptr,  # (T * H, I)
    x_stride,
    x_head_stride,
    y_stride,
    num_heads,
    num_rows,  # T * H
    eps,
    NUM_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    ADDS: tl.constexpr = y_ptr is not None
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = (row < num_rows)[:, None]
    token, head = row // num_heads, row % num_heads
    x_rows = x_ptr + (token * x_stride + head * x_head_stride)[:, None]
    y_rows = y_ptr + (token * y_stride)[:, None] if ADDS else None
    out_rows = out_ptr + (row * NUM_FEATURES)[:, None]
    features = tl.arange(0, BLOCK)[None, :]

    if NUM_FEATURES <= BLOCK:
        is_feature = features < NUM_FEATURES
        mask = is_row & is_feature
        x = _load(x_rows, y_rows, features, mask, ADDS)
        if ADDS:
            tl.store(x_rows + features, x, mask=mask)
        square = x.to(tl.float32) * x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(square, 1) / NUM_FEATURES + eps)
        tl.store(out_rows + features, _normalised(x, scale, weight_ptr, features, is_feature), mask=mask)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(0, NUM_FEATURES, BLOCK):
            mask = is_row & (first + features < NUM_FEATURES)
            x = _load(x_rows, y_rows, first + features, mask, ADDS)
            squares += x.to(tl.float32) * x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, 1) / NUM_FEATURES + eps)
        for first in range(0, NUM_FEATURES, BLOCK):
            is_feature = first + features < NUM_FEATURES
            mask = is_row & is_feature
            # Added anew: what one thread stores another could not read without a barrier.
            x = _load(x_rows, y_rows, first + features, mask, ADDS)
            if ADDS:
                tl.store(x_rows + first + features, x, mask=mask)
            normalised = _normalised(x, scale, weight_ptr, first + features, is_feature)
            tl.store(out_rows + first + features, normalised, mask=mask)


def rms_norm(x: torch.Tensor, weight_I: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension, which is contiguous, of one or more.

    Beyond three dimensions, those before the last two are made one, which copies ``x`` where no view of it can be.
    """
    x_THI = x if x.dim() > 2 else x.unsqueeze(-2)
    return _launch(x_THI.reshape(-1, *x_THI.shape[-2:]), None, weight_I, eps).view(x.shape)


def add_rms_norm_(x_TI: torch.Tensor, y_TI: torch.Tensor, weight_I: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds ``y`` to ``x``, in place and rounded to its dtype; returns the sum normalised. Rows are contiguous."""
    return _launch(x_TI.unsqueeze(1), y_TI, weight_I, eps).squeeze(1)


def _launch(x_THI, y_TI, weight_I, eps):
    T, H, num_features = x_THI.shape
    out_THI = torch.empty_like(x_THI, memory_format=torch.contiguous_format)
    if out_THI.numel() == 0:
        return out_THI
    block = min(triton.next_power_of_2(num_features), _MAX_BLOCK)
    rows = max(1, _ELEMENTS_PER_PROGRAM // block)
    with on_device(x_THI):
        _rms_norm[(triton.cdiv(T * H, rows),)](
            *(x_THI, y_TI, weight_I, out_THI, *x_THI.stride()[:2], 0 if y_TI is None else y_TI.stride(0)),
            *(H, T * H, float(eps)),
            NUM_FEATURES=num_features,
            BLOCK=block,
            ROWS=rows,
            num_warps=min(_MAX_WARPS, max(1, rows * block // _ELEMENTS_PER_WARP)),
        )
    return out_THI
