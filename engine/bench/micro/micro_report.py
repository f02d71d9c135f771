"""What a microbenchmark of decode steps found, each row beside the baseline: as tables, as CSV and as a plot."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.micro.decode_operations import all_operations, hidden_size, intermediate_size
from engine.bench.micro.decode_workload import MODES
from engine.bench.micro.micro_ratio import ratio, setting_of
from engine.bench.micro.micro_results import OPERATIONS_MODE, PREFILL_MODE, RowResult, Sizes
from engine.bench.micro.micro_table import csv_values, print_notes, print_rows, print_title
from engine.bench.micro.operation_findings import BASELINE, about_operations, name_of
from engine.bench.ratio import Ratio
from engine.bench.report import MISSING, require_matplotlib, write_table
from engine.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

ALLOWED_OVER_BEST = 0.1  # of the time of the better one: what a choice that was measured before may cost


@dataclass(frozen=True)
class MicroRow:
    """A result, and how it compares with others at the same sizes and with the same backend."""

    result: RowResult
    vs_base: Ratio | None  # of whole attention only: how many times as fast as the baseline
    vs_best: Ratio | None  # of auto only: how many times as long as the faster one of the modes that it chooses from


def build_micro_rows(results: Iterable[RowResult]) -> list[MicroRow]:
    """Ordered by setting, kind, heads, sizes and what is timed. Only rows of one setting are compared. Results of mode
    ``prefill`` have a report of their own."""
    results = sorted((result for result in results if result.row.mode != PREFILL_MODE), key=_order)
    bases = {_point(result): result for result in results if name_of(result) == BASELINE}

    def against_base(result: RowResult) -> Ratio | None:
        base, operation = bases.get(_point(result)), result.row.operation
        is_whole = not operation or operation in MODES
        return ratio([base], [result]) if base is not None and is_whole else None

    fixed = {name for name, mode in MODES.items() if not mode.chooses}
    choices: dict[tuple[object, ...], list[RowResult]] = {}
    for result in results:
        if name_of(result) in fixed and result.median_ms:
            choices.setdefault(_point(result), []).append(result)

    def against_best(result: RowResult) -> Ratio | None:
        others = choices.get(_point(result), [])
        if result.choice is None or len(others) < len(fixed):
            return None
        return ratio([result], [min(others, key=lambda other: other.median_ms)])

    return [MicroRow(result, against_base(result), against_best(result)) for result in results]


def _is_operation(result: RowResult) -> bool:
    return result.row.mode == OPERATIONS_MODE


def _point(result: RowResult) -> tuple[object, ...]:
    return (setting_of(result), _is_operation(result), result.row.sizes, result.row.backend)


def _order(result: RowResult) -> tuple[object, ...]:
    row, names = result.row, [operation.name for operation in all_operations()]
    heads = (row.num_heads, row.num_kv_heads, row.head_dim)
    place = names.index(name_of(result)) if name_of(result) in names else len(names)
    return (setting_of(result), _is_operation(result), heads, row.sizes, place, row.mode, row.operation, row.backend)


# ---- table


def print_micro_tables(rows: Sequence[MicroRow], console: "Console") -> None:
    """A table of each setting's modes and one of its operations, without columns that no row has."""
    for (_, operations), group in groupby(rows, key=lambda r: (setting_of(r.result), _is_operation(r.result))):
        members = list(group)
        what = "Operations of a decode step" if operations else "Attention of one layer in a decode step"
        print_title(what, members[0].result, console)
        columns = {
            "choice": [row.result.choice or MISSING for row in members],
            "vs\nbase": [row.vs_base.text if row.vs_base else MISSING for row in members],
            "time over\nthe best": [row.vs_best.text if row.vs_best else MISSING for row in members],
        }
        print_rows([row.result for row in members], "operation" if operations else "mode", columns, console)
        if operations:
            _print_comparisons(members, console)
        for line in _about_choices(members):
            console.print(line, soft_wrap=True, highlight=False)
    ratios = [found for row in rows for found in (row.vs_base, row.vs_best) if found]
    print_notes([row.result for row in rows], ratios, console)


def _print_comparisons(rows: Sequence[MicroRow], console: "Console") -> None:
    for sizes, results in _by_sizes(rows):
        row_sizes = f"hidden size {hidden_size(sizes)}, MLP {intermediate_size(sizes)}"
        console.print(f"{sizes.words} ({row_sizes}):", soft_wrap=True, highlight=False)
        for line in about_operations(results):
            console.print(f"  {line}", soft_wrap=True, highlight=False)


def micro_findings(rows: Sequence[MicroRow]) -> list[str]:
    """What the rows of one setting say, in words."""
    operations, modes = ([row for row in rows if _is_operation(row.result) == kind] for kind in (True, False))
    found = [f"{sizes.words}: {line}" for sizes, same in _by_sizes(operations) for line in about_operations(same)]
    ratios = sorted(row.vs_base.value for row in modes if row.vs_base and row.result.row.mode == "hydragen")
    if ratios:
        found.append(f"hydragen is {ratios[0]:.2f} to {ratios[-1]:.2f} times as fast as base")
    return found + _about_choices(modes)


def _by_sizes(rows: Sequence[MicroRow]) -> Iterator[tuple[Sizes, list[RowResult]]]:
    for sizes, group in groupby((row.result for row in rows), key=lambda result: result.row.sizes):
        yield sizes, list(group)


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
        f"most {worst.vs_best.words}, at {worst.result.row.words}",
        f"beyond {ALLOWED_OVER_BEST:.0%} and the spread: {f'{len(beyond)}: {where}' if beyond else 'none'}",
    ]


# ---- CSV


def write_micro_csv(rows: Sequence[MicroRow], path: Path) -> None:
    """Writes one line a row with all that the tables show and the files hold but the raw times."""
    values = [csv_values(row.result, {"vs_base": row.vs_base, "vs_best": row.vs_best}) for row in rows]
    write_table(path, list(values[0]), values)


# ---- plot


def plot_micro(rows: Sequence[MicroRow], path: Path) -> bool:
    """Writes a PNG of the modes' times and speed-ups against the unique length; False where no mode has times.

    Raises InputError when matplotlib is not installed.
    """
    drawn = [row for row in rows if not _is_operation(row.result) and row.result.median_ms]
    if not drawn:
        return False
    require_matplotlib()
    from engine.bench.micro.micro_plot import draw_micro  # here: matplotlib takes half a second to import

    write_whole(path, draw_micro(drawn))
    return True
