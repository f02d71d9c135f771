"""Draws questions about documents: the time that each takes against their number, and where answers are right."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from engine.bench.needles.document import NUM_DEPTHS
from engine.bench.needles.heat_map import draw_shares
from engine.bench.needles.needle_report import most_questions, needle_title, setting_of
from engine.bench.needles.needle_results import NeedlesResult
from engine.bench.png import new_figure, to_png
from engine.prefill import DENSE

# A fixed colour a method, so that two reports can be laid side by side; the colour-blind can tell them apart.
_COLORS = {"hydragen": "#0072B2", "auto": "#117733", "hydragen_noshared": "#D55E00", "noattention": "#444444"}
_OTHER_COLOR = "#8A6D00"
_DASHES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def draw_needles(results: Sequence[NeedlesResult]) -> bytes:
    """The plot as a PNG, one row of two panels a setting. ``results`` have times and are ordered by setting."""
    settings = [list(group) for _, group in groupby(results, key=setting_of)]
    heights = [max(4.6, 1.6 + 0.62 * len(most_questions(group))) for group in settings]
    width = 12.5 if all(result.prefill == DENSE for result in results) else 18.5
    figure = new_figure(width, sum(heights))
    parts = figure.subfigures(len(settings), squeeze=False, height_ratios=heights)[:, 0]
    for part, group in zip(parts, settings, strict=True):
        _draw_setting(part, group)
    return to_png(figure)


def _draw_setting(part: SubFigure, results: Sequence[NeedlesResult]) -> None:
    part.suptitle(needle_title(results[0]), fontsize=10, wrap=True)
    runs = most_questions(results)
    are_dense = all(run.prefill == DENSE for run in runs)
    panels = part.subplots(1, 2 if are_dense else 3)
    _draw_times(panels[0], results)
    _draw_depths(panels[1], runs)
    if not are_dense:
        _draw_densities(panels[2], runs)


def _line(result: NeedlesResult) -> tuple[str, int]:
    return (result.questions.name, result.num_document_tokens)


def _label(result: NeedlesResult) -> str:
    return f"{result.questions.name}, {result.num_document_tokens:,} tokens"


def _draw_times(axes: Axes, results: Sequence[NeedlesResult]) -> None:
    """Median and, shaded, the 20th to the 80th percentile, over the number of questions: a line a run and document."""
    drawn: dict[str, int] = {}
    for _, group in groupby(sorted(results, key=lambda result: (_line(result), result.questions)), key=_line):
        runs = list(group)
        method = runs[0].attention
        color, dashes = _COLORS.get(method, _OTHER_COLOR), _DASHES[drawn.get(method, 0) % len(_DASHES)]
        drawn[method] = drawn.get(method, 0) + 1
        counts = [run.questions.num_questions for run in runs]
        axes.plot(
            counts,
            [run.ms_per_question for run in runs],
            dashes,
            color=color,
            marker="o",
            ms=3.5,
            label=_label(runs[0]),
        )
        low, high = ([getattr(run.answer, p) / n for run, n in zip(runs, counts)] for p in ("p20", "p80"))
        axes.fill_between(counts, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("questions about one document")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.set_ylabel("ms a question: read and answered")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _pattern(run: NeedlesResult) -> tuple[str, str, int]:
    return run.prefill.partition(":")[0], run.attention, run.num_document_tokens


def _draw_densities(axes: Axes, runs: Sequence[NeedlesResult]) -> None:
    """The share of right answers, with its interval, against how much of attention was computed for it: a line a
    pattern, method and document."""
    shown = sorted((run for run in runs if run.mean_density is not None), key=_pattern)
    for number, (pattern, group) in enumerate(groupby(shown, key=_pattern)):
        members = sorted(group, key=lambda run: run.mean_density)
        shares = [run.accuracy.share for run in members]
        below, above = zip(*(run.accuracy.interval for run in members), strict=True)
        errors = [
            [max(0.0, share - low) for share, low in zip(shares, below, strict=True)],
            [max(0.0, high - share) for share, high in zip(shares, above, strict=True)],
        ]
        axes.errorbar(
            [run.mean_density for run in members],
            shares,
            yerr=errors,
            fmt=f"{_MARKS[number % len(_MARKS)]}-",
            ms=5,
            linewidth=1,
            capsize=2,
            label=f"{pattern[0]} ({pattern[1]}), {pattern[2]:,} tokens",
        )
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("fraction of attention's pairs that the prefill computed")
    axes.set_ylabel("right answers (95% interval)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.3g}" if share < 0.01 else f"{share:.0%}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def _draw_depths(axes: Axes, runs: Sequence[NeedlesResult]) -> None:
    """A heat map of depth against length: a line of cells a run and document, for the most questions about it."""
    draw_shares(axes, [run.accuracy_by_depth for run in runs], "right answers")
    labels = [f"{_label(run)}\n{run.questions.num_questions} questions: {run.accuracy.text}" for run in runs]
    axes.set_yticks(range(len(runs)), labels, fontsize=8)
    axes.set_xticks(
        np.arange(NUM_DEPTHS + 1) - 0.5, [f"{100 * i // NUM_DEPTHS}%" for i in range(NUM_DEPTHS + 1)], fontsize=8
    )
    axes.set_xlabel("where in the document the needle is")
