"""Exact merge of attention states over disjoint keys.

A state is ``(out (T, H, D), lse (T, H))`` with natural-log lse; the empty state has lse -inf. With more than two in one
pass, ``out = sum(w_p * out_p)`` with ``w_p = exp(lse_p - lse)`` and ``lse = log(sum(exp(lse_p)))`` (Hydragen,
arXiv:2402.05099, section 3.2), in float32, rounded once.

Shapes: P states, T queries, H heads, D head dimension.
"""

import math
from functools import cache

import torch

from kernels import simd
from kernels.backend import Backend
from kernels.dispatch import choose_backend
from kernels.simd import Kernel, Target

_MAX_STATES = 64  # that the vector code has room for


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the union of both key sets, in float32.

    ``out = w * out_a + (1 - w) * out_b`` with ``w = exp(lse_a) / (exp(lse_a) + exp(lse_b)) = sigmoid(lse_a - lse_b)``
    (FlashAttention, arXiv:2205.14135, section 3.1, for two blocks). Two empty states, whose outputs are 0, merge to the
    empty state.
    """
    # -inf - -inf is NaN: both are empty, any weight will do, since both outputs are 0.
    difference = (lse_a - lse_b).nan_to_num_(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
    out = torch.lerp(out_b.float(), out_a.float(), difference.sigmoid_().unsqueeze(-1))
    return out, torch.logaddexp(lse_a, lse_b)


def merge_stacked(
    outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor, backend: Backend | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the union of all key sets: ``out (T, H, D)`` and ``lse (T, H)``, both float32, as the inputs are,
    which are contiguous. What ``outs`` holds where a state is empty does not matter.

    Raises ValueError for a ``backend`` that cannot run here.
    """
    chosen = choose_backend(backend, outs_PTHD, lses_PTH, has_simd=len(outs_PTHD) <= _MAX_STATES)
    if chosen == Backend.TRITON:
        from kernels.gpu import merge  # here, as Triton takes long to import

        return merge.merge_stacked(outs_PTHD, lses_PTH, torch.float32)
    if chosen == Backend.SIMD:
        return _launch(outs_PTHD, lses_PTH)
    is_empty = lses_PTH == -math.inf
    lse_TH = lses_PTH.logsumexp(0)
    weights = (lses_PTH - lse_TH).exp().masked_fill(is_empty, 0.0)
    return (outs_PTHD.masked_fill(is_empty[..., None], 0.0) * weights[..., None]).sum(0), lse_TH


def _launch(outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    P, T, H, D = outs_PTHD.shape
    out_THD, lse_TH = outs_PTHD.new_empty(T, H, D), lses_PTH.new_empty(T, H)
    num_tasks, rows_per_task = simd.split_rows(T * H)
    _compiled(simd.host(), D).launch(
        num_tasks, T * H, rows_per_task, P, outs_PTHD, lses_PTH, out_THD, lse_TH
    )
    return out_THD, lse_TH


@cache
def _compiled(target: Target, head_dim: int) -> simd.CompiledKernel:
    k = Kernel("merge", target)
    weights = k.array(simd.F32, _MAX_STATES)
    num_rows, num_states = k.integer(0), k.integer(2)
    outs, lses, out, lse = (k.pointer(i, simd.F32) for i in (3, 4, 5, 6))
    with k.rows(0, 1) as row:
        best = k.variable(k.constant(-math.inf, simd.F32))
        with k.range(0, num_states) as state:
            best.value = best.value.maximum(lses[state * num_rows + row])
        # Of empty states alone: any finite shift makes their weights 0.
        shift = best.value.equals(-math.inf).choose(k.constant(0, simd.F32), best.value)
        total = k.variable(k.constant(0, simd.F32))
        with k.range(0, num_states) as state:
            weight = k.exp2(((lses[state * num_rows + row] - shift) * math.log2(math.e)).spread())[0]
            weights[state] = weight
            total.value = total.value + weight
        is_empty = total.value.equals(0.0)
        inverse = is_empty.choose(total.value, 1.0 / total.value).spread()

        def add(i, count):
            zero = k.constant(0, simd.F32, k.lanes)
            merged = k.variable(zero)
            with k.range(0, num_states) as state:
                part = (outs + (state * num_rows + row) * head_dim).load_padded(i, count, k.lanes)
                weight = weights[state]
                merged.value = merged.value + weight.equals(0.0).choose(zero, part * weight.spread())
            (out + row * head_dim).store(i, merged.value * inverse, count)

        k.each_vector(head_dim, add)
        lse[row] = is_empty.choose(k.constant(-math.inf, simd.F32), best.value + k.log(total.value))
    return k.compile()
