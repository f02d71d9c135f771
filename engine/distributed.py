"""The tensor-parallel group: one process per device, the same program on every rank.

``torchrun`` starts the ranks; a single process needs no launcher. This is the only file that reads the launcher's
environment variables; everything else is given the group.
"""

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from engine.errors import InputError
from engine.host_exchange import HostExchange
from engine.peers import Peers, RankLostError, awaken_siblings, end_with_launcher

T = TypeVar("T")

_groups_joined = itertools.count()  # by this process, as by every other rank


class TPGroup:
    """Collectives over the ranks. With one rank each is the identity and nothing is initialised.

    A collective that fails because of another rank raises RankLostError. Tensors of ranks that share a host go through
    ``host``, where it is given.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | str = "cpu",
        peers: Peers | None = None,
        host: HostExchange | None = None,
    ):
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        self._peers, self._host = peers, host

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph can hold the collectives of tensors."""
        return self.size == 1 or dist.get_backend() == "nccl"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1 and not (self._host is not None and self._host.all_reduce(tensor)):
            self._exchange(dist.all_reduce, tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``(size, *tensor.shape)``, stacked in rank order."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        if self._host is not None:
            self._host.all_gather(tensor.contiguous(), gathered)
        else:
            self._exchange(dist.all_gather, list(gathered), tensor.contiguous())
        return gathered

    def broadcast(self, value):
        """Rank 0's ``value`` (anything that pickles) on every rank."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        self._exchange(dist.broadcast_object_list, box, 0, None, self._object_device())
        return box[0]

    def gather_objects(self, value) -> list:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box = [None] * self.size
        self._exchange(dist.all_gather_object, box, value)
        return box

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            self._exchange(dist.barrier)

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
            if self._peers is not None:
                self._peers.leave()
            dist.destroy_process_group()

    def _exchange(self, collective: Callable, *args) -> None:
        try:
            collective(*args)
        except RuntimeError as error:
            if self._peers is None or not _failed_between_ranks(error):
                raise
            raise self._peers.explain(error) from error

    def _object_device(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")


def _failed_between_ranks(error: RuntimeError) -> bool:
    """Whether a collective failed for its communication, and not for a mistake or for memory."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


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


def launched_size() -> int:
    """The number of ranks that ``torchrun`` started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def init_group(device: str | None = None, timeout_s: float = 600.0) -> TPGroup:
    """Joins the group that ``torchrun`` describes, or makes a group of one.

    NCCL connects CUDA devices; gloo connects CPUs, and ranks that have to share a GPU; on one host tensors of CPUs go
    through memory that they share. A collective, or a rank that is yet to join, is waited for ``timeout_s`` seconds at
    most; then RankLostError is raised, or NCCL ends the process. From here on SIGTERM, with which the launcher ends the
    ranks, and the system when ``torchrun`` is killed, raises: RankLostError when another rank has been killed, and
    SystemExit.
    """
    rank, size = launched_rank(), launched_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        return TPGroup(rank, size, chosen)
    if dist.is_initialized():
        raise InputError(
            "this process has joined the other ranks already; accepted: one group in a process; give the one that "
            "there is, as in LLM(model, group=group), or close it first"
        )
    if dist.is_torchelastic_launched():  # by torchrun; another parent may be a thread that comes and goes
        end_with_launcher()
    one_gpu_each = chosen.type == "cuda" and torch.cuda.device_count() >= local_size
    timeout = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store.set_timeout(timeout)
        # One store serves ranks that the launcher has started again, and groups that follow each other: without a
        # prefix they would find what those before have left.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"restart {restart}, group {next(_groups_joined)}", store)
        dist.init_process_group(
            "nccl" if one_gpu_each else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
        )
        peers = Peers(store, rank, size, timeout_s)
        on_one_host = chosen.type == "cpu" and peers.are_all_here
        host = HostExchange.join(store, rank, size, peers.check) if on_one_host else None
    except RuntimeError as error:
        if not _failed_between_ranks(error):
            raise
        stopped = awaken_siblings()
        cause = f"{', '.join(stopped)} stopped; run it again" if stopped else str(error).partition("\n")[0]
        raise RankLostError(f"the {size} ranks did not come together within {timeout_s:g} s: {cause}") from error
    peers.take_sigterm()  # only now, as the waiting above is not Python's, and could not be ended
    return TPGroup(rank, size, chosen, peers, host)
