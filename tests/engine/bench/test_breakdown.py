import io
import itertools
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from clock import Clock
from commands import ROOT, Command, assert_mistake
from rich.console import Console

from engine.bench import breakdown
from engine.bench.breakdown import (
    Breakdown,
    Comparison,
    Point,
    Series,
    matmul_alone_ms,
    run_breakdown,
)
from engine.bench.breakdown_table import print_breakdown
from engine.bench.modes import ModelOptions
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.loader import load_model
from engine.progress import progress_bar

MODES = ("noattention", "hydragen", "hydragen_noshared", "hf")
COMPARISON = Comparison(
    MODES, batch_size=2, shared_lens=(8, 16), num_unique=4, model=ModelOptions("tiny", load_format="dummy"),
    num_iters=3, hf_iters=2,
)  # fmt: skip
QUIET = Console(quiet=True)
PREFILLS = {"hydragen": 300.0, "hf": 390.0}  # ms
SPANS = {"noattention": 2.0, "hydragen": 26.0, "hydragen_noshared": 82.0}  # ms, of these steps
STEPS = {"noattention": 15.0, "hydragen": 40.0, "hydragen_noshared": 115.0, "hf": 800.0}  # ms
DRIFT = (1.0, 2.0, 3.0)  # of a machine that slows down: a factor on everything that a round times


def measured(steps=STEPS, drift=DRIFT, **changes):
    """A point whose times are ``steps`` on a machine that drifts; hf has no third round."""
    rounds = {mode: drift[:2] if mode == "hf" else drift for mode in steps}
    point = Point(
        num_shared=4096,
        num_unique=16,
        kv_bytes=2 * 10**9,
        matmul_alone_ms=[10.0 * slower for slower in drift],
        prefix_alone_ms=[20.0 * slower for slower in drift],
        prefix_aten_ms=[90.0 * slower for slower in drift],
        read_gbs=[40.0 / slower for slower in drift],
        decode_ms={mode: [slower * (15 * ms + 7) for slower in rounds[mode]] for mode, ms in steps.items()},
        first_token_ms={mode: [slower * 7 for slower in rounds[mode]] for mode in steps},
        prefill_ms={mode: [slower * ms for slower in rounds[mode]] for mode, ms in PREFILLS.items() if mode in steps},
        span_ms={mode: [slower * ms for slower in drift] for mode, ms in SPANS.items() if mode in steps},
    )
    return replace(point, **changes)


def printed(*points, modes=MODES):
    stream = io.StringIO()
    environment = {"dtype": "float32", "device_name": "abacus", "num_threads": 7}
    print_breakdown(
        Breakdown(replace(COMPARISON, modes=modes), environment, list(points)), Console(file=stream, width=160)
    )
    return stream.getvalue()


def row(text, mode, number=0):
    """The cells of the mode's line in the ``number``-th length, the shared length left out."""
    lines = [line for line in text.splitlines() if f" {mode} " in line and "x " + mode not in line]
    return lines[number].split(f" {mode} ")[1].split()


# ---- what times amount to


def test_what_times_are_held_against():
    figures = measured(drift=(1.0,)).figures()
    assert {name: series.values for name, series in figures.items()} == {
        **{f"{mode}_ms": [pytest.approx(ms)] for mode, ms in STEPS.items()},
        "noattention_per_matmul": [pytest.approx(1.5)],  # 15 / 10
        "added_ms": [pytest.approx(24)],  # 26 - 2
        "added_per_prefix": [pytest.approx(1.2)],  # 24 / 20
        "step_added_ms": [pytest.approx(25)],  # 40 - 15
        "step_added_per_prefix": [pytest.approx(1.25)],  # 25 / 20
        "prefix_aten_per_alone": [pytest.approx(4.5)],  # 90 / 20
        "noshared_gbs": [pytest.approx(25)],  # 2 GB in 82 - 2 ms
        "noshared_per_read": [pytest.approx(0.625)],  # of 40
        "step_noshared_per_read": [pytest.approx(0.5)],  # 2 GB in 115 - 15 ms: 20 of 40
        "hf_per_hydragen": [pytest.approx(20)],  # 800 / 40
        "hydragen_prefill_ms": [300.0],
        "hf_prefill_ms": [390.0],
        "hf_prefill_per_hydragen": [pytest.approx(1.3)],  # 390 / 300
    }


