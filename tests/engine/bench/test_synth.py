import io
import itertools
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from documented import fields_of_table
from ranks import World, run_ranks
from rich.console import Console

import engine.arena
import engine.tree_room
from engine.attention import METHODS
from engine.attention.hydragen import Hydragen
from engine.bench import synth
from engine.bench.environment import Execution
from engine.bench.memory_model import footprint
from engine.bench.modes import ModelOptions
from engine.bench.ranges import MAX_COMBINATIONS
from engine.bench.results import Cell, Status, read_cell
from engine.bench.roofline import Ceilings
from engine.bench.synth import Sweep, make_grid, print_plan, run_sweep
from engine.distributed import TPGroup
from engine.errors import InputError

TINY = ModelOptions("tiny", load_format="dummy")
GIB = 2**30
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSecond line")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Measuring them takes longer than a tiny cell."""
    monkeypatch.setattr(synth, "measure_ceilings", lambda device, dtype, rows: Ceilings(10.0, 1.0, 0.5, rows))


@pytest.fixture
def sweep(tmp_path):
    def make(mode="hydragen", batch_sizes=(2, 3), **changes):
        grid = make_grid(mode, batch_sizes, (8, 12), (4,))
        return replace(Sweep(tmp_path / "a" / "out", mode, grid, TINY, 2, 1, calc_prefill=True), **changes)

    return make


def run(sweep: Sweep, group: TPGroup | None = None) -> str:
    """Runs it and returns what it printed."""
    file = io.StringIO()
    run_sweep(sweep, group or TPGroup(), Console(file=file, width=140))
    return file.getvalue()


def plan(sweep: Sweep, num_ranks: int = 1) -> list[list[str]]:
    """The table's rows."""
    file = io.StringIO()
    print_plan(sweep, num_ranks, Console(file=file, width=140))
    return [re.findall(r"[^│\s][^│]*?(?=\s*│)", line) for line in file.getvalue().splitlines() if line.startswith("│")]


def results(sweep: Sweep) -> dict[Cell, object]:
    return {cell: read_cell(cell.path(sweep.outdir)) for cell in sweep.cells}


class FakeMode:
    """Does nothing, but raise ``error`` at a stage of a batch size, on one rank or all."""

    def __init__(self, group, stage=None, batch_size=2, rank=None, error=OUT_OF_MEMORY):
        self.group, self.where, self.rank, self.error = group, (stage, batch_size), rank, error
        self.calls: list[str] = []

    def _do(self, stage: str) -> None:
        self.calls.append(stage)
        if self.where == (stage, self.cell.batch_size) and self.rank in (None, self.group.rank):
            raise self.error

    def set_up(self, cell):
        self.cell = cell
        self._do("set_up")

    def prefill(self, prompt):
        assert len(prompt) == self.cell.num_shared
        self._do("prefill")

    def generate(self, num_tokens):
        self._do("generate")
        self.group.barrier()  # as collectives do

    def choice(self):
        return None

    def release(self):
        self.calls.append("release")


@pytest.fixture
def fake(monkeypatch):
    """Sweeps use a FakeMode of these options; returns the list of those that were made."""
    made = []

    def use(**options):
        def make(name, model, group, tp, max_batch_size, execution):
            made.append(FakeMode(group, **options))
            return made[-1]

        monkeypatch.setattr(synth, "make_mode", make)
        return made

    return use


class TestGrid:
    def test_every_combination_batch_sizes_fastest(self):
        cells = make_grid("hf", (1, 2), (10, 20), (5,))
        assert cells == tuple(Cell("hf", b, s, 5) for s in (10, 20) for b in (1, 2))

    def test_not_too_many(self):
        assert len(make_grid("hf", range(1, 101), range(1, 101), (1,))) == MAX_COMBINATIONS
        with pytest.raises(InputError, match="the ranges make 10100 cells; accepted: at most 10000"):
            make_grid("hf", range(1, 102), range(1, 101), (1,))


