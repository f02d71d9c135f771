"""The tensor-parallel group: one process per device, the same program on every rank.

``torchrun`` starts the ranks; a single process needs no launcher. This is the only file that reads the launcher's
environment variables; everything else is given the group.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from engine.errors import InputError

T = TypeVar("T")


class TPGroup:
    """Collectives over the ranks. With one rank each is the identity and nothing is initialised."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu"):
        self.rank = rank
        self.size = size
        self.device = torch.device(device)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``(size, *tensor.shape)``, stacked in rank order."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered), tensor.contiguous())
        return gathered

    def broadcast(self, value):
        """Rank 0's ``value`` (anything that pickles) on every rank."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=self._object_device())
        return box[0]

    def gather_objects(self, value) -> list:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def on_rank_0(self, action: Callable[[], T]) -> T:
        """What ``action``, which rank 0 alone runs, returns, on every rank.

        An InputError or OSError of it is raised on every rank, so that none waits for a rank that has given up.
        """
        result, failure = None, None
        if self.rank == 0:
            try:
                result = action()
            except (InputError, OSError) as error:
                failure = error
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            raise failure
        return result

    def close(self) -> None:
        """Leaves the group; without it gloo aborts the process at exit."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _object_device(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")


def choose_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The device of a rank. ``name`` is ``cpu``, ``cuda``, ``cuda:N``, or None for CUDA where there is one."""
    available = torch.cuda.device_count()
    if name is None:
        name = "cuda" if available else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is not known; accepted: cpu, cuda, cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"device {name!r} is not supported; accepted: cpu, cuda, cuda:N")
    if not available:
        raise InputError(f"device {name!r} was asked for, but PyTorch sees no CUDA device; use --device cpu")
    index = device.index if device.index is not None else local_rank % available
    if index >= available:
        raise InputError(f"device {name!r} was asked for, but there are {available}: cuda:0 to cuda:{available - 1}")
    return torch.device("cuda", index)


def launched_rank() -> int:
    """The rank that ``torchrun`` gave this process, known before it joins the group; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def init_group(device: str | None = None, timeout_s: float = 600.0) -> TPGroup:
    """Joins the group that ``torchrun`` describes, or makes a group of one.

    NCCL connects CUDA devices; gloo connects CPUs, and ranks that have to share a GPU. A collective that waits longer
    than ``timeout_s`` seconds raises.
    """
    rank, size = launched_rank(), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        one_gpu_each = chosen.type == "cuda" and torch.cuda.device_count() >= local_size
        dist.init_process_group(
            "nccl" if one_gpu_each else "gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )
    return TPGroup(rank, size, chosen)
