"""The table of how fast weights are loaded and cut."""

from rich import box
from rich.console import Console
from rich.table import Table

from engine.bench.breakdown import Series
from engine.bench.load_speed import WORK, LoadSpeed
from engine.bench.timing import HIGH_SPREAD

_WHAT = {
    "read": "read the files into a small buffer",
    "fill": "fill as much fresh memory",
    "copy": "copy the files, as cp does",
    "copy_synced": "copy them, until they are on the disk",
    "load": "load the checkpoint",
    "load_shards": "load shards",
    "load_ranks": "load the checkpoint, {num_ranks} ranks",
    "load_shards_ranks": "load shards, {num_ranks} ranks",
    "cut": "cut for {num_ranks} ranks, until it is on the disk",
}


def print_load_speed(measured: LoadSpeed, console: Console) -> None:
    """Prints it; a high spread is marked ``!``."""
    plan, environment = measured.plan, measured.environment
    table = Table(
        title=f"{measured.num_bytes / 1e9:.2f} GB of weights: {plan.model_name}, {environment['dtype']} on "
        f"{environment['device_name']}",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for heading in ("ms", "spread", "least", "GB/s", "speed", "spread", "of least times"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, yardsticks in WORK.items():
        times = Series(measured.times_ms[name])
        own = [
            _WHAT[name].format(num_ranks=plan.num_ranks),
            f"{times.median:,.0f}",
            _spread(times),
            f"{min(times.values):,.0f}",
            f"{measured.gbs(name).median:.2f}",
        ]
        for yardstick in yardsticks or [None]:
            held_against = [""] * 4
            if yardstick is not None:
                share, best = measured.share(name, yardstick), measured.best_share(name, yardstick)
                held_against = [f"{share.median:.2f}", _spread(share), f"{best:.2f}", f"x {yardstick}"]
            table.add_row(*own, *held_against)
            own = [""] * 5
    console.print(table)
    console.print(
        f"Medians of {plan.num_iters} rounds in which all took turns, with {environment['num_threads']} threads in "
        "all; ratios are of the same round, and of the least times of all rounds. 1 is as fast. All files were in the "
        "page cache.",
        soft_wrap=True,
    )
    console.print(f"! rounds vary by more than {HIGH_SPREAD:.0%}: differences of that size may be noise")


def _spread(series: Series) -> str:
    if series.spread is None:
        return "-"
    return f"{series.spread:.0%}" + (" !" if series.high_spread else "")
