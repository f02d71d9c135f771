"""Draws a sweep: throughput against batch size and against prefix length, both on log axes, one line a mode."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from engine.bench.png import new_figure, to_png
from engine.bench.results import CellResult
from engine.bench.timing import HIGH_SPREAD

# A fixed colour a mode, so that two reports can be laid side by side; the colour-blind can tell them apart.
_COLORS = {
    "hydragen": "#0072B2",
    "auto": "#117733",
    "hydragen_noshared": "#D55E00",
    "hf": "#009E73",
    "hf_static": "#56B4E9",
    "vllm": "#CC79A7",
    "vllm_notok": "#8C5B9F",
    "noattention": "#444444",
}
_OTHER_COLOR = "#8A6D00"
_NAMES = {"batch_size": "batch size (sequences)", "num_shared": "shared prefix (tokens)"}
_LABEL_HEIGHT = 12.0  # points between the baselines of two labels


@dataclass(frozen=True)
class Comparison:
    """Cells that belong on one pair of axes: of one sweep, model, device, dtype and unique length."""

    title: str
    sweep: str
    results: Sequence[CellResult]


def draw(comparisons: Sequence[Comparison]) -> bytes:
    """The plot as a PNG, one row of two panels a comparison; one in which no cell has a throughput is left out."""
    comparisons = [c for c in comparisons if any(r.tokens_per_second is not None for r in c.results)]
    figure = new_figure(12, 4.8 * max(1, len(comparisons)))
    panels = []
    if comparisons:
        for part, comparison in zip(figure.subfigures(len(comparisons), squeeze=False)[:, 0], comparisons, strict=True):
            panels += _draw_comparison(part, comparison)
    else:
        figure.text(0.5, 0.5, "no cell has a decode throughput", ha="center", color="#666666")
    figure.draw_without_rendering()  # settles the height of the axes, which the labels' positions need
    for axes, labels in panels:
        _label_lines(axes, labels)
    return to_png(figure)


_Labels = list[tuple[str, str, float]]
"""``(text, colour, y)`` of each line, to be written at its right."""


def _draw_comparison(part: SubFigure, comparison: Comparison) -> list[tuple[Axes, _Labels]]:
    part.suptitle(comparison.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    measured = [result for result in comparison.results if result.tokens_per_second is not None]
    left, right = part.subplots(1, 2, sharey=True)
    panels = [
        (left, _draw_panel(left, measured, "batch_size", "num_shared")),
        (right, _draw_panel(right, measured, "num_shared", "batch_size")),
    ]
    left.set_ylabel("decode throughput (tokens/s)")
    speeds = [result.tokens_per_second for result in measured]
    left.set_ylim(min(speeds) / 1.7, max(speeds) * 1.7)  # room for at least one of the ticks 1, 2, 5
    notes = [f"from {comparison.sweep}"] if comparison.sweep else []
    modes = [[r for r in measured if r.cell.mode == mode] for mode in {r.cell.mode for r in measured}]
    if any(len(_values(results, name)) > 1 for results in modes for name in _NAMES):
        notes.append("faint: the other values of what a panel holds fixed")
    if any(result.high_spread for result in measured):
        notes.append(f"hollow: times vary by more than {HIGH_SPREAD:.0%}")
    part.supxlabel(" · ".join(notes), x=0.01, ha="left", fontsize=8.5, color="#666666")
    return panels


def _draw_panel(axes: Axes, results: list[CellResult], x: str, fixed: str) -> _Labels:
    """One panel: speed against ``x`` at the value of ``fixed`` that shows the most modes, at other values faint."""
    reference = _best_shown([r for r in results if r.cell.mode != "noattention"] or results, fixed, x)
    labels: _Labels = []
    for mode in dict.fromkeys([*_COLORS, *sorted(r.cell.mode for r in results)]):
        mine = [r for r in results if r.cell.mode == mode]
        if not mine:
            continue
        color = _COLORS.get(mode, _OTHER_COLOR)
        if mode == "noattention":
            labels.append(("noattention\n(ceiling)", color, _draw_ceiling(axes, mine, x, reference)))
            continue
        chosen = reference if reference in _values(mine, fixed) else _best_shown(mine, fixed, x)
        for value in _values(mine, fixed):
            line = sorted((r for r in mine if getattr(r.cell, fixed) == value), key=lambda r: getattr(r.cell, x))
            _draw_line(axes, line, x, color, faint=value != chosen)
            if value == chosen:
                suffix = "" if chosen == reference else f"\n({_short(fixed)} {chosen})"
                labels.append((mode + suffix, color, line[-1].tokens_per_second))
    axes.set_title(f"{_short(fixed)} {reference:,}", loc="left", fontsize=10.5)
    _style(axes, _values(results, x), _NAMES[x])
    return labels


def _draw_line(axes: Axes, line: list[CellResult], x: str, color: str, faint: bool) -> None:
    xs = [getattr(r.cell, x) for r in line]
    ys = [r.tokens_per_second for r in line]
    if faint:
        axes.plot(xs, ys, color=color, alpha=0.22, linewidth=1, marker=".", markersize=3)
        return
    axes.plot(xs, ys, color=color, linewidth=2, zorder=3)
    faces = ["white" if r.high_spread else color for r in line]
    axes.scatter(xs, ys, s=26, c=faces, edgecolors=color, linewidths=1.5, zorder=4)


def _draw_ceiling(axes: Axes, results: list[CellResult], x: str, reference: int) -> float:
    """The throughput without attention, dashed, and its height at the right.

    It does not depend on the shared length, so cells of any stand for all of them.
    """
    style = {"color": _COLORS["noattention"], "linestyle": (0, (5, 3)), "zorder": 2}
    batches = _values(results, "batch_size")
    heights = {b: median(r.tokens_per_second for r in results if r.cell.batch_size == b) for b in batches}
    if x == "batch_size":
        axes.plot(batches, list(heights.values()), linewidth=1.6, marker="o" if len(batches) == 1 else None, **style)
        return heights[batches[-1]]
    chosen = reference if reference in heights else batches[-1]
    for batch, height in heights.items():
        axes.axhline(height, **style, **({"linewidth": 1.6} if batch == chosen else {"linewidth": 1, "alpha": 0.22}))
    return heights[chosen]


def _style(axes: Axes, xs: list[int], name: str) -> None:
    axes.set_yscale("log")
    # A prefix of 0 tokens has no place on a log axis: symlog is linear below the first length that is not 0.
    if xs[0] > 0:
        axes.set_xscale("log", base=2)
    else:
        axes.set_xscale("symlog", base=2, linthresh=max(1, next((x for x in xs if x), 1)))
    if len(xs) == 1:
        axes.set_xlim(xs[0] / 2, max(1, xs[0] * 2))
    if len(xs) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_minor_locator(NullLocator())
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_lines(axes: Axes, labels: _Labels) -> None:
    """Writes each line's name at the right of the axes, level with its end, moved up where two would touch."""
    points_per_pixel = 72 / axes.figure.get_figure(root=True).dpi
    free = float("-inf")
    for text, color, y in sorted(labels, key=lambda label: label[2]):
        at = axes.transData.transform((1, y))[1] * points_per_pixel
        height = _LABEL_HEIGHT * (1 + text.count("\n"))
        center = max(at, free + height / 2)
        free = center + height / 2
        axes.annotate(
            text,
            xy=(1, y), xycoords=("axes fraction", "data"), xytext=(6, center - at), textcoords="offset points",
            color=color, fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip


def _values(results: Sequence[CellResult], name: str) -> list[int]:
    return sorted({getattr(result.cell, name) for result in results})


def _best_shown(results: Sequence[CellResult], name: str, x: str) -> int:
    """The largest value of ``name`` at which the most modes have a line over ``x``; failing that, a point."""

    def num_modes(value: int, length: int) -> int:
        points = Counter(r.cell.mode for r in results if getattr(r.cell, name) == value)
        return sum(count >= length for count in points.values())

    return max(_values(results, name), key=lambda value: (num_modes(value, 2), num_modes(value, 1), value))


def _short(name: str) -> str:
    return {"batch_size": "at batch size", "num_shared": "at shared prefix"}[name]
