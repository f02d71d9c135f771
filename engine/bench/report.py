"""What a sweep found: each cell beside its baselines: as a table, as CSV and as a plot."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from engine.bench.modes import HF_MODES
from engine.bench.results import CellResult, Status
from engine.bench.timing import HIGH_SPREAD
from engine.errors import InputError
from engine.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

_MODE_ORDER = ("noattention", "hydragen", "auto", "hydragen_noshared", "hf", "hf_static", "vllm", "vllm_notok")


@dataclass(frozen=True)
class Row:
    """One cell and its throughput over each baseline's at the same point; None where one of the two is missing."""

    result: CellResult
    vs_noattention: float | None
    vs_noshared: float | None  # hydragen_noshared
    vs_hf: float | None
    unfair_to_hf: tuple[int, int, str] | None = None  # this cell's and hf's numbers of threads or devices, if unequal

    @property
    def spread(self) -> float | None:
        """That of the result; None for a single time, which has none."""
        return self.result.spread if len(self.result.decode_ms) > 1 else None

    @property
    def prefill_ms(self) -> float | None:
        return median(self.result.prefill_ms) if self.result.prefill_ms else None


def build_rows(results: Iterable[CellResult]) -> list[Row]:
    """The rows of a report, ordered by setting, unique length, shared length, batch size and mode.

    A baseline is a cell of the same sweep, model, device and dtype, at the same batch size and lengths. ``noattention``
    does not depend on the shared length, so any one with the same batch size and unique length serves where that of
    the same shared length was not run. The engine's own baselines must have run on as many ranks; ``hf`` need not: it
    runs in one process. But it must have had as many threads as all ranks together, or devices, or there is no ratio.
    """
    results = sorted(results, key=_order)
    by_point: dict[tuple[object, ...], float] = {}
    hf_sizes: dict[tuple[object, ...], tuple[int, str] | None] = {}
    ceilings: dict[tuple[object, ...], float] = {}
    for result in results:
        if result.tokens_per_second is not None:
            by_point[_point(result, result.cell.mode)] = result.tokens_per_second
            if result.cell.mode == "hf":
                hf_sizes[_point(result, "hf")] = _size(result)
            if result.cell.mode == "noattention":
                ceilings.setdefault(_ceiling_point(result), result.tokens_per_second)

    def against(result: CellResult, baseline: float | None) -> float | None:
        speed = result.tokens_per_second
        return None if speed is None or baseline is None else speed / baseline

    def unfair(result: CellResult) -> tuple[int, int, str] | None:
        ours, theirs = _size(result), hf_sizes.get(_point(result, "hf"))
        if ours is None or theirs is None or ours == theirs or result.cell.mode.startswith("vllm"):
            return None
        return ours[0], theirs[0], ours[1]

    return [
        Row(
            result,
            vs_noattention=against(
                result, by_point.get(_point(result, "noattention"), ceilings.get(_ceiling_point(result)))
            ),
            vs_noshared=against(result, by_point.get(_point(result, "hydragen_noshared"))),
            vs_hf=None if unfair(result) else against(result, by_point.get(_point(result, "hf"))),
            unfair_to_hf=unfair(result),
        )
        for result in results
    ]


def _setting(result: CellResult) -> tuple[str, str, str, str]:
    """What results that are compared have in common: sweep, model, device and dtype."""
    device_name, dtype = (str(result.environment.get(name, "unknown")) for name in ("device_name", "dtype"))
    return result.sweep, result.model_name, device_name, dtype


