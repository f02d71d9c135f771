"""The gated activation of Llama's MLP (SwiGLU, arXiv:2002.05202), by a Triton kernel.

Shapes: T rows, F features of the MLP.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import on_device

_BLOCK = 1024  # features of a program. Chosen, not measured.


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, row_stride, num_features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = feature < num_features
    gates = gate_up_ptr + row * row_stride
    gate = tl.load(gates + feature, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + num_features + feature, mask=mask, other=0.0).to(tl.float32)
    # A denominator that is infinite gives 0, to which silu falls.
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + row * num_features + feature, (silu * up).to(out_ptr.dtype.element_ty), mask=mask)


def swiglu(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, ``(T, F)``, of ``(T, 2 F)``: the gates, then the ups. Rows are contiguous."""
    T, num_features = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = gate_up_TF.new_empty(T, num_features)
    if out_TF.numel() > 0:
        with on_device(gate_up_TF):
            _swiglu[(T, triton.cdiv(num_features, _BLOCK))](
                gate_up_TF, out_TF, gate_up_TF.stride(0), num_features, BLOCK=_BLOCK
            )
    return out_TF
