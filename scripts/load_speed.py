"""Times loading and cutting a model's weights, beside reading and copying the same files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from engine.bench.load_speed import Plan, measure_load_speed
from engine.bench.load_speed_table import print_load_speed
from engine.cli import make_app, make_console, run

app = make_app()


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def load_speed(
    outdir: Annotated[
        Path, typer.Argument(metavar="OUTDIR", help="Where load_speed.yaml is written; refused if it has one.")
    ],
    model_name: Annotated[
        str, typer.Option(help="A checkpoint's folder, or a preset, of which one with random weights is made.")
    ] = "princeton-nlp/Sheared-LLaMA-1.3B",
    dtype: Annotated[Dtype, typer.Option(help="Of a preset's weights; a checkpoint has its own.")] = Dtype.bfloat16,
    num_ranks: Annotated[int, typer.Option(min=2, help="Ranks to cut for, which then load at once.")] = 2,
    num_iters: Annotated[int, typer.Option(min=1, help="Rounds; each times everything once.")] = 7,
) -> None:
    """Time how long weights take to load on the CPU, and to cut, beside reading and copying the same files.

    Everything takes turns: a round times each once, then all are timed again, so that a machine whose speed drifts is
    as slow for one as for the other. Files are in the page cache; a cold one is not measured. OUTDIR needs room for
    five times the weights meanwhile, and so does memory. It runs in one process, which starts what it needs.

    \b
    Examples:
      python scripts/load_speed.py results/load
      python scripts/load_speed.py results/load-mine --model-name path/to/model --num-ranks 4
    """
    measured = measure_load_speed(
        outdir, Plan(model_name, getattr(torch, dtype), num_ranks, num_iters), make_console(stderr=True)
    )
    print_load_speed(measured, make_console())


if __name__ == "__main__":
    run(app)
