"""Tensor parallelism against one process with as many threads: the same cell, turn by turn.

Each turn is a sweep of one cell in processes of its own, as a user would start it, so that nothing of the one is left
for the other. A machine's speed drifts, so ratios are taken between neighbours.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from engine.bench.breakdown import Series
from engine.bench.measurement_file import check_new, round_all, round_off, write_measurement
from engine.bench.modes import ModelOptions
from engine.bench.results import Cell, CellResult, Status, read_cell
from engine.errors import InputError
from engine.progress import progress_bar

SCHEMA_VERSION = 1
FILE_NAME = "scaling.yaml"


@dataclass(frozen=True)
class Plan:
    """One cell, in one process of ``num_ranks`` threads and in ``num_ranks`` processes of one."""

    cell: Cell
    model: ModelOptions
    num_ranks: int
    num_rounds: int
    num_iters: int  # of each turn


@dataclass(frozen=True)
class Scaling:
    plan: Plan
    one_process: list[CellResult]  # one a round
    ranks: list[CellResult]

    @property
    def ratio(self) -> Series:
        """How many times as many tokens per second the ranks make."""
        pairs = zip(self.ranks, self.one_process, strict=True)
        return Series([ranks.tokens_per_second / one.tokens_per_second for ranks, one in pairs])


def run_scaling(outdir: Path, plan: Plan, synth: Path, console: Console) -> Scaling:
    """Takes the turns and writes ``outdir/scaling.yaml``. ``synth`` is the script that sweeps.

    Raises InputError for an ``outdir`` that cannot be written to or has the file already, for fewer than two ranks, and
    for a turn that fails, with what it said.
    """
    check_new(outdir / FILE_NAME)
    if plan.num_ranks < 2:
        raise InputError(f"{plan.num_ranks} rank is one process; accepted: 2 or more; raise --num-ranks")
    scaling = Scaling(plan, [], [])
    with progress_bar(console) as progress, tempfile.TemporaryDirectory() as scratch:
        task = progress.add_task("", total=2 * plan.num_rounds)
        for round_ in range(plan.num_rounds):
            turns = [(1, scaling.one_process), (plan.num_ranks, scaling.ranks)]
            for num_processes, results in turns if round_ % 2 == 0 else reversed(turns):  # neither is always the later
                progress.update(task, description=f"round {round_ + 1}, processes: {num_processes}")
                results.append(_turn(plan, num_processes, synth, Path(scratch, f"{round_}-{num_processes}")))
                progress.advance(task)
    write_measurement(outdir / FILE_NAME, _described(scaling))
    return scaling


def _turn(plan: Plan, num_processes: int, synth: Path, results: Path) -> CellResult:
    cell, model = plan.cell, plan.model
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    sizes = [str(size) for size in (cell.batch_size, cell.num_shared, cell.num_unique)]
    options = {
        "--mode": cell.mode, "--model-name": model.name, "--load-format": model.load_format, "--dtype": model.dtype,
        "--device": "cpu", "--num-iters": str(plan.num_iters), "--seed": str(model.seed),
    }  # fmt: skip
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(synth), str(results), *sizes]
    command += [word for option in options.items() for word in option] + ["--no-calc-prefill"]
    environment = os.environ | {"OMP_NUM_THREADS": str(plan.num_ranks // num_processes)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.startswith("error")), done.stderr[-500:])
        raise InputError(f"a sweep with {num_processes} process(es) ended with status {done.returncode}: {said}")
    result = read_cell(cell.path(results))
    if result.status != Status.OK or result.tokens_per_second is None:
        raise InputError(
            f"a sweep with {num_processes} process(es) has no throughput: "
            f"{result.message or 'its steps are lost in noise'}; use a smaller cell, or more tokens"
        )
    return result


def print_scaling(scaling: Scaling, console: Console) -> None:
    """Prints each round and the ratio."""
    plan, ratio = scaling.plan, scaling.ratio
    for round_, (one, ranks, value) in enumerate(
        zip(scaling.one_process, scaling.ranks, ratio.values, strict=True), start=1
    ):
        console.print(
            f"round {round_}: 1 process, {plan.num_ranks} threads: {one.tokens_per_second:.0f} tokens/s; "
            f"{plan.num_ranks} ranks, 1 thread each: {ranks.tokens_per_second:.0f} tokens/s; {value:.2f}",
            soft_wrap=True,
        )
    spread = "" if ratio.spread is None else f" (spread {ratio.spread:.0%}, least {min(ratio.values):.2f})"
    console.print(f"{plan.num_ranks} ranks make {ratio.median:.2f} times the tokens of one process{spread}")


def _described(scaling: Scaling) -> dict[str, object]:
    plan, ratio = scaling.plan, scaling.ratio

    def turns(results: list[CellResult]) -> list[dict[str, object]]:
        return [
            {
                "tokens_per_second": round_off(r.tokens_per_second),
                "decode_ms": list(r.decode_ms),
                "first_token_ms": list(r.first_token_ms),
            }
            for r in results
        ]

    return {
        "schema_version": SCHEMA_VERSION,
        "model_name": plan.model.name,
        "seed": plan.model.seed,
        "mode": plan.cell.mode,
        "batch_size": plan.cell.batch_size,
        "num_shared": plan.cell.num_shared,
        "num_unique": plan.cell.num_unique,
        "environment": scaling.one_process[0].environment,
        "num_ranks": plan.num_ranks,
        "one_process": turns(scaling.one_process),
        "ranks": turns(scaling.ranks),
        "ratio": {
            "median": round_off(ratio.median),
            "spread": None if ratio.spread is None else round_off(ratio.spread),
            "rounds": round_all(ratio.values),
        },
    }