class TestResults:
    @pytest.mark.parametrize("mode", ["hydragen", "hydragen_noshared", "noattention", "hf", "hf_static"])
    def test_every_mode_writes_what_is_documented(self, sweep, mode):
        printed = run(sweep(mode))
        assert "Loading tiny for mode" in printed and "skipped" not in printed
        documented = fields_of_table(0)
        for cell, result in results(sweep(mode)).items():
            assert cell.path(Path()) == Path(mode, f"b{cell.batch_size}_s{cell.num_shared}_u4.yaml")
            raw = yaml.safe_load(cell.path(sweep(mode).outdir).read_text())
            assert raw.keys() == documented, raw.keys() ^ documented
            assert (result.status, result.message, result.model_name) == (Status.OK, "", "tiny")
            assert (result.num_iters, result.num_warmup, result.seed) == (2, 1, 0)
            assert [len(times) for times in (result.decode_ms, result.first_token_ms, result.prefill_ms)] == [2, 2, 2]
            assert min(*result.decode_ms, *result.first_token_ms, *result.prefill_ms) > 0
            assert result.environment["dtype"] == "float32" and result.environment["world_size"] == 1
            assert result.predicted_bytes == (footprint(TINY.config(), 1, cell).total,)
            assert result.peak_bytes[0] > result.predicted_bytes[0]  # on a CPU the interpreter counts too
            if result.decode_step_ms is not None:
                assert (result.roofline_ms is None) == mode.startswith("hf")
            assert f"batch {cell.batch_size}, shared {cell.num_shared}, unique 4: " in printed

    def test_a_method_that_was_added_runs_like_the_others(self, sweep, monkeypatch):
        class OwnTokensOnly(Hydragen):
            name = "own_tokens_only"

            def shared_segments(self, tree, placement, runs):
                return []

        monkeypatch.setitem(METHODS, "own_tokens_only", OwnTokensOnly())
        # A clock by which all 4 tokens take 4 ms and the first takes 1: on a tiny model the steps can be lost in noise.
        ticks = itertools.cycle((4.0, 1.0))
        monkeypatch.setattr(synth, "Timer", lambda device: nullcontext(SimpleNamespace(ms=next(ticks))))
        mine = sweep("own_tokens_only", batch_sizes=(2,), calc_prefill=False)
        run(mine)
        for result in results(mine).values():
            assert result.status == Status.OK
            assert (result.decode_ms, result.first_token_ms, result.decode_step_ms) == ((4, 4), (1, 1), 1)
            assert result.roofline_ms > 0 and result.achieved_gbs > 0 and result.achieved_tflops > 0

    def test_the_prefill_need_not_be_timed(self, sweep, fake):
        modes = fake()
        run(sweep(batch_sizes=(2,), calc_prefill=False))
        assert {result.prefill_ms for result in results(sweep(batch_sizes=(2,))).values()} == {()}
        assert modes[0].calls == (["set_up", "prefill"] + ["generate"] * 5 + ["release"]) * 2

    def test_what_is_run_and_how_often(self, sweep, fake):
        modes = fake()
        run(sweep(batch_sizes=(2,)))
        assert modes[0].calls == (["set_up"] + ["prefill"] * 3 + ["generate"] * 5 + ["release"]) * 2

    def test_a_single_token_has_no_first_one_to_subtract(self, sweep, fake):
        modes = fake()
        single = sweep(cells=(Cell("hydragen", 2, 8, 1),))
        run(single)
        assert modes[0].calls.count("generate") == 3
        assert results(single)[single.cells[0]].first_token_ms == ()

    def test_ranks_write_one_result_of_the_slowest(self, sweep):
        run_ranks(2, lambda group: run(sweep(), group))
        for cell, result in results(sweep()).items():
            assert result.environment["world_size"] == 2
            assert result.predicted_bytes == (footprint(TINY.config(), 2, cell).total,) * 2
            assert len(result.peak_bytes) == 2

    def test_vllms_ranks_are_its_own(self, sweep, fake):
        fake()
        run(sweep("vllm", tp=8))
        for result in results(sweep("vllm")).values():
            assert result.environment["world_size"] == 8
            assert (result.predicted_bytes, result.peak_bytes) == ((), ())


