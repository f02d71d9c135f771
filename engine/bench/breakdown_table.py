"""The table of a breakdown: each mode's step, and what it is held against."""

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from engine.bench.breakdown import HF_MODES, REPEATS, Breakdown, Point, Series
from engine.bench.timing import HIGH_SPREAD

_MISSING = "-"


def print_breakdown(breakdown: Breakdown, console: Console) -> None:
    """Prints it; a high spread is marked ``!``."""
    comparison, points = breakdown.comparison, breakdown.points
    table = Table(
        title=f"One decode step of {comparison.batch_size} sequences: {comparison.model.name}, "
        f"{breakdown.environment['dtype']} on {breakdown.environment['device_name']}",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
    )
    for heading in ("shared", "mode", "rounds", "ms", "spread", "least", "ratio", "spread", "least", ""):
        table.add_column(heading, justify="left" if heading in ("mode", "") else "right")
    shown: list[Series] = []
    for point in points:
        figures, least = point.figures(), point.least().figures()
        held_against, held_at_least = _held_against(point, figures), _held_against(point, least)
        for i, mode in enumerate(comparison.modes):
            step = figures.get(f"{mode}_ms")
            ratio, spec, what = held_against.get(mode, (None, "", ""))
            least_ratio = held_at_least.get(mode, (None, "", ""))[0]
            shown += [series for series in (step, ratio) if series is not None]
            table.add_row(
                "" if i else str(point.num_shared),  # a length's first row names it
                mode,
                str(len(step.values)) if step else _MISSING,
                _step(step),
                _spread(step),
                _step(least.get(f"{mode}_ms")),
                format(ratio.median, spec) if ratio else _MISSING,
                _spread(ratio),
                format(least_ratio.median, spec) if least_ratio else _MISSING,
                what,
            )
        table.add_section()
    console.print(table)
    if any(series.high_spread for series in shown):
        console.print(f"! rounds vary by more than {HIGH_SPREAD:.0%}: differences of that size may be noise")
    for point in points:
        for mode, failure in point.failures.items():
            console.print(f"shared {point.num_shared}, {mode}: {failure}", soft_wrap=True)
    for point in points:
        if prefill := _prefill(point):
            console.print(prefill, soft_wrap=True)
    against_aten = [
        f"{figures['prefix_aten_per_alone'].median:.1f} times as long at {point.num_shared}"
        for point in points
        if "prefix_aten_per_alone" in (figures := point.figures())
    ]
    if against_aten:
        console.print(f"PyTorch's kernel takes for prefix attention alone {', '.join(against_aten)}.", soft_wrap=True)
    console.print(
        f"All modes ran in one process with {breakdown.environment['num_threads']} threads, taking turns. Steps and "
        "ratios are medians of the rounds, ratios of times of the same round; beside them what the least times of all "
        "rounds come to.",
        soft_wrap=True,
    )
    console.print(
        f"Alone: warm, contiguous, best of {REPEATS} in each round, the best of them shown. What attention takes is "
        "timed within the steps; the differences of whole steps, which are noisier, are in the file, too.",
        soft_wrap=True,
    )
    if rates := [rate for point in points for rate in point.read_gbs]:
        console.print(
            f"The read limit, measured before and after each of the baseline's steps: {min(rates):.1f} to "
            f"{max(rates):.1f} GB/s.",
            soft_wrap=True,
        )


def _held_against(point: Point, figures: Mapping[str, Series]) -> dict[str, tuple[Series | None, str, str]]:
    """For each mode that is held against something the ratio, how that is printed, and what it says."""
    matmul_ms, prefix_ms = min(point.matmul_alone_ms), min(point.prefix_alone_ms)
    return {
        "noattention": (
            figures.get("noattention_per_matmul"),
            ".2f",
            f"x its matrix products alone, {matmul_ms:.1f} ms",
        ),
        "hydragen": (
            figures.get("added_per_prefix"),
            ".2f",
            f"x prefix attention alone, {prefix_ms:.1f} ms; attention takes {_median(figures, 'added_ms')} ms",
        ),
        "hydragen_noshared": (
            figures.get("noshared_per_read"),
            ".0%",
            f"of the read limit: keys and values at {_median(figures, 'noshared_gbs')} GB/s",
        ),
        **{mode: (figures.get(f"{mode}_per_hydragen"), ".1f", "x hydragen") for mode in HF_MODES},
    }


def _median(figures: Mapping[str, Series], name: str) -> str:
    return f"{figures[name].median:.1f}" if name in figures else _MISSING


def _step(step: Series | None) -> str:
    if step is None:
        return _MISSING
    return f"{step.median:.1f}" if step.median > 0 else "lost in noise"


def _spread(series: Series | None) -> str:
    if series is None or series.spread is None:
        return _MISSING
    return f"{series.spread:.1%}" + (" !" if series.high_spread else "")


def _prefill(point: Point) -> str | None:
    """What is said of computing the shared prompt."""
    figures = point.figures()
    if "hydragen_prefill_ms" not in figures:
        return None
    ours = figures["hydragen_prefill_ms"]
    text = f"Prefill of {point.num_shared} tokens: {ours.median:.0f} ms (spread {_spread(ours)})"
    if "hf_prefill_per_hydragen" not in figures:
        return text
    theirs = figures["hf_prefill_per_hydragen"]
    return f"{text}; transformers takes {theirs.median:.2f} times as long (spread {_spread(theirs)})"
