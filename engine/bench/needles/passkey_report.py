"""What a passkey grid found: exact and partial matches by length and depth, and over all."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.needles.accuracy import NOTHING_ASKED, Accuracy
from engine.bench.needles.passkey_results import PasskeyResult
from engine.bench.report import MISSING, format_number, require_matplotlib, write_table
from engine.bench.result_files import Status
from engine.files import write_whole
from engine.prefill import DENSE

if TYPE_CHECKING:
    from rich.console import Console


def passkey_grids(results: Iterable[PasskeyResult]) -> list[list[PasskeyResult]]:
    """The lengths of each run, ascending: what one table and one heat map show."""
    ordered = sorted(results, key=lambda result: (_setting(result), result.length))
    return [list(group) for _, group in groupby(ordered, key=_setting)]


def passkey_title(grid: Sequence[PasskeyResult]) -> str:
    first, environment = grid[0], grid[0].environment
    ranks = environment.get("world_size", 1)
    source = f", from {first.sweep}" if first.sweep else ""
    return (
        f"{first.length.name}: passkeys of {first.num_digits} digits, {first.num_repeats} at each depth, in "
        f"{first.haystack}; {Path(first.model_name).name}, {environment.get('dtype')} on "
        f"{environment.get('device_name')}, {ranks} rank{'s' * (ranks != 1)}{_prefill_text(environment)}{source}"
    )


def _prefill_text(environment: dict[str, object]) -> str:
    """How prompts were read; nothing where all of attention was computed."""
    prefill = environment.get("prefill", DENSE)
    return "" if prefill == DENSE else f", prefill {prefill}"


def overall(grid: Sequence[PasskeyResult]) -> tuple[Accuracy, Accuracy]:
    """Exact and partial matches of all lengths together."""
    exact = sum((result.exact for result in grid), NOTHING_ASKED)
    return exact, sum((result.partial for result in grid), NOTHING_ASKED)


def overall_by_depth(grid: Sequence[PasskeyResult]) -> list[tuple[Accuracy, Accuracy]]:
    """Likewise, of each depth."""
    answered = [result for result in grid if result.status == Status.OK]
    num_asked = sum(result.num_repeats for result in answered)
    return [
        tuple(
            Accuracy(sum(getattr(result, name)[depth] for result in answered), num_asked)
            for name in ("exact_by_depth", "partial_by_depth")
        )
        for depth in range(grid[0].num_depths)
    ]


def span(grid: Sequence[PasskeyResult]) -> str:
    """The lengths in words, such as ``all 5 lengths, 512 to 4096 words``."""
    first, last = grid[0].length.num_words, grid[-1].length.num_words
    return f"all {len(grid)} lengths, {first} to {last} words" if len(grid) > 1 else f"{first} words"


def _setting(result: PasskeyResult) -> tuple[str, ...]:
    names = ("device_name", "dtype", "world_size", "prefill")
    environment = (str(result.environment.get(name, "unknown")) for name in names)
    sizes = (str(result.num_digits), str(result.num_repeats), str(tuple(result.depths)))
    return (
        result.sweep,
        result.model_name,
        result.model_digest,
        *environment,
        *sizes,
        result.haystack,
        result.haystack_digest,
        str(result.seed),
        result.length.name,
    )


# ---- table


def print_passkey_tables(results: Iterable[PasskeyResult], console: "Console") -> None:
    """A table of each run: a line a length and one for all, a column a depth with the share of exact matches."""
    for grid in passkey_grids(results):
        console.print(passkey_title(grid), style="bold", markup=False, soft_wrap=True)
        _print_grid(grid, console)
        exact, partial = overall(grid)
        console.print(
            f"{span(grid)}: exact {exact.text}, partial {format_number(partial.share, '.1%')}", highlight=False
        )
        for result in grid:
            if result.status != Status.OK and result.message:
                where = result.length.path(Path())
                console.print(f"{where}: {result.message}", style="dim", markup=False, soft_wrap=True)


def _print_grid(grid: Sequence[PasskeyResult], console: "Console") -> None:
    from rich import box  # here: rich.table takes longer to import than the rest of this module
    from rich.table import Table

    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    depths = [f"{depth:.0%}" for depth in grid[0].depths]
    for heading in ("words", "tokens", *depths, "exact (95% interval)", "partial", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in grid:
        if result.status == Status.OK:
            shares = [f"{count / result.num_repeats:.0%}" for count in result.exact_by_depth]
            outcome = (result.exact.text, format_number(result.partial.share, ".1%"), f"{result.total_ms / 1e3:.1f}")
        else:
            shares = [MISSING] * len(depths)
            outcome = (str(result.status).replace("_", " "), MISSING, MISSING)
        table.add_row(str(result.length.num_words), str(result.num_tokens), *shares, *outcome)
    if len(grid) > 1:
        exact, partial = overall(grid)
        shares = [format_number(one.share, ".0%") for one, _ in overall_by_depth(grid)]
        table.add_section()
        table.add_row("all", "", *shares, exact.text, format_number(partial.share, ".1%"), "")
    console.print(table)


# ---- CSV

_COLUMNS = (
    "sweep name attention model model_digest num_words num_tokens depth num_repeats exact exact_low exact_high partial "
    "num_digits haystack haystack_digest seed status device device_name dtype world_size torch git_revision message"
).split()
_FROM_RESULT = "sweep attention model_digest num_tokens num_digits haystack haystack_digest seed".split()


def write_passkey_csv(results: Iterable[PasskeyResult], path: Path) -> None:
    """Writes a line for each length and depth, one for each length (depth ``all``), and the same of all lengths of a
    run together (words ``all``)."""
    write_table(path, _COLUMNS, [line for grid in passkey_grids(results) for line in _grid_lines(grid)])


def _grid_lines(grid: Sequence[PasskeyResult]) -> Iterator[dict[str, object]]:
    for result in grid:
        for depth, exact, partial in zip(result.depths, result.exact_by_depth, result.partial_by_depth, strict=False):
            repeats = result.num_repeats
            yield _line(result, depth, Accuracy(exact, repeats), Accuracy(partial, repeats))
        yield _line(result, "all", result.exact, result.partial)
    of_all = {"num_words": "all", "num_tokens": None, "status": None, "message": None}
    for depth, (exact, partial) in zip(grid[0].depths, overall_by_depth(grid), strict=True):
        yield _line(grid[0], depth, exact, partial) | of_all
    yield _line(grid[0], "all", *overall(grid)) | of_all


def _line(result: PasskeyResult, depth: float | str, exact: Accuracy, partial: Accuracy) -> dict[str, object]:
    environment = result.environment
    low, high = exact.interval if exact.num_asked else (None, None)
    return {
        **{name: getattr(result, name) for name in _FROM_RESULT},
        **{name: environment.get(name) for name in ("device", "device_name", "dtype", "world_size", "git_revision")},
        "name": result.length.name,
        "model": result.model_name,
        "num_words": result.length.num_words,
        "depth": depth,
        "num_repeats": exact.num_asked,
        "exact": exact.share,
        "exact_low": low,
        "exact_high": high,
        "partial": partial.share,
        "status": str(result.status),
        "torch": (environment.get("versions") or {}).get("torch"),
        "message": result.message,
    }


# ---- plot


def plot_passkeys(results: Sequence[PasskeyResult], path: Path) -> bool:
    """Writes a PNG with a heat map of depth against length for each run; False where no result has answers.

    Raises InputError when matplotlib is not installed.
    """
    grids = passkey_grids(result for result in results if result.status == Status.OK)
    if not grids:
        return False
    require_matplotlib()
    from engine.bench.needles.passkey_plot import draw_passkeys  # here: matplotlib takes half a second to import

    write_whole(path, draw_passkeys(grids))
    return True
