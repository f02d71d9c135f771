"""What prefill methods took: the time to the first token of each against context length, beside dense's."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.prefill.prefill_results import PrefillResult
from engine.bench.prefill.same_settings import SAME_ENVIRONMENT
from engine.bench.ratio import Ratio
from engine.bench.report import MISSING, format_number, require_matplotlib, write_table
from engine.bench.result_files import Status
from engine.bench.timing import HIGH_SPREAD
from engine.files import write_whole
from engine.prefill import DENSE, method_order

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class PrefillRow:
    """A result, and how many times as fast as dense the method reads the same prompt."""

    result: PrefillResult
    vs_dense: Ratio | None  # None of dense itself, and where one of the two is missing


def build_prefill_rows(results: Iterable[PrefillResult]) -> list[PrefillRow]:
    """Ordered by setting, context length and method."""
    results = sorted(results, key=_order)
    dense = {_point(result): result for result in results if result.prefill == DENSE}
    return [PrefillRow(result, _ratio(dense.get(_point(result)), result)) for result in results]


def prefill_settings(rows: Sequence[PrefillRow]) -> list[list[PrefillRow]]:
    """The rows of each table and panel. Rows are ordered by setting."""
    return [list(group) for _, group in groupby(rows, key=lambda row: _setting(row.result))]


def prefill_title(result: PrefillResult) -> str:
    environment, ranks = result.environment, result.environment.get("world_size", 1)
    weights = " with random weights" if result.load_format == "dummy" else ""
    source = f", from {result.sweep}" if result.sweep else ""
    return (
        f"{Path(result.model_name).name}{weights}, {environment.get('dtype')} on {environment.get('device_name')}, "
        f"{ranks} rank{'s' * (ranks != 1)}: time to first token after {result.prompt}{source}"
    )


def _setting(result: PrefillResult) -> tuple[str, ...]:
    """What results that are compared have in common, beside the prompt's length."""
    environment = (str(result.environment.get(name, "unknown")) for name in SAME_ENVIRONMENT)
    model = (result.model_name, result.model_digest, result.load_format, str(result.seed))
    return (result.sweep, *model, result.prompt, result.prompt_digest, *environment)


def _point(result: PrefillResult) -> tuple[object, ...]:
    return (_setting(result), result.point.num_tokens)


def _order(result: PrefillResult) -> tuple[object, ...]:
    return (_point(result), method_order(result.prefill))


def _ratio(dense: PrefillResult | None, result: PrefillResult) -> Ratio | None:
    if dense is None or dense is result or not dense.first_token_ms or not result.first_token_ms:
        return None
    theirs, ours = dense.first_token_ms, result.first_token_ms
    if dense.run == result.run and len(theirs) == len(ours):
        return Ratio.of_rounds(theirs, ours)
    return Ratio.of_runs([theirs], [ours])


# ---- tables


def print_prefill_tables(rows: Sequence[PrefillRow], console: "Console") -> None:
    """Of each setting a table: one column a method, and for each context length a line for each figure."""
    for members in prefill_settings(rows):
        console.print(prefill_title(members[0].result), style="bold", markup=False, soft_wrap=True)
        _print_setting(members, console)
    if any(row.result.high_spread or (row.vs_dense and row.vs_dense.high_spread) for row in rows):
        console.print(f"! times vary by more than {HIGH_SPREAD:.0%}: differences of that size may be noise")
    if any(row.vs_dense and not row.vs_dense.same_run for row in rows):
        console.print("~ timed in separate runs: --attn-type with several methods times them turn by turn")
    for row in rows:
        if row.result.status != Status.OK and row.result.message:
            where = row.result.point.path(Path())
            console.print(f"{where}: {row.result.message}", style="dim", markup=False, soft_wrap=True)


