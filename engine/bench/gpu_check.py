"""One run over what only a GPU can show: tests, the machine's ceilings, two ranks on one device, throughput.

Each section is a process of its own with a time limit, so that a fault of one leaves the others alone: a process in
which a kernel failed can do nothing more on its device.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.bench.gpu_work import NEEDLE_DTYPES, RESULTS, SIZES, Grid, MicroGrid
from engine.bench.micro.micro_report import MicroRow, build_micro_rows, micro_findings
from engine.bench.micro.micro_results import FILES, RowResult, Sizes
from engine.bench.micro.sparse_report import SparseRow, build_sparse_rows, sparse_findings
from engine.bench.needles.needle_report import NeedlesRow, build_needle_rows
from engine.bench.needles.needle_results import NEEDLE_FILES
from engine.bench.results import CellResult, Status, read_results
from engine.files import write_whole

SCHEMA_VERSION = 1
REPORT = "gpu_check.json"
_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE_S = 5.0  # that a section which is told to end has for ending its own processes
_TAIL = 4000  # characters of a failed section's log that the report holds
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception): .+)$", re.MULTILINE)
# Shares of the time, in seconds of the nine minutes that are there by default.
_WEIGHTS = {
    "attention": 60.0, "operations": 40.0, "crossover": 40.0, "sparse": 35.0,
    "sweep-125m": 40.0, "graphs-125m": 30.0, "sweep-8b": 30.0, "graphs-8b": 30.0,
}  # fmt: skip
# Of the largest logit, between two ranks and one.
_RANKS_TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2}
# Shares of right answers. A wrong colour without attention is one for all questions, of 76.
_LEAST_RIGHT, _MOST_BY_CHANCE = 0.9, 0.2


@dataclass(frozen=True)
class Outcome:
    """How a section went."""

    name: str
    seconds: float
    limit_s: float
    error: str | None  # what is wrong, in one line; None when all is well
    log_tail: str | None  # of a section that failed
    summary: str  # of its numbers
    numbers: dict  # as far as it came

    @property
    def passed(self) -> bool:
        return self.error is None


class Section(ABC):
    """One section of a check."""

    name: str
    weight: float  # its share of the time, against the other sections' weights

    @abstractmethod
    def command(self, folder: Path) -> list[str]:
        """The program, which leaves its results in ``folder``."""

    @abstractmethod
    def read(self, folder: Path) -> dict:
        """Its numbers, as plain data, as far as they are there; of a section that was stopped, perhaps none."""

    @abstractmethod
    def complaint(self, numbers: dict) -> str | None:
        """What is wrong with them, in one line."""

    @abstractmethod
    def summary(self, numbers: dict) -> str:
        """What they say, in one line. They may be incomplete."""


class GpuTests(Section):
    """The tests that are marked ``gpu``. ``paths`` are those to look in; ``required``: one has to run and pass."""

    name, weight = "tests", 200.0

    def __init__(self, paths: Sequence[str], required: bool):
        self._paths, self._required = paths, required

    def command(self, folder):
        options = ["-m", "gpu", "-p", "no:cacheprovider", "-p", "engine.bench.pytest_outcomes"]
        options += ["--outcomes", str(folder / "tests.jsonl"), "--tb=short", "--continue-on-collection-errors"]
        # A file that cannot be imported counts as an error and keeps no other test from running.
        return [sys.executable, "-m", "pytest", *options, *self._paths]

    def read(self, folder):
        """Of the tests that came to an end, should the run be stopped."""
        path = folder / "tests.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A test may fail after it has passed; the last line may be cut.
        outcomes = {line["test"]: line["outcome"] for line in map(json.loads, (x for x in lines if x.endswith("\n")))}
        if not outcomes:
            return {}
        counts = Counter(outcomes.values())
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        return {kind: counts[kind] for kind in ("passed", "failed", "skipped")} | {"failed_tests": failed}

    def complaint(self, numbers):
        if numbers["failed"]:
            return f"{numbers['failed']} failed, {numbers['failed_tests'][0]} first"
        return "no test ran" if self._required and not numbers["passed"] else None

    def summary(self, numbers):
        return ", ".join(f"{numbers[kind]} {kind}" for kind in ("passed", "failed", "skipped") if kind in numbers)


class _Work(Section):
    """A section of ``engine.bench.gpu_work``."""

    def __init__(self, device: str, size_name: str):
        self._arguments = [device, size_name]

    def command(self, folder):
        return [sys.executable, "-m", "engine.bench.gpu_work", self.name, str(folder), *self._arguments]

    def read(self, folder):
        path = folder / RESULTS
        return json.loads(path.read_text()) if path.exists() else {}


class Machine(_Work):
    """What the machine is and its ceilings."""

    name, weight = "machine", 12.0

    def complaint(self, numbers):
        return None if numbers["ceilings"] else "no ceiling was measured"

    def summary(self, numbers):
        if not numbers:
            return ""
        ceilings = numbers["ceilings"]
        rows = ", ".join(f"{c['rows_tflops']:.3g} at {c['rows']} rows" for c in ceilings)
        best = max(ceilings, key=lambda c: c["read_gbs"])
        return f"reads {best['read_gbs']:,.0f} GB/s; {best['matmul_tflops']:.3g} TFLOP/s, {rows}"


class Ranks(_Work):
    """Two ranks, on one device where there is but one, against one rank."""

    name, weight = "ranks", 25.0

    def command(self, folder):
        program = super().command(folder)[1:]
        # The machine may not know its own name, which is what the ranks would meet at otherwise.
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
        return [sys.executable, *launcher, *program]

    def complaint(self, numbers):
        for found in numbers["comparisons"]:
            what = f"{found['model']} in {found['dtype']}, {found['method']}"
            if not found["ranks_agree"]:
                return f"{what}: the ranks return different tokens"
            if not found["largest_difference"] <= _RANKS_TOLERANCE[found["dtype"]]:
                return f"{what}: logits off by {found['largest_difference']:.1e} of the largest"
        return None

    def summary(self, numbers):
        return "; ".join(
            f"{found['dtype']} {found['method']}: off by {found['largest_difference']:.0e}, "
            f"{found['num_tokens_differ']} of {found['num_tokens']} tokens differ"
            for found in numbers.get("comparisons", ())
        )


class Microbenchmark(_Work):
    """The attention of one layer, or the operations of a step, over a grid of sizes."""

    def __init__(self, name: str, weight: float, grid: MicroGrid, device: str, size_name: str):
        super().__init__(device, size_name)
        self.name, self.weight, self._grid = name, weight, grid

    def read(self, folder):
        rows = build_micro_rows(FILES.read_all([folder]))
        return {"rows": [_row_numbers(row) for row in rows], "found": micro_findings(rows)}

    def complaint(self, numbers):
        """Sizes that do not fit are recorded, and are no fault."""
        bad = next((row for row in numbers["rows"] if row["status"] == Status.OUT_OF_MEMORY), None)
        if bad is not None:
            return f"{bad['mode']} at batch {bad['batch_size']}: {bad['message']}"
        done = {tuple(row[name] for name in _SIZES) for row in numbers["rows"]}
        needed = {tuple(getattr(sizes, name) for name in _SIZES) for sizes in self._grid.sizes[: self._grid.num_needed]}
        return f"{len(needed - done)} of {len(needed)} sizes were not timed" if needed - done else None

    def summary(self, numbers):
        sizes = {tuple(row[name] for name in _SIZES) for row in numbers.get("rows", ())}
        return "\n".join([f"{len(sizes)} of {len(self._grid.sizes)} sizes", *numbers.get("found", ())])


class SparseMicrobenchmark(Microbenchmark):
    """The attention of one layer where prompts are read, sparse and dense."""

    def read(self, folder):
        rows = build_sparse_rows(FILES.read_all([folder]))
        numbers = [_result_numbers(result) | _sparse_ratios(row) for row in rows for result in row.results]
        return {"rows": numbers, "found": sparse_findings(rows)}


class Needles(_Work):
    """Answers of the model that ships: right, without attention by chance, and in float32 the same with sharing."""

    name, weight = "needles", 25.0

    def __init__(self, device: str, size_name: str):
        super().__init__(device, size_name)
        size = SIZES[size_name]
        self._num_points = len(NEEDLE_DTYPES) * len(size.num_questions) * len(size.document_lengths)

    def read(self, folder):
        rows = build_needle_rows(NEEDLE_FILES.read_all([folder]))
        return {"rows": [_needle_numbers(row) for row in rows]}

    def complaint(self, numbers):
        for row in numbers["rows"]:
            what = f"{row['name']}, {row['num_questions']} questions about {row['num_document_tokens']} tokens"
            if row["status"] != Status.OK:
                return f"{what}: {row['message']}"
            if row["attention"] == "noattention":
                if row["accuracy"] > _MOST_BY_CHANCE:
                    return f"{what}: {row['accuracy']:.1%} right without attention"
            elif row["accuracy"] < _LEAST_RIGHT:
                return f"{what}: only {row['accuracy']:.1%} right"
            if (row["attention"], row["dtype"]) == ("hydragen", "float32"):
                if row["same_answers"] != row["num_questions"]:
                    return f"{what}: {row['same_answers']} answers are those of hydragen_noshared"
        num_wanted = 3 * self._num_points
        num_missing = num_wanted - len(numbers["rows"])
        return f"{num_missing} of {num_wanted} are missing" if num_missing > 0 else None

    def summary(self, numbers):
        """The largest points."""
        largest = {}
        for row in numbers["rows"]:
            if row["attention"] == "hydragen":
                largest[row["dtype"]] = row
        return "; ".join(
            f"{dtype}, {row['num_questions']} questions about {row['num_document_tokens']} tokens: "
            f"{row['accuracy']:.1%} right, {_times(row['vs_noshared'])} noshared"
            for dtype, row in largest.items()
        )


class Throughput(_Work):
    """A sweep over one model's grid."""

    def __init__(self, name: str, weight: float, grid: Grid, device: str, size_name: str):
        super().__init__(device, size_name)
        self.name, self.weight, self._grid = name, weight, grid

    def read(self, folder):
        return {"model": self._grid.model, "cells": [_cell_numbers(result) for result in read_results([folder])]}

    def complaint(self, numbers):
        num_wanted = sum(len(self._grid.cells(mode)) for mode in self._grid.modes)
        num_timed = sum(cell["status"] == Status.OK for cell in numbers["cells"])
        if num_timed == num_wanted:
            return None
        why = next((f": {cell['message']}" for cell in numbers["cells"] if cell["status"] != Status.OK), "")
        return f"{num_wanted - num_timed} of {num_wanted} cells were not timed{why}"

    def summary(self, numbers):
        """The largest cells."""
        grid = self._grid
        batch_size, shared, unique = grid.batch_sizes[-1], grid.num_shared[-1], grid.num_unique[-1]
        speeds = {
            cell["mode"]: cell["tokens_per_second"]
            for cell in numbers["cells"]
            if (cell["batch_size"], cell["num_shared"], cell["num_unique"]) == (batch_size, shared, unique)
        }
        found = (f"{mode} {'-' if speed is None else format(speed, ',.0f')}" for mode, speed in speeds.items())
        return f"batch {batch_size}, shared {shared}, unique {unique}, tokens/s: {', '.join(found)}"


