"""What the microbenchmark of prompts found: sparse attention, and its index, beside attention to all keys."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.micro.micro_ratio import ratio, setting_of
from engine.bench.micro.micro_results import PREFILL_MODE, PrefillPart, RowResult, Sizes
from engine.bench.micro.micro_table import csv_values, print_notes, print_title, spread_text, time_text
from engine.bench.ratio import Ratio
from engine.bench.report import MISSING, format_number, require_matplotlib, write_table
from engine.files import write_whole
from engine.prefill import DENSE, method_order

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SparseRow:
    """The attention of a method, the index that it takes, and how both compare with dense attention at the same sizes.
    """

    attention: RowResult
    index: RowResult | None = None
    attention_of_dense: Ratio | None = None  # its time over that of dense attention
    index_of_dense: Ratio | None = None  # likewise
    vs_dense: Ratio | None = None  # how many times as fast as dense attention the two are

    @property
    def sizes(self) -> Sizes:
        return self.attention.row.sizes

    @property
    def method(self) -> str:
        return self.attention.row.method

    @property
    def over_share(self) -> float | None:
        """Its part of dense attention's time, over its part of dense attention's work."""
        if self.attention_of_dense is None or not self.attention.density:
            return None
        return self.attention_of_dense.value / self.attention.density

    @property
    def results(self) -> list[RowResult]:
        return [self.attention] if self.index is None else [self.attention, self.index]

    @property
    def ratios(self) -> list[Ratio]:
        return [found for found in (self.attention_of_dense, self.index_of_dense, self.vs_dense) if found]


def build_sparse_rows(results: Iterable[RowResult]) -> list[SparseRow]:
    """Those of mode ``prefill``, by setting, sizes and method. Only rows of one setting and backend are compared."""
    results = sorted((result for result in results if result.row.mode == PREFILL_MODE), key=_order)
    rows = []
    for _, group in groupby(results, key=_point):
        members = list(group)
        attention, index = (
            {one.row.method: one for one in members if one.row.operation == part}
            for part in (PrefillPart.ATTENTION, PrefillPart.INDEX)
        )
        dense = [attention[DENSE]] if DENSE in attention else []
        for method, one in attention.items():
            if method not in index:
                rows.append(SparseRow(one))
                continue
            own = index[method]
            ratios = ratio([one], dense), ratio([own], dense), ratio(dense, [one, own])
            rows.append(SparseRow(one, own, *ratios))
    return rows


def _point(result: RowResult) -> tuple[object, ...]:
    return _table(result), result.row.sizes


def _table(result: RowResult) -> tuple[object, ...]:
    row = result.row
    return setting_of(result), row.num_heads, row.num_kv_heads, row.head_dim, row.backend


def _order(result: RowResult) -> tuple[object, ...]:
    return (*_point(result), method_order(result.row.method), result.row.operation)


# ---- table


def print_sparse_tables(rows: Sequence[SparseRow], console: "Console") -> None:
    """A table for each setting, heads and backend, without columns that no row has."""
    for _, group in groupby(rows, key=lambda row: _table(row.attention)):
        members = list(group)
        row = members[0].attention.row
        backend = f", by {row.backend}" if row.backend else ""
        what = f"Attention of one layer where prompts are read, {row.heads} heads of {row.head_dim}{backend}"
        print_title(what, members[0].attention, console)
        _print_table(members, console)
    print_notes([one for row in rows for one in row.results], [one for row in rows for one in row.ratios], console)


def _print_table(rows: Sequence[SparseRow], console: "Console") -> None:
    from rich import box  # here: rich.table takes longer to import than the rest of this module
    from rich.table import Table

    columns = {
        "density": [format_number(row.attention.density, ".1%") for row in rows],
        "attention\nms": [time_text(row.attention) for row in rows],
        "spread": [spread_text(row.attention) for row in rows],
        "TFLOP/s": [format_number(row.attention.achieved_tflops, ".3f") for row in rows],
        "of\nroofline": [format_number(row.attention.roofline_fraction, ".0%") for row in rows],
        "of\ndense": [_text(row.attention_of_dense) for row in rows],
        "over its\nshare": [format_number(row.over_share, ".2f") for row in rows],
        "index\nms": [time_text(row.index) if row.index else MISSING for row in rows],
        "of\ndense ": [_text(row.index_of_dense, ".3f") for row in rows],
        "both vs\ndense": [_text(row.vs_dense) for row in rows],
    }
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    for name in ("batch", "cached", "new"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("method")
    shown = {name: values for name, values in columns.items() if set(values) != {MISSING}}
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for index, row in enumerate(rows):
        sizes = row.sizes
        if previous is not None and sizes != previous:
            table.add_section()
        where = ("",) * 3 if sizes == previous else (str(sizes.batch_size), str(sizes.num_shared), sizes.unique)
        table.add_row(*where, row.method.replace(":", " "), *(values[index] for values in shown.values()))
        previous = sizes
    console.print(table)


def _text(found: Ratio | None, spec: str = ".2f") -> str:
    return MISSING if found is None else found.formatted(spec)


def sparse_findings(rows: Sequence[SparseRow]) -> list[str]:
    """What the rows of one setting say, in words."""
    return [
        f"{row.sizes.words}, {row.method}: {row.attention.density:.1%} of dense attention's work in "
        f"{row.attention_of_dense.words} of its time, the index in {row.index.median_ms * 1e3:,.0f} us; with it "
        f"{row.vs_dense.words} times as fast"
        for row in rows
        if row.vs_dense is not None
    ]


# ---- CSV and plot


def write_sparse_csv(rows: Sequence[SparseRow], path: Path) -> None:
    """Writes a line for each method and size, with all that the tables show and the files hold but the raw times."""
    values = []
    for row in rows:
        ratios = {
            "attention_of_dense": row.attention_of_dense,
            "index_of_dense": row.index_of_dense,
            "vs_dense": row.vs_dense,
        }
        found = csv_values(row.attention, ratios) | {"over_share": row.over_share}
        for name in ("status", "median_ms", "spread", "num_bytes"):
            found[f"index_{name}"] = row.index and getattr(row.index, name)
        values.append(found)
    write_table(path, list(values[0]), values)


def plot_sparse(rows: Sequence[SparseRow], path: Path) -> bool:
    """Writes a PNG of the times against the number of keys; False where there are none. Raises InputError when
    matplotlib is not installed."""
    drawn = [result for row in rows for result in row.results if result.median_ms]
    if not drawn:
        return False
    require_matplotlib()
    from engine.bench.micro.sparse_plot import draw_sparse  # here: matplotlib takes half a second to import

    write_whole(path, draw_sparse(drawn))
    return True
