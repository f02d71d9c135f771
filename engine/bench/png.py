"""A figure as the bytes of a PNG file."""

import io

from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """In inches. A bare Figure draws through Agg: no display is needed, and no pyplot state is left behind."""
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()
