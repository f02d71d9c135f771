"""Prints and plots what synth.py, microbenchmark.py, needles.py and prefill.py of this folder measured."""

from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from engine.bench.reports import read_reports
from engine.bench.result_files import print_warning
from engine.cli import make_app, make_console, run
from engine.errors import InputError

app = make_app()


@app.command()
def report(
    outdirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUTDIR", help="Result folders of synth.py, microbenchmark.py, needles.py or prefill.py."
        ),
    ],
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Where the CSV goes, if not to report.csv (microbenchmark.csv, needles.csv, passkey.csv, prefill.csv) "
            "in the first OUTDIR.",
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where the plot goes, if not beside the CSV, as report.png and so on."),
    ] = None,
    no_csv: Annotated[bool, typer.Option("--no-csv", help="Write no CSV.")] = False,
    no_png: Annotated[bool, typer.Option("--no-png", help="Draw no plot (which needs matplotlib).")] = False,
) -> None:
    """Show a sweep, a microbenchmark, needles or prefill methods as a table, a CSV file and a plot.

    Of a sweep the table has decode throughput in tokens per second (tokens after the first over the time for all less
    the time for one), as a ratio to noattention (the ceiling), hydragen_noshared and hf of the same sweep at the same
    point, the spread of the times (! above 10%), the prefill's time, and the roofline's time as a fraction of the
    measured one. The plot has throughput against batch size and against prefix length, one line a mode.

    Of a microbenchmark it has each row's time and spread, the bytes and operations per second, the roofline's time, and
    how many times as fast as base it is (~ where the two ran at different times). The plot has time against the number
    of unique keys for each batch size and shared length, and the speed-up over base.

    Of needles it has accuracy with its 95% interval, times, and how many answers are those of hydragen_noshared; of a
    passkey grid exact and partial matches. The plots have time per question, and heat maps of depth against length.

    Of prefill methods it has the time to the first token at each context length, how many times as fast as dense it is,
    and the part of attention's work that was done. The plot has time against context length, one line a method.

    \b
    Examples:
      python scripts/report.py results/7b
      python scripts/report.py results/7b results/13b --csv all.csv --png all.png
      python scripts/report.py results/micro --no-csv --no-png
      python scripts/report.py results/needles
    """
    for path, unwanted, option in ((csv, no_csv, "csv"), (png, no_png, "png")):
        if path is not None and unwanted:
            raise InputError(f"--{option} {path} and --no-{option} were both given; give one of them")
    warn = cache(print_warning)  # a file that no reader can use is named once
    reports = read_reports(outdirs, warn)
    if not reports:
        raise InputError(
            f"no results in {', '.join(map(str, outdirs))}; "
            "give the OUTDIR of scripts/synth.py, the folder that holds MODE/*.yaml"
        )
    if len(reports) > 1 and (csv or png):
        raise InputError(
            f"{csv or png} was given for one file, but there are results of "
            f"{' and of '.join(found.what for found in reports)}; leave --csv and --png out, or name folders of "
            "one kind"
        )
    for found in reports:
        found.show(make_console())
        if not no_csv:
            csv_path = csv or outdirs[0] / f"{found.stem}.csv"
            found.write_csv(csv_path)
            print(f"wrote {csv_path}")
        if not no_png:
            png_path = png or outdirs[0] / f"{found.stem}.png"
            drawn = found.plot(png_path)
            print(f"wrote {png_path}" if drawn else "no plot: there are no times to draw")


if __name__ == "__main__":
    run(app)
