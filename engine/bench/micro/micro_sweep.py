"""The microbenchmark: the attention of one layer, or the operations of a decode step, over a grid of sizes.

What is compared takes turns, with cold caches: a machine's speed drifts within seconds by more than what is to be told
apart.
"""

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine.arena import fits_beside
from engine.bench.environment import describe_environment
from engine.bench.micro.cache_flush import CacheFlush
from engine.bench.micro.cold_timing import ColdCall, make_cold_call, time_in_turns
from engine.bench.micro.decode_operations import VOCAB_SIZE, hidden_size, intermediate_size
from engine.bench.micro.micro_results import FILES, Row, RowResult, Sizes
from engine.bench.micro.micro_settings import MicroSweep
from engine.bench.micro.operation import Call, Memory, Needs
from engine.bench.micro.subjects import Subject, subjects_of
from engine.bench.result_files import Status
from engine.bench.roofline import Ceilings, measure_ceilings
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.files import check_outdir
from engine.memory import available_bytes, describe_out_of_memory, is_out_of_memory
from engine.progress import progress_bar
from engine.shards import dtype_name

BUDGET_S = 1.0  # for each row's times where their number is not given


def run_microbenchmark(sweep: MicroSweep, group: TPGroup, console: Console) -> list[RowResult]:
    """Times the rows that have no result yet, and writes each size's as soon as they are done. Returns these.

    Sizes of which a row is missing are timed anew, all rows of them: only rows of one run can be compared turn by turn.
    Raises InputError when OUTDIR cannot be used, or holds rows of another device or dtype.
    """
    say = partial(console.print, soft_wrap=True)
    todo = _unfinished(sweep, group.device)
    skipped = len(sweep.grid) - len(todo)
    if skipped:
        say(f"{skipped} of {len(sweep.grid)} sizes have results in {sweep.outdir} and are skipped.")
    if not todo:
        return []
    runner, began = _Runner(sweep, group, say), time.monotonic()
    results = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(todo))
        for sizes in todo:
            if sweep.seconds is not None and time.monotonic() - began > sweep.seconds:
                break
            progress.update(task, description=sizes.words)
            found = runner.run(sizes)
            for result in found:
                if sweep.save:
                    FILES.write(sweep.outdir, result)
                for line in _lines(result, sweep.verbose):
                    say(line)
            results += found
            progress.advance(task)
    return results


