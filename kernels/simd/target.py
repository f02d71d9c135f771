"""The CPU at hand, and whether vector code can be compiled for it and run on it."""

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

try:
    import llvmlite
    import llvmlite.binding as llvm
except ImportError:  # an optional wheel: the callers do without these kernels
    llvm = None

_MIN_LLVM = (20, 0, 0)  # whose addresses have no types


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for."""

    cpu: str  # LLVM's name
    features: str  # LLVM's, comma-separated
    lanes: int  # 32-bit lanes of a vector register
    num_registers: int
    has_bf16_pairs: bool  # an instruction that multiplies pairs of bfloat16 and adds both products to a float32

    @classmethod
    def avx2(cls) -> "Target":
        """Any x86-64 with AVX2, FMA and F16C."""
        return cls("x86-64-v3", "", lanes=8, num_registers=16, has_bf16_pairs=False)


@cache
def host() -> Target | None:
    """This machine, or None when kernels cannot be compiled for it or run on it."""
    if llvm is None or fork_join() is None or not llvm.get_process_triple().startswith("x86_64"):
        return None
    if llvm.llvm_version_info < _MIN_LLVM:
        warnings.warn(
            f"llvmlite {llvmlite.__version__} is too old for the CPU kernels, which need 0.46 or newer; PyTorch's own "
            "are used instead, which are slower",
            stacklevel=2,
        )
        return None
    features = llvm.get_host_cpu_features()
    if not all(features.get(name) for name in ("avx2", "fma", "f16c")):
        return None
    if not all(features.get(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl")):
        return Target.avx2()
    # LLVM splits 512-bit vectors in two on CPUs whose clock once fell when they were used.
    return Target(
        llvm.get_host_cpu_name(),
        features.flatten() + ",-prefer-256-bit",
        lanes=16,
        num_registers=32,
        has_bf16_pairs=features.get("avx512bf16", False),
    )


@cache
def fork_join() -> Callable | None:
    """libgomp's entry into a parallel region, as the PyTorch in this process is linked with it."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(path)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function