def _comparisons(rows: Iterable[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """``(title, sweep, rows)`` of each setting and unique length: what one table and one pair of panels show."""

    def key(row: Row) -> tuple[str, str, str, str, int]:
        return (*_setting(row.result), row.result.cell.num_unique)

    for (sweep, model, device_name, dtype, num_unique), group in groupby(rows, key=key):
        members = list(group)
        ranks = sorted({_num_ranks(row.result) for row in members})
        ranks_text = "1 rank" if ranks == [1] else f"{' or '.join(map(str, ranks))} ranks"
        title = f"{model}, {num_unique} new token{'s' * (num_unique != 1)}, {dtype} on {device_name}, {ranks_text}"
        yield title, sweep, members


def _num_ranks(result: CellResult) -> int:
    world_size = result.environment.get("world_size")
    return world_size if isinstance(world_size, int) else 1


def _size(result: CellResult) -> tuple[int, str] | None:
    """What the result ran on, all ranks together: threads of a CPU, or devices. None where that is unknown."""
    device, threads = (result.environment.get(name) for name in ("device", "num_threads"))
    if device != "cpu":
        return None if device is None else (_num_ranks(result), "device")
    return (threads * _num_ranks(result), "thread") if isinstance(threads, int) else None


def _point(result: CellResult, mode: str) -> tuple[object, ...]:
    """Where the cell of ``mode`` that compares with ``result`` is found."""
    cell = result.cell
    ranks = None if mode in HF_MODES else _num_ranks(result)
    return (_setting(result), mode, ranks, cell.batch_size, cell.num_shared, cell.num_unique)


def _ceiling_point(result: CellResult) -> tuple[object, ...]:
    return (_setting(result), _num_ranks(result), result.cell.batch_size, result.cell.num_unique)


def _order(result: CellResult) -> tuple[object, ...]:
    cell = result.cell
    mode = (_MODE_ORDER.index(cell.mode) if cell.mode in _MODE_ORDER else len(_MODE_ORDER), cell.mode)
    return (_setting(result), cell.num_unique, cell.num_shared, cell.batch_size, mode, _num_ranks(result))


# ---- table


def print_table(rows: Sequence[Row], console: "Console") -> None:
    """Prints one table a setting and unique length, without columns that no row has; a high spread is marked ``!``."""
    for title, sweep, members in _comparisons(rows):
        _print_comparison(f"{title}, from {sweep}" if sweep else title, members, console)
    if any(row.result.high_spread for row in rows):
        console.print(f"! times vary by more than {HIGH_SPREAD:.0%}: differences of that size may be noise")
    for ours, theirs, what in sorted({row.unfair_to_hf for row in rows if row.unfair_to_hf}):
        fewer = f"it ran with {theirs} {what}(s) and the mode with {ours} in all"
        console.print(f"no ratio to hf where {fewer}: equal them")
    for row in rows:
        if row.result.status != Status.OK and row.result.message:
            where = row.result.cell.path(Path())
            console.print(f"{where}: {row.result.message}", style="dim", markup=False, highlight=False)


def _print_comparison(title: str, rows: list[Row], console: "Console") -> None:
    from rich import box  # here: rich.table takes longer to import than the rest of this module
    from rich.table import Table
    from rich.text import Text

    columns = {
        "ranks": [str(_num_ranks(row.result)) for row in rows],
        "tokens/s": [_throughput(row.result) for row in rows],
        "vs\nnoattn": [format_number(row.vs_noattention, ".2f") for row in rows],
        "vs\nnoshared": [format_number(row.vs_noshared, ".2f") for row in rows],
        "vs\nhf": [format_number(row.vs_hf, ".2f") for row in rows],
        "spread": [format_number(row.spread, ".1%") + (" !" if row.result.high_spread else "") for row in rows],
        "prefill\nms": [format_number(row.prefill_ms, ",.1f") for row in rows],
        "roof-\nline": [format_number(row.result.roofline_fraction, ".0%") for row in rows],
        "choice": [row.result.choice or MISSING for row in rows],
    }
    columns = {heading: values for heading, values in columns.items() if set(values) != {MISSING}}
    if len({_num_ranks(row.result) for row in rows if row.result.cell.mode not in HF_MODES}) <= 1:
        del columns["ranks"]  # the title says it

    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=box.HORIZONTALS, padding=0)
    for heading in ("shared", "batch", "mode", *columns):
        table.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=True, overflow="fold")
    previous = None
    for i, row in enumerate(rows):
        cell = row.result.cell
        point = (f"{cell.num_shared}", f"{cell.batch_size}")
        if previous not in (None, point):
            table.add_section()
        # A point's first row names it; the rows below it are read against each other.
        where = ("", "") if point == previous else point
        table.add_row(*where, Text(cell.mode), *(values[i] for values in columns.values()))
        previous = point
    console.print(table)


