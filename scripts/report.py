"""Prints and plots what scripts/synth.py and scripts/microbenchmark.py measured."""

from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from engine.bench.micro_report import build_micro_rows, plot_micro, print_micro_tables, write_micro_csv
from engine.bench.micro_results import FILES
from engine.bench.report import build_rows, plot, print_table, write_csv
from engine.bench.result_files import print_warning
from engine.bench.results import read_results
from engine.cli import make_app, make_console, run
from engine.errors import InputError

app = make_app()


@app.command()
def report(
    outdirs: Annotated[
        list[Path],
        typer.Argument(metavar="OUTDIR", help="Result folders of scripts/synth.py or scripts/microbenchmark.py."),
    ],
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Where the CSV goes, if not to report.csv (microbenchmark.csv) in the first OUTDIR."
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Where the plot goes, if not to report.png (microbenchmark.png) in the first OUTDIR."
        ),
    ] = None,
    no_csv: Annotated[bool, typer.Option("--no-csv", help="Write no CSV.")] = False,
    no_png: Annotated[bool, typer.Option("--no-png", help="Draw no plot (which needs matplotlib).")] = False,
) -> None:
    """Show a sweep or a microbenchmark as a table, a CSV file and a plot.

    Of a sweep the table has decode throughput in tokens per second (tokens after the first over the time for all less
    the time for one), as a ratio to noattention (the ceiling), hydragen_noshared and hf of the same sweep at the same
    point, the spread of the times (! above 10%), the prefill's time, and the roofline's time as a fraction of the
    measured one. The plot has throughput against batch size and against prefix length, one line a mode.

    Of a microbenchmark it has each row's time and spread, the bytes and operations per second, the roofline's time, and
    how many times as fast as base it is (~ where the two ran at different times). The plot has time against the number
    of unique keys for each batch size and shared length, and the speed-up over base.

    \b
    Examples:
      python scripts/report.py results/7b
      python scripts/report.py results/7b results/13b --csv all.csv --png all.png
      python scripts/report.py results/micro --no-csv --no-png
    """
    for path, unwanted, option in ((csv, no_csv, "csv"), (png, no_png, "png")):
        if path is not None and unwanted:
            raise InputError(f"--{option} {path} and --no-{option} were both given; give one of them")
    warn = cache(print_warning)  # a file that neither reader can use is named once
    rows, micro_rows = build_rows(read_results(outdirs, warn)), build_micro_rows(FILES.read_all(outdirs, warn))
    if not rows and not micro_rows:
        raise InputError(
            f"no results in {', '.join(map(str, outdirs))}; "
            "give the OUTDIR of scripts/synth.py, the folder that holds MODE/*.yaml"
        )
    if rows and micro_rows and (csv or png):
        raise InputError(
            f"{csv or png} was given for one file, but there are results of synth.py and of microbenchmark.py; leave "
            "--csv and --png out, or give folders of one kind"
        )
    if rows:
        print_table(rows, make_console())
        if not no_csv:
            csv_path = csv or outdirs[0] / "report.csv"
            write_csv(rows, csv_path)
            print(f"wrote {csv_path}")
        if not no_png:
            png_path = png or outdirs[0] / "report.png"
            plot(rows, png_path)
            print(f"wrote {png_path}")
    if micro_rows:
        print_micro_tables(micro_rows, make_console())
        if not no_csv:
            csv_path = csv or outdirs[0] / "microbenchmark.csv"
            write_micro_csv(micro_rows, csv_path)
            print(f"wrote {csv_path}")
        if not no_png:
            png_path = png or outdirs[0] / "microbenchmark.png"
            drawn = plot_micro(micro_rows, png_path)
            print(f"wrote {png_path}" if drawn else "no plot: no mode has times (operations are in the table alone)")


if __name__ == "__main__":
    run(app)
