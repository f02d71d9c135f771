"""Draws the time to the first token against context length, both on log axes, one line a prefill method."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from engine.bench.png import new_figure, to_png
from engine.bench.prefill.prefill_report import method_order, prefill_title
from engine.bench.prefill.prefill_results import PrefillResult

# A fixed colour a method, so that two reports can be laid side by side; the colour-blind can tell them apart.
_COLORS = {
    "dense": "#444444",
    "a_shape": "#0072B2",
    "tri_shape": "#56B4E9",
    "vertical_slash": "#D55E00",
    "block_sparse": "#009E73",
    "minference": "#CC79A7",
}
_OTHER_COLOR = "#8A6D00"
_DASHES = ("-", "--", ":", "-.")
_MOST_TICKS = 10


def draw_prefill(panels: Sequence[Sequence[PrefillResult]]) -> bytes:
    """The plot as a PNG, a panel for each setting. Each of its results has times."""
    figure = new_figure(8.5, 5.2 * len(panels))
    for axes, results in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _draw_panel(axes, results)
    return to_png(figure)


def _draw_panel(axes: Axes, results: Sequence[PrefillResult]) -> None:
    """Median and, shaded, the 20th to the 80th percentile."""
    drawn: dict[str, int] = {}
    for method in sorted({result.prefill for result in results}, key=method_order):
        line = sorted((r for r in results if r.prefill == method), key=lambda result: result.point)
        name = method.partition(":")[0]
        color, dashes = _COLORS.get(name, _OTHER_COLOR), _DASHES[drawn.get(name, 0) % len(_DASHES)]
        drawn[name] = drawn.get(name, 0) + 1
        xs = [result.point.num_tokens for result in line]
        axes.plot(xs, [r.times.median for r in line], dashes, color=color, marker="o", ms=3.5, label=method)
        low, high = [r.times.p20 for r in line], [r.times.p80 for r in line]
        axes.fill_between(xs, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_title(prefill_title(results[0]), fontsize=9, loc="left", wrap=True)
    _style(axes, sorted({result.point.num_tokens for result in results}))


def _style(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if len(lengths) == 1:
        axes.set_xlim(lengths[0] / 2, lengths[0] * 2)
    if len(lengths) <= _MOST_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("time to first token (ms)")
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