class TestResumption:
    def test_what_is_done_is_skipped(self, sweep, fake):
        modes = fake()
        run(sweep())
        assert run(sweep()) == f"4 of 4 cells have results in {sweep().outdir} and are skipped.\n"
        assert len(modes) == 1, "a model was loaded for nothing"
        printed = run(sweep(batch_sizes=(3, 4)))
        assert printed.startswith("2 of 4 cells have results")
        assert modes[1].calls.count("set_up") == 2

    def test_what_is_deleted_is_measured_again(self, sweep, fake):
        modes = fake()
        run(sweep())
        before = {cell: cell.path(sweep().outdir).read_text() for cell in sweep().cells}
        gone = sweep().cells[2]
        gone.path(sweep().outdir).unlink()
        assert run(sweep()).startswith("3 of 4 cells")
        assert modes[1].calls.count("set_up") == 1
        after = {cell: cell.path(sweep().outdir).read_text() for cell in sweep().cells}
        assert {cell for cell in before if before[cell] != after[cell]} <= {gone}

    def test_so_is_what_cannot_be_read(self, sweep, fake, capsys):
        fake()
        run(sweep())
        damaged = sweep().cells[0].path(sweep().outdir)
        damaged.write_text("schema_version: 0\n")
        run(sweep())
        assert f"warning: {damaged}: has schema version 0" in capsys.readouterr().err
        assert results(sweep())[sweep().cells[0]].status == Status.OK

    @pytest.mark.parametrize(
        ("options", "ours"),
        [
            (replace(TINY, dtype="bfloat16"), "tiny in bfloat16"),
            (replace(TINY, name="demo"), "demo in float32"),
        ],
    )
    def test_results_of_another_model_or_dtype_are_refused(self, sweep, fake, options, ours):
        modes = fake()
        run(sweep())
        message = f"{sweep().outdir} holds results of tiny in float32; this sweep is of {ours}; use another OUTDIR"
        for attempt in (lambda: run(sweep(model=options)), lambda: plan(sweep(model=options))):
            with pytest.raises(InputError, match=message):
                attempt()
        assert len(modes) == 1, "the model was loaded first"


    @pytest.mark.parametrize("mode", ["hydragen", "noattention"])
    def test_results_of_another_number_of_ranks_are_refused(self, sweep, fake, mode):
        modes = fake()
        run(sweep())
        message = (
            rf"^{sweep().outdir} holds results of hydragen on 1 rank\(s\) \(cpu\); "
            rf"this sweep is of {mode} on 2 rank\(s\) \(cpu\); use another OUTDIR$"
        )

        def refused(group):
            with pytest.raises(InputError, match=message):
                run(sweep(mode), group)

        run_ranks(2, refused)
        with pytest.raises(InputError, match=message):
            plan(sweep(mode), num_ranks=2)
        assert len(modes) == 1, "the model was loaded first"

    def test_so_are_those_of_another_device(self, sweep, fake, monkeypatch):
        fake()
        run(sweep())
        group = TPGroup()
        monkeypatch.setattr(group, "device", torch.device("cuda"))
        with pytest.raises(InputError, match=r"on 1 rank\(s\) \(cpu\); this sweep .* on 1 rank\(s\) \(cuda\); use"):
            run(sweep(), group)

    @pytest.mark.parametrize(
        ("execution", "problem"),
        [
            (Execution("aten"), "attention_backend reference; this sweep has aten"),
            (Execution(), "attention_backend reference; this sweep has "),
            (Execution("reference", "aten"), "operations_backend simd; this sweep has aten"),
            (Execution("reference", cuda_graphs=True), "cuda_graphs False; this sweep has True"),
        ],
    )
    def test_so_are_those_of_an_engine_that_ran_otherwise(self, sweep, fake, monkeypatch, execution, problem):
        monkeypatch.setattr("engine.bench.environment.available_operations_backends", lambda *_: ("simd", "aten"))
        fake()
        run(sweep(execution=Execution("reference")))
        assert "are skipped" in run(sweep(execution=Execution("reference")))
        with pytest.raises(InputError, match=f"holds results of hydragen with {problem}.*; use another OUTDIR"):
            run(sweep(execution=execution))

    def test_other_systems_have_processes_of_their_own(self, sweep, fake):
        fake()
        run_ranks(2, lambda group: run(sweep(), group))
        run(sweep("hf"))
        run(sweep("vllm", tp=8))
        run(sweep("vllm_notok", tp=4))
        with pytest.raises(InputError, match=r"of vllm on 8 rank\(s\) \(cpu\); this sweep is of vllm on 4 rank"):
            run(sweep("vllm", tp=4))
        with pytest.raises(InputError, match=r"of vllm on 8 rank\(s\) \(cpu\); this sweep is of vllm on 4 rank"):
            plan(sweep("vllm", tp=4), num_ranks=4)


