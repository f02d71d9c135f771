"""The tensor-parallel group: one process per device, the same program on every rank.

``torchrun`` starts the ranks; a single process needs no launcher. This is the only file that reads the launcher's
environment variables; everything else is given the group.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from engine.errors import InputError

T = TypeVar("T")

# Seconds in which a process whose connections have just broken is seen to have ended.
_ENDING_S = 1.0


class RankLostError(RuntimeError):
    """Another rank has ended, is stopped or does not answer, so that this one cannot go on.

    ``told_elsewhere`` says that another rank reports the cause.
    """

    def __init__(self, message: str, told_elsewhere: bool = False):
        super().__init__(message)
        self.told_elsewhere = told_elsewhere


class TPGroup:
    """Collectives over the ranks. With one rank each is the identity and nothing is initialised.

    A collective that fails because of another rank raises RankLostError.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu", peers: "_Peers | None" = None
    ):
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        self._peers = peers

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            self._exchange(dist.all_reduce, tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``(size, *tensor.shape)``, stacked in rank order."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(self.size, *tensor.shape)
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


@dataclass(frozen=True)
class _Process:
    """Where a rank runs. ``started`` tells it from a later process with its number."""

    place: str  # a process can only be looked at from the place that it runs in
    pid: int
    started: str

    @classmethod
    def own(cls) -> "_Process":
        pid = os.getpid()
        try:
            namespace = os.stat("/proc/self/ns/pid").st_ino
        except OSError:  # no Linux: nothing can be looked at
            return cls(f"{os.uname().nodename} {pid}", pid, "")
        _, started = _state_and_start(pid)
        return cls(f"{os.uname().nodename} {namespace}", pid, started)

    def has_ended(self) -> bool:
        state, started = _state_and_start(self.pid)
        return started != self.started or state in ("Z", "X")

    def is_stopped(self) -> bool:
        return _state_and_start(self.pid) in (("T", self.started), ("t", self.started))


def _state_and_start(pid: int) -> tuple[str, str]:
    """Of a process, as ``man 5 proc`` has them in ``stat``; empty when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


class _Peers:
    """What has become of the other ranks, as far as this host can tell.

    A rank that ends by itself says in the group's store that it leaves, and reports its own error; one that was killed
    has not left.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float):
        self._store, self._rank, self._timeout_s = dist.PrefixStore("peers", store), rank, timeout_s
        own = _Process.own()
        self._store.set(f"process {rank}", f"{own.place}/{own.pid}/{own.started}")
        self._others = {}
        for other in set(range(size)) - {rank}:
            place, pid, started = self._store.get(f"process {other}").decode().split("/")  # waits for it to come
            if place == own.place:
                self._others[other] = _Process(place, int(pid), started)
        self._handler = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def leave(self) -> None:
        with suppress(RuntimeError):  # the store may have ended with its process
            self._store.set(f"left {self._rank}", "")
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def explain(self, error: RuntimeError) -> RankLostError:
        """Of a collective that failed. Looks for the rank at fault; one that is stopped goes on, so that it can end."""
        deadline = time.monotonic() + _ENDING_S
        while True:
            if (killed := self._killed()) is not None:
                return killed
            if left := [rank for rank in self._others if self._has_left(rank)]:
                return RankLostError(f"rank {left[0]} has ended", told_elsewhere=True)
            if stopped := [rank for rank, process in self._others.items() if process.is_stopped()]:
                for rank in stopped:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(self._others[rank].pid, signal.SIGCONT)
                return self._lost(stopped, f"stopped, and did not answer for {self._timeout_s:g} s; run it again")
            if time.monotonic() > deadline:
                said = str(error).partition("\n")[0]
                return RankLostError(f"another rank did not answer, though none here has ended or is stopped: {said}")
            time.sleep(0.02)

    def _on_sigterm(self, *_) -> None:
        """The launcher ends all ranks when one has died, and nobody but this rank may be left to say so."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        killed = self._killed()
        raise SystemExit(128 + signal.SIGTERM) if killed is None or killed.told_elsewhere else killed

    def _killed(self) -> RankLostError | None:
        ended = [rank for rank, process in self._others.items() if process.has_ended() and not self._has_left(rank)]
        if not ended:
            return None
        return self._lost(ended, "dead: it was killed, or crashed; the launcher's report says by what")

    def _lost(self, ranks: list[int], what: str) -> RankLostError:
        """The lowest rank that is left tells it."""
        processes = ", ".join(f"rank {rank} (process {self._others[rank].pid})" for rank in ranks)
        message = f"{processes} {'is' if len(ranks) == 1 else 'are'} {what}"
        return RankLostError(message, told_elsewhere=bool(set(range(self._rank)) - set(ranks)))

    def _has_left(self, rank: int) -> bool:
        try:
            return self._store.check([f"left {rank}"])
        except RuntimeError:  # the store has ended with its process
            return False


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

    NCCL connects CUDA devices; gloo connects CPUs, and ranks that have to share a GPU. A collective, or a rank that is
    yet to join, is waited for ``timeout_s`` seconds at most; then RankLostError is raised, or NCCL ends the process.
    From here on SIGTERM, with which the launcher ends the ranks, raises: RankLostError when another rank has been
    killed, and SystemExit.
    """
    rank, size = launched_rank(), launched_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        return TPGroup(rank, size, chosen)
    one_gpu_each = chosen.type == "cuda" and torch.cuda.device_count() >= local_size
    timeout = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if one_gpu_each else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
        )
        peers = _Peers(store, rank, size, timeout_s)
    except dist.DistError as error:
        said = str(error).partition("\n")[0]
        raise RankLostError(f"the {size} ranks did not come together within {timeout_s:g} s: {said}") from error
    return TPGroup(rank, size, chosen, peers)
