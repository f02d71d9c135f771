"""The exact merge of any number of attention states in one pass, by a Triton kernel.

Shapes: P states, T queries, H heads, D head dimension.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import on_device

# States that a program takes at once, and queries and heads that it has where these are fewer. Chosen, not measured.
_STATES = 32
_ROWS_TIMES_STATES = 32


@triton.jit
def _merge(
    outs_ptr,  # (P, T * H, D)
    lses_ptr,  # (P, T * H) float32
    out_ptr,  # (T * H, D)
    lse_ptr,  # (T * H,) float32
    num_states,
    num_rows,  # T * H
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STATES: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    is_row, is_dim = rows < num_rows, dims < HEAD_DIM
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, num_states, STATES):
        states = first + tl.arange(0, STATES)
        places = rows[:, None] + states[None, :].to(tl.int64) * num_rows
        mask = is_row[:, None] & (states < num_states)[None, :]
        lses = tl.load(lses_ptr + places, mask=mask, other=float("-inf"))
        new_best = tl.maximum(best, tl.max(lses, 1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights, rescale = tl.exp(lses - shift[:, None]), tl.exp(best - shift)
        best, total = new_best, total * rescale + tl.sum(weights, 1)
        # The output of an empty state is not looked at.
        mask = (mask & (lses != float("-inf")))[:, :, None] & is_dim[None, None, :]
        parts = tl.load(outs_ptr + places[:, :, None] * HEAD_DIM + dims[None, None, :], mask=mask, other=0.0)
        out = out * rescale[:, None] + tl.sum(parts.to(tl.float32) * weights[:, :, None], 1)
    is_empty = total == 0.0  # NaN is not: it shows in the total, which a maximum may have passed over
    safe_total = tl.where(is_empty, 1.0, total)
    tl.store(lse_ptr + rows, tl.where(is_empty, float("-inf"), best + tl.log(safe_total)), mask=is_row)
    merged = (out / safe_total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * HEAD_DIM + dims[None, :], merged, mask=is_row[:, None] & is_dim[None, :])


def merge_stacked(
    outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the union of the states' keys, which are disjoint: ``out (T, H, D)`` in ``dtype``, rounded once
    from float32, and ``lse (T, H)``. Both inputs are contiguous, ``lses`` in float32. What ``outs`` holds where a state
    is empty does not matter."""
    P, T, H, D = outs_PTHD.shape
    out, lse = outs_PTHD.new_empty(T, H, D, dtype=dtype), lses_PTH.new_empty(T, H)
    if T * H == 0:
        return out, lse
    states = min(triton.next_power_of_2(P), _STATES)
    rows = _ROWS_TIMES_STATES // states
    with on_device(outs_PTHD):
        _merge[(triton.cdiv(T * H, rows),)](
            *(outs_PTHD, lses_PTH, out, lse, P, T * H),
            HEAD_DIM=D,
            BLOCK_D=triton.next_power_of_2(D),
            STATES=states,
            ROWS=rows,
        )
    return out, lse