def test_a_ratio_is_that_of_times_of_the_same_round():
    """All of a machine's drift is in the times, none of it in their ratios."""
    figures = measured().figures()
    assert (figures["hydragen_ms"].median, figures["hf_ms"].median) == pytest.approx((80, 1200))
    assert figures["hydragen_ms"].high_spread
    for name, expected in {
        "noattention_per_matmul": 1.5, "added_per_prefix": 1.2, "step_added_per_prefix": 1.25,
        "noshared_per_read": 0.625, "step_noshared_per_read": 0.5, "hf_per_hydragen": 20.0, "hf_prefill_per_hydragen": 1.3,
    }.items():  # fmt: skip
        assert figures[name].median == pytest.approx(expected)
        assert figures[name].spread == pytest.approx(0, abs=1e-9) and not figures[name].high_spread
    assert len(figures["hf_per_hydragen"].values) == 2


def test_the_median_of_the_rounds_is_reported():
    series = Series([1.0, 2.0, 9.0])
    assert series.median == 2
    assert series.spread == pytest.approx((6.2 - 1.4) / 2)  # 80th and 20th percentile
    assert series.high_spread
    assert Series([-1.0, -2.0, -9.0]).high_spread  # what attention adds can be lost in noise
    assert Series([5.0]).spread is None and not Series([5.0]).high_spread


def test_the_least_times_of_all_rounds():
    """One mode was disturbed in one round, another in another: neither shows in what the least times come to."""
    point = measured(drift=(1.0,) * 3)
    point.decode_ms["hydragen"][1] *= 5
    point.decode_ms["noattention"][2] *= 5
    point.matmul_alone_ms[0] *= 5
    point.read_gbs[1] /= 5
    figures = point.least().figures()
    assert {name: series.values for name, series in figures.items()} == {
        name: pytest.approx(series.values) for name, series in measured(drift=(1.0,)).figures().items()
    }
    lacking = measured(prefix_aten_ms=[], read_gbs=[]).least()
    assert lacking.prefix_aten_ms == lacking.read_gbs == []


def test_a_mode_that_was_not_run_has_no_figures():
    point = measured({"hydragen": 40.0})
    assert set(point.figures()) == {"hydragen_ms", "prefix_aten_per_alone", "hydragen_prefill_ms"}
    text = printed(point)
    assert "Prefill of 4096 tokens: 600 ms (spread 60.0% !)\n" in text
    assert "Prefill" not in printed(measured({"noattention": 15.0}))
    assert row(text, "hydragen")[:2] == ["3", "80.0"]
    assert row(text, "hydragen")[4:8] == ["40.0", "-", "-", "-"]
    assert row(text, "hf") == ["-", "-", "-", "-", "-", "-", "-", "x", "hydragen"]


def test_what_is_lost_in_noise_is_no_divisor():
    first_token_ms = measured().first_token_ms | {"hydragen": [700.0, 2000.0, 3000.0]}
    point = measured(first_token_ms=first_token_ms)
    figures = point.figures()
    assert figures["hydragen_ms"].median < 0
    assert "hf_per_hydragen" not in figures
    assert row(printed(point), "hydragen")[1:4] == ["lost", "in", "noise"]
    faster_than_none = measured(STEPS | {"hydragen_noshared": 14.0}).figures()
    assert "step_noshared_per_read" not in faster_than_none and "noshared_per_read" in faster_than_none
    spans = measured().span_ms
    without_attention = measured(span_ms=spans | {"hydragen_noshared": spans["noattention"]}).figures()
    assert not {"noshared_gbs", "noshared_per_read"} & set(without_attention)


# ---- the table


