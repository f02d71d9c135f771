"""The throughput sweep: for each cell of a grid the time to generate below a shared prompt, one file a cell.

Every rank runs every cell; rank 0 decides what is left to do, writes the files and prints.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine.attention import METHODS
from engine.bench.environment import describe_environment
from engine.bench.memory_model import Footprint, footprint
from engine.bench.modes import Mode, ModelOptions, make_mode, make_prompt
from engine.bench.peak_memory import PeakMemory
from engine.bench.results import Cell, CellResult, Status, is_finished, read_results, write_cell
from engine.bench.roofline import Ceilings, decode_step_cost, measure_ceilings, predict_ms
from engine.bench.timing import Timer
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.memory import available_bytes
from engine.progress import progress_bar


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


def run_sweep(sweep: Sweep, group: TPGroup, tp: int, console: Console) -> None:
    """Runs the cells that have no result yet, and writes each as soon as it is done.

    Raises InputError when the directory holds results of another model or dtype, or the mode cannot be run.
    """
    todo = group.broadcast(_unfinished(sweep) if group.rank == 0 else None)
    skipped = len(sweep.cells) - len(todo)
    if skipped:
        console.print(f"{skipped} of {len(sweep.cells)} cells have results in {sweep.outdir} and are skipped.")
    if not todo:
        return
    console.print(f"Loading {sweep.model.name} for mode {sweep.mode} ...")
    mode = make_mode(sweep.mode, sweep.model, group, tp)
    environment = describe_environment(group.device, mode.config.dtype, tp if sweep.mode.startswith("vllm") else group.size)
    message = group.broadcast(_foreign_results(sweep, environment["dtype"]) if group.rank == 0 else None)
    if message:
        raise InputError(message)
    limit = min(group.gather_objects(available_bytes(group)))
    ceilings: dict[int, Ceilings] = {}
    with progress_bar(console) as progress:
        task = progress.add_task(sweep.mode, total=len(todo))
        for cell in todo:
            progress.update(task, description=_name(cell))
            result = _run_cell(cell, sweep, mode, group, environment, limit, ceilings)
            if group.rank == 0:
                write_cell(sweep.outdir, result)
            if result.status != Status.OK:
                console.print(f"{_name(cell)}: {result.message}")
            progress.advance(task)
    group.barrier()  # every file is there before any rank goes on


def _unfinished(sweep: Sweep) -> list[Cell]:
    return [cell for cell in sweep.cells if not is_finished(sweep.outdir, cell)]


def _foreign_results(sweep: Sweep, dtype: str) -> str | None:
    """What to say when the directory holds results that cannot be compared with those to come."""
    if not sweep.outdir.is_dir():
        return None
    for result in read_results([sweep.outdir], warn=lambda line: None):
        theirs = result.environment.get("dtype")
        if (result.model_name, theirs) != (sweep.model.name, dtype):
            return (
                f"{sweep.outdir} holds results of {result.model_name} in {theirs}; this sweep is of {sweep.model.name} "
                f"in {dtype}; use another OUTDIR"
            )
    return None


def _run_cell(
    cell: Cell,
    sweep: Sweep,
    mode: Mode,
    group: TPGroup,
    environment: dict,
    limit: int,
    ceilings: dict[int, Ceilings],
) -> CellResult:
    """Times one cell on all ranks, or says why it was not."""
    needed = mode.footprint(cell)
    result = CellResult(
        cell=cell,
        status=Status.OK,
        model_name=sweep.model.name,
        seed=sweep.model.seed,
        num_iters=sweep.num_iters,
        num_warmup=sweep.num_warmup,
        environment=environment,
        predicted_bytes=() if needed is None else (needed.total,) * group.size,
    )
    refusal = _refusal(cell, mode.config, needed, limit)
    if refusal:
        return replace(result, status=Status.DOES_NOT_FIT, message=refusal)
    try:
        mode.set_up(cell)
        times = _time(cell, sweep, mode, group)
    except (torch.OutOfMemoryError, MemoryError) as error:
        result = replace(result, status=Status.OUT_OF_MEMORY, message=f"out of memory: {str(error).splitlines()[0]}")
        if group.size == 1:
            return result
        # The other ranks are waiting for this one: there is no going on together. The next run goes on after the cell.
        write_cell(sweep.outdir, result)
        raise InputError(
            f"rank {group.rank} ran out of memory in {_name(cell)}, which is recorded; run the same command again to "
            "go on with the next cell"
        ) from error
    finally:
        mode.release()
    result = replace(result, **times)
    return _with_roofline(result, mode, group, ceilings) if cell.mode in METHODS else result


def _refusal(cell: Cell, config: ModelConfig, needed: Footprint | None, limit: int) -> str | None:
    length = cell.num_shared + cell.num_unique
    if length > config.max_position_embeddings:
        return f"{length} tokens a sequence; the model has {config.max_position_embeddings} positions"
    # The weights are there already.
    if needed is not None and needed.cache + needed.activations > limit:
        return (
            f"needs {(needed.cache + needed.activations) / 2**30:.2f} GiB a rank beside the weights; "
            f"{limit / 2**30:.2f} GiB are free"
        )
    return None


def _time(cell: Cell, sweep: Sweep, mode: Mode, group: TPGroup) -> dict:
    """Raw times in ms, each that of the slowest rank, and the peak memory of each rank."""
    prompt = make_prompt(mode.config.vocab_size, cell.num_shared, sweep.model.seed)

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
        "peak_bytes": tuple(group.gather_objects(peak.bytes)),
    }


def _with_roofline(result: CellResult, mode: Mode, group: TPGroup, ceilings: dict[int, Ceilings]) -> CellResult:
    """Adds what the decode step achieved, and the least time that the machine's ceilings allow it."""
    cell, config, step_ms = result.cell, mode.config, result.decode_step_ms
    if step_ms is None:
        return result
    if cell.batch_size not in ceilings:
        group.barrier()
        ceilings[cell.batch_size] = measure_ceilings(group.device, mode.config.dtype, rows=cell.batch_size)
    cost = decode_step_cost(
        cell.mode,
        batch=cell.batch_size,
        shared_len=cell.num_shared,
        unique_len=cell.num_unique / 2,  # own keys are 1, 2, ... num_unique - 1 in the steps that are timed
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        world_size=group.size,
        bytes_per_element=mode.config.dtype.itemsize,
    )
    return replace(
        result,
        achieved_gbs=cost.bytes / (step_ms * 1e6),
        achieved_tflops=cost.flops / (step_ms * 1e9),
        roofline_ms=predict_ms(cost, ceilings[cell.batch_size]),
    )


def print_plan(sweep: Sweep, config: ModelConfig, world_size: int, console: Console) -> None:
    """The grid with each cell's predicted memory per rank. Runs nothing."""
    table = Table(title=f"{sweep.mode}: {sweep.model.name}, {config.dtype}, {world_size} rank(s); GiB per rank")
    for column in ("batch", "shared", "unique", "weights", "KV cache", "activations", "total", "result"):
        table.add_column(column, justify="right")
    for cell in sweep.cells:
        need = footprint(config, world_size, cell)
        sizes = [f"{size / 2**30:.3f}" for size in (need.weights, need.cache, need.activations, need.total)]
        done = "there already" if is_finished(sweep.outdir, cell) else "to be run"
        table.add_row(str(cell.batch_size), str(cell.num_shared), str(cell.num_unique), *sizes, done)
    console.print(table)


def _name(cell: Cell) -> str:
    return f"{cell.mode} batch {cell.batch_size}, shared {cell.num_shared}, unique {cell.num_unique}"

