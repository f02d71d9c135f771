"""Takes a decode step apart: each mode's time beside the matrix products and prefix attention that it needs."""

from pathlib import Path
from typing import Annotated

import typer

from engine import cli_options as options
from engine.bench.breakdown import Comparison, run_breakdown
from engine.bench.breakdown_table import print_breakdown
from engine.bench.modes import MODES, ModelOptions, check_mode
from engine.bench.ranges import parse_range
from engine.cli import make_app, make_console, run
from engine.distributed import init_group

app = make_app()


@app.command()
def decode_step(
    outdir: Annotated[
        Path, typer.Argument(metavar="OUTDIR", help="Where breakdown.yaml is written; refused if it has one.")
    ],
    model_name: Annotated[
        str, typer.Option(help="A local folder, a Hub id, or with --load-format dummy a preset's name.")
    ] = "llama-125m",
    load_format: options.LoadFormat = "dummy",
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions at once.")] = 64,
    shared: Annotated[str, typer.Option(help="Tokens of the shared prompt: a range.")] = "1024,4096",
    unique: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
    num_iters: Annotated[int, typer.Option(min=1, help="Rounds; each times every mode once.")] = 7,
    hf_iters: Annotated[
        int, typer.Option(min=1, help="Rounds that hf takes part in, the first ones, of --num-iters: it is slow.")
    ] = 2,
    modes: Annotated[
        str, typer.Option(help=f"Modes to time, separated by commas: {', '.join(MODES)}.")
    ] = "noattention,hydragen,hydragen_noshared,hf,hf_static",
    seed: options.SeedOfDummies = 0,
) -> None:
    """Time a decode step in each mode, and alone the operations that it consists of.

    All modes are loaded in one process and take turns: each round times one step of every mode, then all are timed
    again, so that a machine whose speed drifts is as slow for one as for the other. Each mode keeps its caches
    meanwhile; one that memory does not suffice for is left out.

    Prints, for each shared length: a noattention step over its matrix products alone; what attention takes within a
    step of hydragen over the prefix-attention calls alone; the rate at which the baseline reads keys and values within
    its steps, and its part of what this machine reads just before and after; and how many times faster hydragen is than
    transformers. Each with its spread over the rounds.

    \b
    Examples:
      python scripts/decode_step.py results/step
      python scripts/decode_step.py results/step32 --dtype float32 --shared 4096 --modes noattention,hydragen
      python scripts/decode_step.py results/steady --num-iters 15 --hf-iters 5
    """
    model = ModelOptions(model_name, load_format=load_format, dtype=dtype, seed=seed)
    chosen = tuple(mode.strip() for mode in modes.split(","))
    lengths = parse_range(shared, name="--shared")
    group = init_group(device)
    try:
        for mode in chosen:
            check_mode(mode, model, group.size, None)
        comparison = Comparison(chosen, batch_size, lengths, unique, model, num_iters, hf_iters)
        breakdown = run_breakdown(outdir, comparison, group, make_console(stderr=True))
        print_breakdown(breakdown, make_console())
    finally:
        group.close()


if __name__ == "__main__":
    run(app)