def test_the_table():
    text = printed(measured(), measured(num_shared=8192))
    assert row(text, "noattention")[:8] == ["3", "30.0", "60.0%", "!", "15.0", "1.50", "0.0%", "1.50"]
    assert "x its matrix products alone, 10.0 ms" in text  # the best round's
    assert row(text, "hydragen", 1)[5] == "1.20"
    assert "x prefix attention alone, 20.0 ms; attention takes 48.0 ms" in text
    assert "PyTorch's kernel takes for prefix attention alone 4.5 times as long at 4096, 4.5 times" in text
    assert "PyTorch's kernel" not in printed(measured(prefix_aten_ms=[]))  # on CUDA there is no other
    assert row(text, "hydragen_noshared")[5] == "62%"
    assert "of the read limit: keys and values at 12.5 GB/s" in text
    assert row(text, "hf")[:2] == ["2", "1200.0"] and row(text, "hf")[5] == "20.0"
    assert "! rounds vary by more than 10%" in text
    assert "with 7 threads" in text
    assert "steps: 13.3 to 40.0 GB/s" in text
    assert "GB/s" not in printed(measured(read_gbs=[]), modes=("noattention", "hydragen"))
    assert [line.split()[0] for line in text.splitlines() if "noattention" in line] == ["4096", "8192"]


def test_a_low_spread_is_not_flagged():
    text = printed(measured(drift=(1.0, 1.01, 1.02)))
    assert "!" not in text
    assert "-" in row(printed(measured(drift=(1.0,))), "hf")  # a single round


# ---- measuring


@pytest.fixture
def fakes(monkeypatch):
    """Modes and operations that note what is done, in order. ``fakes.before(mode, event)`` may raise."""
    log, clock, rates = [], Clock(), itertools.cycle([30.0, 50.0])  # before and after
    fakes = SimpleNamespace(log=log, models=[], before=lambda name, event: None)

    class FakeMode:
        def __init__(self, name):
            self.name = name

        def note(self, event):
            log.append(f"{self.name} {event}")
            fakes.before(self.name, event)

        def set_up(self, cell):
            assert (cell.mode, cell.batch_size, cell.num_unique) == (self.name, 2, 4)
            self.note(f"set_up {cell.num_shared}")

        def prefill(self, prompt):
            self.note(f"prefill {len(prompt)}")
            clock.now += PREFILLS.get(self.name, 0) / 1e3

        def generate(self, num_tokens):
            self.note(f"generate {num_tokens}")
            clock.now += (7 + STEPS[self.name] * (num_tokens - 1)) / 1e3

        def release(self):
            self.note("release")

    def engine_mode(name, model):
        fakes.models.append(model)
        return FakeMode(name)

    monkeypatch.setattr(breakdown, "EngineMode", engine_mode)
    monkeypatch.setattr(breakdown, "make_mode", lambda name, *args: FakeMode(name))
    monkeypatch.setattr(breakdown, "matmul_alone_ms", lambda *args: log.append("alone") or 10.0)
    monkeypatch.setattr(breakdown, "prefix_alone_ms", lambda *args: 90.0 if "aten" in args else 20.0)
    monkeypatch.setattr(breakdown, "read_gbs", lambda *args: next(rates))
    monkeypatch.setattr("engine.bench.timing.time", clock)
    return fakes


def test_modes_take_turns(tmp_path, fakes):
    points = run_breakdown(tmp_path, COMPARISON, TPGroup(), QUIET).points
    assert len(fakes.models) == 3 and len(set(map(id, fakes.models))) == 1  # one model for all of the engine's modes

    def timed(*modes):
        counts = {mode: (4, 1) if mode == "hf" else (4, 4, 1) for mode in modes}  # the first of three is a warm-up
        log = []
        for mode in modes:
            log += [f"{mode} prefill {shared}"] if mode in PREFILLS else []
            log += [f"{mode} generate {num_tokens}" for num_tokens in counts[mode]]
        return log

    expected = []
    for shared in (8, 16):
        for mode in MODES:
            warmup = 2 if mode == "hf" else 4
            expected += [f"{mode} set_up {shared}", f"{mode} prefill {shared}", f"{mode} generate {warmup}"]
        for modes in (MODES, MODES, MODES[:3]):
            expected += ["alone", *timed(*modes)]
        expected += [f"{mode} release" for mode in MODES]
    assert fakes.log == expected
    for point in points:
        for mode, step_ms in STEPS.items():
            num_rounds = 2 if mode == "hf" else 3
            assert point.step_ms(mode) == pytest.approx([step_ms] * num_rounds)
            assert point.first_token_ms[mode] == pytest.approx([7] * num_rounds)
            if mode in PREFILLS:
                assert point.prefill_ms[mode] == pytest.approx([PREFILLS[mode]] * num_rounds)
        assert point.matmul_alone_ms == [10.0] * 3 and point.prefix_alone_ms == [20.0] * 3
        assert point.prefix_aten_ms == [90.0] * 3
        assert point.read_gbs == [40.0] * 3


