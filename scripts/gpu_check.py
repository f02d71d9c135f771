"""Checks the engine on a GPU, in one command and a few minutes: tests, ceilings, two ranks, throughput."""

from pathlib import Path
from typing import Annotated

import typer

from engine.bench.gpu_check import REPORT, make_sections, print_outcomes, run_sections
from engine.cli import make_app, make_console, run
from engine.distributed import choose_device
from engine.errors import InputError

app = make_app()


@app.command()
def gpu_check(
    outdir: Annotated[Path, typer.Argument(metavar="OUTDIR", help=f"Where {REPORT} and the sections' logs go.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:N; or cpu, which can only be tiny.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy sizes: to check the check.")] = False,
    minutes: Annotated[float, typer.Option(min=0.01, help="That all sections together may take.")] = 9.0,
) -> None:
    """Run the tests that need a GPU, measure the machine's ceilings, compare two ranks with one, ask the model
    that ships about hidden facts, and sweep throughput
    (llama-125m in all modes, Llama-3.1-8B in the engine's own, both with random weights). Needs no network.

    A section that fails or takes too long is recorded, and the others still run. Exit status 1 if any failed.

    \b
    Examples (PYTHONPATH is for a checkout that is not installed):
      PYTHONPATH=. python3 scripts/gpu_check.py results/h200
      python scripts/gpu_check.py results/check --device cpu --tiny
    """
    if choose_device(device).type == "cpu" and not tiny:
        raise InputError("--device cpu was given without --tiny; the full sizes are for a GPU: add --tiny")
    outcomes = run_sections(make_sections(device, tiny), outdir, device, minutes * 60, make_console(stderr=True))
    console = make_console()
    print_outcomes(outcomes, console)
    console.print(f"All numbers are in {outdir / REPORT}.", highlight=False)
    if not all(outcome.passed for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    run(app)