_FIGURES: dict[str, Callable[[PrefillRow], str]] = {
    "ms": lambda row: _outcome(row.result),
    "spread": lambda row: f"{row.result.spread:.1%}{_flag(row.result)}" if row.result.spread is not None else MISSING,
    "vs dense": lambda row: row.vs_dense.text if row.vs_dense else MISSING,
    "density": lambda row: format_number(row.result.density, ".1%"),
    "peak GiB": lambda row: (
        format_number(max(row.result.peak_bytes) / 2**30, ".2f") if row.result.peak_bytes else MISSING
    ),
}


def _print_setting(rows: Sequence[PrefillRow], console: "Console") -> None:
    from rich import box  # here: rich.table takes longer to import than the rest of this module
    from rich.table import Table

    methods = sorted({row.result.prefill for row in rows}, key=method_order)
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for method in methods:
        table.add_column(method.replace(":", "\n"), justify="right", overflow="fold")
    for num_tokens, group in groupby(rows, key=lambda row: row.result.point.num_tokens):
        by_method = {row.result.prefill: row for row in group}
        where = f"{num_tokens:,}"
        for name, figure in _FIGURES.items():
            values = [figure(by_method[method]) if method in by_method else MISSING for method in methods]
            if set(values) != {MISSING}:
                table.add_row(where, name, *values)
                where = ""
        table.add_section()
    console.print(table)


def _outcome(result: PrefillResult) -> str:
    return str(result.status).replace("_", " ") if result.times is None else f"{result.times.median:,.1f}"


def _flag(result: PrefillResult) -> str:
    return " !" if result.high_spread else ""


# ---- CSV

_RESULT_COLUMNS = (
    "sweep model_digest load_format prefill attention status prompt prompt_digest seed predicted_bytes first_token "
    "density run message"
).split()
_ENVIRONMENT_COLUMNS = "device device_name dtype world_size num_threads git_revision".split()
_COLUMNS = (
    "name", "num_tokens", "model", "first_token_ms", "spread", "vs_dense", "vs_dense_spread", "vs_dense_same_run",
    "least_density", "most_density", "density_by_layer", "num_iters", "num_warmup", "peak_bytes",
    *_RESULT_COLUMNS, *_ENVIRONMENT_COLUMNS, "torch",
)  # fmt: skip


def write_prefill_csv(rows: Sequence[PrefillRow], path: Path) -> None:
    """Writes one line a result; times are medians in ms, densities those of layers, in ``density_by_layer`` all of them
    with spaces between, in ``density`` their mean."""
    write_table(path, _COLUMNS, [_csv_values(row) for row in rows])


def _csv_values(row: PrefillRow) -> dict[str, object]:
    result, environment, ratio = row.result, row.result.environment, row.vs_dense
    return {
        "name": result.point.name,
        "num_tokens": result.point.num_tokens,
        "model": result.model_name,
        "first_token_ms": result.times and result.times.median,
        "spread": result.spread,
        "vs_dense": ratio and ratio.value,
        "vs_dense_spread": ratio and ratio.spread,
        "vs_dense_same_run": ratio and ratio.same_run,
        "least_density": min(result.density_by_layer, default=None),
        "most_density": max(result.density_by_layer, default=None),
        "density_by_layer": " ".join(f"{density:.6g}" for density in result.density_by_layer),
        "num_iters": len(result.first_token_ms),
        "num_warmup": len(result.first_token_warmup_ms),
        "peak_bytes": max(result.peak_bytes, default=None),
        **{name: getattr(result, name) for name in _RESULT_COLUMNS},
        **{name: environment.get(name) for name in _ENVIRONMENT_COLUMNS},
        "torch": (environment.get("versions") or {}).get("torch"),
    }


# ---- plot


def plot_prefill(rows: Sequence[PrefillRow], path: Path) -> bool:
    """Writes a PNG of the time to the first token against context length; False where no result has times.

    Raises InputError when matplotlib is not installed.
    """
    timed = [row for row in rows if row.result.times is not None]
    if not timed:
        return False
    require_matplotlib()
    from engine.bench.prefill.prefill_plot import draw_prefill  # here: matplotlib takes half a second to import

    panels = [[row.result for row in members] for members in prefill_settings(timed)]
    write_whole(path, draw_prefill(panels))
    return True
