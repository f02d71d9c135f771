"""Measures how the time of a decode step grows with the work."""

from pathlib import Path
from typing import Annotated

import typer

from engine import cli_options as options
from engine.bench.growth import Plan, Work, run_growth
from engine.bench.growth_table import print_growth
from engine.bench.modes import ModelOptions, check_mode
from engine.bench.ranges import parse_range
from engine.cli import make_app, make_console, run
from engine.distributed import init_group

app = make_app()


@app.command()
def growth(
    outdir: Annotated[
        Path, typer.Argument(metavar="OUTDIR", help="Where growth.yaml is written; refused if it has one.")
    ],
    model_name: Annotated[
        str, typer.Option(help="A local folder, a Hub id, or with --load-format dummy a preset's name.")
    ] = "llama-125m",
    load_format: options.LoadFormat = "dummy",
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    attention: options.Attention = "hydragen",
    batch: Annotated[str, typer.Option(help="Completions at once: a range.")] = "1:513:x2",
    prefix: Annotated[str, typer.Option(help="Tokens that they share: a range.")] = "256:32769:x2",
    depth: Annotated[str, typer.Option(help="Levels that the prefix is divided into: a range.")] = "1:5:1",
    base_batch: Annotated[int, typer.Option(min=1, help="The batch where another size varies.")] = 64,
    base_prefix: Annotated[int, typer.Option(min=1, help="Likewise the prefix.")] = 4096,
    unique: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
    finished: Annotated[int, typer.Option(min=1, help="Sequences that finish in a call of the last table.")] = 4096,
    num_iters: Annotated[int, typer.Option(min=1, help="Times each step, and each call of many, is timed.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the tokens, and of dummy weights.")] = 0,
) -> None:
    """Time a decode step as batch, shared prefix and depth of the prefix tree grow, one at a time, and as sequences of
    the same call have finished. Beside each time stands the least that this machine could need for the bytes and
    operations of the step.

    \b
    Examples:
      python scripts/growth.py results/growth
      python scripts/growth.py results/baseline --attention hydragen_noshared --prefix 256:8193:x2
      python scripts/growth.py results/deep --depth 1,2,4,8,16 --base-batch 256 --batch 1,256 --prefix 4096
    """
    model = ModelOptions(model_name, load_format=load_format, dtype=dtype, seed=seed)
    plan = Plan(
        Work(base_batch, base_prefix),
        parse_range(batch, name="--batch"),
        parse_range(prefix, name="--prefix"),
        parse_range(depth, name="--depth"),
        unique,
        finished,
        attention,
        model,
        num_iters,
    )
    check_mode(attention, model, 1, None)
    group = init_group(device)
    try:
        print_growth(run_growth(outdir, plan, group, make_console(stderr=True)), make_console())
    finally:
        group.close()


if __name__ == "__main__":
    run(app)
