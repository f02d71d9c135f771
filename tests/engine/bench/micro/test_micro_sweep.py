import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from documented import fields_of_table
from micro_machine import set_machine
from rich.console import Console

from engine.arena import fits_beside
from engine.attention.crossover import ALWAYS, NEVER
from engine.bench.micro import decode_operations, micro_sweep, subjects
from engine.bench.micro.decode_operations import Ready, whole_attention
from engine.bench.micro.decode_workload import MODES
from engine.bench.micro.micro_results import FILES, Sizes, TimedWith
from engine.bench.micro.micro_settings import (
    MicroSweep,
    make_grid,
    parse_backend,
    parse_dtype,
    parse_modes,
)
from engine.bench.micro.micro_sweep import print_plan, run_microbenchmark
from engine.bench.micro.operation import Memory
from engine.bench.micro.subjects import subjects_of
from engine.bench.result_files import Status
from engine.distributed import TPGroup
from engine.errors import InputError
from kernels import Backend

CPU = torch.device("cpu")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSecond line")
GRID = make_grid(("hydragen",), (2, 3), (8,), (0, 4), (4,), (2,), (8,))


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    set_machine(monkeypatch)


@pytest.fixture
def sweep(tmp_path):
    return MicroSweep(tmp_path / "a" / "out", ("hydragen",), GRID, num_iters=2, num_warmup=1)


def run(sweep) -> tuple[list, str]:
    file = io.StringIO()
    return run_microbenchmark(sweep, TPGroup(), Console(file=file, width=300)), file.getvalue()


def plan(sweep) -> list[list[str]]:
    file = io.StringIO()
    print_plan(sweep, TPGroup(), Console(file=file, width=160))
    return [re.findall(r"[^│\s][^│]*?(?=\s*│)", line) for line in file.getvalue().splitlines() if line.startswith("│")]


def saved(sweep):
    return FILES.read_all([sweep.outdir])


class TestGrid:
    def test_every_combination_unique_lengths_fastest(self):
        grid = make_grid(("base",), (1, 2), (10, 20), (0, 5), (8,), (1, 2), (64,))
        assert len(grid) == 16
        assert grid[0] == Sizes(1, 10, 0, 0, 8, 1, 64) and grid[1] == Sizes(1, 10, 5, 5, 8, 1, 64)

    def test_keys_in_use(self):
        grid = make_grid(("base",), (1,), (10,), (4, 5), (8,), (1,), (64,), unique_seq_len=4)
        assert [(sizes.num_unique, sizes.unique_seq_len) for sizes in grid] == [(4, 4), (5, 4)]

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"num_heads": (8, 12), "num_kv_heads": (2, 5)}, "divide by KV heads: 8 to 5, 12 to 5; accepted"),
            ({"num_heads": (1,), "num_kv_heads": range(2, 9)}, "1 to 2, 1 to 3, 1 to 4, 1 to 5, 1 to 6 and 2 more"),
            ({"num_shared": (0, 8), "num_unique": (0, 4)}, "NUM_SHARED 0 with no unique keys leaves nothing"),
            ({"num_shared": (0,), "unique_seq_len": 0}, "NUM_SHARED 0 with no unique keys leaves nothing"),
            ({"unique_seq_len": 5}, "--unique-seq-len 5 is above NUM_UNIQUE 4"),
            ({"batch_sizes": range(1, 10002)}, "the ranges make 10001 rows; accepted: at most 10000"),
            ({"modes": ("operations",), "head_dims": (7, 8, 9)}, "--dim-range holds 7, 9; accepted: even numbers"),
        ],
    )
    def test_what_has_no_meaning_is_refused(self, changes, problem):
        arguments = {
            "modes": ("hydragen",), "batch_sizes": (2,), "num_shared": (8,), "num_unique": (4,), "num_heads": (8,),
            "num_kv_heads": (1,), "head_dims": (8,),
        }  # fmt: skip
        with pytest.raises(InputError, match=re.escape(problem)):
            make_grid(**arguments | changes)