def _times(ratio: dict | None) -> str:
    return "- x" if ratio is None else f"{ratio['value']:.2f} x"


def _needle_numbers(row: NeedlesRow) -> dict:
    numbers = asdict(row.result)
    numbers |= numbers.pop("questions")
    del numbers["sweep"]
    derived = {"accuracy": row.result.accuracy.share, "dtype": row.result.environment["dtype"]}
    return numbers | derived | {
        "vs_noshared": row.vs_baseline and asdict(row.vs_baseline),
        "same_answers": row.same_answers,
    }  # fmt: skip


def _cell_numbers(result: CellResult) -> dict:
    fields = asdict(result)
    fields |= fields.pop("cell")
    del fields["sweep"]  # a folder that is gone by now
    return fields | {name: getattr(result, name) for name in ("tokens_per_second", "decode_step_ms", "spread")}


_SIZES = tuple(field.name for field in fields(Sizes))


def _row_numbers(row: MicroRow) -> dict:
    return _result_numbers(row.result) | _ratios(row, "vs_base", "vs_best")


def _sparse_ratios(row: SparseRow) -> dict:
    return _ratios(row, "attention_of_dense", "index_of_dense", "vs_dense") | {"over_share": row.over_share}


def _result_numbers(result: RowResult) -> dict:
    numbers = asdict(result)
    numbers |= numbers.pop("row")
    del numbers["sweep"]
    derived = ("median_ms", "spread", "achieved_gbs", "achieved_tflops", "roofline_ms", "roofline_fraction")
    return numbers | {name: getattr(result, name) for name in derived}