@pytest.mark.parametrize(("hf_iters", "hf_rounds"), [(2, 2), (5, 3)])
def test_the_progress_bar_gets_to_its_end(tmp_path, fakes, monkeypatch, hf_iters, hf_rounds):
    bars = []

    @contextmanager
    def bar(console):
        with progress_bar(console) as progress:
            bars.append(progress)
            yield progress

    def fail(name, what):
        if (name, what) == ("hydragen", "set_up 8"):
            raise MemoryError

    monkeypatch.setattr(breakdown, "progress_bar", bar)
    fakes.before = fail
    run_breakdown(tmp_path, replace(COMPARISON, hf_iters=hf_iters), TPGroup(), QUIET)
    ((task,),) = (bar.tasks for bar in bars)
    assert task.completed == task.total == 2 * (4 + 3 * 4 + hf_rounds)  # set-ups, engine and alone, hf


def test_hf_takes_part_in_no_more_rounds_than_there_are(tmp_path, fakes):
    comparison = replace(COMPARISON, num_iters=1, hf_iters=5)
    (point, _) = run_breakdown(tmp_path, comparison, TPGroup(), QUIET).points
    assert {mode: len(times) for mode, times in point.decode_ms.items()} == dict.fromkeys(MODES, 1)


def test_modes_after_hf_have_all_rounds(tmp_path, fakes):
    comparison = replace(COMPARISON, modes=("hf", "hydragen"))
    (point, _) = run_breakdown(tmp_path, comparison, TPGroup(), QUIET).points
    assert {mode: len(times) for mode, times in point.decode_ms.items()} == {"hf": 2, "hydragen": 3}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("a KV cache of 9 tokens"), "a KV cache of 9 tokens"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("tried to allocate\nand so on"), "out of memory: tried to allocate"),
    ],
)
@pytest.mark.parametrize("event", ["set_up 8", "prefill 8", "generate 4"])
def test_a_mode_that_memory_does_not_suffice_for_is_left_out(tmp_path, fakes, error, message, event):
    def fail(name, what):
        if (name, what) == ("hydragen_noshared", event) and not fakes.log.count("alone"):
            raise error

    fakes.before = fail
    result = run_breakdown(tmp_path, COMPARISON, TPGroup(), QUIET)
    short, long = result.points
    assert short.failures == {"hydragen_noshared": message} and not short.step_ms("hydragen_noshared")
    at = fakes.log.index(f"hydragen_noshared {event}")
    assert fakes.log[at + 1] == "hydragen_noshared release"  # at once: the next mode needs the room
    assert fakes.log.index("hydragen_noshared set_up 16") > at
    assert len(long.step_ms("hydragen_noshared")) == len(short.step_ms("hydragen")) == 3 and not long.failures
    text = printed(*result.points)
    assert row(text, "hydragen_noshared")[:5] == ["-"] * 5
    assert f"shared 8, hydragen_noshared: {message}\n" in text
    (described, _) = yaml.safe_load((tmp_path / "breakdown.yaml").read_text())["points"]
    assert described["modes"]["hydragen_noshared"] == {"decode_ms": [], "first_token_ms": [], "message": message}


