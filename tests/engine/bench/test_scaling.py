"""Turns of one process and of ranks, by a sweep that notes how it was started and makes up its times."""

import io

import pytest
import yaml
from rich.console import Console

from engine.bench.modes import ModelOptions
from engine.bench.results import Cell
from engine.bench.scaling import Plan, print_scaling, run_scaling
from engine.errors import InputError

PLAN = Plan(Cell("hydragen", 4, 8, 3), ModelOptions("tiny", load_format="dummy", dtype="float32"), 2, 1, 2)
QUIET = Console(file=io.StringIO(), quiet=True)

# In one process of two threads a step takes 10 ms, in two ranks of one thread 16.
SWEEP = """
import os, sys
from pathlib import Path
from engine.bench.results import Cell, CellResult, Status, write_cell

out, *sizes = sys.argv[1:5]
options = sys.argv[5:]
assert options[options.index("--model-name") + 1] == "tiny" and options[options.index("--num-iters") + 1] == "2"
size, rank, threads = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0"), os.environ["OMP_NUM_THREADS"]
assert size * int(threads) == 2
if options[options.index("--seed") + 1] == "7":
    sys.exit("error: no memory" if rank == "0" else 1)
if rank == "0":
    step = 10 if size == 1 else 16
    status = Status.DOES_NOT_FIT if options[options.index("--seed") + 1] == "8" else Status.OK
    times = ((2 * step + 1.0,) * 2, (1.0, 1.0)) if status == Status.OK else ((), ())
    message = "" if status == Status.OK else "needs 9 GiB"
    cell = Cell("hydragen", *map(int, sizes))
    result = CellResult(cell, status, "tiny", 0, 2, 0, {"world_size": size}, message, *times)
    write_cell(Path(out), result)
"""


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP)
    return path


def test_ranks_are_held_against_one_process(tmp_path, sweep):
    found = run_scaling(tmp_path / "new", PLAN, sweep, QUIET)
    assert found.ratio.values == [pytest.approx(10 / 16)]
    written = yaml.safe_load((tmp_path / "new" / "scaling.yaml").read_text())
    assert written["ratio"]["median"] == pytest.approx(0.625) and written["num_ranks"] == 2
    assert [turn["tokens_per_second"] for turn in written["one_process"]] == [400]
    assert [turn["decode_ms"] for turn in written["ranks"]] == [[33.0, 33.0]]
    printed = io.StringIO()
    print_scaling(found, Console(file=printed, width=200))
    assert printed.getvalue().splitlines() == [
        "round 1: 1 process, 2 threads: 400 tokens/s; 2 ranks, 1 thread each: 250 tokens/s; 0.62",
        "2 ranks make 0.62 times the tokens of one process",
    ]
    with pytest.raises(InputError, match="scaling.yaml exists; accepted: an OUTDIR without one"):
        run_scaling(tmp_path / "new", PLAN, sweep, QUIET)


@pytest.mark.parametrize(
    ("seed", "message"), [(7, "ended with status 1: error: no memory"), (8, "has no throughput: needs 9 GiB; use a")]
)
def test_a_turn_that_fails(tmp_path, sweep, seed, message):
    plan = Plan(PLAN.cell, ModelOptions("tiny", load_format="dummy", dtype="float32", seed=seed), 2, 1, 2)
    with pytest.raises(InputError, match=message):
        run_scaling(tmp_path / "new", plan, sweep, QUIET)
    assert not (tmp_path / "new").exists()


def test_one_rank_is_no_comparison(tmp_path, sweep):
    with pytest.raises(InputError, match="1 rank is one process; accepted: 2 or more"):
        run_scaling(tmp_path / "new", Plan(PLAN.cell, PLAN.model, 1, 1, 1), sweep, QUIET)