def _ratios(row: MicroRow | SparseRow, *names: str) -> dict:
    return {name: getattr(row, name) and asdict(getattr(row, name)) for name in names}


def make_sections(device: str, tiny: bool) -> list[Section]:
    """The sections, in the order in which they run: what is wrong first, how fast it is after."""
    size_name = "tiny" if tiny else "full"
    size = SIZES[size_name]
    tests = GpuTests(["tests/kernels/test_attention_cuda.py"] if tiny else ["tests"], required=device != "cpu")
    micro = [
        (SparseMicrobenchmark if grid.methods else Microbenchmark)(name, _WEIGHTS[name], grid, device, size_name)
        for name, grid in size.micro.items()
    ]
    sweeps = [Throughput(name, _WEIGHTS[name], grid, device, size_name) for name, grid in size.sweeps.items()]
    checks = [Machine(device, size_name), Ranks(device, size_name), Needles(device, size_name)]
    return [tests, *checks, *micro, *sweeps]


def run_sections(
    sections: Sequence[Section], outdir: Path, device: str, seconds: float, console: Console
) -> list[Outcome]:
    """Runs all sections in at most ``seconds`` and writes ``outdir/gpu_check.json`` anew after each.

    A section may take its share of the time that is left then, so what one does not need the later ones have. Logs are
    ``outdir/NAME.log``.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    deadline = began + seconds - _PATIENCE_S
    outcomes: list[Outcome] = []
    for number, section in enumerate(sections):
        to_come = sum(other.weight for other in sections[number:])
        limit_s = max(deadline - time.monotonic(), 0.0) * section.weight / to_come
        console.print(f"{section.name}: {limit_s:.0f} s at most", highlight=False)
        outcomes.append(_run(section, outdir / f"{section.name}.log", device, limit_s))
        report = {
            "schema_version": SCHEMA_VERSION,
            "complete": len(outcomes) == len(sections),
            "device": device,
            "seconds": round(time.monotonic() - began, 3),
            "sections": {o.name: {"passed": o.passed} | asdict(o) for o in outcomes},
        }
        write_whole(outdir / REPORT, json.dumps(report, indent=1).encode())
    return outcomes


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table(title="GPU check")
    table.add_column("section", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("what it found", overflow="fold")
    for outcome in outcomes:
        found = "\n".join(filter(None, (outcome.error, outcome.summary)))
        table.add_row(outcome.name, "passed" if outcome.passed else "FAILED", f"{outcome.seconds:.1f}", Text(found))
    console.print(table)


def _run(section: Section, log: Path, device: str, limit_s: float) -> Outcome:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        error = _run_process(section.command(Path(folder)), log, _environment(device), limit_s)
        numbers = section.read(Path(folder))
    complaint = section.complaint(numbers) if numbers else "there are no results"
    error = "; ".join(filter(None, (error, complaint))) or None
    return Outcome(
        name=section.name,
        seconds=round(time.monotonic() - began, 3),
        limit_s=round(limit_s, 3),
        error=error,
        log_tail=None if error is None else log.read_text(errors="replace")[-_TAIL:],
        summary=section.summary(numbers),
        numbers=numbers,
    )


def _run_process(command: list[str], log: Path, environment: dict[str, str], limit_s: float) -> str | None:
    """What went wrong, in one line. Nothing that the process started is left running."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"it took longer than {limit_s:.0f} s"
        finally:
            _end(process)
    return f"exit status {status}: {_last_words(log.read_text(errors='replace'))}" if status else None


def _last_words(text: str) -> str:
    """The first exception in a log, which made those after it, or else the last line."""
    exception = _EXCEPTION.search(text)
    return exception[1] if exception else (text.rstrip().rpartition("\n")[2].strip() or "it said nothing")


def _end(process: subprocess.Popen) -> None:
    """torchrun's ranks are not in its process group: it is told to end them before all that is left is killed."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(device: str) -> dict[str, str]:
    """The engine of this checkout, installed or not. Without the GPUs, if they are not meant."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return environment | {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else environment
