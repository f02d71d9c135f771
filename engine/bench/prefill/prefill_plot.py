"""Draws the time to the first token against context length, both on log axes, one line a prefill method."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from engine.bench.method_lines import method_styles, style_times
from engine.bench.png import new_figure, to_png
from engine.bench.prefill.prefill_report import prefill_title
from engine.bench.prefill.prefill_results import PrefillResult


def draw_prefill(panels: Sequence[Sequence[PrefillResult]]) -> bytes:
    """The plot as a PNG, a panel for each setting. Each of its results has times."""
    figure = new_figure(8.5, 5.2 * len(panels))
    for axes, results in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _draw_panel(axes, results)
    return to_png(figure)


def _draw_panel(axes: Axes, results: Sequence[PrefillResult]) -> None:
    """Median and, shaded, the 20th to the 80th percentile."""
    for method, (color, dashes) in method_styles(result.prefill for result in results).items():
        line = sorted((r for r in results if r.prefill == method), key=lambda result: result.point)
        xs = [result.point.num_tokens for result in line]
        axes.plot(xs, [r.times.median for r in line], dashes, color=color, marker="o", ms=3.5, label=method)
        low, high = [r.times.p20 for r in line], [r.times.p80 for r in line]
        axes.fill_between(xs, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_title(prefill_title(results[0]), fontsize=9, loc="left", wrap=True)
    lengths = sorted({result.point.num_tokens for result in results})
    style_times(axes, lengths, "context length (tokens)", "time to first token (ms)")