def test_a_mode_that_runs_out_later_keeps_its_rounds(tmp_path, fakes):
    def fail(name, what):
        if name == "hydragen" and what == "generate 1" and fakes.log.count("alone") == 2:
            raise MemoryError

    fakes.before = fail
    (point, _) = run_breakdown(tmp_path, COMPARISON, TPGroup(), QUIET).points
    assert point.failures == {"hydragen": "out of memory"}
    assert point.step_ms("hydragen") == pytest.approx([40])
    assert len(point.decode_ms["noattention"]) == 3


def test_an_error_of_ours_is_not_taken_for_a_lack_of_memory(tmp_path, fakes):
    def fail(name, what):
        if what == "prefill 8":
            raise RuntimeError("shapes do not match")

    fakes.before = fail
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_breakdown(tmp_path, COMPARISON, TPGroup(), QUIET)
    assert [line for line in fakes.log if "release" in line] == [f"{mode} release" for mode in MODES]


def test_a_mode_that_would_not_fit_is_not_tried(tmp_path, fakes, monkeypatch):
    """A system that promises more memory than it has ends the process that uses it."""
    monkeypatch.setattr(breakdown, "available_bytes", lambda group: 0)
    (point, _) = run_breakdown(tmp_path, COMPARISON, TPGroup(), QUIET).points
    assert set(point.failures) == set(MODES)
    assert "0.00 GiB that are free, with a reserve; use a smaller batch or fewer modes" in point.failures["hf"]
    assert not any("set_up" in line for line in fakes.log)


def test_all_modes_have_as_many_threads(tmp_path, fakes):
    threads = torch.get_num_threads()

    def change(name, what):
        if name == "hydragen" and what == "prefill 8":
            torch.set_num_threads(threads + 1)

    fakes.before = change
    try:
        with pytest.raises(AssertionError, match=f"{threads + 1} threads"):
            run_breakdown(tmp_path, COMPARISON, TPGroup(), QUIET)
    finally:
        torch.set_num_threads(threads)


def test_one_run_measures_every_part(tmp_path):
    model = ModelOptions("tiny", load_format="dummy", dtype="float32")
    comparison = replace(COMPARISON, model=model, num_iters=2, hf_iters=1)
    points = run_breakdown(tmp_path / "new", comparison, TPGroup(), QUIET).points
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["breakdown.yaml"]
    written = yaml.safe_load((tmp_path / "new" / "breakdown.yaml").read_text())
    assert "versions" in written["environment"] and written["batch_size"] == 2 and written["num_unique"] == 4
    assert [point["num_shared"] for point in written["points"]] == [8, 16]
    for point, described in zip(points, written["points"], strict=True):
        assert not point.failures
        # K and V, layers, heads, D, batch, keys
        assert described["kv_bytes"] == point.kv_bytes == 2 * 2 * 2 * 16 * 2 * (point.num_shared + 2) * 4
        for name in ("matmul_alone_ms", "prefix_alone_ms", "prefix_aten_ms", "read_gbs"):
            assert described[name] == pytest.approx(getattr(point, name), rel=1e-5)
            assert len(described[name]) == 2 and min(described[name]) > 0
        for mode in MODES:
            times = described["modes"][mode]
            assert times["decode_ms"] == pytest.approx(point.decode_ms[mode], rel=1e-5)
            assert times["first_token_ms"] == pytest.approx(point.first_token_ms[mode], rel=1e-5)
            assert len(times["decode_ms"]) == (1 if mode == "hf" else 2)
        step = described["figures"]["hydragen_ms"]
        assert step["rounds"] == pytest.approx(point.step_ms("hydragen"), rel=1e-5) and step["spread"] >= 0
        assert step["median"] == pytest.approx(sum(step["rounds"]) / 2, rel=1e-4)
        assert described["figures"]["hf_ms"]["spread"] is None


