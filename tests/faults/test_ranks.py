"""A rank that raises, is killed or is stopped: all end within 30 s, and the cause comes first."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from faults.processes import TINY, Running, cause, files

from engine.bench.results import read_cell

LIMIT_S = 30
RANKS = 2
SWEEP = (2, "64:256:1", 128, *TINY)
GENERATE = ("tiny", "--load-format", "dummy", "--device", "cpu", "--max-tokens", 4000, "--ignore-eos")


@pytest.fixture
def generating(start, tmp_path):
    """``scripts/run.py`` in the middle of generation."""

    def begin(*arguments: object, num_ranks: int = RANKS) -> Running:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("[5, 6, 7]\n")
        options = dict(num_ranks=num_ranks, terminal=True)
        running = start("scripts/run.py", *GENERATE, "--prompt-file", prompts, *arguments, **options)
        running.wait_until(lambda: " tokens" in running.stderr)
        return running

    return begin


@pytest.fixture
def sweeping(start, tmp_path):
    """``scripts/synth.py`` in the middle of a sweep, some while after its first cell."""

    def begin(*arguments: object, num_ranks: int = RANKS) -> Running:
        running = start("scripts/synth.py", tmp_path / "out", *SWEEP, *arguments, num_ranks=num_ranks)
        running.wait_until(lambda: any((tmp_path / "out").rglob("*.yaml")))
        time.sleep(random.Random(num_ranks).uniform(0, 0.5))
        return running

    return begin


def ends_with(running: Running, *parts: str, within_s: float = LIMIT_S) -> None:
    start = time.monotonic()
    done = running.finish(within_s)
    assert time.monotonic() - start < within_s
    assert done.status != 0
    assert done.stdout == ""
    for part in parts:
        assert part in cause(done)


def assert_whole(outdir: Path) -> None:
    for path in outdir.rglob("*.yaml"):
        read_cell(path)


def killed(running: Running, rank: int) -> str:
    """Kills the rank and returns what is to be said of it."""
    pid = running.rank(rank)
    os.kill(pid, signal.SIGKILL)
    return f"rank {rank} (process {pid}) is dead: it was killed, or crashed"


class TestKilled:
    def test_in_a_sweep(self, sweeping, tmp_path):
        running = sweeping()
        ends_with(running, "error: ", killed(running, 1))
        assert_whole(tmp_path / "out")
        assert not any(name.endswith(".partial") for name in files(tmp_path / "out"))

    @pytest.mark.slow
    def test_the_one_that_writes(self, sweeping, tmp_path):
        running = sweeping()
        ends_with(running, "error (rank 1): ", killed(running, 0))
        assert_whole(tmp_path / "out")

    @pytest.mark.slow
    @pytest.mark.parametrize("rank", [0, 1])
    def test_in_generation(self, generating, rank):
        running = generating()
        ends_with(running, killed(running, rank))

    @pytest.mark.slow
    def test_one_of_four(self, sweeping):
        running = sweeping(num_ranks=4)
        ends_with(running, "error: ", killed(running, 2))


class TestLauncher:
    @pytest.mark.slow
    def test_ranks_end_with_it(self, sweeping):
        running = sweeping()  # without a terminal, whose end would end them as well
        ranks = [running.rank(rank) for rank in range(RANKS)]
        (launcher,) = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in ranks}
        os.kill(launcher, signal.SIGKILL)
        deadline = time.monotonic() + LIMIT_S
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.1)


    @pytest.mark.slow
    @pytest.mark.parametrize("_", range(3))
    def test_ranks_that_are_started_again_know_nothing_of_those_before(self, start, _):
        running = start(Path(__file__).with_name("restarted.py"), num_ranks=RANKS, max_restarts=1)
        done = running.finish(60)
        expected = "".join(f"group {number}: [3.0, 3.0, 3.0], memory shared: True\n" for number in range(2))
        assert (done.status, done.stdout) == (0, expected), done.stderr


class TestStopped:
    TIMEOUT_S = 10

    def stops(self, running: Running, rank: int) -> None:
        pid = running.rank(rank)
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        what = f"rank {rank} (process {pid}) is stopped, and did not answer for {self.TIMEOUT_S} s; run it again"
        ends_with(running, what, within_s=self.TIMEOUT_S + LIMIT_S)
        assert time.monotonic() - start > self.TIMEOUT_S - 1  # it was given the time

    @pytest.mark.slow
    @pytest.mark.parametrize("rank", [0, 1])
    def test_in_generation(self, generating, rank):
        self.stops(generating("--timeout", self.TIMEOUT_S), rank)

    @pytest.mark.slow
    @pytest.mark.parametrize("rank", [0, 1])
    def test_in_a_sweep(self, sweeping, tmp_path, rank):
        self.stops(sweeping("--timeout", self.TIMEOUT_S), rank)
        assert_whole(tmp_path / "out")


    @pytest.mark.slow
    @pytest.mark.parametrize("rank", [0, 1])
    def test_before_they_have_come_together(self, start, tmp_path, rank):
        """The launcher would wait 30 s for its end."""
        timeout_s = 5  # less than imports may take, which a rank does before it waits
        running = start("scripts/synth.py", tmp_path / "out", *SWEEP, "--timeout", timeout_s, num_ranks=RANKS)
        running.wait_until(lambda: rank in running.pids().values())
        pid = running.rank(rank)
        os.kill(pid, signal.SIGSTOP)
        what = f"did not come together within {timeout_s} s: rank {rank} (process {pid}) stopped; run it again"
        ends_with(running, what, within_s=timeout_s + LIMIT_S)


class TestRaises:
    @pytest.mark.slow
    def test_in_generation(self, start):
        running = start(Path(__file__).with_name("generate.py"), num_ranks=RANKS)
        ends_with(running, "error (rank 1): RuntimeError: the callback broke", within_s=60)
        assert cause(running.finish()) == "error (rank 1): RuntimeError: the callback broke"

    @pytest.mark.slow
    def test_in_a_sweep(self, sweeping, tmp_path):
        """Rank 0 finds a file where it has a folder."""
        running, folder = sweeping(), tmp_path / "out" / "hydragen"
        folder.rename(tmp_path / "moved")
        folder.write_text("")
        ends_with(running, f"error: {folder}: File exists")
        assert_whole(tmp_path / "moved")


class TestTheLauncherIsEnded:
    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_no_rank_is_blamed(self, sweeping, tmp_path, number):
        running = sweeping()
        running.send(number)
        done = running.finish(LIMIT_S)
        assert done.status != 0
        assert not any(line.startswith("error") for line in done.stderr.splitlines())
        assert_whole(tmp_path / "out")
