"""Commands as real processes that a test may kill, stop or starve, and that are gone when the test is over."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from commands import ROOT, Done

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
TINY = ("--model-name", "tiny", "--load-format", "dummy", "--device", "cpu", "--num-iters", 1, "--num-warmup", 0)
_MARK = "FAULT_TEST"
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Running:
    """``Running(folder, "scripts/x.py", "argument", ...)``: a command that has been started.

    Every process of it, of whatever session, carries a mark of its own in its environment. With ``terminal`` its stderr
    is one, on which commands show how far they are.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        num_ranks: int = 1,
        max_restarts: int = 0,
        terminal: bool = False,
        limit: Callable[[], None] | None = None,
    ):
        mark = str(uuid.uuid4())
        self._mark = f"{_MARK}={mark}"
        self._stdout, self._stderr = folder / f"{mark}.out", folder / f"{mark}.err"
        launcher = (*TORCHRUN, f"--max-restarts={max_restarts}", f"--nproc_per_node={num_ranks}")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm", _MARK: mark}
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            master, slave = pty.openpty() if terminal else (None, stderr.fileno())
            self._process = subprocess.Popen(
                [sys.executable, *(launcher if num_ranks > 1 else ()), *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=slave,
                start_new_session=True,
                preexec_fn=limit,
            )
        if terminal:
            os.close(slave)
            threading.Thread(target=self._copy, args=(master,), daemon=True).start()

    def _copy(self, master: int) -> None:
        with self._stderr.open("ab") as file, os.fdopen(master, "rb", buffering=0) as terminal:
            try:
                while data := terminal.read(4096):
                    file.write(data)
                    file.flush()
            except OSError:  # no process has it open any more
                pass

    @property
    def stderr(self) -> str:
        text = self._stderr.read_text(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        return _TERMINAL_CODES.sub("", text)

    def pids(self) -> dict[int, int | None]:
        """Every process that is left, and its rank, if it is one."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and "\nState:\tZ" not in (folder / "status").read_text():
                    environment = (folder / "environ").read_text(errors="replace").split("\0")
                    if self._mark in environment:
                        rank = next((e for e in environment if e.startswith("RANK=")), None)
                        found[int(folder.name)] = rank and int(rank.removeprefix("RANK="))
            except OSError:  # it has ended meanwhile
                pass
        return found

    def rank(self, rank: int) -> int:
        return next(pid for pid, its_rank in self.pids().items() if its_rank == rank)

    def send(self, number: signal.Signals) -> None:
        """To the process that was started."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, f"it has ended: {self.stderr}"
            assert time.monotonic() < deadline, f"it has not come to this in {timeout_s} s: {self.stderr}"
            time.sleep(0.005)

    def finish(self, timeout_s: float = 120) -> Done:
        """Waits for its end, and that of all its processes."""
        deadline = time.monotonic() + timeout_s
        status = self._process.wait(timeout_s)
        while left := self.pids():
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.05)
        return Done(status, self._stdout.read_text(errors="replace"), self.stderr)

    def kill(self) -> None:
        while left := self.pids():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)
        self._process.wait()


def cause(done: Done) -> str:
    """The first line that tells of an error, which no traceback may come before."""
    lines = done.stderr.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("error")), None)
    assert first is not None, done.stderr
    assert not any("Traceback" in line for line in lines[:first]), done.stderr
    return lines[first]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
