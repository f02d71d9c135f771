"""Weights that are used where they lie, in a mapped file, in place of a copy.

A copy takes fresh memory, which the system clears and hands out page by page: that takes several times as long as
reading the file. A mapped file that was read before is there already, and several processes share it. It has to stay as
it is meanwhile: one that is removed or replaced by a rename does, one that is cut short ends the process.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor


def as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The parts as one flat tensor in their memory; None unless they lie in the CPU's one after the other.

    What they are views of stays valid as long as that tensor. A part that is not contiguous, not aligned to its
    elements or of another dtype than the first lies otherwise.
    """
    dtype, start = parts[0].dtype, parts[0].data_ptr()
    end = start
    for part in parts:
        # One with the negative bit holds the negative of what lies there.
        lies_there = part.device.type == "cpu" and part.is_contiguous() and not part.is_neg()
        if not lies_there or part.dtype != dtype or part.data_ptr() != end:
            return None
        end += part.nbytes
    if start == end or start % dtype.itemsize:
        return None
    memory = (ctypes.c_byte * (end - start)).from_address(start)
    memory.parts = list(parts)  # torch keeps the array, and the array what it is a view of
    return torch.frombuffer(memory, dtype=dtype)