MISSING = "-"


def _throughput(result: CellResult) -> str:
    if result.status != Status.OK:
        return str(result.status).replace("_", " ")
    if result.cell.num_unique < 2:
        return "one token"  # decode throughput starts with the second
    if result.tokens_per_second is None:
        return "lost in noise"
    return format_number(result.tokens_per_second, ",.0f" if result.tokens_per_second >= 100 else ".1f")


def format_number(value: float | None, spec: str) -> str:
    return MISSING if value is None else format(value, spec)


# ---- CSV

_COLUMNS = (
    "sweep model mode batch_size num_shared num_unique status tokens_per_second vs_noattention vs_noshared vs_hf "
    "spread decode_step_ms decode_ms first_token_ms prefill_ms roofline_ms roofline_fraction achieved_gbs "
    "achieved_tflops choice predicted_bytes peak_bytes num_iters num_warmup seed device device_name dtype ranks "
    "num_threads torch git_revision message"
).split()


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes one line a cell with everything that the table shows and what the file holds; times are medians, in ms.

    Bytes are those of the rank that needs most. A value that is missing is an empty field.
    """
    write_table(path, _COLUMNS, [_csv_values(row) for row in rows])


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, object]]) -> None:
    """Writes a CSV; numbers that are no integers with six digits."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for values in rows:
        writer.writerow({name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in values.items()})
    write_whole(path, buffer.getvalue().encode())


def _csv_values(row: Row) -> dict[str, object]:
    result, environment = row.result, row.result.environment
    return {
        **{name: getattr(result.cell, name) for name in ("mode", "batch_size", "num_shared", "num_unique")},
        **{name: getattr(row, name) for name in ("vs_noattention", "vs_noshared", "vs_hf", "spread", "prefill_ms")},
        **{name: environment.get(name) for name in ("device", "device_name", "dtype", "num_threads", "git_revision")},
        **{
            name: getattr(result, name)
            for name in (
                "sweep", "tokens_per_second", "decode_step_ms", "roofline_ms", "roofline_fraction",
                "achieved_gbs", "achieved_tflops", "choice", "num_iters", "num_warmup", "seed", "message",
            )
        },
        "model": result.model_name,
        "status": str(result.status),
        "decode_ms": median(result.decode_ms) if result.decode_ms else None,
        "first_token_ms": median(result.first_token_ms) if result.first_token_ms else None,
        "predicted_bytes": max(result.predicted_bytes, default=None),
        "peak_bytes": max(result.peak_bytes, default=None),
        "ranks": _num_ranks(result),
        "torch": (environment.get("versions") or {}).get("torch"),
    }  # fmt: skip


# ---- plot


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Writes a PNG of throughput against batch size and against prefix length, one line a mode; always True.

    Each setting and unique length has its own pair of panels. Raises InputError when matplotlib is not installed.
    """
    require_matplotlib()
    from engine.bench.plot import Comparison, draw  # here: matplotlib takes half a second to import

    comparisons = [
        Comparison(title, sweep, [row.result for row in members]) for title, sweep, members in _comparisons(rows)
    ]
    write_whole(path, draw(comparisons))
    return True


def require_matplotlib() -> None:
    """Raises InputError when it is not installed."""
    if not find_spec("matplotlib"):
        raise InputError(
            "plotting needs matplotlib, which is not installed; run in the repository's root: "
            'pip install -e ".[plots]"'
        )
