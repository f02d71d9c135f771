"""Tensors between pages that may not be touched: a kernel that reads or writes beside one ends the process."""

import ctypes
import mmap

import torch

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PAGE = mmap.PAGESIZE
_NONE, _READ_WRITE = 0, 3


def guarded(tensor: torch.Tensor, *, at_end: bool) -> torch.Tensor:
    """A contiguous copy that ends where the forbidden page after it begins, or begins where the one before it ends.

    The memory is never given back. A tensor without elements lies there too.
    """
    num_bytes = tensor.nbytes
    inside = max(1, -(-num_bytes // _PAGE)) * _PAGE
    private_and_anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _LIBC.mmap(None, inside + 2 * _PAGE, _NONE, private_and_anonymous, -1, 0)
    assert address != ctypes.c_void_p(-1).value, "no memory"
    assert _LIBC.mprotect(address + _PAGE, inside, _READ_WRITE) == 0
    offset = inside - num_bytes if at_end else 0
    memory = (ctypes.c_char * inside).from_address(address + _PAGE)
    if tensor.numel() == 0:  # no buffer may be empty: one of one element, of which nothing is taken
        whole = torch.frombuffer(memory, dtype=tensor.dtype, count=1)
        return whole[:0].view(tensor.shape)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)
