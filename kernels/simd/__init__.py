"""Vector code for the CPU at hand, written in Python and compiled by LLVM (the llvmlite wheel; no toolchain needed).

A ``Kernel`` records vector code; compiled, it runs on the threads of PyTorch's own OpenMP pool (a second pool would
fight it for the cores: OpenMP's idle threads spin), which claim tasks one by one.

``host()`` is None where this does not work: another architecture than x86-64 with AVX2, no llvmlite, no OpenMP.
"""

import torch

from kernels.simd import language
from kernels.simd.compiled import CompiledKernel
from kernels.simd.language import Kernel, Pointer, Value, Variable
from kernels.simd.target import Target, host

if language.ir is not None:
    from kernels.simd.language import BF16, F16, F32, F64, FLOATS, I8, I16, I32, I64

__all__ = [
    "BF16", "F16", "F32", "F64", "FLOATS", "I8", "I16", "I32", "I64", "CompiledKernel", "Kernel", "Pointer", "Target",
    "Value", "Variable", "host", "split_rows",
]  # fmt: skip


def split_rows(num_rows: int) -> tuple[int, int]:
    """``(tasks, rows of each)``: a few tasks a thread, so that one that is held up does not hold up all."""
    rows_per_task = max(1, -(-num_rows // (4 * torch.get_num_threads())))
    return -(-num_rows // rows_per_task), rows_per_task
