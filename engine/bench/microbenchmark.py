"""The microbenchmark: the attention of one layer in one decode step, or each operation of a step, over a grid of sizes.

What is compared takes turns, with cold caches: a machine's speed drifts within seconds by more than what is to be told
apart.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine.arena import fits_beside
from engine.attention.crossover import Crossover
from engine.bench.cache_flush import CacheFlush
from engine.bench.cold_timing import ColdCall, make_cold_call, time_in_turns
from engine.bench.decode_workload import MODES, DecodeWorkload
from engine.bench.environment import describe_environment
from engine.bench.micro_results import FILES, OPERATIONS_MODE, Row, RowResult, Sizes
from engine.bench.operations import (
    VOCAB_SIZE,
    Call,
    Memory,
    Operation,
    all_operations,
    hidden_size,
    intermediate_size,
    memory_of,
    whole_attention,
)
from engine.bench.ranges import check_combinations
from engine.bench.result_files import Status
from engine.bench.roofline import Ceilings, measure_ceilings
from engine.calibration import Setting, find_crossover
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.files import check_outdir
from engine.loader import DTYPES
from engine.memory import available_bytes, describe_out_of_memory, is_out_of_memory
from engine.progress import progress_bar
from engine.shards import dtype_name
from kernels import Backend, check_backend

BUDGET_S = 1.0  # for each row's times where their number is not given


@dataclass(frozen=True)
class MicroSweep:
    """A grid of sizes, and what is timed at each, turn by turn."""

    outdir: Path
    modes: tuple[str, ...]
    grid: tuple[Sizes, ...]
    dtype: torch.dtype = torch.bfloat16
    backend: Backend | None = None  # of attention; None: the best there is
    seed: int = 0
    num_iters: int | None = None  # None: as many as BUDGET_S allows
    num_warmup: int | None = None
    save: bool = True  # write files, and skip the rows that have one
    verbose: bool = False
    seconds: float | None = None  # after which no further size is begun


@dataclass(frozen=True)
class Subject:
    """One row, and the operation that it times."""

    row: Row
    operation: Operation
    backend: Backend | None


# ---- what is asked for


def parse_modes(mode: str, compare: str | None) -> tuple[str, ...]:
    """The mode and those that take turns with it. Raises InputError for one that is not known, or given twice."""
    others = () if compare is None else tuple(name.strip() for name in compare.split(","))
    modes = (mode, *others)
    for name in modes:
        if name not in MODES and not (name == OPERATIONS_MODE and len(modes) == 1):
            alone = "" if len(modes) == 1 else f" ({OPERATIONS_MODE} alone: it compares by itself)"
            raise InputError(
                f"mode {name!r} is not known{' here' if alone else ''}; accepted: "
                f"{', '.join((*MODES, *(() if alone else (OPERATIONS_MODE,))))}{alone}"
            )
        if modes.count(name) > 1:
            raise InputError(f"mode {name} was given twice; accepted: each once; leave one out of --compare")
    return modes


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not known; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_backend(
    name: str | None, modes: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Backend | None:
    """Raises InputError for one that cannot run there, or where ``operations`` tries them all."""
    if name is None:
        return None
    if OPERATIONS_MODE in modes:
        raise InputError(f"--backend {name} was given, but mode {OPERATIONS_MODE} times every backend; leave it out")
    try:
        return check_backend(name, device, dtype)
    except ValueError as error:
        raise InputError(str(error)) from None


def make_grid(
    modes: Sequence[str],
    batch_sizes: Sequence[int],
    num_shared: Sequence[int],
    num_unique: Sequence[int],
    num_heads: Sequence[int],
    num_kv_heads: Sequence[int],
    head_dims: Sequence[int],
    unique_seq_len: int | None = None,
) -> tuple[Sizes, ...]:
    """Every combination; unique lengths change fastest. Raises InputError for too many, and for one without a meaning.
    """
    ranges = (batch_sizes, num_heads, num_kv_heads, head_dims, num_shared, num_unique)
    check_combinations(ranges, "rows")
    odd_heads = [f"{heads} to {kv_heads}" for heads, kv_heads in product(num_heads, num_kv_heads) if heads % kv_heads]
    if odd_heads:
        raise InputError(
            f"query heads do not divide by KV heads: {_listed(odd_heads)}; accepted: a multiple of every KV-head count "
            "in --kvheads-range; use other ranges, or several runs"
        )
    odd_dims = [str(dim) for dim in head_dims if dim % 2]
    if odd_dims and OPERATIONS_MODE in modes:
        raise InputError(
            f"--dim-range holds {_listed(odd_dims)}; accepted: even numbers in mode {OPERATIONS_MODE}, for RoPE "
            "rotates pairs; use these"
        )
    if unique_seq_len is not None and unique_seq_len > min(num_unique):
        raise InputError(
            f"--unique-seq-len {unique_seq_len} is above NUM_UNIQUE {min(num_unique)}; accepted: at most the room that "
            "each sequence has; use a shorter one"
        )
    grid = tuple(
        Sizes(b, s, u, u if unique_seq_len is None else unique_seq_len, q, k, d)
        for b, q, k, d, s, u in product(*ranges)
    )
    if any(not (sizes.num_shared or sizes.unique_seq_len) for sizes in grid):
        raise InputError(
            "NUM_SHARED 0 with no unique keys leaves nothing to attend to; accepted: one of them above 0 in every "
            "combination; use other ranges"
        )
    return grid


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def subjects_of(sweep: MicroSweep, sizes: Sizes, device: torch.device) -> list[Subject]:
    """What is timed at these sizes."""

    def subject(mode: str, operation: Operation, backend: Backend | None, name: str = "") -> Subject:
        return Subject(Row(**asdict(sizes), mode=mode, operation=name, backend=backend or ""), operation, backend)

    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
    crossover = partial(_crossover, device, sweep.dtype, heads, sweep.backend)
    if sweep.modes != (OPERATIONS_MODE,):
        return [subject(mode, whole_attention(mode, crossover), sweep.backend) for mode in sweep.modes]
    return [
        subject(OPERATIONS_MODE, operation, backend, operation.name)
        for operation in all_operations(crossover)
        if operation.runs(sizes)
        for backend in operation.backends(device, sweep.dtype)
    ]


@cache
def _crossover(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], backend: Backend | None
) -> Crossover:
    return find_crossover(TPGroup(device=device), Setting.of(device, dtype, *heads, backend), dtype)


# ---- the sweep


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
    taken: list[tuple[Operation, Backend | None]] = []
    fits: dict[Row, bool] = {}
    alone = {subject.row: memory_of([(subject.operation, subject.backend)], sizes, dtype) for subject in subjects}
    for subject in sorted(subjects, key=lambda subject: alone[subject.row].total):
        together = memory_of([*taken, (subject.operation, subject.backend)], sizes, dtype)
        fits[subject.row] = fits_beside(free, together.arenas, together.others)
        if fits[subject.row]:
            taken.append((subject.operation, subject.backend))
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
        workload = None
        for subject in runnable:
            try:
                if workload is None:
                    workload = DecodeWorkload(sizes, group.device, sweep.dtype, sweep.seed)
                call = subject.operation.make(workload, subject.backend)
                cold = make_cold_call(call.run, group.device, self._flush, self._say)
                cold()  # what only the first call does is no part of its time; and it shows whether memory suffices
                calls[subject.row] = cold
                results[subject.row] = self._known(results[subject.row], subject, call, cold)
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

    def _known(self, result: RowResult, subject: Subject, call: Call, cold: ColdCall) -> RowResult:
        work = subject.operation.work(subject.row.sizes, self._sweep.dtype)
        return replace(
            result,
            num_bytes=work.bytes,
            num_flops=work.flops,
            backends=call.backends,
            choice=call.choice,
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
