import io
import os
from types import SimpleNamespace

import pytest
import torch
import yaml
from checkpoints import save_tiny
from rich.console import Console

from engine.bench import load_speed
from engine.bench.load_speed import FILE_NAME, WORK, LoadSpeed, Plan, measure_load_speed
from engine.bench.load_speed_table import print_load_speed
from engine.errors import InputError
from engine.presets import find_preset

TINY = Plan("tiny", torch.bfloat16, num_ranks=2, num_iters=2)
TINY_BYTES = find_preset("tiny").num_parameters * 2
QUIET = Console(quiet=True)


@pytest.fixture
def in_this_process(monkeypatch):
    """What would run in a process of its own; its calls, with one rank at a time."""
    calls = []

    def run(work, arguments):
        calls.append((work.__name__, len(arguments)))
        return 10.0 * len(arguments)

    monkeypatch.setattr(load_speed, "_in_processes", run)
    return calls


def measured(**times_ms) -> LoadSpeed:
    names = {name: [100.0, 100.0] for name in WORK}
    return LoadSpeed(TINY, 10**9, {"dtype": "bfloat16", "device_name": "abacus", "num_threads": 7}, names | times_ms)


def test_figures_are_of_the_same_round():
    speed = measured(read=[100.0, 200.0], load=[250.0, 400.0])
    assert speed.gbs("read").values == [10.0, 5.0]
    assert speed.share("load", "read").values == [0.4, 0.5]
    assert speed.best_share("load", "read") == 0.4


def test_the_file_holds_raw_times_and_what_they_amount_to(in_this_process, tmp_path):
    speed = measure_load_speed(tmp_path / "out", TINY, QUIET)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE_NAME]
    raw = yaml.safe_load((tmp_path / "out" / FILE_NAME).read_text())
    assert (raw["model_name"], raw["num_bytes"], raw["num_ranks"]) == ("tiny", TINY_BYTES, 2)
    assert raw["environment"] == speed.environment
    assert raw["environment"]["dtype"] == "bfloat16"
    assert list(raw["work"]) == list(WORK)
    for name, work in raw["work"].items():
        assert work["ms"] == pytest.approx(speed.times_ms[name], rel=1e-5)
        assert work["gbs"]["median"] == pytest.approx(speed.gbs(name).median, rel=1e-5)
        assert {key for key in work if key.startswith("of_")} == {f"of_{yardstick}" for yardstick in WORK[name]}
    of_copy = raw["work"]["cut"]["of_copy"]
    assert of_copy["median"] == pytest.approx(speed.share("cut", "copy").median, rel=1e-5)
    assert of_copy["best_times"] == pytest.approx(speed.best_share("cut", "copy"), rel=1e-5)


def test_every_round_times_everything_in_an_order_of_its_own(in_this_process, tmp_path, monkeypatch):
    order = []
    for name in load_speed._Runner.WORK:
        work = getattr(load_speed._Runner, name)
        monkeypatch.setattr(
            load_speed._Runner, name, lambda runner, name=name, work=work: order.append(name) or work(runner)
        )
    speed = measure_load_speed(tmp_path, TINY, QUIET)
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    assert second != first and sorted(second) == sorted(first) and len(set(first)) == len(first) == len(WORK) - 1
    assert {len(times) for times in speed.times_ms.values()} == {2}
    assert all(x <= y for x, y in zip(speed.times_ms["copy"], speed.times_ms["copy_synced"], strict=True))
    assert sorted(in_this_process) == sorted(
        [*[("_fill_ms", 1)] * len(WORK), *[("_load_ms", 1)] * 2, *[("_load_ms", 2)] * 2] * 2  # one before each turn
    )


def test_a_checkpoint_of_ones_own_stays_as_it_is(in_this_process, tmp_path):
    folder = save_tiny(tmp_path / "model")
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    speed = measure_load_speed(tmp_path / "out", Plan(str(folder), torch.bfloat16, 2, 1), QUIET)
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()} == before
    assert (speed.num_bytes, speed.environment["dtype"]) == (2 * TINY_BYTES, "float32")


@pytest.mark.slow
def test_real_processes_load_all_of_the_weights(tmp_path):
    speed = measure_load_speed(tmp_path, Plan("tiny", torch.float32, 2, 1), QUIET)
    assert all(0 < ms < 60_000 for times in speed.times_ms.values() for ms in times)


class TestRefusals:
    def refused(self, tmp_path, message: str, plan: Plan = TINY) -> None:
        with pytest.raises(InputError, match=message):
            measure_load_speed(tmp_path / "out", plan, QUIET)
        assert not (tmp_path / "out").exists()

    def test_no_room_on_the_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(load_speed.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * TINY_BYTES - 1))
        self.refused(tmp_path, r"0.00 GB of weights need 0.00 GB on the disk of .*out, which has 0.00 GB free; use a s")

    def test_no_room_in_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(load_speed, "free_host_bytes", lambda: 5 * TINY_BYTES - 1)
        self.refused(tmp_path, "0.00 GB of weights need 0.00 GB in memory, which has 0.00 GB free; use a smaller model")

    def test_ranks_that_do_not_divide(self, tmp_path):
        self.refused(tmp_path, "into 3 parts; accepted: 1, 2, 4", Plan("tiny", torch.bfloat16, 3, 1))

    def test_no_such_model(self, tmp_path):
        self.refused(tmp_path, "no such folder: 'tinny'", Plan("tinny", torch.bfloat16, 2, 1))

    def test_a_result_that_is_there(self, tmp_path):
        (tmp_path / FILE_NAME).write_text("precious")
        with pytest.raises(InputError, match=f"{FILE_NAME} exists; accepted: an OUTDIR without one"):
            measure_load_speed(tmp_path, TINY, QUIET)
        assert os.listdir(tmp_path) == [FILE_NAME]


def test_the_table_shows_every_figure():
    stream = io.StringIO()
    speed = measured(read=[100.0, 200.0], load=[250.0, 400.0])
    print_load_speed(speed, Console(file=stream, width=140))
    lines = stream.getvalue().splitlines()
    title = next(line for line in lines if line.strip())
    assert title.strip() == "1.00 GB of weights: tiny, bfloat16 on abacus"
    row = next(line for line in lines if "load the checkpoint  " in line)
    assert row.split()[3:] == ["325", "28%", "!", "250", "3.25", "0.45", "13%", "!", "0.40", "x", "read"]
    assert sum(" x read" in line for line in lines) == 4
    assert any("cut for 2 ranks" in line and "x copy" in line for line in lines)