class TestArguments:
    def test_modes(self):
        assert parse_modes("hydragen", None) == ("hydragen",)
        assert parse_modes("hydragen", "base") == ("hydragen", "base")
        assert parse_modes("operations", None) == ("operations",)
        for mode, compare, problem in (
            ("fast", None, "mode 'fast' is not known; accepted: base, hydragen, auto, operations, prefill"),
            ("", None, "mode '' is not known"),
            ("base", "", "mode '' is not known here"),
            ("base", "hydragen,base", "mode base was given twice"),
            ("operations", "base", "mode 'operations' is not known here; accepted: base, hydragen, auto"),
            ("base", "operations", "operations and prefill alone: they compare by themselves"),
        ):
            with pytest.raises(InputError, match=re.escape(problem)):
                parse_modes(mode, compare)

    def test_dtypes_and_backends(self):
        assert parse_dtype("float16") == torch.float16
        for name in ("auto", "int4"):
            with pytest.raises(InputError, match=f"dtype '{name}' is not known; accepted: float32, bfloat16, float16"):
                parse_dtype(name)
        assert parse_backend("aten", ("base",), CPU, torch.bfloat16) == "aten"
        with pytest.raises(InputError, match="attention backend 'abacus' cannot run bfloat16 on cpu; accepted: "):
            parse_backend("abacus", ("base",), CPU, torch.bfloat16)
        with pytest.raises(InputError, match="--backend aten was given, but mode operations times every backend"):
            parse_backend("aten", ("operations",), CPU, torch.bfloat16)


class TestRows:
    @pytest.mark.parametrize("mode", ["base", "hydragen"])
    def test_every_row_is_a_file_that_is_documented(self, sweep, mode):
        results, printed = run(replace(sweep, modes=(mode,)))
        assert [result.row.sizes for result in results] == list(GRID)
        assert {replace(result, sweep="", times_ms=()) for result in map(_hashable, results)} == {
            replace(result, sweep="", times_ms=()) for result in map(_hashable, saved(sweep))
        }
        documented = fields_of_table(1)
        for result in results:
            assert result.row.path(Path()).parent == Path(mode)
            assert yaml.safe_load(result.row.path(sweep.outdir).read_text()).keys() == documented
            assert (result.status, result.message, result.choice) == (Status.OK, "", None)
            assert (len(result.times_ms), result.num_warmup, result.timed_with) == (2, 1, TimedWith.CLOCK)
            assert (result.read_gbs, result.matmul_tflops) == (10.0, 1.0)
            assert len(result.backends) == (2 if mode == "hydragen" and result.row.num_unique else 1)
            assert result.environment["dtype"] == "bfloat16"
            work = whole_attention(mode).work(result.row.sizes, torch.bfloat16)
            assert (result.num_bytes, result.num_flops) == (work.bytes, work.flops)
            assert f"{mode}, {result.row.words}: {result.median_ms:.4f} ms" in printed
        assert len({result.run for result in results}) == 1

    def test_finished_sizes_are_skipped(self, sweep):
        run(sweep)
        paths = [result.row.path(sweep.outdir) for result in saved(sweep)]
        times = [path.stat().st_mtime_ns for path in paths]
        assert run(sweep) == ([], f"4 of 4 sizes have results in {sweep.outdir} and are skipped.\n")
        paths[2].write_text("schema_version: 0\n")
        results, printed = run(sweep)
        assert [result.row.path(sweep.outdir) for result in results] == [paths[2]]
        assert printed.startswith("3 of 4 sizes have results")
        assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [1, 1, 0, 1]

    def test_without_saving_nothing_is_written_or_skipped(self, sweep):
        run(sweep)
        before = {path: path.read_bytes() for path in sweep.outdir.rglob("*.yaml")}
        results, printed = run(replace(sweep, save=False, seed=1))
        assert len(results) == 4 and "skipped" not in printed
        assert before == {path: path.read_bytes() for path in sweep.outdir.rglob("*.yaml")}
        elsewhere = replace(sweep, save=False, outdir=sweep.outdir.parent / "other")
        run(elsewhere)
        assert not elsewhere.outdir.exists()

    def test_modes_that_are_compared_take_turns(self, sweep, monkeypatch):
        order = []
        actual = whole_attention

        def watched(mode, crossover):
            operation = actual(mode, crossover)

            def prepare(workload, backend):
                ready = operation.prepare(workload, backend)
                return replace(ready, run=lambda: (order.append(mode), ready.run()))

            return replace(operation, prepare=prepare)

        monkeypatch.setattr(subjects, "whole_attention", watched)
        results, _ = run(replace(sweep, modes=("hydragen", "base"), grid=GRID[:1]))
        # The first call of each, one round before, two that count.
        assert [set(order[i : i + 2]) for i in range(0, 8, 2)] == [{"hydragen", "base"}] * 4 and len(order) == 8
        assert [result.row.mode for result in results] == ["hydragen", "base"]
        # A row that is missing is not timed alone.
        results[0].row.path(sweep.outdir).unlink()
        assert len(run(replace(sweep, modes=("hydragen", "base"), grid=GRID[:1]))[0]) == 2

    @pytest.mark.parametrize(("crossover", "choice"), [(ALWAYS, "shared"), (NEVER, "unshared")])
    def test_auto_asks_for_its_setting_and_says_what_it_chose(self, sweep, monkeypatch, crossover, choice):
        asked = []
        monkeypatch.setattr(subjects, "_crossover", lambda *setting: asked.append(setting) or crossover)
        run(replace(sweep, modes=("base",)))
        assert asked == []
        results, _ = run(replace(sweep, modes=("auto", "hydragen"), grid=GRID[:1], backend=Backend.ATEN))
        assert set(asked) == {(CPU, torch.bfloat16, (4, 2, 8), Backend.ATEN)}
        assert [result.choice for result in results] == [choice, None]
        assert FILES.read(results[0].row.path(sweep.outdir)).choice == choice
        # What each sequence reads for itself counts as often.
        assert (results[0].num_bytes > results[1].num_bytes) == (choice == "unshared")

    def test_an_outdir_of_another_dtype_or_device_is_refused(self, sweep):
        run(replace(sweep, modes=("base",)))
        with pytest.raises(InputError, match="holds rows of cpu in bfloat16; this sweep is of cpu in float32; use an"):
            run(replace(sweep, dtype=torch.float32))
        with pytest.raises(InputError, match="this sweep is of cpu in float32"):
            plan(replace(sweep, dtype=torch.float32))
        path = saved(sweep)[0].row.path(sweep.outdir)
        path.write_text(path.read_text().replace("device: cpu", "device: cuda"))
        with pytest.raises(InputError, match="holds rows of cuda in bfloat16"):
            run(sweep)

    def test_a_backend_is_another_row(self, sweep):
        run(sweep)
        results, _ = run(replace(sweep, backend="aten"))
        assert {result.backends for result in results} == {("aten",), ("aten", "aten")}
        assert len(saved(sweep)) == 8

    def test_verbose(self, sweep):
        results, printed = run(replace(sweep, verbose=True))
        for result in results:
            assert f"  ms: {result.times_ms[0]:.4f} {result.times_ms[1]:.4f}\n" in printed
        assert "this machine reads at 10.0 GB/s and multiplies at 1.000 TFLOP/s" in printed

    def test_numbers_that_time_decides(self, sweep, monkeypatch):
        monkeypatch.setattr(micro_sweep, "BUDGET_S", 0.0)
        results, _ = run(replace(sweep, num_iters=None, num_warmup=None))
        assert {(len(result.times_ms), result.num_warmup) for result in results} == {(5, 1)}


