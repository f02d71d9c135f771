"""Memory in pages of 2 MiB in place of 4 KiB: 512 times fewer faults when it is first written to."""

import ctypes
import mmap
import sys

from torch import Tensor


def use_huge_pages(tensor: Tensor) -> None:
    """Asks the system to back a tensor with huge pages, as far as it was not written to. No more than a hint.

    Does nothing for a tensor that is not on the CPU, or where there is no such request (it is Linux's).
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:  # an error, as of a kernel built without huge pages, leaves the memory as it is
        _madvise(start, end - start, mmap.MADV_HUGEPAGE)


def _madvise(address: int, num_bytes: int, advice: int) -> None:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function(address, num_bytes, advice)
