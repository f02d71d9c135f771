"""The gated activation of Llama's MLP (SwiGLU, arXiv:2002.05202).

Shapes: T rows, F features of the MLP.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F

from kernels import simd
from kernels.backend import Backend
from kernels.dispatch import choose_backend
from kernels.simd import Kernel, Target


def swiglu(gate_up_TF: torch.Tensor, backend: Backend | None = None) -> torch.Tensor:
    """``silu(gate) * up``, ``(T, F)``, of ``(T, 2 F)``: the gates, then the ups.

    Raises ValueError for a ``backend`` that cannot run here.
    """
    chosen = choose_backend(backend, gate_up_TF)
    if chosen == Backend.TRITON:
        from kernels.gpu import swiglu as gpu  # here, as Triton takes long to import

        return gpu.swiglu(gate_up_TF)
    if chosen == Backend.ATEN:
        gate, up = gate_up_TF.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    T, num_features = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = gate_up_TF.new_empty(T, num_features)
    num_tasks, rows_per_task = simd.split_rows(T)
    _compiled(simd.host(), gate_up_TF.dtype, num_features).launch(
        num_tasks, T, rows_per_task, gate_up_TF, gate_up_TF.stride(0), out_TF
    )
    return out_TF


@cache
def _compiled(target: Target, dtype: torch.dtype, num_features: int) -> simd.CompiledKernel:
    k = Kernel("swiglu", target)
    element = simd.FLOATS[dtype]
    with k.rows(0, 1) as row:
        gates = k.pointer(2, element) + row * k.integer(3)
        ups, out = gates + num_features, k.pointer(4, element) + row * num_features

        def activate(i, count):
            gate = gates.load_floats(i, count)
            # The denominator must stay finite; past this the quotient is under 2 ** -126 of the gate.
            exponent = (gate * -math.log2(math.e)).minimum(126.0)
            out.store_floats(i, gate / (k.exp2(exponent) + 1.0) * ups.load_floats(i, count), count)

        k.each_vector(num_features, activate)
    return k.compile()
