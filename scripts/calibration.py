"""Shows, or deletes, what was measured for attention method auto."""

from typing import Annotated

import typer
from rich.table import Table

from engine.calibration import NUM_QUERIES, cache_directory, kept
from engine.cli import make_app, make_console, run

app = make_app()


@app.command()
def calibration(
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete all of it; it is measured anew when needed.")
    ] = False,
) -> None:
    """Show from which length on, in tokens, attention method auto has a shared prefix read once for all queries.

    A row is a measurement, of one device, dtype and head shape of a rank, and a column a number of sequences. A shorter
    prefix is read by each sequence for itself. A measurement is made when auto first needs it, in seconds, and holds
    until libraries or kernels change: then it is old, and another takes its place. It is kept in $TRIBUTARY_CACHE, or
    tributary below $XDG_CACHE_HOME or ~/.cache.

    \b
    Examples:
      python scripts/calibration.py
      python scripts/calibration.py --delete
    """
    console = make_console()
    found = kept()
    if delete:
        for path, _ in found:
            path.unlink(missing_ok=True)
        console.print(f"deleted {len(found)} file(s) in {cache_directory()}")
        return
    table = Table("device", "dtype", "heads", "backend", title="prefixes that are shared, from so many tokens on")
    for count in NUM_QUERIES:
        table.add_column(str(count), justify="right")
    for path, measured in found:
        if measured is None:
            console.print(f"{path} is damaged or of another version; it is not used")
            continue
        setting = measured.setting
        count = setting.num_threads
        threads = f", {count} thread{'s' * (count > 1)}" if count else ""
        heads = f"{setting.num_heads}/{setting.num_kv_heads} of {setting.head_dim}"
        lengths = ("never" if length is None else str(length) for length in measured.crossover.lengths)
        old = "" if setting.is_current else " (old)"
        table.add_row(setting.device + threads + old, setting.dtype, heads, setting.backend or "best", *lengths)
    if table.row_count:
        console.print(table)
    else:
        console.print(f"nothing is kept in {cache_directory()}")


if __name__ == "__main__":
    run(app)