def _hashable(result):
    return replace(result, environment=None)


class TestMemory:
    def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(self, sweep, monkeypatch):
        monkeypatch.setattr(micro_sweep, "available_bytes", lambda group: 100_000)
        huge = replace(GRID[0], batch_size=2**31 - 1, num_shared=2**31 - 1)
        results, printed = run(replace(sweep, grid=(huge, *GRID)))
        assert [result.status for result in results] == [Status.DOES_NOT_FIT] + [Status.OK] * 4
        assert "needs " in results[0].message and "0.00 GiB are free" in results[0].message
        assert results[0].predicted_bytes > 2**31 and results[0].times_ms == ()
        assert f"{results[0].row.words}: needs " in printed
        assert run(replace(sweep, grid=(huge, *GRID)))[0] == []

    def test_one_of_two_that_take_turns(self, sweep, monkeypatch):
        one = replace(GRID[1], batch_size=64, num_shared=64)
        both = replace(sweep, modes=("base", "hydragen"), grid=(one,))
        found = subjects_of(both, one, CPU)
        needed = [Memory.together([s.operation.needs(one, sweep.dtype, None)]) for s in found]
        enough = next(n for n in range(0, 10**7, 1000) if fits_beside(n, needed[0].arenas, needed[0].others))
        monkeypatch.setattr(micro_sweep, "available_bytes", lambda group: enough)
        assert [row[-1] for row in plan(replace(both, modes=("base",)))] == ["to be run"]
        assert [row[-1] for row in plan(both)] == ["does not fit", "to be run"]
        results, _ = run(both)
        assert [(r.row.mode, r.status) for r in results] == [("base", Status.DOES_NOT_FIT), ("hydragen", Status.OK)]

    @pytest.mark.parametrize("when", ["make", "first call", "later call"])
    def test_out_of_memory_is_recorded_and_the_rest_goes_on(self, sweep, monkeypatch, when):
        actual = whole_attention

        def failing(mode, crossover):
            def prepare(workload, backend):
                calls = []

                def call():
                    calls.append(1)
                    if workload.sizes == GRID[1] and len(calls) == (1 if when == "first call" else 3):
                        raise OUT_OF_MEMORY

                if when == "make" and workload.sizes == GRID[1]:
                    raise OUT_OF_MEMORY
                return Ready(call)

            return replace(actual(mode), prepare=prepare)

        monkeypatch.setattr(subjects, "whole_attention", failing)
        results, _ = run(sweep)
        assert [result.status for result in results] == [
            Status.OK, Status.OUT_OF_MEMORY, Status.OK, Status.OK
        ]  # fmt: skip
        assert results[1].message == "out of memory: CUDA out of memory. Tried to allocate 9 GiB."
        assert saved(sweep)[1].times_ms == ()

    def test_another_failure_is_one(self, sweep, monkeypatch):
        def failing(mode, crossover):
            def prepare(workload, backend):
                raise RuntimeError("an index is out of range")

            return replace(whole_attention(mode), prepare=prepare)

        monkeypatch.setattr(subjects, "whole_attention", failing)
        with pytest.raises(RuntimeError, match="out of range"):
            run(sweep)
        assert not sweep.outdir.exists()

    def test_nothing_is_left_of_the_size_before(self, sweep, monkeypatch):
        import gc
        import weakref

        made = []
        workload = decode_operations.DecodeWorkload

        def make(*arguments):
            gc.disable()  # freed by reference counts alone, at once
            assert not [one for one in made if one() is not None]
            one = workload(*arguments)
            made.append(weakref.ref(one))
            return one

        monkeypatch.setattr(decode_operations, "DecodeWorkload", make)
        try:
            run(replace(sweep, modes=("hydragen", "base")))
        finally:
            gc.enable()
        assert len(made) == 4


