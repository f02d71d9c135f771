"""Times the attention of one layer: in a decode step, with a shared cache and without, and of prompts."""

from pathlib import Path
from typing import Annotated

import typer

from engine import cli_options as options
from engine.bench.micro.decode_workload import MODES
from engine.bench.micro.micro_report import build_micro_rows, print_micro_tables
from engine.bench.micro.micro_results import FILES, OPERATIONS_MODE, PREFILL_MODE
from engine.bench.micro.micro_settings import (
    METHODS,
    MicroSweep,
    make_grid,
    parse_backend,
    parse_dtype,
    parse_methods,
    parse_modes,
)
from engine.bench.micro.micro_sweep import print_plan, run_microbenchmark
from engine.bench.micro.sparse_report import build_sparse_rows, print_sparse_tables
from engine.bench.ranges import parse_range
from engine.cli import make_app, make_console, run
from engine.distributed import init_group, launched_size
from engine.errors import InputError
from engine.loader import DTYPES

app = make_app()

RANGE = "a,b,c or start:stop:step or start:stop:xfactor, stop exclusive"


@app.command()
def microbenchmark(
    outdir: Annotated[Path, typer.Argument(metavar="OUTDIR", help="Where OUTDIR/MODE/b*_s*_u*_q*_k*_d*.yaml go.")],
    batch_size: Annotated[
        str,
        typer.Argument(metavar="BS", help=f"Sequences of one query token, in mode prefill of NUM_UNIQUE: {RANGE}."),
    ],
    num_shared: Annotated[
        str, typer.Argument(metavar="NUM_SHARED", help="Keys that all sequences share: a range, which may hold 0.")
    ],
    num_unique: Annotated[
        str,
        typer.Argument(
            metavar="NUM_UNIQUE",
            help="Keys that each sequence has besides: a range, with 0 or not. In mode prefill new tokens, 1 or more.",
        ),
    ],
    mode: Annotated[
        str, typer.Option(help=f"What is timed: {', '.join((*MODES, OPERATIONS_MODE, PREFILL_MODE))}.")
    ] = "hydragen",
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODES", help="Further modes, separated by commas, that are timed turn by turn with --mode."
        ),
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(
            metavar="METHODS",
            help=f"Of mode prefill, separated by commas: {', '.join(METHODS)}, with options as in "
            "a_shape:n_init=128:n_local=4096.  [default: all of them]",
        ),
    ] = None,
    qheads_range: Annotated[str, typer.Option(help="Query heads: a range.")] = "8",
    kvheads_range: Annotated[str, typer.Option(help="KV heads, which the query heads divide by: a range.")] = "1",
    dim_range: Annotated[str, typer.Option(help="Dimension of a head: a range.")] = "128",
    unique_seq_len: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of NUM_UNIQUE, the keys that are in use; the rest is room in the KV cache. Without it: all."
        ),
    ] = None,
    num_iters: Annotated[
        int | None, typer.Option(min=1, help="Timed calls of a row. Without it: what a second allows, 5 to 1000.")
    ] = None,
    num_warmup: Annotated[
        int | None, typer.Option(min=0, help="Calls of a row before those. Without it: what 0.1 s allows, 1 or more.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "bfloat16",
    device: options.Device = None,
    backend: options.AttentionBackend = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the queries, keys and values.")] = 0,
    no_save: Annotated[
        bool, typer.Option("--no-save", help="Write nothing, and time rows that have a file all the same.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every raw time, and what ran.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the grid and each row's memory, and run nothing.")
    ] = False,
) -> None:
    """Time the attention of one layer.

    In one decode step: BS queries, with NUM_SHARED shared and NUM_UNIQUE own keys each. In mode prefill: NUM_UNIQUE new
    tokens of each of BS prompts, whose first NUM_SHARED tokens are cached and shared.

    Every combination of the ranges is a row, and every row one file. A row that has a file is skipped. A row that
    cannot fit in memory is recorded as such, and the rest goes on. Each call meets cold caches: what lies in them is
    driven out by reading a buffer, which is not timed. On CUDA a call is a graph's replay, timed by the device's
    events.

    Mode base gives each sequence a contiguous copy of the shared keys, and reads all of them: attention without
    sharing. Mode hydragen keeps and reads the shared keys once. --compare base times both turn by turn, so that the
    ratio is of one run.

    Mode operations times single operations of a decode step, with every backend that runs here: attention over the
    shared keys and over the own keys, the merge of two states, RMSNorm after a sum, the rotary embedding with the write
    into the cache, SwiGLU, and the passes over all logits of a greedy choice (block_maxima) and of a draw
    (block_masses); beside them base and hydragen, and memory_read, which reads as many
    bytes as base keeps (1 GiB at most). All take turns. The hidden size is query heads x dim, the MLP's 8/3 of it
    rounded up to 256, the vocabulary 32000. It says how hydragen compares with the sum of its parts, and base with the
    memory's rate. The reference backend, which is there to be right, is left out.

    Mode prefill times attention of the dense method and of sparse ones, and apart from it the making of each one's
    index, the mask, from the same random queries and keys. All take turns. It says what part of dense attention's work
    was done, in what part of its time.

    \b
    Examples:
      python scripts/microbenchmark.py results/micro 512 1024 0:513:16 --mode hydragen
      python scripts/microbenchmark.py results/micro 64 1024,4096 16:257:x4 --compare base --qheads-range 12 \\
          --kvheads-range 4 --dim-range 64
      python scripts/microbenchmark.py results/operations 64 4096 64 --mode operations --qheads-range 12 \\
          --kvheads-range 4 --dim-range 64
      python scripts/microbenchmark.py results/sparse 1 0 2048:32769:x2 --mode prefill --qheads-range 12 \\
          --kvheads-range 4 --dim-range 64 --prefill dense,vertical_slash:num_vertical=800:num_slash=130
      python scripts/microbenchmark.py results/micro 4096 8192 0:513:16 --mode base --dry-run
    """
    if launched_size() > 1:
        raise InputError(f"the microbenchmark is one process, not {launched_size()} ranks; start it with python")
    modes = parse_modes(mode, compare)
    methods = parse_methods(prefill, modes)
    ranges = [
        parse_range(text, name=name, allow_zero=name in ("NUM_SHARED", "NUM_UNIQUE"))
        for text, name in (
            (batch_size, "BS"),
            (num_shared, "NUM_SHARED"),
            (num_unique, "NUM_UNIQUE"),
            (qheads_range, "--qheads-range"),
            (kvheads_range, "--kvheads-range"),
            (dim_range, "--dim-range"),
        )
    ]
    grid, torch_dtype = make_grid(modes, *ranges, unique_seq_len), parse_dtype(dtype)
    group = init_group(device)
    chosen = parse_backend(backend, modes, group.device, torch_dtype)
    sweep = MicroSweep(
        outdir, modes, grid, torch_dtype, chosen, seed, num_iters, num_warmup, save=not no_save, verbose=verbose,
        methods=methods,
    )  # fmt: skip
    if dry_run:
        print_plan(sweep, group, make_console())
        return
    results = run_microbenchmark(sweep, group, make_console(stderr=True))
    found = FILES.read_all([outdir]) if sweep.save else results
    print_micro_tables(build_micro_rows(found), make_console())
    print_sparse_tables(build_sparse_rows(found), make_console())
    if sweep.save:
        print(f"Results are in {outdir}. To plot them: python scripts/report.py {outdir}")


if __name__ == "__main__":
    run(app)