def test_every_field_of_the_file_is_documented(tmp_path, fakes):
    run_breakdown(tmp_path, COMPARISON, TPGroup(), QUIET)
    written = yaml.safe_load((tmp_path / "breakdown.yaml").read_text())
    text = (ROOT / "docs" / "benchmark-files.md").read_text().split("## `breakdown.yaml`")[1]
    documented = set(re.findall(r"`(\w+)`", text))
    point = written["points"][0]
    figures = {"MODE_ms" if name.removesuffix("_ms") in MODES else name for name in point["figures"]}
    fields = written.keys() | point.keys() | figures | point["modes"]["hf"].keys() | point["figures"]["hf_ms"].keys()
    assert fields <= documented, fields - documented


def test_the_products_alone_are_all_of_the_step(monkeypatch):
    """Every weight but the embedding: four a layer, timed as one layer's, and the head's."""
    model = load_model("tiny", TPGroup(), load_format="dummy").model
    seen = []
    monkeypatch.setattr("engine.bench.breakdown.linear", lambda x, w: seen.append((tuple(x.shape), tuple(w.shape))))
    assert matmul_alone_ms(model, 5, torch.device("cpu")) > 0
    assert set(seen) == {((5, 64), (128, 64)), ((5, 64), (64, 64)), ((5, 64), (352, 64)), ((5, 176), (64, 176)),
                         ((5, 64), (512, 64))}  # fmt: skip


# ---- mistakes, found before anything is loaded

decode_step = Command("scripts/decode_step.py")
TINY = ("--model-name", "tiny", "--shared", "8")


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(ModelOptions, "load", None)


def test_several_ranks_are_refused(tmp_path, nothing_is_loaded):
    with pytest.raises(InputError, match="one process, not in 2"):
        run_breakdown(tmp_path, COMPARISON, TPGroup(0, 2), QUIET)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--modes", "hydragen,magic"], "mode 'magic' is not known; accepted: hydragen"),
        (["--modes", ""], "mode '' is not known"),
        (["--modes", "hf,hydragen,hf"], "the modes hold hf twice; accepted: each once; leave one out"),
        (["--shared", "8,4090"], "4090 shared and 16 unique tokens make 4106; accepted: at most 4096"),
        (["--shared", "8:"], "--shared '8:' cannot be read"),
        (["--hf-iters", "0"], "--hf-iters"),
        (["--unique", "1"], "--unique"),
    ],
)
def test_options(tmp_path, nothing_is_loaded, options, part):
    assert_mistake(decode_step(tmp_path / "out", *TINY, *options), part)
    assert not (tmp_path / "out").exists()


def test_an_outdir_that_cannot_be_used(tmp_path, nothing_is_loaded):
    path = tmp_path / "breakdown.yaml"
    path.write_text("measured yesterday")
    assert_mistake(decode_step(tmp_path, *TINY), f"{path} exists; accepted: an OUTDIR without one", "use another")
    assert path.read_text() == "measured yesterday"
    assert_mistake(decode_step(path, *TINY), f"{path} is a file; accepted: an OUTDIR that is a directory")
    assert_mistake(decode_step(path / "sub", *TINY), f"{path} is a file")


def test_an_outdir_without_permission(tmp_path, nothing_is_loaded, monkeypatch):
    monkeypatch.setattr("engine.files.os.access", lambda *args: False)  # the user may be root
    assert_mistake(decode_step(tmp_path / "out", *TINY), f"{tmp_path} cannot be written to; accepted: an OUTDIR that")


# ---- the command


def test_the_command(tmp_path):
    modes = "noattention,hydragen"
    done = decode_step(
        tmp_path, *TINY, "--modes", modes, "--batch-size", 2, "--unique", 3, "--num-iters", 1, "--dtype", "float32"
    )
    assert (done.status, done.stderr) == (0, "")
    assert "tiny, float32 on" in done.stdout and f"with {torch.get_num_threads()} threads" in done.stdout
    written = yaml.safe_load((tmp_path / "breakdown.yaml").read_text())
    assert list(written["points"][0]["modes"]) == modes.split(",")


def test_help_has_examples_and_every_option():
    done = decode_step("--help")
    assert done.status == 0 and "python scripts/decode_step.py results/step" in done.stdout
    assert "--hf-iters" in done.stdout and "the first ones" in " ".join(done.stdout.split())
