"""What has become of the other ranks when one of them does not answer."""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

# Seconds in which a process whose connections have just broken is seen to have ended.
_ENDING_S = 1.0
# Seconds in which the launcher, having seen that a rank has ended, sends SIGTERM to the others. It looks every 0.1 s.
_LAUNCHER_S = 10.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STOPPED = ("T", "t")  # by a signal, by a debugger
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


class RankLostError(RuntimeError):
    """Another rank has ended, is stopped or does not answer, so that this one cannot go on.

    ``told_elsewhere`` says that another rank reports the cause.
    """

    def __init__(self, message: str, told_elsewhere: bool = False):
        super().__init__(message)
        self.told_elsewhere = told_elsewhere


def end_with_launcher() -> None:
    """From now on the system sends SIGTERM to this process when the one that started it has ended. A launcher that is
    killed would otherwise leave its ranks running. Linux only; elsewhere nothing is done."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def awaken_siblings() -> list[str]:
    """The ranks that this one's launcher has started here and that are stopped, each in words. They go on, so that they
    can be ended.

    For a rank that waits for others of which nothing is known yet. Linux only; elsewhere none is found.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        state, parent, _ = _status(int(folder.name))
        if state not in _STOPPED or parent != str(os.getppid()):
            continue
        with suppress(OSError):  # it has ended, or belongs to another user
            variables = (folder / "environ").read_text(errors="replace").split("\0")
            environment = dict(variable.partition("=")[::2] for variable in variables)
            if all(environment.get(name) == os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")):
                os.kill(int(folder.name), signal.SIGCONT)
                found.append(f"rank {environment.get('RANK')} (process {folder.name})")
    return sorted(found)


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
            # Hosts may have equal names, and the number of a host's first namespace is the same everywhere.
            host, namespace = _BOOT_ID.read_text().strip(), os.stat("/proc/self/ns/pid").st_ino
        except OSError:  # no Linux: nothing can be looked at
            return cls(f"{os.uname().nodename} {pid}", pid, "")
        _, _, started = _status(pid)
        return cls(f"{host} {namespace}", pid, started)

    def has_ended(self) -> bool:
        state, _, started = _status(self.pid)
        return started != self.started or state in ("Z", "X")

    def is_stopped(self) -> bool:
        state, _, started = _status(self.pid)
        return state in _STOPPED and started == self.started


def _status(pid: int) -> tuple[str, str, str]:
    """A process's state, parent and start, as ``man 5 proc`` has them in ``stat``; empty when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", "", ""
    return fields[0], fields[1], fields[19]


class Peers:
    """What has become of the other ranks, as far as this host can tell.

    A rank that ends by itself says in the group's store that it leaves, and reports its own error; one that was killed
    has not left.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float):
        self._store, self._rank, self._size = dist.PrefixStore("peers", store), rank, size
        self._timeout_s = timeout_s
        own = _Process.own()
        self._store.set(f"process {rank}", f"{own.place}/{own.pid}/{own.started}")
        self._others = {}
        for other in set(range(size)) - {rank}:
            place, pid, started = self._store.get(f"process {other}").decode().split("/")  # waits for it to come
            if place == own.place:
                self._others[other] = _Process(place, int(pid), started)
        self._handler = None
        self._due_until = 0.0  # as time.monotonic() has it

    def take_sigterm(self) -> None:
        """From now on SIGTERM raises, in place of ending the process at once, wherever Python can act on it."""
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def leave(self) -> None:
        with suppress(RuntimeError):  # the store may have ended with its process
            self._store.set(f"left {self._rank}", "")
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._after_leaving if self._is_one_due() else self._handler)

    @property
    def are_all_here(self) -> bool:
        """Whether all ranks run on this host, where they see each other; if so, each of them says so."""
        return len(self._others) == self._size - 1

    def check(self, waited_s: float) -> RankLostError | None:
        """What has become of a rank that has ended, so that it is not going to come if it has not yet.

        Raises RankLostError when others have been waited for too long. One that was stopped goes on then, and may come
        after all: it is to end all the same.
        """
        if waited_s > self._timeout_s:
            raise self.explain(RuntimeError(f"waited for {waited_s:.0f} s"))
        if self._killed() is not None or any(self._has_left(rank) for rank in self._others):
            return self.explain(RuntimeError("a rank has ended"))
        return None

    def explain(self, error: RuntimeError) -> RankLostError:
        """Of a collective that failed. Looks for the rank at fault; one that is stopped goes on, so that it can end.

        When it is this rank that is to tell it, the next SIGTERM is let pass, if it comes soon: it is the launcher's,
        which has seen the other rank end as well, and the error is on its way already.
        """
        explained = self._explain(error)
        if not explained.told_elsewhere:
            self._due_until = time.monotonic() + _LAUNCHER_S
        return explained

    def _explain(self, error: RuntimeError) -> RankLostError:
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

    def _is_one_due(self) -> bool:
        return time.monotonic() < self._due_until

    def _after_leaving(self, number: int, _) -> None:
        """SIGTERM is what it was before the group, but for the one that is due."""
        passes, self._due_until = self._is_one_due(), 0.0
        signal.signal(number, self._handler)
        if not passes:
            os.kill(os.getpid(), number)

    def _on_sigterm(self, *_) -> None:
        """The launcher ends all ranks when one has died, and nobody but this rank may be left to say so."""
        if self._is_one_due():
            self._due_until = 0.0
            return
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
