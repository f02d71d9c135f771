"""A batch that is stopped, killed or out of room: what it wrote is whole, and the same command completes it."""

import os
import random
import resource
import signal
from pathlib import Path

import pytest
from batches import completion, results, write_batch
from commands import Command, assert_mistake
from faults.processes import Running, cause, files

NUM_REQUESTS = 300
SHARED = list(range(5, 105))
# Few at a time, so that some end in every moment.
OPTIONS = ("--load-format", "dummy", "--device", "cpu", "--max-batch-size", 4)


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """A second's work or two, with lines that are none in between."""
    lengths = random.Random(0)
    lines = [
        completion(str(i), [*SHARED, i], max_tokens=lengths.randrange(1, 30), ignore_eos=True)
        for i in range(NUM_REQUESTS)
    ]
    lines[7::50] = [b"bad"] * len(lines[7::50])
    return write_batch(tmp_path_factory.mktemp("requests") / "in.jsonl", *lines)


@pytest.fixture
def batch(start, requests):
    def begin(output: Path, *arguments: object, **options) -> Running:
        return start("scripts/run_batch.py", "tiny", requests, output, *OPTIONS, *arguments, **options)

    return begin


@pytest.fixture(scope="module")
def undisturbed(requests, tmp_path_factory):
    """The lines of results that nothing has disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    assert Command("scripts/run_batch.py")("tiny", requests, output, *OPTIONS).status == 0
    return set(output.read_bytes().splitlines(keepends=True))


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def assert_whole(output: Path, undisturbed: set[bytes]) -> int:
    """Every line is one of an undisturbed run's, and none is there twice. Returns how many there are."""
    lines = output.read_bytes().splitlines(keepends=True) if output.exists() else []
    assert set(lines) <= undisturbed and len(set(lines)) == len(lines)
    return len(lines)


def assert_completed(running: Running, output: Path, undisturbed: set[bytes]) -> None:
    done = running.finish()
    assert done.status == 0, done.stderr
    assert assert_whole(output, undisturbed) == len(undisturbed) == NUM_REQUESTS


class TestStopped:
    def stop(self, batch, output: Path, undisturbed, number: signal.Signals, shares: list[float], **options) -> None:
        """Each time when the file has grown to this share of the whole."""
        total = sum(map(len, undisturbed))
        times_stopped = found = 0
        for share in sorted(shares):
            running = batch(output, **options)
            running.wait_until(lambda share=share: size(output) > share * total)
            running.send(number)
            done = running.finish()
            times_stopped += done.status != 0
            if number != signal.SIGKILL:
                assert "Traceback" not in done.stderr and "error" not in done.stderr, done.stderr
                before, found = found, assert_whole(output, undisturbed)
                assert found >= before  # what there was stays
        assert times_stopped > len(shares) / 2
        assert_completed(batch(output, **options), output, undisturbed)

    def test_once(self, batch, undisturbed, tmp_path):
        self.stop(batch, tmp_path / "out.jsonl", undisturbed, signal.SIGKILL, [0.3])

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_at_random_moments(self, batch, undisturbed, tmp_path, number):
        moments = random.Random(number)
        self.stop(batch, tmp_path / "out.jsonl", undisturbed, number, [moments.random() * 0.9 for _ in range(6)])

    @pytest.mark.slow
    def test_between_windows(self, batch, undisturbed, tmp_path):
        output = tmp_path / "out.jsonl"
        running = batch(output, "--window-requests", 20)
        running.wait_until(lambda: size(output) > 0.5 * sum(map(len, undisturbed)))
        running.send(signal.SIGKILL)
        running.finish()
        assert_completed(batch(output, "--window-requests", 30), output, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed(batch, undisturbed, tmp_path, rank):
    output = tmp_path / "out.jsonl"
    running = batch(output, num_ranks=2)
    running.wait_until(lambda: size(output) > 0.3 * sum(map(len, undisturbed)), timeout_s=120)
    pid = running.rank(rank)
    os.kill(pid, signal.SIGKILL)
    done = running.finish(30)
    assert done.status != 0
    assert f"rank {rank} (process {pid}) is dead: it was killed, or crashed" in cause(done)
    # One rank goes on where two were stopped.
    assert_completed(batch(output), output, undisturbed)


class TestNoRoom:
    @pytest.mark.slow
    @pytest.mark.parametrize("num_ranks", [1, 2])
    def test_on_a_full_disk(self, batch, undisturbed, small_disk, num_ranks):
        output, filler = small_disk / "out.jsonl", small_disk / "filler"
        filler.write_bytes(bytes(2**20 - 2**16))
        done = batch(output, num_ranks=num_ranks).finish()
        line = f"error: {output}: No space left on device; the results in it are whole: make room, and run the same "
        assert cause(done).startswith(line)
        if num_ranks == 1:
            assert_mistake(done, line)
        assert 0 < assert_whole(output, undisturbed) < NUM_REQUESTS
        assert output.read_bytes().endswith(b"\n")

        filler.unlink()
        assert_completed(batch(output, num_ranks=num_ranks), output, undisturbed)

    @pytest.mark.slow
    def test_on_one_that_is_full_from_the_start(self, batch, small_disk):
        (small_disk / "filler").write_bytes(bytes(2**20))
        assert_mistake(batch(small_disk / "out.jsonl").finish(), "No space left on device")
        assert files(small_disk).keys() == {"filler"}

    @pytest.mark.slow
    def test_a_file_that_may_not_grow(self, batch, undisturbed, tmp_path):
        output = tmp_path / "out.jsonl"
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        assert_mistake(batch(output, limit=limit).finish(), f"error: {output}: File too large; the results in it are")
        assert_whole(output, undisturbed)
        assert_completed(batch(output), output, undisturbed)


@pytest.mark.slow
def test_two_runs_on_one_output(batch, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    first = batch(output)
    first.wait_until(lambda: size(output) > 0)
    first.send(signal.SIGSTOP)  # or it might be done before the others begin
    others = batch(output), batch(output, "--overwrite")
    for other in others:
        assert_mistake(other.finish(), f"error: {output} is being written by another run; wait for its end")
    first.send(signal.SIGCONT)
    assert_completed(first, output, undisturbed)
    assert results(output).keys() == set(range(1, NUM_REQUESTS + 1))
