"""The exact merge of any number of attention states in one pass, by a Triton kernel.

Shapes: P states, T queries, H heads, D head dimension.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import on_device

_ROWS = 8  # queries and heads of a program. Chosen, not measured.


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
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    is_row = rows < num_rows
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for state in range(num_states):
        places = rows + tl.cast(state, tl.int64) * num_rows
        lse = tl.load(lses_ptr + places, mask=is_row, other=float("-inf"))
        is_there = (lse != float("-inf"))[:, None]  # the output of an empty state is not looked at
        part = tl.load(outs_ptr + places[:, None] * HEAD_DIM + dims[None, :], mask=mask & is_there, other=0.0)
        new_best = tl.maximum(best, lse, propagate_nan=tl.PropagateNan.ALL)
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight, rescale = tl.exp(lse - shift), tl.exp(best - shift)
        best, total = new_best, total * rescale + weight
        out = out * rescale[:, None] + part.to(tl.float32) * weight[:, None]
    is_empty = best == float("-inf")
    safe_total = tl.where(is_empty, 1.0, total)
    tl.store(lse_ptr + rows, tl.where(is_empty, float("-inf"), best + tl.log(safe_total)), mask=is_row)
    merged = (out / safe_total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * HEAD_DIM + dims[None, :], merged, mask=mask)


def merge_stacked(
    outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the union of the states' keys, which are disjoint: ``out (T, H, D)`` in ``dtype``, rounded once
    from float32, and ``lse (T, H)``. Both inputs are contiguous, ``lses`` in float32. What ``outs`` holds where a state
    is empty does not matter."""
    P, T, H, D = outs_PTHD.shape
    out, lse = outs_PTHD.new_empty(T, H, D, dtype=dtype), lses_PTH.new_empty(T, H)
    with on_device(outs_PTHD):
        _merge[(triton.cdiv(T * H, _ROWS),)](
            *(outs_PTHD, lses_PTH, out, lse, P, T * H),
            HEAD_DIM=D,
            BLOCK_D=triton.next_power_of_2(D),
            ROWS=_ROWS,
        )
    return out, lse
