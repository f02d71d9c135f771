"""Maxima and masses of blocks of logits by Triton kernels, which read the logits once, in their own dtype.

Shapes: B rows of logits, R rows that are wanted, V entries, N blocks.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import on_device

_BLOCKS_PER_PROGRAM = 16  # Chosen, not measured.


@triton.jit
def _load_blocks(logits_ptr, row, stride, block, num_entries, BLOCK: tl.constexpr):
    """``(len(block), BLOCK)`` float32, -inf beyond the row's end."""
    entry = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logits = tl.load(logits_ptr + row * stride + entry, mask=entry < num_entries, other=float("-inf"))
    return logits.to(tl.float32)


@triton.jit
def _block_maxima(
    logits_ptr,  # (B, V)
    maxima_ptr,  # (B, N) float32
    stride,
    num_entries,
    num_blocks,
    BLOCK: tl.constexpr,
    NUM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * NUM + tl.arange(0, NUM)
    logits = _load_blocks(logits_ptr, row, stride, block, num_entries, BLOCK)
    has_nan = tl.max((logits != logits).to(tl.int32), 1) > 0  # which a maximum would pass over
    maxima = tl.where(has_nan, float("nan"), tl.max(logits, 1))
    tl.store(maxima_ptr + row * num_blocks + block, maxima, mask=block < num_blocks)


@triton.jit
def _block_masses(
    logits_ptr,  # (B, V)
    rows_ptr,  # (R,) int64; None: all rows
    peak_ptr,  # (R,) float32
    temperature_ptr,  # (R,) float32
    log_min_p_ptr,  # (R,) float32; None: no row has a min-p
    masses_ptr,  # (R, N) float64
    stride,
    num_entries,
    num_blocks,
    BLOCK: tl.constexpr,
    NUM: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * NUM + tl.arange(0, NUM)
    row = place if rows_ptr is None else tl.load(rows_ptr + place)
    logits = _load_blocks(logits_ptr, row, stride, block, num_entries, BLOCK)
    # Rounded as everywhere else, so that the same tokens pass min-p: a plain division here is an approximation.
    difference = logits - tl.load(peak_ptr + place)
    exponents = tl.div_rn(difference, tl.load(temperature_ptr + place))
    weights = tl.exp(exponents)
    if log_min_p_ptr is not None:
        weights *= (exponents >= tl.load(log_min_p_ptr + place)).to(tl.float32)  # a factor, so that NaN stays
    masses = tl.sum(weights.to(tl.float64), 1)
    tl.store(masses_ptr + place * num_blocks + block, masses, mask=block < num_blocks)


def block_maxima(logits_BV: torch.Tensor, block: int) -> torch.Tensor:
    """``(B, N)`` float32, NaN where a block holds any. Rows are contiguous; ``block`` is a power of two."""
    B, V = logits_BV.shape
    num_blocks = triton.cdiv(V, block)
    maxima_BN = logits_BV.new_empty(B, num_blocks, dtype=torch.float32)
    if maxima_BN.numel() > 0:
        with on_device(logits_BV):
            _block_maxima[(B, triton.cdiv(num_blocks, _BLOCKS_PER_PROGRAM))](
                logits_BV, maxima_BN, logits_BV.stride(0), V, num_blocks, BLOCK=block, NUM=_BLOCKS_PER_PROGRAM
            )
    return maxima_BN


def block_masses(
    logits_BV: torch.Tensor,
    rows_R: torch.Tensor | None,
    peak_R: torch.Tensor,
    temperature_R: torch.Tensor,
    log_min_p_R: torch.Tensor | None,
    block: int,
) -> torch.Tensor:
    """``(R, N)`` float64, as that of ``kernels.logit_blocks``. Rows are contiguous; ``block`` is a power of two.

    The exponential is the device's own, right to a few units in the last place of float32.
    """
    R, V = len(peak_R), logits_BV.shape[1]
    num_blocks = triton.cdiv(V, block)
    masses_RN = logits_BV.new_empty(R, num_blocks, dtype=torch.float64)
    if masses_RN.numel() > 0:
        with on_device(logits_BV):
            _block_masses[(R, triton.cdiv(num_blocks, _BLOCKS_PER_PROGRAM))](
                *(logits_BV, rows_R, peak_R, temperature_R, log_min_p_R, masses_RN),
                *(logits_BV.stride(0), V, num_blocks),
                BLOCK=block,
                NUM=_BLOCKS_PER_PROGRAM,
            )
    return masses_RN
