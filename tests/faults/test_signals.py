"""SIGINT and SIGTERM at random moments: what is on disk is whole, and the same command completes it."""

import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import save_random
from faults.processes import TINY, Running, files

from engine.bench.results import read_cell
from engine.presets import find_preset
from engine.shard_writer import write_shards
from engine.shards import MANIFEST_FILE

SIGNALS = [signal.SIGINT, signal.SIGTERM]
GRID = {f"hydragen/b2_s{num_shared}_u64.yaml" for num_shared in range(64, 96)}
SWEEP = (2, "64:96:1", 64, *TINY)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Large enough that cutting it takes a second."""
    config = replace(find_preset("tiny"), vocab_size=8192, hidden_size=512, intermediate_size=1408, head_dim=128)
    return save_random(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write_shards(model, folder, 2, model_name=str(model))
    return files(folder)


def was_stopped(running: Running, number: signal.Signals) -> bool:
    """Sends the signal. False when the command had done all before."""
    running.send(number)
    done = running.finish()
    assert done.status in (0, 128 + number, -number), done.stderr  # -number: Python was closing down
    assert "Traceback" not in done.stderr and "error" not in done.stderr, done.stderr
    return done.status == 128 + number


class TestSharding:
    def cut(self, start, model, undisturbed, tmp_path, number: signal.Signals, shares: list[float]) -> None:
        """Stopped each time when this share of all bytes is written."""
        outdir = tmp_path / "shards"
        command = ("tools/make_tp_files.py", model, outdir, "--num-splits", 2)
        total = sum(map(len, undisturbed.values()))
        times_stopped = 0
        for share in shares:
            running = start(*command)
            running.wait_until(lambda share=share: size(outdir) > share * total or (outdir / MANIFEST_FILE).exists())
            if was_stopped(running, number):
                times_stopped += 1
                assert files(outdir) == {}
            else:
                assert files(outdir) == undisturbed
                shutil.rmtree(outdir)
        assert times_stopped > len(shares) / 3
        assert start(*command).finish().status == 0
        assert files(outdir) == undisturbed

    def test_stopped_once(self, start, model, undisturbed, tmp_path):
        self.cut(start, model, undisturbed, tmp_path, signal.SIGTERM, [0.3])

    @pytest.mark.slow
    @pytest.mark.parametrize("number", SIGNALS)
    def test_at_random_moments(self, start, model, undisturbed, tmp_path, number):
        moments = random.Random(number)
        self.cut(start, model, undisturbed, tmp_path, number, [moments.random() for _ in range(6)])


def size(folder: Path) -> int:
    """Bytes in files that come and go."""
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


class TestSweep:
    def check_cells(self, outdir: Path) -> set[str]:
        names = files(outdir).keys()
        assert names <= GRID
        for name in names:
            read_cell(outdir / name)
        return names

    @pytest.mark.slow
    @pytest.mark.parametrize("number", SIGNALS)
    def test_at_random_moments(self, start, tmp_path, number):
        outdir, moments = tmp_path / "out", random.Random(number)
        found = set()
        for _ in range(5):
            running = start("scripts/synth.py", outdir, *SWEEP)
            running.wait_until(lambda running=running: "Loading" in running.stderr)
            time.sleep(moments.uniform(0, 2.5))
            was_stopped(running, number)
            before, found = found, self.check_cells(outdir)
            assert before <= found
        done = start("scripts/synth.py", outdir, *SWEEP).finish()
        assert done.status == 0, done.stderr
        assert self.check_cells(outdir) == GRID
