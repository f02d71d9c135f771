"""Draws passkey grids: a heat map of depth against length for each run."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.bench.needles.passkey_report import overall, passkey_title
from engine.bench.needles.passkey_results import PasskeyResult

SHARES = "RdYlGn"  # of right answers: red, none, to green, all
_MAX_NUMBERED = 200  # cells that have their number in them


def draw_passkeys(grids: Sequence[Sequence[PasskeyResult]]) -> bytes:
    """The plot as a PNG, one panel a run, the beginning of the text at the top."""
    width = 3.2 + 0.62 * max(len(grid) for grid in grids)
    height = 1.6 + 0.42 * max(len(grid[0].depths) for grid in grids)
    # A bare Figure draws through Agg: no display is needed, and no pyplot state is left behind.
    figure = Figure(figsize=(max(width, 7.5), height * len(grids)), dpi=130, layout="constrained")
    for axes, grid in zip(figure.subplots(len(grids), squeeze=False)[:, 0], grids, strict=True):
        _draw_grid(axes, grid)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def _draw_grid(axes: Axes, grid: Sequence[PasskeyResult]) -> None:
    shares = np.array([[count / result.num_repeats for count in result.exact_by_depth] for result in grid]).T
    image = axes.imshow(shares, cmap=SHARES, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(
        range(len(grid)), [f"{result.length.num_words}\n({result.num_tokens})" for result in grid], fontsize=8
    )
    axes.set_yticks(range(len(grid[0].depths)), [f"{depth:.0%}" for depth in grid[0].depths], fontsize=8)
    axes.set_xlabel("words of text (tokens of the prompt)")
    axes.set_ylabel("depth of the passkey")
    if shares.size <= _MAX_NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color="#222222")
    exact, partial = overall(grid)
    name, _, rest = passkey_title(grid).partition(": ")
    axes.set_title(
        f"{name}: exact {exact.text}, partial {partial.share:.1%}\n{rest}", fontsize=9, loc="left", wrap=True
    )
    axes.figure.colorbar(image, ax=axes, label="exact matches", format=lambda share, _: f"{share:.0%}")
