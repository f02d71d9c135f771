"""Decode throughput on synthetic data: many completions of one shared prompt, over a grid of sizes."""

from pathlib import Path
from typing import Annotated

import typer

from engine import cli_options as options
from engine.bench.environment import Execution
from engine.bench.modes import MODES, ModelOptions, check_mode
from engine.bench.ranges import parse_range
from engine.bench.report import build_rows, print_table
from engine.bench.results import read_results
from engine.bench.synth import Sweep, make_grid, print_plan, run_sweep
from engine.cli import make_app, make_console, run
from engine.distributed import init_group

app = make_app()

RANGE = "a,b,c or start:stop:step or start:stop:xfactor, stop exclusive"


@app.command()
def synth(
    outdir: Annotated[Path, typer.Argument(metavar="OUTDIR", help="Where OUTDIR/MODE/b*_s*_u*.yaml are written.")],
    batch_size: Annotated[str, typer.Argument(metavar="BS", help=f"Completions at once: {RANGE}.")],
    num_shared: Annotated[str, typer.Argument(metavar="NUM_SHARED", help="Tokens of the shared prompt: a range.")],
    num_unique: Annotated[str, typer.Argument(metavar="NUM_UNIQUE", help="Tokens to generate: a range.")],
    model_name: Annotated[
        str,
        typer.Option(help="A local folder, a Hub id, or with --load-format dummy a preset's name (llama-125m, tiny)."),
    ],
    mode: Annotated[str, typer.Option(help=f"What is timed: {', '.join(MODES)}.")] = "hydragen",
    num_iters: Annotated[int, typer.Option(min=1, help="Timed runs of a cell.")] = 5,
    num_warmup: Annotated[int, typer.Option(min=0, help="Runs of a cell before those.")] = 2,
    tp_dir: options.TpDir = None,
    tp: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tensor-parallel size: of vLLM, which starts its own processes, or of a --dry-run. "
            "The other modes have as many ranks as torchrun starts.",
        ),
    ] = None,
    attention_backend: options.AttentionBackend = None,
    operations_backend: options.OperationsBackend = None,
    cuda_graphs: options.CudaGraphs = False,
    prefill: options.Prefill = None,
    load_format: options.LoadFormat = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    seed: options.SeedOfDummies = 0,
    calc_prefill: Annotated[
        bool, typer.Option(help="Time the shared prompt's prefill as often as the decoding, or run it once untimed.")
    ] = True,
    timeout: options.Timeout = 600,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the grid and each cell's memory per rank, and run nothing.")
    ] = False,
) -> None:
    """Time the generation of NUM_UNIQUE tokens for BS completions of one prompt of NUM_SHARED tokens.

    Every combination of the three ranges is a cell, and every cell one file. A cell that has a file is skipped, so a
    sweep that was stopped goes on where it was. A cell that cannot fit is recorded as such and skipped.

    Modes hydragen, hydragen_noshared (each completion has its own copy of the prompt: FlashAttention without sharing),
    auto (hydragen where it is measured to pay; what it chose is in the result) and noattention (the ceiling) are this
    engine's; hf is transformers with the prompt's cache kept, hf_static
    the same with its StaticCache; vllm and vllm_notok (without detokenisation) are vLLM with prefix caching. All choose
    tokens greedily. Decode throughput is tokens after the first over (time for all - time for one). Run several modes
    into one OUTDIR to see their ratios.

    \b
    Examples:
      python scripts/synth.py results/125m 1:65:x4 1024,4096 16 --model-name llama-125m --load-format dummy
      torchrun --standalone --nproc_per_node=8 scripts/synth.py results/7b 32:129:x2 1024,2048 128 \\
          --mode hydragen --model-name codellama/CodeLlama-7b-Instruct-hf --tp-dir shards/7b
      python scripts/synth.py results/7b 32:4097:x2 16256 128 --model-name codellama/CodeLlama-7b-hf --dry-run --tp 8
    """
    ranges = [
        parse_range(text, name=name)
        for text, name in ((batch_size, "BS"), (num_shared, "NUM_SHARED"), (num_unique, "NUM_UNIQUE"))
    ]
    model = ModelOptions(model_name, tp_dir, load_format, dtype, revision, seed)
    execution = Execution(attention_backend, operations_backend, cuda_graphs, prefill)
    sweep = Sweep(outdir, mode, make_grid(mode, *ranges), model, num_iters, num_warmup, calc_prefill, tp, execution)
    group = init_group(device, timeout_s=timeout)
    try:
        check_mode(mode, model, group.size, tp, dry_run, execution)
        if dry_run:
            print_plan(sweep, tp or group.size, make_console(quiet=group.rank != 0))
            return
        run_sweep(sweep, group, make_console(stderr=True, quiet=group.rank != 0))
        if group.rank == 0:
            print_table(build_rows(read_results([outdir])), make_console())
            print(f"Results are in {outdir}. To plot them: python scripts/report.py {outdir}")
    finally:
        group.close()


if __name__ == "__main__":
    run(app)
