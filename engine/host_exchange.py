"""Collectives between the ranks of one host, through memory that they share.

To sum the activations of a decode step gloo wakes threads and sends the numbers through sockets; with two sums a layer
that can take as long as the rest of the step. Here every rank writes its part to memory that all have mapped, raises
its counter, and waits for those of the others by looking at them. ``scripts/scaling.py`` measures what is left.

What makes it safe: a processor of the x86 family makes one thread's writes visible in the order in which they were
made, so who sees a counter sees the part that was written before it. There are two places for each rank's part, taken
in turns. A rank can only be writing to one of them again when all others have raised their counters for the other, and
they do that after they have read the first.
"""

import mmap
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

SLOT_BYTES = 2**20  # of a rank's part at a time; more is exchanged in pieces
_LINE_BYTES = 64  # each counter has a cache line to itself
_TOKEN_BYTES = 16

# How long a rank looks without a pause, then offering its core to others, before it sleeps between looks.
_LOOKS = 500
_PATIENCE_S = 0.02
_NAP_S = 0.0005
_ASK_EVERY_S = 0.1
_LONGEST_LOOK_S = 1.0  # what lasts longer is a time in which this process was stopped, and the others may have been

WhileWaiting = Callable[[float], Exception | None]

_SUMMED = (torch.float32, torch.bfloat16, torch.float16)


class HostExchange:
    """One rank's end of the memory.

    Args:
        memory: ``size_in_bytes(size)`` bytes, zeroed, that all ranks see.
        rank, size: which rank this is, and of how many.
        while_waiting: called now and then with the seconds for which another rank has been waited for. It raises when
            these are too many; what it returns is raised if the rank really has not come.
    """

    def __init__(
        self, memory: mmap.mmap | bytearray, rank: int, size: int, while_waiting: WhileWaiting
    ) -> None:
        self._rank, self._while_waiting = rank, while_waiting
        # Of 64 bits, aligned: read and written at once, faster than through numpy.
        self._counters = memoryview(memory)[: size * _LINE_BYTES].cast("q")
        self._places = [rank * _LINE_BYTES // 8 for rank in range(size)]
        parts = torch.frombuffer(memory, dtype=torch.uint8, offset=size * _LINE_BYTES, count=2 * size * SLOT_BYTES)
        self._parts = parts.view(2, size, SLOT_BYTES)
        self._count = 0  # exchanges that this rank has begun

    @classmethod
    def join(
        cls, store: dist.Store, rank: int, size: int, while_waiting: WhileWaiting
    ) -> "HostExchange | None":
        """The exchange of a group whose ranks run on this host; None, on every rank, where it cannot be had.

        ``store`` is the group's. Every rank makes the same call.
        """
        store = dist.PrefixStore("host exchange", store)
        file = _new_memory(store, size) if rank == 0 else None
        memory = _map_memory(store, size)
        store.set(f"rank {rank}", "" if memory is None else "mapped")
        are_mapped = [store.get(f"rank {other}") == b"mapped" for other in range(size)]  # waits for each
        if file is not None:
            os.close(file)
        return cls(memory, rank, size, while_waiting) if all(are_mapped) else None

    def all_reduce(self, tensor: torch.Tensor) -> bool:
        """Sums over the ranks, in place, in float32 and rounded once, with the same bits on each; False for a tensor
        that is left as it is, of a dtype that is not summed here or not contiguous."""
        if tensor.dtype not in _SUMMED or not tensor.is_contiguous():
            return False
        flat = tensor.view(-1)
        step = SLOT_BYTES // tensor.itemsize
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step]
            part.copy_(self._exchange(part).sum(0, dtype=torch.float32))
        return True

    def all_gather(self, tensor: torch.Tensor, gathered: torch.Tensor) -> None:
        """Copies every rank's ``tensor`` (contiguous) to ``gathered`` (size, *its shape)."""
        flat, all_flat = tensor.view(-1), gathered.view(len(self._places), -1)
        step = SLOT_BYTES // tensor.itemsize
        for first in range(0, flat.numel(), step):
            part = slice(first, first + step)
            all_flat[:, part] = self._exchange(flat[part])

    def _exchange(self, part: torch.Tensor) -> torch.Tensor:
        """Every rank's ``part`` (n,), as (size, n), to be read before the next exchange but one begins."""
        self._count += 1
        parts = self._parts[self._count % 2, :, : part.nbytes].view(part.dtype)
        parts[self._rank].copy_(part)
        self._counters[self._places[self._rank]] = self._count
        self._wait()
        return parts

    def _wait(self) -> None:
        for _ in range(_LOOKS):
            if self._all_are_here():
                return
        began = asked = time.monotonic()
        waited_s = 0.0
        while not self._all_are_here():
            now = time.monotonic()
            if now - asked > _ASK_EVERY_S:
                waited_s += min(now - asked, _LONGEST_LOOK_S)
                asked = now
                lost = self._while_waiting(waited_s)
                # The last one may have come, and gone on to its end, meanwhile.
                if lost is not None and not self._all_are_here():
                    raise lost
            if now - began < _PATIENCE_S:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)

    def _all_are_here(self) -> bool:
        counters, count = self._counters, self._count
        return all(counters[place] >= count for place in self._places)


def size_in_bytes(size: int) -> int:
    """Of the memory of ``size`` ranks."""
    return size * (_LINE_BYTES + 2 * SLOT_BYTES) + _TOKEN_BYTES


def _new_memory(store: dist.Store, size: int) -> int | None:
    """Makes the memory and says in the store where it is. It is no file that has a name: whatever ends the ranks,
    nothing is left."""
    file, address = None, ""
    if sys.platform.startswith("linux") and platform.machine() in ("x86_64", "AMD64"):
        token = secrets.token_bytes(_TOKEN_BYTES)
        try:
            file = os.memfd_create("tributary")
            os.posix_fallocate(file, 0, size_in_bytes(size))  # now, rather than by a signal when it is written to
            os.pwrite(file, token, size_in_bytes(size) - _TOKEN_BYTES)
            address = f"/proc/{os.getpid()}/fd/{file} {token.hex()}"
        except (AttributeError, OSError):  # Python was built without it, the system does not allow it, or has no room
            pass
    store.set("memory", address)
    return file


def _map_memory(store: dist.Store, size: int) -> mmap.mmap | None:
    """What ``_new_memory`` has made; None where it has not, this process may not open it, or it is something else."""
    address = store.get("memory").decode()
    if not address:
        return None
    path, token = address.split()
    try:
        with Path(path).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size_in_bytes(size))
    except (OSError, ValueError):  # ValueError: it is shorter
        return None
    return memory if memory[-_TOKEN_BYTES:].hex() == token else None