class TestPlan:
    def test_every_row_and_nothing_is_made(self, sweep, monkeypatch):
        monkeypatch.setattr(decode_operations, "DecodeWorkload", None)
        rows = plan(replace(sweep, modes=("hydragen", "base")))
        assert [row[:6] for row in rows[:2]] == [
            ["2", "8", "0", "4/2", "8", "hydragen"], ["2", "8", "0", "4/2", "8", "base"]
        ]  # fmt: skip
        assert {row[-1] for row in rows} == {"to be run"}
        assert not sweep.outdir.exists()

    def test_what_is_there_and_what_does_not_fit(self, sweep, monkeypatch):
        run(replace(sweep, grid=GRID[:2]))
        huge = replace(GRID[0], num_shared=2**31 - 1)
        states = [row[-1] for row in plan(replace(sweep, grid=(*GRID, huge), dtype=torch.bfloat16))]
        monkeypatch.setattr(micro_sweep, "available_bytes", lambda group: 10**6)
        assert states[:4] == ["there already"] * 2 + ["to be run"] * 2
        assert [row[-1] for row in plan(replace(sweep, grid=(huge,)))] == ["does not fit"]


class TestOperations:
    def test_every_operation_with_every_backend(self, sweep):
        sizes = Sizes(2, 8, 4, 2, 4, 2, 8)
        results, _ = run(replace(sweep, modes=("operations",), grid=(sizes,)))
        assert {result.status for result in results} == {Status.OK}
        names = [(result.row.operation, result.row.backend) for result in results]
        assert names == [(s.row.operation, s.row.backend) for s in subjects_of(sweep_of(sizes), sizes, CPU)]
        others = {"memory_read", "attention_shared", "attention_own", "merge"}
        rows = {"add_rms_norm", "rotary_into_cache", "swiglu", "block_maxima", "block_masses"}
        assert {name for name, _ in names} == {*MODES, *others, *rows}
        assert {backend for name, backend in names if name == "attention_own"} >= {"aten"}
        by_name = {result.row.operation: result for result in results}
        swiglu, own = by_name["swiglu"], by_name["attention_own"]
        assert (swiglu.hidden_size, swiglu.intermediate_size, swiglu.vocab_size) == (32, 256, 32000)
        assert (own.hidden_size, own.intermediate_size, own.vocab_size) == (None, None, None)
        assert len(list((sweep.outdir / "operations").iterdir())) == len(results)
        assert run(replace(sweep, modes=("operations",), grid=(sizes,)))[0] == []


def sweep_of(sizes):
    return MicroSweep(Path(), ("operations",), (sizes,))
