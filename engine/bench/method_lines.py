"""How plots of times against a number of tokens draw prefill methods: a line for each, on log axes."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from engine.prefill import method_order

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


def method_styles(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and dashes of each, in order; those of one name differ in their dashes."""
    drawn: dict[str, int] = {}
    styles = {}
    for method in sorted(set(methods), key=method_order):
        name = method.partition(":")[0]
        styles[method] = (_COLORS.get(name, _OTHER_COLOR), _DASHES[drawn.get(name, 0) % len(_DASHES)])
        drawn[name] = drawn.get(name, 0) + 1
    return styles


def style_times(axes: Axes, lengths: Sequence[int], xlabel: str, ylabel: str) -> None:
    """``lengths`` rise; they are the ticks, unless they are too many."""
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
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
