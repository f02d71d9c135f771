"""The tables and CSV columns that all results of a microbenchmark have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.micro.micro_ratio import setting_of
from engine.bench.micro.micro_results import Row, RowResult
from engine.bench.ratio import Ratio
from engine.bench.report import MISSING, format_number
from engine.bench.result_files import Status
from engine.bench.timing import HIGH_SPREAD

if TYPE_CHECKING:
    from rich.console import Console


def print_title(what: str, result: RowResult, console: "Console") -> None:
    """Of a table whose rows have the setting of ``result``."""
    sweep, device_name, dtype = setting_of(result)
    source = f", from {sweep}" if sweep else ""
    console.print(f"{what}, {dtype} on {device_name}{source}", style="bold", markup=False, soft_wrap=True)


def print_rows(
    results: Sequence[RowResult], heading: str, columns: Mapping[str, Sequence[str]], console: "Console"
) -> None:
    """A line a result: sizes, what is timed below ``heading``, its times, and ``columns``, those that any row has."""
    from rich import box  # here: rich.table takes longer to import than the rest of this module
    from rich.table import Table

    columns = {
        "ms": [time_text(result) for result in results],
        "spread": [spread_text(result) for result in results],
        "GB/s": [format_number(result.achieved_gbs, ".1f") for result in results],
        "TFLOP/s": [format_number(result.achieved_tflops, ".3f") for result in results],
        "roofline\nms": [format_number(result.roofline_ms if result.times_ms else None, ".4g") for result in results],
        "of\nroofline": [format_number(result.roofline_fraction, ".0%") for result in results],
        **columns,
    }
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    for name in ("batch", "shared", "unique", "heads", "dim"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(heading, no_wrap=True)
    shown = {name: values for name, values in columns.items() if set(values) != {MISSING}}
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for index, result in enumerate(results):
        row = result.row
        point = (str(row.batch_size), str(row.num_shared), row.unique, row.heads, str(row.head_dim))
        if previous is not None and _starts_section(row, results[index - 1].row):
            table.add_section()
        # A point's first row names it; the rows below it are read against each other.
        where = ("",) * len(point) if point == previous else point
        table.add_row(*where, row.label, *(values[index] for values in shown.values()))
        previous = point
    console.print(table)


def _starts_section(row: Row, before: Row) -> bool:
    """Sizes of operations have many rows each; those of modes differ in the unique length first."""
    if row.operation:
        return row.sizes != before.sizes
    return replace(row.sizes, num_unique=0, unique_seq_len=0) != replace(before.sizes, num_unique=0, unique_seq_len=0)


def time_text(result: RowResult) -> str:
    if result.status != Status.OK:
        return str(result.status).replace("_", " ")
    return format_number(result.median_ms, ".4g")


def spread_text(result: RowResult) -> str:
    return format_number(result.spread, ".1%") + (" !" if result.high_spread else "")


def print_notes(results: Sequence[RowResult], ratios: Sequence[Ratio], console: "Console") -> None:
    """What the signs in tables mean, where there are any, and why results have no times."""
    if any(found.high_spread for found in (*ratios, *results)):
        console.print(f"! times vary by more than {HIGH_SPREAD:.0%}: differences of that size may be noise")
    if any(not found.same_run for found in ratios):
        console.print("~ timed in separate runs: what one run compares takes turns")
    for result in results:
        if result.status != Status.OK and result.message:
            where = result.row.path(Path())
            console.print(f"{where}: {result.message}", style="dim", markup=False, highlight=False, soft_wrap=True)


# ---- CSV

_ROW_COLUMNS = (
    "mode method operation backend batch_size num_shared num_unique unique_seq_len num_heads num_kv_heads head_dim"
).split()
_RESULT_COLUMNS = (
    "sweep status median_ms spread achieved_gbs achieved_tflops roofline_ms roofline_fraction num_bytes num_flops "
    "read_gbs matmul_tflops choice density timed_with num_warmup predicted_bytes hidden_size intermediate_size "
    "vocab_size seed run message"
).split()
_ENVIRONMENT_COLUMNS = "device device_name dtype num_threads git_revision".split()


def csv_values(result: RowResult, ratios: Mapping[str, Ratio | None]) -> dict[str, object]:
    """All that the tables show and a file holds but the raw times, by column; ``ratios`` with their spreads."""
    environment = result.environment
    values = {
        **{name: getattr(result.row, name) for name in _ROW_COLUMNS},
        **{name: getattr(result, name) for name in _RESULT_COLUMNS},
    }
    for name, found in ratios.items():
        values |= {name: found and found.value, f"{name}_spread": found and found.spread}
        values[f"{name}_same_run"] = found and found.same_run
    return values | {
        "num_iters": len(result.times_ms),
        "backends": " ".join(result.backends),
        **{name: environment.get(name) for name in _ENVIRONMENT_COLUMNS},
        "torch": (environment.get("versions") or {}).get("torch"),
    }
