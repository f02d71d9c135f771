"""Draws questions about a document: the time that each takes against their number, and accuracy by depth."""

import io
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from engine.bench.needles.document import NUM_DEPTHS
from engine.bench.needles.needle_report import needle_title, setting_of
from engine.bench.needles.needle_results import NeedlesResult
from engine.bench.needles.passkey_plot import SHARES

# A fixed colour a method, so that two reports can be laid side by side; the colour-blind can tell them apart.
_COLORS = {"hydragen": "#0072B2", "auto": "#117733", "hydragen_noshared": "#D55E00", "noattention": "#444444"}
_OTHER_COLOR = "#8A6D00"
_DASHES = ("-", "--", ":", "-.")


def draw_needles(results: Sequence[NeedlesResult]) -> bytes:
    """The plot as a PNG, one row of two panels a setting. ``results`` have times and are ordered by setting."""
    settings = [list(group) for _, group in groupby(results, key=setting_of)]
    # A bare Figure draws through Agg: no display is needed, and no pyplot state is left behind.
    figure = Figure(figsize=(12.5, 4.6 * len(settings)), dpi=130, layout="constrained")
    for part, group in zip(figure.subfigures(len(settings), squeeze=False)[:, 0], settings, strict=True):
        _draw_setting(part, group)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def _draw_setting(part: SubFigure, results: Sequence[NeedlesResult]) -> None:
    part.suptitle(needle_title(results[0]), fontsize=10, wrap=True)
    left, right = part.subplots(1, 2)
    by_name = {
        name: sorted(group, key=lambda result: result.questions)
        for name, group in groupby(sorted(results, key=_name), key=_name)
    }
    _draw_times(left, by_name)
    _draw_depths(right, [runs[-1] for runs in by_name.values()])


def _name(result: NeedlesResult) -> str:
    return result.questions.name


def _draw_times(axes: Axes, by_name: dict[str, list[NeedlesResult]]) -> None:
    """Median and, shaded, the 20th to the 80th percentile, over the number of questions."""
    drawn: dict[str, int] = {}
    for name, runs in by_name.items():
        method = runs[0].attention
        color, dashes = _COLORS.get(method, _OTHER_COLOR), _DASHES[drawn.get(method, 0) % len(_DASHES)]
        drawn[method] = drawn.get(method, 0) + 1
        counts = [run.questions.num_questions for run in runs]
        axes.plot(counts, [run.ms_per_question for run in runs], dashes, color=color, marker="o", ms=3.5, label=name)
        low, high = ([getattr(run.answer, p) / n for run, n in zip(runs, counts)] for p in ("p20", "p80"))
        axes.fill_between(counts, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("questions about one document")
    axes.set_ylabel("ms a question: read and answered")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _draw_depths(axes: Axes, runs: Sequence[NeedlesResult]) -> None:
    """A line of cells a run, for the most questions that it has."""
    shares = np.array([[np.nan if one.share is None else one.share for one in run.accuracy_by_depth] for run in runs])
    image = axes.imshow(shares, cmap=SHARES, vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, "-" if np.isnan(share) else f"{share:.0%}", ha="center", va="center", fontsize=7.5)
    labels = [f"{_name(run)}\n{run.questions.num_questions} questions\n{run.accuracy.text}" for run in runs]
    axes.set_yticks(range(len(runs)), labels, fontsize=8)
    axes.set_xticks(np.arange(NUM_DEPTHS + 1) - 0.5, [f"{100 * i // NUM_DEPTHS}%" for i in range(NUM_DEPTHS + 1)], fontsize=8)
    axes.set_xlabel("where in the document the needle is")
    axes.figure.colorbar(image, ax=axes, label="right answers", format=lambda share, _: f"{share:.0%}")
