"""Prints and plots what scripts/synth.py measured."""

from pathlib import Path
from typing import Annotated

import typer

from engine.bench.report import build_rows, plot, print_table, write_csv
from engine.bench.results import read_results
from engine.cli import make_app, make_console, run
from engine.errors import InputError

app = make_app()


@app.command()
def report(
    outdirs: Annotated[list[Path], typer.Argument(metavar="OUTDIR", help="Result folders of scripts/synth.py.")],
    csv: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where the CSV goes, if not to report.csv in the first OUTDIR.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where the plot goes, if not to report.png in the first OUTDIR.")
    ] = None,
    no_csv: Annotated[bool, typer.Option("--no-csv", help="Write no CSV.")] = False,
    no_png: Annotated[bool, typer.Option("--no-png", help="Draw no plot (which needs matplotlib).")] = False,
) -> None:
    """Show a sweep as a table, a CSV file and a plot.

    The table has decode throughput in tokens per second (tokens after the first over the time for all less the time for
    one), as a ratio to noattention (the ceiling), hydragen_noshared and hf of the same sweep at the same point, the
    spread of the times (! above 10%), the prefill's time, and the roofline's time as a fraction of the measured one.
    The plot has throughput against batch size and against prefix length, one line a mode.

    \b
    Examples:
      python scripts/report.py results/7b
      python scripts/report.py results/7b results/13b --csv all.csv --png all.png
      python scripts/report.py results/7b --no-csv --no-png
    """
    for path, unwanted, option in ((csv, no_csv, "csv"), (png, no_png, "png")):
        if path is not None and unwanted:
            raise InputError(f"--{option} {path} and --no-{option} were both given; give one of them")
    rows = build_rows(read_results(outdirs))
    if not rows:
        raise InputError(
            f"no results in {', '.join(map(str, outdirs))}; "
            "give the OUTDIR of scripts/synth.py, the folder that holds MODE/*.yaml"
        )
    print_table(rows, make_console())
    if not no_csv:
        csv = csv or outdirs[0] / "report.csv"
        write_csv(rows, csv)
        print(f"wrote {csv}")
    if not no_png:
        png = png or outdirs[0] / "report.png"
        plot(rows, png)
        print(f"wrote {png}")


if __name__ == "__main__":
    run(app)
