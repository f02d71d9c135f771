"""What a microbenchmark found, each row beside the baseline: as tables, as CSV and as a plot."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.decode_workload import MODES
from engine.bench.micro_results import OPERATIONS_MODE, Row, RowResult, Sizes
from engine.bench.operations import PARTS, all_operations, hidden_size, intermediate_size
from engine.bench.ratio import Ratio
from engine.bench.report import MISSING, format_number, require_matplotlib, write_table
from engine.bench.result_files import Status
from engine.bench.timing import HIGH_SPREAD
from engine.files import write_whole
from kernels import Backend

if TYPE_CHECKING:
    from rich.console import Console

BASELINE = "base"
ALLOWED_OVER_BEST = 0.1  # of the time of the better one: what a choice that was measured before may cost


def ratio(over: Sequence[RowResult], under: Sequence[RowResult]) -> Ratio | None:
    """The times of ``over`` added up, over those of ``under``; None where one of them has no times.

    In one run the ratio is the median of those of the rounds, and the spread theirs. Of rows that ran at other times
    it is that of the medians, and the spreads of all of them count, for none of the machine's drift cancels.
    """
    rows = [*over, *under]
    if not (over and under) or not all(row.median_ms for row in rows):
        return None
    if len({(row.run, len(row.times_ms)) for row in rows}) == 1 and rows[0].run:
        return Ratio.of_rounds(*([sum(times) for times in _rounds(side)] for side in (over, under)))
    return Ratio.of_runs(*([row.times_ms for row in side] for side in (over, under)))


def _rounds(rows: Sequence[RowResult]) -> Iterator[tuple[float, ...]]:
    return zip(*(row.times_ms for row in rows), strict=True)


@dataclass(frozen=True)
class MicroRow:
    """A result, and how it compares with others at the same sizes and with the same backend."""

    result: RowResult
    vs_base: Ratio | None  # of whole attention only: how many times as fast as the baseline
    vs_best: Ratio | None  # of auto only: how many times as long as the faster one of the modes that it chooses from


def build_micro_rows(results: Iterable[RowResult]) -> list[MicroRow]:
    """Ordered by setting, kind, heads, sizes and what is timed. Only rows of one setting are compared."""
    results = sorted(results, key=_order)
    bases = {_point(result): result for result in results if _name(result) == BASELINE}

    def against_base(result: RowResult) -> Ratio | None:
        base, operation = bases.get(_point(result)), result.row.operation
        is_whole = not operation or operation in MODES
        return ratio([base], [result]) if base is not None and is_whole else None

    fixed = {name for name, mode in MODES.items() if not mode.chooses}
    choices: dict[tuple[object, ...], list[RowResult]] = {}
    for result in results:
        if _name(result) in fixed and result.median_ms:
            choices.setdefault(_point(result), []).append(result)

    def against_best(result: RowResult) -> Ratio | None:
        others = choices.get(_point(result), [])
        if result.choice is None or len(others) < len(fixed):
            return None
        return ratio([result], [min(others, key=lambda other: other.median_ms)])

    return [MicroRow(result, against_base(result), against_best(result)) for result in results]


def _name(result: RowResult) -> str:
    """What is timed, in whichever mode."""
    return result.row.operation or result.row.mode


def _is_operation(result: RowResult) -> bool:
    return result.row.mode == OPERATIONS_MODE


def setting_of(result: RowResult) -> tuple[str, str, str]:
    """What results that are compared have in common: sweep, device and dtype."""
    device_name, dtype = (str(result.environment.get(name, "unknown")) for name in ("device_name", "dtype"))
    return result.sweep, device_name, dtype


def _point(result: RowResult) -> tuple[object, ...]:
    return (setting_of(result), _is_operation(result), result.row.sizes, result.row.backend)


def _order(result: RowResult) -> tuple[object, ...]:
    row, names = result.row, [operation.name for operation in all_operations()]
    heads = (row.num_heads, row.num_kv_heads, row.head_dim)
    place = names.index(_name(result)) if _name(result) in names else len(names)
    return (setting_of(result), _is_operation(result), heads, row.sizes, place, row.mode, row.operation, row.backend)


# ---- operations of one size, held against each other


def hydragen_over_parts(results: Sequence[RowResult]) -> tuple[Ratio, str] | None:
    """The time of hydragen's attention over the sum of its parts' best single calls, and what these are.

    ``results`` are those of one size. A kernel that merges its state with that of the segment before leaves no merge
    to be added.
    """
    whole = [result for result in results if _name(result) == "hydragen"]
    best = [
        min(timed, key=lambda result: result.median_ms)
        for part in PARTS
        if (timed := [result for result in results if _name(result) == part.name and result.median_ms])
    ]
    attention = [result for result in best if result.backends]
    if not whole or len(attention) < 2:
        return None
    merges_itself = all(backend == Backend.SIMD for backend in whole[0].backends[1:])
    parts = attention if merges_itself else best
    found = ratio(whole, parts)
    return None if found is None else (found, " + ".join(result.row.label for result in parts))


def base_over_read(results: Sequence[RowResult]) -> Ratio | None:
    """The rate at which the baseline moves its bytes, over the rate at which memory was read in the same rounds."""
    base, read = ([result for result in results if _name(result) == name] for name in (BASELINE, "memory_read"))
    found = ratio(read, base)
    return None if found is None else replace(found, value=found.value * base[0].num_bytes / read[0].num_bytes)


# ---- table


def print_micro_tables(rows: Sequence[MicroRow], console: "Console") -> None:
    """A table of each setting's modes and one of its operations, without columns that no row has."""
    for (setting, operations), group in groupby(rows, key=lambda r: (setting_of(r.result), _is_operation(r.result))):
        members = list(group)
        sweep, device_name, dtype = setting
        what = "Operations of a decode step" if operations else "Attention of one layer in a decode step"
        source = f", from {sweep}" if sweep else ""
        console.print(f"{what}, {dtype} on {device_name}{source}", style="bold", markup=False, soft_wrap=True)
        _print_table(members, console)
        if operations:
            _print_comparisons(members, console)
        for line in _about_choices(members):
            console.print(line, soft_wrap=True, highlight=False)
    ratios = [found for row in rows for found in (row.vs_base, row.vs_best) if found]
    if any(found.high_spread for found in (*ratios, *(row.result for row in rows))):
        console.print(f"! times vary by more than {HIGH_SPREAD:.0%}: differences of that size may be noise")
    if any(not found.same_run for found in ratios):
        console.print("~ timed in separate runs: --compare times modes turn by turn")
    for row in rows:
        if row.result.status != Status.OK and row.result.message:
            where = row.result.row.path(Path())
            console.print(f"{where}: {row.result.message}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _print_table(rows: Sequence[MicroRow], console: "Console") -> None:
    from rich import box  # here: rich.table takes longer to import than the rest of this module
    from rich.table import Table

    results = [row.result for row in rows]
    columns = {
        "ms": [_time(result) for result in results],
        "spread": [format_number(result.spread, ".1%") + (" !" if result.high_spread else "") for result in results],
        "GB/s": [format_number(result.achieved_gbs, ".1f") for result in results],
        "TFLOP/s": [format_number(result.achieved_tflops, ".3f") for result in results],
        "roofline\nms": [format_number(result.roofline_ms if result.times_ms else None, ".4g") for result in results],
        "of\nroofline": [format_number(result.roofline_fraction, ".0%") for result in results],
        "choice": [result.choice or MISSING for result in results],
        "vs\nbase": [row.vs_base.text if row.vs_base else MISSING for row in rows],
        "time over\nthe best": [row.vs_best.text if row.vs_best else MISSING for row in rows],
    }
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    for heading in ("batch", "shared", "unique", "heads", "dim"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("operation" if _is_operation(results[0]) else "mode", no_wrap=True)
    shown = {heading: values for heading, values in columns.items() if set(values) != {MISSING}}
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
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


def _print_comparisons(rows: Sequence[MicroRow], console: "Console") -> None:
    for sizes, results in _by_sizes(rows):
        row_sizes = f"hidden size {hidden_size(sizes)}, MLP {intermediate_size(sizes)}"
        console.print(f"{sizes.words} ({row_sizes}):", soft_wrap=True, highlight=False)
        for line in _about_operations(results):
            console.print(f"  {line}", soft_wrap=True, highlight=False)


def micro_findings(rows: Sequence[MicroRow]) -> list[str]:
    """What the rows of one setting say, in words."""
    operations, modes = ([row for row in rows if _is_operation(row.result) == kind] for kind in (True, False))
    found = [f"{sizes.words}: {line}" for sizes, same in _by_sizes(operations) for line in _about_operations(same)]
    ratios = sorted(row.vs_base.value for row in modes if row.vs_base and row.result.row.mode == "hydragen")
    if ratios:
        found.append(f"hydragen is {ratios[0]:.2f} to {ratios[-1]:.2f} times as fast as base")
    return found + _about_choices(modes)


def _by_sizes(rows: Sequence[MicroRow]) -> Iterator[tuple[Sizes, list[RowResult]]]:
    for sizes, group in groupby((row.result for row in rows), key=lambda result: result.row.sizes):
        yield sizes, list(group)


def _about_operations(results: Sequence[RowResult]) -> list[str]:
    """Of one size."""
    lines = []
    if parts := hydragen_over_parts(results):
        found, what = parts
        lines.append(f"hydragen takes {_ratio(found)} times as long as the best calls of its parts: {what}")
    if found := base_over_read(results):
        lines.append(f"base moves its bytes at {_ratio(found)} of the rate at which memory_read does")
    for name, rows in groupby((result for result in results if result.median_ms), key=_name):
        if len(backends := list(rows)) > 1:
            lines.append(f"{name}: {', '.join(_speed(result) for result in backends)}")
    return lines


def _speed(result: RowResult) -> str:
    fraction = f" ({result.roofline_fraction:.0%} of the roofline)" if result.roofline_fraction else ""
    return f"{result.row.backend} {result.median_ms:.4g} ms{fraction}"


def _about_choices(rows: Sequence[MicroRow]) -> list[str]:
    """How far the mode that chooses is from the better of the others, over all sizes."""
    chosen = sorted((row for row in rows if row.vs_best), key=lambda row: row.vs_best.value)
    if not chosen:
        return []
    worst, middle = chosen[-1], chosen[len(chosen) // 2]
    beyond = [row for row in chosen if row.vs_best.value > 1 + ALLOWED_OVER_BEST + (row.vs_best.spread or 0)]
    where = "; ".join(row.result.row.words for row in beyond)
    return [
        f"auto takes {middle.vs_best.text} times as long as the best in the middle of {len(chosen)} sizes, and at "
        f"most {_ratio(worst.vs_best)}, at {worst.result.row.words}",
        f"beyond {ALLOWED_OVER_BEST:.0%} and the spread: {f'{len(beyond)}: {where}' if beyond else 'none'}",
    ]


def _ratio(found: Ratio) -> str:
    return f"{found.text} (spread {format_number(found.spread, '.0%')})"


def _time(result: RowResult) -> str:
    if result.status != Status.OK:
        return str(result.status).replace("_", " ")
    return format_number(result.median_ms, ".4g")


# ---- CSV

_ROW_COLUMNS = (
    "mode operation backend batch_size num_shared num_unique unique_seq_len num_heads num_kv_heads head_dim"
).split()
_RESULT_COLUMNS = (
    "sweep status median_ms spread achieved_gbs achieved_tflops roofline_ms roofline_fraction num_bytes num_flops "
    "read_gbs matmul_tflops choice timed_with num_warmup predicted_bytes hidden_size intermediate_size vocab_size seed "
    "run message"
).split()
_ENVIRONMENT_COLUMNS = "device device_name dtype num_threads git_revision".split()
_COLUMNS = (
    *_ROW_COLUMNS, *_RESULT_COLUMNS, "vs_base", "vs_base_spread", "vs_base_same_run", "vs_best", "vs_best_spread",
    "num_iters", "backends",
    *_ENVIRONMENT_COLUMNS, "torch",
)  # fmt: skip


def write_micro_csv(rows: Sequence[MicroRow], path: Path) -> None:
    """Writes one line a row with all that the tables show and the files hold but the raw times."""
    write_table(path, _COLUMNS, [_csv_values(row) for row in rows])


def _csv_values(row: MicroRow) -> dict[str, object]:
    result, environment = row.result, row.result.environment
    return {
        **{name: getattr(result.row, name) for name in _ROW_COLUMNS},
        **{name: getattr(result, name) for name in _RESULT_COLUMNS},
        **{name: environment.get(name) for name in _ENVIRONMENT_COLUMNS},
        "vs_base": row.vs_base and row.vs_base.value,
        "vs_base_spread": row.vs_base and row.vs_base.spread,
        "vs_base_same_run": row.vs_base and row.vs_base.same_run,
        "vs_best": row.vs_best and row.vs_best.value,
        "vs_best_spread": row.vs_best and row.vs_best.spread,
        "num_iters": len(result.times_ms),
        "backends": " ".join(result.backends),
        "torch": (environment.get("versions") or {}).get("torch"),
    }


# ---- plot


def plot_micro(rows: Sequence[MicroRow], path: Path) -> bool:
    """Writes a PNG of the modes' times and speed-ups against the unique length; False where no mode has times.

    Raises InputError when matplotlib is not installed.
    """
    drawn = [row for row in rows if not _is_operation(row.result) and row.result.median_ms]
    if not drawn:
        return False
    require_matplotlib()
    from engine.bench.micro_plot import draw_micro  # here: matplotlib takes half a second to import

    write_whole(path, draw_micro(drawn))
    return True
