"""What runs an operation. Every operation takes a ``backend`` argument, and chooses by itself where it is None."""

import os
from enum import StrEnum
from functools import cache
from importlib.util import find_spec

import torch


class Backend(StrEnum):
    """Where each of them can run is told by the operation."""

    SIMD = "simd"  # our vector code, compiled for the CPU at hand
    TRITON = "triton"  # our kernels for CUDA
    ATEN = "aten"  # PyTorch's own operations and attention kernels, on any device
    REFERENCE = "reference"  # attention written to be obviously right, on any device and in any dtype; slow


def triton_runs(device: torch.device) -> bool:
    """Whether our Triton kernels run there: on CUDA, and by Triton's interpreter, which is for tests, anywhere."""
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