class TestRoom:
    def test_a_cell_that_does_not_fit_is_recorded(self, sweep, fake, monkeypatch):
        modes = fake()
        needs = {cell: footprint(TINY.config(), 1, cell) for cell in sweep().cells}
        larger = max(need.cache + need.activations for need in needs.values())
        free = larger  # which leaves nothing for what nobody counts
        monkeypatch.setattr(engine.arena, "_FRACTION", 0.99)
        monkeypatch.setattr(synth, "available_bytes", lambda group: free if modes else 2**40)  # the weights are taken
        printed = run(sweep())
        for cell, result in results(sweep()).items():
            fits = needs[cell].cache + needs[cell].activations < larger
            assert result.status == (Status.OK if fits else Status.DOES_NOT_FIT)
            assert result.predicted_bytes == (needs[cell].total,)
            if not fits:
                message = f"needs {larger / GIB:.2f} GiB a rank beside the weights; {free / GIB:.2f} GiB are free"
                assert result.message.startswith(message) and result.message in printed
                assert result.decode_ms == ()
        assert modes[0].calls.count("set_up") == 3, "it was tried"
        run(sweep())
        assert len(modes) == 1, "it was tried again"

    def test_weights_that_do_not_fit_are_not_loaded(self, sweep, fake, monkeypatch):
        modes = fake()
        weights = footprint(TINY.config(), 1, sweep().cells[0]).weights
        monkeypatch.setattr(synth, "available_bytes", lambda group: weights - 1)
        printed = run(sweep())
        assert not modes and "Loading" not in printed
        found = results(sweep())
        assert set(found) == set(sweep().cells)
        for result in found.values():
            assert result.status == Status.DOES_NOT_FIT and result.predicted_bytes[0] > weights
            gib = f"{weights / GIB:.2f} GiB"
            assert result.message == f"the weights take {gib} a rank; {gib} are free" in printed
        run(sweep())
        assert not modes, "it was tried again"

    def test_ranks_go_by_the_one_with_least(self, sweep, fake, monkeypatch):
        modes = fake()
        monkeypatch.setattr(synth, "available_bytes", lambda group: 0 if modes and group.rank == 1 else 2**40)
        run_ranks(2, lambda group: run(sweep(), group))
        assert {result.status for result in results(sweep()).values()} == {Status.DOES_NOT_FIT}

    def test_a_cache_that_cannot_be_had_is_recorded(self, sweep, monkeypatch):
        monkeypatch.setattr(engine.arena, "available_bytes", lambda group: 2**12)
        run(sweep())
        for result in results(sweep()).values():
            assert result.status == Status.DOES_NOT_FIT
            assert re.match(r"a KV cache of \d+ tokens needs .* which memory has room for", result.message)

    @pytest.mark.parametrize("mode", ["hydragen", "noattention"])
    def test_a_batch_that_would_run_in_waves_is_recorded(self, sweep, monkeypatch, mode):
        """Free memory can shrink after the sweep began. What is timed is the whole batch at once, or nothing."""
        needed = lambda model, tree, nodes, sequences, num_sequences: 2**60 * (num_sequences > 2)  # noqa: E731
        monkeypatch.setattr(engine.tree_room, "tree_activation_bytes", needed)
        run(sweep(mode))
        for cell, result in results(sweep(mode)).items():
            assert result.status == (Status.OK if cell.batch_size == 2 else Status.DOES_NOT_FIT)
            if cell.batch_size == 3:
                assert result.message.startswith("memory has room for 2 of 3 sequences") and result.decode_ms == ()

    def test_a_cell_that_is_too_long_is_recorded(self, sweep, fake):
        fake()
        grid = make_grid("hydragen", (2,), (4092, 4093), (4,))
        run(sweep(cells=grid))
        fits, too_long = results(sweep(cells=grid)).values()
        assert fits.status == Status.OK
        assert too_long.status == Status.DOES_NOT_FIT
        assert too_long.message == "4097 tokens a sequence; the model has 4096 positions"

    @pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError(), RuntimeError("cpu: can't allocate memory: 9")])
    @pytest.mark.parametrize("stage", ["set_up", "prefill", "generate"])
    def test_out_of_memory_is_recorded_and_the_sweep_goes_on(self, sweep, fake, stage, error):
        modes = fake(stage=stage, error=error)
        printed = run(sweep())
        first_line = str(error).splitlines()[:1]
        for cell, result in results(sweep()).items():
            assert result.status == (Status.OUT_OF_MEMORY if cell.batch_size == 2 else Status.OK)
            if cell.batch_size == 2:
                assert result.message == ": ".join(["out of memory", *first_line])
                assert result.message in printed
        assert modes[0].calls.count("release") == 4

    def test_another_error_is_not_taken_for_it(self, sweep, fake):
        fake(stage="generate", error=RuntimeError("ours"))
        with pytest.raises(RuntimeError, match="ours"):
            run(sweep())
        assert not sweep().cells[0].path(sweep().outdir).exists()

    @pytest.mark.parametrize("rank", [0, 1, None])
    def test_ranks_agree_before_they_start(self, sweep, fake, rank):
        fake(stage="set_up", rank=rank)
        run_ranks(2, lambda group: run(sweep(), group))
        for cell, result in results(sweep()).items():
            assert result.status == (Status.OUT_OF_MEMORY if cell.batch_size == 2 else Status.OK)

    @pytest.mark.parametrize("rank", [0, 1, None])
    @pytest.mark.parametrize("stage", ["prefill", "generate"])
    def test_a_rank_that_runs_out_ends_the_run_and_the_next_goes_on(self, sweep, fake, stage, rank):
        fake(stage=stage, rank=rank)
        world = World(2)

        def run_to_the_end(group):
            with pytest.raises(InputError) as raised:
                run(sweep(), group)
            world._barrier.abort()  # a process that ends breaks the connections
            return str(raised.value)

        messages = world.run(run_to_the_end)
        who = "another rank" if rank == 1 else "rank 0"
        assert messages[0] == (
            f"{who} ran out of memory in hydragen batch 2, shared 8, unique 4, which is recorded; run the same command "
            "again to go on with the next cell"
        )
        first, *others = sweep().cells
        assert read_cell(first.path(sweep().outdir)).status == Status.OUT_OF_MEMORY
        assert not any(cell.path(sweep().outdir).exists() for cell in others)
        fake()
        run_ranks(2, lambda group: run(sweep(), group))
        assert [result.status for result in results(sweep()).values()] == [Status.OUT_OF_MEMORY] + [Status.OK] * 3


