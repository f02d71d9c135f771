"""The throughput sweep: for each cell of a grid the time to generate below a shared prompt, one file a cell.

Every rank runs every cell; rank 0 decides what is left to do, writes the files and prints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine.arena import fits_beside
from engine.attention import METHODS, Auto, get_method
from engine.attention.crossover import NEVER
from engine.attention.pass_plan import one_prompt
from engine.bench.environment import Execution, describe_environment, describe_execution
from engine.bench.memory_model import Footprint, footprint
from engine.bench.modes import Mode, ModelOptions, make_mode, make_prompt
from engine.bench.peak_memory import PeakMemory
from engine.bench.ranges import check_combinations
from engine.bench.results import Cell, CellResult, Status, is_finished, read_results, write_cell
from engine.bench.roofline import Ceilings, decode_step_cost, measure_ceilings, predict_ms
from engine.bench.timing import Timer
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.files import check_outdir
from engine.memory import available_bytes, describe_out_of_memory, is_out_of_memory
from engine.prefill import DENSE, check_prefill
from engine.progress import progress_bar
from engine.shards import dtype_name


@dataclass(frozen=True)
class Sweep:
    """A grid of cells of one mode, and how each is timed."""

    outdir: Path
    mode: str
    cells: tuple[Cell, ...]
    model: ModelOptions
    num_iters: int
    num_warmup: int
    calc_prefill: bool  # time the shared prompt's prefill too, as often as the decoding
    tp: int | None = None  # processes that vLLM starts
    execution: Execution = Execution()  # of the engine's own modes


def make_grid(
    mode: str, batch_sizes: Sequence[int], num_shared: Sequence[int], num_unique: Sequence[int]
) -> tuple[Cell, ...]:
    """Every combination; batch sizes change fastest. Raises InputError for too many."""
    check_combinations((batch_sizes, num_shared, num_unique), "cells")
    return tuple(Cell(mode, b, s, u) for u in num_unique for s in num_shared for b in batch_sizes)


def run_sweep(sweep: Sweep, group: TPGroup, console: Console) -> None:
    """Runs the cells that have no result yet, and writes each as soon as it is done.

    Raises InputError when OUTDIR cannot be used or holds results of another model, dtype, device or number of ranks,
    when the model cannot be loaded, and when one rank of several runs out of memory.
    """
    say = partial(console.print, soft_wrap=True)
    config = sweep.model.config()
    check_prefill(sweep.execution.prefill, sweep.model.name, config)
    _check_lengths(sweep, config)
    todo = group.on_rank_0(lambda: _unfinished(sweep, config, _num_ranks(sweep, group), group.device.type))
    skipped = len(sweep.cells) - len(todo)
    if skipped:
        say(f"{skipped} of {len(sweep.cells)} cells have results in {sweep.outdir} and are skipped.")
    if not todo:
        return
    if _refuse_weights(sweep, config, group, todo, say):
        return
    say(f"Loading {sweep.model.name} for mode {sweep.mode} ...")
    most = max(cell.batch_size for cell in sweep.cells)
    mode = make_mode(sweep.mode, sweep.model, group, sweep.tp, most, sweep.execution)
    runner = _Runner(sweep, config, mode, group)
    with progress_bar(console) as progress:
        task = progress.add_task(sweep.mode, total=len(todo))
        for cell in todo:
            progress.update(task, description=_name(cell))
            result = runner.run(cell)
            group.on_rank_0(lambda: write_cell(sweep.outdir, result))
            say(f"{_name(cell)}: {_outcome(result)}")
            progress.advance(task)


def print_plan(sweep: Sweep, num_ranks: int, console: Console) -> None:
    """The grid with each cell's predicted memory per rank. Runs nothing, loads no weights, writes nothing.

    Raises InputError for an OUTDIR that a run on ``num_ranks`` would refuse, whatever the device: plans are often made
    elsewhere.
    """
    config = sweep.model.config()
    check_prefill(sweep.execution.prefill, sweep.model.name, config)
    _check_lengths(sweep, config)
    todo = set(_unfinished(sweep, config, num_ranks))
    title = f"{sweep.mode}: {sweep.model.name}, {dtype_name(config.dtype)}, {num_ranks} rank(s); GiB per rank"
    table = Table(title=title)
    for column in ("batch", "shared", "unique", "weights", "KV cache", "activations", "total", "result"):
        table.add_column(column, justify="right")
    for cell in sweep.cells:
        need = footprint(config, num_ranks, cell)
        parts = () if need is None else (need.weights, need.cache, need.activations, need.total)
        sizes = [f"{size / 2**30:.3f}" for size in parts] or ["-"] * 4
        state = "to be run" if cell in todo else "there already"
        if _length(cell) > config.max_positions:
            state = "too long"
        table.add_row(str(cell.batch_size), str(cell.num_shared), str(cell.num_unique), *sizes, state)
    console.print(table)


# ---- what is left to do


def _unfinished(sweep: Sweep, config: ModelConfig, num_ranks: int, device: str | None = None) -> list[Cell]:
    """The cells without a result. Raises InputError when OUTDIR cannot take those to come (from any device if None)."""
    check_outdir(sweep.outdir)
    if sweep.outdir.is_dir():
        ours = (sweep.model.name, dtype_name(config.dtype))
        for result in read_results([sweep.outdir], warn=lambda line: None):  # is_finished warns
            theirs = (result.model_name, result.environment.get("dtype"))
            if theirs != ours:
                raise InputError(
                    f"{sweep.outdir} holds results of {theirs[0]} in {theirs[1]}; this sweep is of {ours[0]} in "
                    f"{ours[1]}; use another OUTDIR"
                )
            _check_execution(sweep, result, num_ranks, device, config.dtype)
    return [cell for cell in sweep.cells if not is_finished(sweep.outdir, cell)]


def _check_lengths(sweep: Sweep, config: ModelConfig) -> None:
    """Raises InputError when no cell can run, whatever the machine. One that is too long among others is recorded."""
    shortest, positions = min(_length(cell) for cell in sweep.cells), config.max_positions
    if shortest > positions:
        raise InputError(
            f"NUM_SHARED and NUM_UNIQUE make {shortest} tokens a sequence at least; accepted: at most {positions}, the "
            "model's positions; use shorter ones"
        )


def _check_execution(
    sweep: Sweep, result: CellResult, num_ranks: int, device: str | None, dtype: torch.dtype
) -> None:
    """Raises InputError when ``result`` ran on another number of ranks or kind of device, or otherwise, than the sweep
    is to.

    The engine's own modes are held against each other, every other system against itself alone: it has its own
    processes.
    """
    mode = result.cell.mode
    if mode != sweep.mode and not (mode in METHODS and sweep.mode in METHODS):
        return
    theirs = (result.environment.get("world_size"), result.environment.get("device"))
    ours = (num_ranks, device or theirs[1])
    if theirs != ours:
        raise InputError(
            f"{sweep.outdir} holds results of {mode} on {theirs[0]} rank(s) ({theirs[1]}); this sweep is of "
            f"{sweep.mode} on {ours[0]} rank(s) ({ours[1]}); use another OUTDIR"
        )
    if mode not in METHODS or device is None:
        return
    for name, value in describe_execution(sweep.execution, torch.device(device), dtype).items():
        found = result.environment.get(name, DENSE if name == "prefill" else None)  # older results are dense
        if found is not None and found != value:
            raise InputError(
                f"{sweep.outdir} holds results of {mode} with {name} {found}; this sweep has {value}; use another "
                "OUTDIR"
            )


def _num_ranks(sweep: Sweep, group: TPGroup) -> int:
    """Processes of the mode: vLLM starts its own."""
    return sweep.tp or 1 if sweep.mode.startswith("vllm") else group.size


# ---- one cell


def _refuse_weights(
    sweep: Sweep, config: ModelConfig, group: TPGroup, cells: Sequence[Cell], say: Callable[[str], None]
) -> bool:
    """Whether not even the weights fit. Then that is recorded for every cell, and nothing need be loaded."""
    free = min(group.gather_objects(available_bytes(group)))
    needed = {cell: footprint(config, group.size, cell) for cell in cells}
    if any(need is None or need.weights <= free for need in needed.values()):
        return False
    environment = describe_environment(group.device, config.dtype, group.size, sweep.execution)
    for cell, need in needed.items():
        message = f"the weights take {need.weights / 2**30:.2f} GiB a rank; {free / 2**30:.2f} GiB are free"
        result = _empty_result(sweep, cell, need, environment, group.size)
        result = replace(result, status=Status.DOES_NOT_FIT, message=message)
        group.on_rank_0(lambda result=result: write_cell(sweep.outdir, result))
        say(f"{_name(cell)}: {_outcome(result)}")
    return True


def _empty_result(
    sweep: Sweep, cell: Cell, needed: Footprint | None, environment: dict, num_ranks: int
) -> CellResult:
    """What is known of a cell before it has run."""
    return CellResult(
        cell=cell,
        status=Status.OK,
        model_name=sweep.model.name,
        seed=sweep.model.seed,
        num_iters=sweep.num_iters,
        num_warmup=sweep.num_warmup,
        environment=environment,
        predicted_bytes=() if needed is None else (needed.total,) * num_ranks,
    )


class _Runner:
    """Runs cells of a loaded mode on all ranks."""

    def __init__(self, sweep: Sweep, config: ModelConfig, mode: Mode, group: TPGroup):
        self._sweep, self._config, self._mode, self._group = sweep, config, mode, group
        self._environment = describe_environment(group.device, config.dtype, _num_ranks(sweep, group), sweep.execution)
        self._free = min(group.gather_objects(available_bytes(group)))
        self._ceilings: dict[int, Ceilings] = {}  # by batch size

    def run(self, cell: Cell) -> CellResult:
        """Times the cell, or says why it was not."""
        mode = self._mode
        needed = footprint(self._config, self._group.size, cell)
        result = _empty_result(self._sweep, cell, needed, self._environment, self._group.size)
        refusal = self._refusal(cell, needed)
        if refusal:
            return replace(result, status=Status.DOES_NOT_FIT, message=refusal)
        try:
            failure = self._set_up(cell)
            if failure is not None:
                status, message = failure
                return replace(result, status=status, message=message)
            try:
                result = replace(result, **self._time(cell))
            except InputError as error:  # the arena's own, finer count; its limit is agreed on, so all ranks are here
                return replace(result, status=Status.DOES_NOT_FIT, message=str(error))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return self._ran_out(result, error)
            self._blame_another_rank(cell, error)
            raise
        finally:
            mode.release()
        return self._with_roofline(result) if cell.mode in METHODS else result

    def _refusal(self, cell: Cell, needed: Footprint | None) -> str | None:
        positions = self._config.max_positions
        if _length(cell) > positions:
            return f"{_length(cell)} tokens a sequence; the model has {positions} positions"
        # The weights are there already.
        if needed is not None and not fits_beside(self._free, needed.cache, needed.activations):
            return (
                f"needs {(needed.cache + needed.activations) / 2**30:.2f} GiB a rank beside the weights; "
                f"{self._free / 2**30:.2f} GiB are free, of which a part is left for what nobody counts"
            )
        return None

    def _set_up(self, cell: Cell) -> tuple[Status, str] | None:
        """Takes the cell's memory on every rank. When any fails, all know of the first one's failure."""
        failure = None
        try:
            self._mode.set_up(cell)
        except InputError as error:
            failure = (Status.DOES_NOT_FIT, str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = (Status.OUT_OF_MEMORY, describe_out_of_memory(error))
        return next((f for f in self._group.gather_objects(failure) if f is not None), None)

    def _ran_out(self, result: CellResult, error: Exception) -> CellResult:
        """The result of a cell that ran out of memory after all."""
        result = replace(result, status=Status.OUT_OF_MEMORY, message=describe_out_of_memory(error))
        if self._group.size == 1:
            return result
        # The other ranks may be waiting for this one: there is no going on together. The next run skips the cell.
        write_cell(self._sweep.outdir, result)
        raise InputError(
            f"rank {self._group.rank} ran out of memory in {_name(result.cell)}, which is recorded; run the same "
            "command again to go on with the next cell"
        ) from error

    def _blame_another_rank(self, cell: Cell, error: RuntimeError) -> None:
        """Raises InputError when a collective failed because the rank at the other end ran out of memory."""
        if self._group.size == 1 or not is_finished(self._sweep.outdir, cell, warn=lambda line: None):
            return
        raise InputError(
            f"another rank ran out of memory in {_name(cell)}, which is recorded; run the same command again to go on "
            "with the next cell"
        ) from error

    def _time(self, cell: Cell) -> dict[str, tuple]:
        """Raw times in ms, each that of the slowest rank, and the peak memory of each rank."""
        sweep, group, mode = self._sweep, self._group, self._mode
        prompt = make_prompt(self._config.vocab_size, cell.num_shared, sweep.model.seed)

        def timed(fn, *args) -> float:
            group.barrier()
            with Timer(group.device) as timer:
                fn(*args)
            return max(group.gather_objects(timer.ms))

        with PeakMemory(group.device) as peak:
            prefill_ms = []
            mode.prefill(prompt)
            if sweep.calc_prefill:
                prefill_ms = [timed(mode.prefill, prompt) for _ in range(sweep.num_iters)]
            for _ in range(sweep.num_warmup):
                mode.generate(cell.num_unique)
            decode_ms, first_token_ms = [], []
            for _ in range(sweep.num_iters):  # turn by turn, so that a busy spell of the machine meets both
                decode_ms.append(timed(mode.generate, cell.num_unique))
                if cell.num_unique > 1:
                    first_token_ms.append(timed(mode.generate, 1))
        return {
            "prefill_ms": tuple(prefill_ms),
            "decode_ms": tuple(decode_ms),
            "first_token_ms": tuple(first_token_ms),
            "choice": mode.choice(),
            # Of vLLM's own processes nothing is known.
            "peak_bytes": () if cell.mode.startswith("vllm") else tuple(group.gather_objects(peak.bytes)),
        }

    def _with_roofline(self, result: CellResult) -> CellResult:
        """Adds what the decode step achieved, and the least time that the machine's ceilings allow it."""
        cell, config, group, step_ms = result.cell, self._config, self._group, result.decode_step_ms
        if step_ms is None:
            return result
        if cell.batch_size not in self._ceilings:
            group.barrier()
            self._ceilings[cell.batch_size] = measure_ceilings(group.device, config.dtype, rows=cell.batch_size)
        # Own keys are 1, 2, ... num_unique - 1 in the steps that are timed.
        tree = one_prompt(cell.num_shared, cell.batch_size)
        method = Auto(NEVER) if result.choice == "unshared" else get_method(cell.mode)
        cost = decode_step_cost(method, tree, cell.num_unique / 2, config, group.size)
        return replace(
            result,
            achieved_gbs=cost.bytes / (step_ms * 1e6),
            achieved_tflops=cost.flops / (step_ms * 1e9),
            roofline_ms=predict_ms(cost, self._ceilings[cell.batch_size]),
        )


# ---- words


def _name(cell: Cell) -> str:
    return f"{cell.mode} batch {cell.batch_size}, shared {cell.num_shared}, unique {cell.num_unique}"


def _outcome(result: CellResult) -> str:
    if result.status != Status.OK:
        return result.message
    speed = result.tokens_per_second
    return "no decode time above the noise" if speed is None else f"{speed:,.0f} tokens/s"


def _length(cell: Cell) -> int:
    return cell.num_shared + cell.num_unique
