"""What attention ``auto`` goes by: measured once, kept, read again, and measured anew where the file cannot be used."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from commands import Command
from models import hf_model, our_engine
from ranks import World

from engine import calibration
from engine.attention.crossover import Crossover
from engine.calibration import Calibration, Setting, Trial, find_crossover, kept, read, write
from engine.distributed import TPGroup
from engine.sampling import SamplingParams
from kernels import Backend

CPU = torch.device("cpu")
GROUP = TPGroup()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUTARY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "NUM_QUERIES", (2, 4))
    monkeypatch.setattr(calibration, "LENGTHS", (16, 32))
    monkeypatch.setattr(calibration, "_SECONDS", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch):
    """How often something was measured, by threads."""
    seen, real = [], calibration.measure

    def counted(*args):
        seen.append(threading.current_thread())
        return real(*args)

    monkeypatch.setattr(calibration, "measure", counted)
    return seen


def setting(**changes) -> Setting:
    fields = {"device": CPU, "dtype": torch.float32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "backend": None}
    return Setting.of(**fields | changes)


def test_is_measured_once_and_kept(measured, cache):
    first = find_crossover(GROUP, setting(), torch.float32)
    assert first.num_queries == (2, 4) and set(first.lengths) <= {16, 32, None}
    assert find_crossover(GROUP, setting(), torch.float32) == first and len(measured) == 1
    (path,) = cache.iterdir()
    assert kept() == [(path, read(path))] and read(path).crossover == first and path == setting().path


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.bfloat16}, {"num_heads": 4}, {"num_kv_heads": 2}, {"head_dim": 16}, {"backend": Backend.ATEN},
    ],
    ids=str,
)  # fmt: skip
def test_holds_for_its_setting_alone(changes):
    assert setting(**changes).path != setting().path == setting().path


def test_holds_for_its_threads_and_kernels(monkeypatch):
    before = setting().path
    monkeypatch.setattr(calibration, "_hash_of_kernels", lambda: "others")
    assert setting().path != before
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert setting().path != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: text.replace('"head_dim": 8', '"head_dim": 16'),
        lambda text: text.replace('"num_heads"', '"heads"'),
        lambda text: text.replace('"lengths": [', '"lengths": [7, '),
        lambda text: text.replace('"lengths": [', '"lengths": [{}, '),
        lambda text: text.replace('"shared_ms"', '"x"'),
        lambda text: text.replace('"num_threads": 1', '"num_threads": "1"'),
        lambda text: text.replace('"versions": {', '"versions": [], "x": {'),
        lambda text: text.replace('"length": 32', '"length": null').replace('"length": 16', '"length": null'),
    ],
)
def test_a_damaged_file_is_measured_anew(measured, damage):
    find_crossover(GROUP, setting(), torch.float32)
    path = setting().path
    path.write_text(damage(path.read_text()))
    find_crossover(GROUP, setting(), torch.float32)
    assert len(measured) == 2 and read(path).setting == setting()


def test_a_cache_that_cannot_be_written_does_not_stop_the_work(measured, cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="a calibration could not be kept, and is made again by the next process"):
        assert find_crossover(GROUP, setting(), torch.float32).num_queries == (2, 4)


def test_rank_0_measures_for_all(measured):
    found = World(2).run(lambda group: find_crossover(group, setting(), torch.float32))
    assert found[0] == found[1] and len(measured) == 1


def trials_by(monkeypatch, pays) -> Calibration:
    """A measurement in which sharing pays as ``pays(num_queries, length)`` says."""
    monkeypatch.setattr(calibration, "NUM_QUERIES", (2, 4, 8, 16))
    monkeypatch.setattr(calibration, "LENGTHS", (16, 32, 64, 128))
    monkeypatch.setattr(
        calibration._Work,
        "try_both",
        lambda self, n, length: Trial(n, length, 1.0 if pays(n, length) else 3.0, 2.0),
    )
    return calibration.measure(setting(), CPU, torch.float32)


def test_finds_the_least_length_that_pays(monkeypatch):
    found = trials_by(monkeypatch, lambda n, length: n * length >= 256)
    assert found.crossover == Crossover((2, 4, 8, 16), (128, 64, 32, 16))
    assert [(t.num_queries, t.length) for t in found.trials] == [
        (2, 128), (2, 64), (4, 128), (4, 64), (4, 32), (8, 64), (8, 32), (8, 16), (16, 32), (16, 16),
    ]  # fmt: skip


def test_a_search_that_begins_with_a_loss_goes_on_to_longer_nodes(monkeypatch):
    found = trials_by(monkeypatch, lambda n, length: length >= {2: 16, 4: 64, 8: 64, 16: 64}[n])
    assert [(t.num_queries, t.length) for t in found.trials[4:]] == [
        (4, 16), (4, 32), (4, 64), (8, 64), (8, 32), (16, 64), (16, 32),
    ]  # fmt: skip
    # One that was found too short is evened out with its neighbours: 16, 64, 64 and 64 are a bit over 32 in the mean.
    assert found.crossover.lengths == (64, 64, 64, 64)


@pytest.mark.parametrize(
    ("places", "expected"),
    [([5, 4, 4, 1], [5, 4, 4, 1]), ([5, 3, 4, 0], [5, 4, 4, 0]), ([0, 9, 0, 0], [5, 5, 0, 0]), ([1, 2, 3], [2, 2, 2])],
)
def test_what_rises_is_evened_out(places, expected):
    assert calibration._evened_out(places) == expected


def test_a_close_trial_is_repeated(monkeypatch):
    class Close(calibration._Work):
        times = 0

        def _time(self, call):
            self.times += 1
            return 1.0 + 0.01 * (self.times % 2)

    class Clear(Close):
        def _time(self, call):
            self.times += 1
            return 1.0 + self.times % 2

    for kind, rounds in ((Close, 9), (Clear, 3)):
        work = kind(setting(), CPU, torch.float32)
        work.try_both(2, 16)
        assert work.times == 2 + 2 * rounds


def test_tries_the_longest_again_after_a_number_that_nothing_pays_for(monkeypatch):
    assert trials_by(monkeypatch, lambda n, length: n >= 8 and length >= 32).crossover.lengths == (None, None, 32, 32)
    assert trials_by(monkeypatch, lambda n, length: True).crossover.lengths == (16, 16, 16, 16)
    assert trials_by(monkeypatch, lambda n, length: False).crossover.lengths == (None,) * 4


@pytest.mark.parametrize("crossover", [(None, None), (16, 16), (None, 16)])
def test_the_engine_reads_it_and_generates_the_same(monkeypatch, crossover):
    engine = our_engine(hf_model())
    heads = engine.model.layers[0].attention
    own = setting(num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim)
    write(Calibration(own, Crossover((2, 4), crossover), ()))
    root = list(range(20))
    prompts = [[*root, 5], [*root, 6], [*root, 7], root, [*root, *range(20, 40), 8], [*root, *range(20, 40), 9], [3]]
    params = SamplingParams(temperature=0, max_tokens=4)
    results = {
        name: [r.token_ids for (r,) in engine.generate(prompts, params, attention=name)]
        for name in ("auto", "hydragen_noshared")
    }
    assert engine.crossover == Crossover((2, 4), crossover)
    assert results["auto"] == results["hydragen_noshared"]


def test_the_command_shows_and_deletes(cache):
    command = Command("scripts/calibration.py")
    assert f"nothing is kept in {cache}" in command().stdout
    find_crossover(GROUP, setting(), torch.float32)
    write(Calibration(setting(backend=Backend.ATEN), Crossover((2, 4), (None, 32)), ()))
    (cache / "crossover-0.json").write_text(json.dumps({"schema_version": 1}))
    old = replace(setting(backend=Backend.REFERENCE), kernels="others")
    write(Calibration(old, Crossover((2, 4), (16, 16)), ()))
    shown = command().stdout
    assert [" (old)" in line for line in shown.splitlines() if "2/1 of 8" in line].count(True) == 1
    assert "2/1 of 8" in shown and "never" in shown and "aten" in shown and "best" in shown
    assert f"{cache / 'crossover-0.json'} is damaged or of another version; it is not used" in shown
    assert f"deleted 4 file(s) in {cache}" in command("--delete").stdout
    assert list(cache.iterdir()) == []
