"""Draws passkey grids: a heat map of depth against length for each run."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from engine.bench.needles.accuracy import Accuracy
from engine.bench.needles.heat_map import draw_shares
from engine.bench.needles.passkey_report import overall, passkey_title, span
from engine.bench.needles.passkey_results import PasskeyResult
from engine.bench.png import new_figure, to_png


def draw_passkeys(grids: Sequence[Sequence[PasskeyResult]]) -> bytes:
    """The plot as a PNG, one panel a run, the beginning of the text at the top."""
    width = 3.2 + 0.62 * max(len(grid) for grid in grids)
    height = 1.6 + 0.42 * max(len(grid[0].depths) for grid in grids)
    figure = new_figure(max(width, 7.5), height * len(grids))
    for axes, grid in zip(figure.subplots(len(grids), squeeze=False)[:, 0], grids, strict=True):
        _draw_grid(axes, grid)
    return to_png(figure)


def _draw_grid(axes: Axes, grid: Sequence[PasskeyResult]) -> None:
    columns = [[Accuracy(count, result.num_repeats) for count in result.exact_by_depth] for result in grid]
    draw_shares(axes, list(zip(*columns, strict=True)), "exact matches")
    axes.set_xticks(
        range(len(grid)), [f"{result.length.num_words}\n({result.num_tokens})" for result in grid], fontsize=8
    )
    axes.set_yticks(range(len(grid[0].depths)), [f"{depth:.0%}" for depth in grid[0].depths], fontsize=8)
    axes.set_xlabel("words of text (tokens of the prompt)")
    axes.set_ylabel("depth of the passkey")
    exact, partial = overall(grid)
    name, _, rest = passkey_title(grid).partition(": ")
    axes.set_title(
        f"{name}, {span(grid)}: exact {exact.text}, partial {partial.share:.1%}\n{rest}",
        fontsize=9,
        loc="left",
        wrap=True,
    )