class TestOutdir:
    @pytest.mark.parametrize("below", [".", "x/y"])
    def test_a_file_is_refused_before_anything_is_loaded(self, sweep, fake, tmp_path, below):
        modes = fake()
        (tmp_path / "file").write_text("mine")
        foreign = sweep(outdir=tmp_path / "file" / below)
        for attempt in (lambda: run(foreign), lambda: plan(foreign)):
            with pytest.raises(InputError, match=f"{tmp_path}/file is a file; accepted: an OUTDIR that is a directory"):
                attempt()
        assert not modes

    def test_so_is_one_that_cannot_be_written_to(self, sweep, monkeypatch, tmp_path):
        monkeypatch.setattr("engine.files.os.access", lambda path, mode: False)
        with pytest.raises(InputError, match=f"{tmp_path} cannot be written to"):
            run(sweep())

    def test_all_ranks_hear_of_it(self, sweep, fake, tmp_path):
        fake()
        (tmp_path / "file").write_text("mine")

        def refused(group):
            with pytest.raises(InputError, match="is a file"):
                run(sweep(outdir=tmp_path / "file"), group)

        run_ranks(2, refused)

    def test_and_of_a_disk_that_is_full(self, sweep, fake, monkeypatch):
        def fail(outdir, result):
            raise OSError(28, "No space left on device", str(outdir))

        fake()
        monkeypatch.setattr(synth, "write_cell", fail)

        def refused(group):
            with pytest.raises(OSError, match="No space left"):
                run(sweep(), group)

        run_ranks(2, refused)


class TestPlan:
    def test_shows_what_each_cell_needs(self, sweep, fake):
        modes = fake()
        big = sweep(model=replace(TINY, name="codellama/CodeLlama-34b-hf"))
        big = replace(big, cells=make_grid("hydragen", (32, 4096), (1024, 16256), (128, 256)))
        for cell, row in zip(big.cells, plan(big, num_ranks=8), strict=True):
            need = footprint(big.model.config(), 8, cell)
            sizes = [need.weights, need.cache, need.activations, need.total]
            lengths = [cell.batch_size, cell.num_shared, cell.num_unique]
            state = "too long" if cell.num_shared + cell.num_unique > 16384 else "to be run"
            assert row == [*map(str, lengths), *(f"{size / GIB:.3f}" for size in sizes), state]
        assert float(row[3]) == pytest.approx(33.7 * 2 / 1.0737 / 8, rel=0.01)  # 33.7e9 parameters in bfloat16
        assert not big.outdir.parent.exists()
        assert not modes

    def test_shows_what_is_there_already(self, sweep, fake):
        fake()
        run(sweep(batch_sizes=(2,)))
        assert [row[-1] for row in plan(sweep())] == ["there already", "to be run"] * 2

    def test_knows_nothing_of_vllms_memory(self, sweep):
        assert plan(sweep("vllm"))[0] == ["2", "8", "4", "-", "-", "-", "-", "to be run"]
