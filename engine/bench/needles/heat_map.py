"""Heat maps of shares of right answers."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from engine.bench.needles.accuracy import Accuracy

_COLORS = "Blues"  # light where nothing is right, dark where all is: what fails stands out, to the colour-blind too
_DARK = 0.55  # shares above this are drawn too dark for black text
_NOTHING_ASKED = "#E8E8E8"
_MAX_NUMBERED = 400  # cells that have their number in them


def draw_shares(axes: Axes, cells: Sequence[Sequence[Accuracy]], label: str) -> None:
    """Rows of cells from the top, each with its percentage and of how many that is."""
    values = np.array([[np.nan if cell.share is None else cell.share for cell in row] for row in cells])
    image = axes.imshow(np.ma.masked_invalid(values), cmap=_COLORS, vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor(_NOTHING_ASKED)  # shows where a cell is masked
    num_rows, num_columns = values.shape
    axes.vlines(np.arange(1, num_columns) - 0.5, -0.5, num_rows - 0.5, color="white", linewidth=1.5)
    axes.hlines(np.arange(1, num_rows) - 0.5, -0.5, num_columns - 0.5, color="white", linewidth=1.5)
    axes.spines[:].set_visible(False)
    if values.size <= _MAX_NUMBERED:
        for (row, column), share in np.ndenumerate(values):
            text = "-" if np.isnan(share) else f"{share:.0%}\nof {cells[row][column].num_asked}"
            color = "white" if share > _DARK else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes.figure.colorbar(image, ax=axes, label=label, format=lambda share, _: f"{share:.0%}")
