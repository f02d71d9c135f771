"""Measures what tensor parallelism on CPU costs: several ranks of one thread against one process with as many."""

from pathlib import Path
from typing import Annotated

import typer

from engine import cli_options as options
from engine.attention import METHODS
from engine.bench.modes import ModelOptions
from engine.bench.results import Cell
from engine.bench.scaling import Plan, print_scaling, run_scaling
from engine.cli import make_app, make_console, run

app = make_app()


@app.command()
def scaling(
    outdir: Annotated[
        Path, typer.Argument(metavar="OUTDIR", help="Where scaling.yaml is written; refused if it has one.")
    ],
    model_name: Annotated[
        str, typer.Option(help="A local folder, a Hub id, or with --load-format dummy a preset's name.")
    ] = "llama-125m",
    load_format: options.LoadFormat = "dummy",
    dtype: options.Dtype = "bfloat16",
    mode: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "hydragen",
    batch_size: Annotated[int, typer.Option(min=1, help="Completions at once.")] = 64,
    shared: Annotated[int, typer.Option(min=1, help="Tokens of the shared prompt.")] = 4096,
    unique: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
    num_ranks: Annotated[int, typer.Option(min=2, help="Ranks, and threads of the one process.")] = 2,
    num_rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 5,
    num_iters: Annotated[int, typer.Option(min=1, help="Times that each turn generates.")] = 5,
    seed: options.SeedOfDummies = 0,
) -> None:
    """Time one cell of scripts/synth.py on CPU, in one process and in ranks started by torchrun, turn by turn.

    \b
    Examples:
      python scripts/scaling.py results/scaling
      python scripts/scaling.py results/scaling4 --num-ranks 4 --shared 1024
    """
    model = ModelOptions(model_name, load_format=load_format, dtype=dtype, seed=seed)
    plan = Plan(Cell(mode, batch_size, shared, unique), model, num_ranks, num_rounds, num_iters)
    synth = Path(__file__).with_name("synth.py")
    print_scaling(run_scaling(outdir, plan, synth, make_console(stderr=True)), make_console())


if __name__ == "__main__":
    run(app)
