"""Draws a microbenchmark as the Hydragen paper's figures 5 and 8: time, and speed-up over the baseline, against the
number of unique keys; or of shared ones, where the unique ones do not vary."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, SymmetricalLogLocator

from engine.bench.micro.micro_report import MicroRow, setting_of
from engine.bench.png import new_figure, to_png
from engine.bench.timing import HIGH_SPREAD, summarize

# A fixed colour a mode, so that two reports can be laid side by side; the colour-blind can tell them apart.
_COLORS = {"base": "#D55E00", "hydragen": "#0072B2", "auto": "#009E73"}
_OTHER_COLOR = "#8A6D00"
# Of the lines of the speed-ups: more sequences and keys, darker.
_SHADES = colormaps["viridis"]
_COLUMNS = 3
_PANEL_SIZE = (4.3, 3.4)  # inches


@dataclass(frozen=True)
class _Axis:
    """Which number of keys is drawn against, and which one, beside the batch size, has panels."""

    keys: str  # field of Sizes
    other: str
    name: str

    @classmethod
    def of(cls, group: Sequence[MicroRow]) -> "_Axis":
        unique, shared = cls("unique_seq_len", "num_shared", "unique"), cls("num_shared", "unique_seq_len", "shared")
        most = Counter((row.result.row.mode, *unique.panel(row)) for row in group)
        return shared if max(most.values()) == 1 < len({shared.x(row) for row in group}) else unique

    def x(self, row: MicroRow) -> int:
        return getattr(row.result.row, self.keys)

    def panel(self, row: MicroRow) -> tuple[int, int]:
        return row.result.row.batch_size, getattr(row.result.row, self.other)

    @property
    def other_name(self) -> str:
        return "shared" if self.name == "unique" else "unique"

    def panels(self, group: Sequence[MicroRow]) -> list[tuple[int, int]]:
        return sorted({self.panel(row) for row in group})

    def line(self, rows: Sequence[MicroRow]) -> list[MicroRow]:
        return sorted(rows, key=lambda row: (self.x(row), row.result.row.num_unique))


def draw_micro(rows: Sequence[MicroRow]) -> bytes:
    """The plot as a PNG. For each setting, heads and backend: a panel of times for each batch size and shared length
    (or unique one), and one of speed-ups for each mode that has any. All ``rows`` have times."""
    groups = [list(group) for _, group in groupby(sorted(rows, key=_group_key), key=_group_key)]
    num_rows = [-(-_num_panels(group) // _COLUMNS) for group in groups]
    width, height = _PANEL_SIZE
    figure = new_figure(width * _COLUMNS, height * sum(num_rows) + 0.7 * len(groups))
    parts = figure.subfigures(len(groups), squeeze=False, height_ratios=num_rows)[:, 0]
    for part, group in zip(parts, groups, strict=True):
        _draw_group(part, group)
    return to_png(figure)


def _group_key(row: MicroRow) -> tuple[object, ...]:
    one = row.result.row
    return (*setting_of(row.result), one.num_heads, one.num_kv_heads, one.head_dim, one.backend)


def _compared(group: Sequence[MicroRow]) -> list[str]:
    """The modes that have a speed-up."""
    found = {row.result.row.mode for row in group if row.vs_base is not None and row.result.row.mode != "base"}
    return [mode for mode in dict.fromkeys([*_COLORS, *sorted(found)]) if mode in found]


def _num_panels(group: Sequence[MicroRow]) -> int:
    return len(_Axis.of(group).panels(group)) + len(_compared(group))


def _draw_group(part: SubFigure, group: Sequence[MicroRow]) -> None:
    result = group[0].result
    sweep, device_name, dtype = setting_of(result)
    backend = f", by {result.row.backend}" if result.row.backend else ""
    title = f"Attention of one decode step, {result.row.heads} heads of {result.row.head_dim}, {dtype} on {device_name}"
    part.suptitle(f"{title}{backend}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    num_panels = _num_panels(group)
    grid = part.subplots(-(-num_panels // _COLUMNS), _COLUMNS, squeeze=False).flatten()
    for axes in grid[num_panels:]:
        axes.set_axis_off()
    panels, axis = iter(grid), _Axis.of(group)
    for panel in axis.panels(group):
        _draw_times(next(panels), axis, panel, [row for row in group if axis.panel(row) == panel])
    for mode in _compared(group):
        _draw_speedups(next(panels), axis, mode, [row for row in group if row.result.row.mode == mode])
    notes = [f"from {sweep}"] if sweep else []
    notes.append("line: median; band: 20th to 80th percentile; dashed: the roofline of the bytes and operations")
    if any(row.result.high_spread for row in group):
        notes.append(f"hollow: times vary by more than {HIGH_SPREAD:.0%}")
    part.supxlabel(" · ".join(notes), x=0.01, ha="left", fontsize=8.5, color="#666666")


def _draw_times(axes: Axes, axis: _Axis, panel: tuple[int, int], rows: Sequence[MicroRow]) -> None:
    modes = {row.result.row.mode for row in rows}
    heights: list[float] = []
    for mode in [mode for mode in dict.fromkeys([*_COLORS, *sorted(modes)]) if mode in modes]:
        line = axis.line([row for row in rows if row.result.row.mode == mode])
        color, xs = _COLORS.get(mode, _OTHER_COLOR), list(map(axis.x, line))
        spreads = [summarize(row.result.times_ms) for row in line]
        axes.fill_between(xs, [s.p20 for s in spreads], [s.p80 for s in spreads], color=color, alpha=0.18, linewidth=0)
        noisy = [row.result.high_spread for row in line]
        _draw_line(axes, xs, [s.median for s in spreads], noisy, color, mode)
        bounds = [(x, row.result.roofline_ms) for x, row in zip(xs, line, strict=True) if row.result.roofline_ms]
        if bounds:
            axes.plot(*zip(*bounds, strict=True), color=color, linestyle=(0, (4, 3)), linewidth=1.2, zorder=2)
        heights += [s.median for s in spreads] + [height for _, height in bounds]
    axes.set_title(f"batch {panel[0]:,}, {axis.other_name} {panel[1]:,}", loc="left", fontsize=10.5)
    axes.set_ylabel("time (ms)")
    _style(axes, axis, heights)  # a band may leave the panel: it is not to flatten the lines


def _draw_speedups(axes: Axes, axis: _Axis, mode: str, rows: Sequence[MicroRow]) -> None:
    rows = [row for row in rows if row.vs_base is not None]
    heights = [1.0]
    panels = axis.panels(rows)[::-1]
    for index, panel in enumerate(panels):
        line = axis.line([row for row in rows if axis.panel(row) == panel])
        xs, ys = list(map(axis.x, line)), [row.vs_base.value for row in line]
        noisy = [row.vs_base.high_spread for row in line]
        _draw_line(axes, xs, ys, noisy, _SHADES(0.9 * index / max(1, len(panels) - 1)), f"{panel[0]:,} × {panel[1]:,}")
        heights += ys
    axes.axhline(1, color="#444444", linewidth=1, linestyle=(0, (1, 2)))
    axes.set_title(f"{mode}: times as fast as base, batch × {axis.other_name}", loc="left", fontsize=10.5)
    axes.set_ylabel("speed-up over base")
    _style(axes, axis, heights)


def _draw_line(
    axes: Axes, xs: Sequence[int], ys: Sequence[float], noisy: Sequence[bool], color: str, label: str
) -> None:
    axes.plot(xs, ys, color=color, linewidth=1.8, zorder=3, label=label)
    faces = ["white" if one else color for one in noisy]
    axes.scatter(xs, ys, s=14, c=faces, edgecolors=[color] * len(xs), linewidths=1.2, zorder=4)


def _style(axes: Axes, axis: _Axis, heights: Sequence[float]) -> None:
    if axis.name == "shared":  # from a few keys to thousands; 0 has its place before 1
        axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
        named = [line for line in axes.lines if not line.get_label().startswith("_")]
        axes.set_xlim(left=min(line.get_xdata()[0] for line in named) * 0.8)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=4, linthresh=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("unique keys of a sequence" if axis.name == "unique" else "shared keys")
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(min(heights) / 1.7, max(heights) * 2)  # room for one of the ticks 1, 2, 5 at least, and the legend
    axes.legend(fontsize=8.5, frameon=False, loc="best")