def print_plan(sweep: MicroSweep, group: TPGroup, console: Console) -> None:
    """The grid with each row's predicted memory. Runs nothing, writes nothing. Raises InputError as the sweep does."""
    todo, free = set(_unfinished(sweep, group.device)), available_bytes(group)
    name = f"{', '.join(sweep.modes)}: {dtype_name(sweep.dtype)} on {group.device}; {free / 2**30:.2f} GiB are free"
    table = Table(title=name)
    for column in ("batch", "shared", "unique", "heads", "dim", "what", "KV cache GiB", "total GiB", "result"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for sizes in sweep.grid:
        for subject, memory, fits in _fitted(subjects_of(sweep, sizes, group.device), sizes, sweep.dtype, free):
            state = ("to be run" if fits else "does not fit") if sizes in todo else "there already"
            columns = (sizes.batch_size, sizes.num_shared, sizes.unique, sizes.heads, sizes.head_dim)
            gib = [f"{num_bytes / 2**30:.3f}" for num_bytes in (memory.arenas, memory.total)]
            table.add_row(*map(str, columns), subject.row.label, *gib, state)
    console.print(table)


def _unfinished(sweep: MicroSweep, device: torch.device) -> list[Sizes]:
    """The sizes of which a row has no result. Raises InputError when OUTDIR cannot take those to come."""
    if not sweep.save:
        return list(sweep.grid)
    check_outdir(sweep.outdir)
    if sweep.outdir.is_dir():
        ours = (device.type, dtype_name(sweep.dtype))
        for result in FILES.read_all([sweep.outdir], warn=lambda line: None):  # is_finished warns
            theirs = tuple(result.environment.get(name) for name in ("device", "dtype"))
            if theirs != ours:
                raise InputError(
                    f"{sweep.outdir} holds rows of {theirs[0]} in {theirs[1]}; this sweep is of {ours[0]} in {ours[1]};"
                    " use another OUTDIR"
                )

    def is_finished(sizes: Sizes) -> bool:
        return all(FILES.is_finished(sweep.outdir, subject.row) for subject in subjects_of(sweep, sizes, device))

    return [sizes for sizes in sweep.grid if not is_finished(sizes)]


def _fitted(
    subjects: Iterable[Subject], sizes: Sizes, dtype: torch.dtype, free: int
) -> list[tuple[Subject, Memory, bool]]:
    """Each with the memory that it needs alone, and whether it fits beside those that do. The smallest come first: one
    that does not fit is not to keep others out."""
    taken: list[Needs] = []
    needs = {subject.row: subject.operation.needs(sizes, dtype, subject.backend) for subject in subjects}
    alone = {row: Memory.together([need]) for row, need in needs.items()}
    fits: dict[Row, bool] = {}
    for row in sorted(needs, key=lambda row: alone[row].total):
        together = Memory.together([*taken, needs[row]])
        fits[row] = fits_beside(free, together.arenas, together.others)
        if fits[row]:
            taken.append(needs[row])
    return [(subject, alone[subject.row], fits[subject.row]) for subject in subjects]


class _Runner:
    """Times one size after another; nothing of the one before is left in memory."""

    def __init__(self, sweep: MicroSweep, group: TPGroup, say: Callable[[str], None]):
        self._sweep, self._group, self._say = sweep, group, say
        self._flush = CacheFlush(group.device)
        self._ceilings: Ceilings = measure_ceilings(group.device, sweep.dtype)
        self._environment = describe_environment(group.device, sweep.dtype, group.size)
        self._run = uuid.uuid4().hex[:12]
        if sweep.verbose:
            say(
                f"caches are flushed by reading {self._flush.num_bytes / 2**20:.0f} MiB; this machine reads at "
                f"{self._ceilings.read_gbs:.1f} GB/s and multiplies at {self._ceilings.matmul_tflops:.3f} TFLOP/s"
            )

    @torch.inference_mode()
    def run(self, sizes: Sizes) -> list[RowResult]:
        sweep, group = self._sweep, self._group
        subjects = subjects_of(sweep, sizes, group.device)
        free = available_bytes(group)
        results: dict[Row, RowResult] = {}
        runnable = []
        for subject, memory, fits in _fitted(subjects, sizes, sweep.dtype, free):
            results[subject.row] = self._untimed(subject, memory)
            if fits:
                runnable.append(subject)
            else:
                message = (
                    f"needs {memory.total / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free, of which a part is taken "
                    "by what it takes turns with, or left for what nobody counts"
                )
                results[subject.row] = replace(results[subject.row], status=Status.DOES_NOT_FIT, message=message)
        calls: dict[Row, ColdCall] = {}
        workload: Any = None
        for subject in runnable:
            try:
                if workload is None:
                    workload = subject.operation.workload(sizes, group.device, sweep.dtype, sweep.seed)
                call = subject.operation.call(workload, subject.backend)
                cold = make_cold_call(call.run, group.device, self._flush, self._say)
                cold()  # what only the first call does is no part of its time; and it shows whether memory suffices
                calls[subject.row] = cold
                results[subject.row] = _known(results[subject.row], call, cold)
            except (RuntimeError, MemoryError) as error:
                results[subject.row] = _ran_out(results[subject.row], error)
        if not calls:
            return list(results.values())
        try:
            times_ms, num_warmup = time_in_turns(calls, sweep.num_iters, sweep.num_warmup, BUDGET_S)
        except (RuntimeError, MemoryError) as error:
            return [_ran_out(result, error) if row in calls else result for row, result in results.items()]
        for row, times in times_ms.items():
            results[row] = replace(results[row], status=Status.OK, times_ms=tuple(times), num_warmup=num_warmup)
        return list(results.values())

    def _untimed(self, subject: Subject, memory: Memory) -> RowResult:
        """What is known of a row before anything is made. Its work is not: to count it takes its plan."""
        sizes, is_row_operation = subject.row, subject.operation.is_row_operation
        return RowResult(
            row=subject.row,
            status=Status.DOES_NOT_FIT,
            seed=self._sweep.seed,
            environment=self._environment,
            num_bytes=0,
            num_flops=0,
            predicted_bytes=memory.total,
            run=self._run,
            read_gbs=self._ceilings.read_gbs,
            matmul_tflops=self._ceilings.matmul_tflops,
            hidden_size=hidden_size(sizes) if is_row_operation else None,
            intermediate_size=intermediate_size(sizes) if is_row_operation else None,
            vocab_size=VOCAB_SIZE if is_row_operation else None,
        )


def _known(result: RowResult, call: Call, cold: ColdCall) -> RowResult:
    """With what a call says of itself."""
    return replace(
        result,
        num_bytes=call.work.bytes,
        num_flops=call.work.flops,
        backends=call.backends,
        choice=call.choice,
        density=call.density,
        timed_with=cold.timed_with,
    )


def _ran_out(result: RowResult, error: RuntimeError | MemoryError) -> RowResult:
    if not is_out_of_memory(error):
        raise error
    return replace(result, status=Status.OUT_OF_MEMORY, message=describe_out_of_memory(error))


def _lines(result: RowResult, verbose: bool) -> list[str]:
    """What is said of a row when it is done."""
    name = f"{result.row.label}, {result.row.words}"
    if result.status != Status.OK:
        return [f"{name}: {result.message}"]
    lines = [f"{name}: {result.median_ms:.4f} ms"]
    if verbose:
        backends = f" by {', '.join(result.backends)}" if result.backends else ""
        lines += [
            f"  {result.num_bytes} bytes, {result.num_flops} FLOPs{backends}, timed with {result.timed_with}, "
            f"{len(result.times_ms)} times after {result.num_warmup}",
            f"  ms: {' '.join(f'{ms:.4f}' for ms in result.times_ms)}",
        ]
    return lines
