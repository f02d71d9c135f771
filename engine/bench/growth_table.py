"""The tables of a growth measurement: each step beside what is predicted for it."""

from collections.abc import Sequence
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table

from engine.bench.breakdown import Series
from engine.bench.growth import Groups, Growth, growth_factors
from engine.bench.timing import HIGH_SPREAD


def print_growth(growth: Growth, console: Console) -> None:
    """Prints a table for each axis and one for finished sequences; a high spread is marked ``!``."""
    for axis in growth.points:
        console.print(_axis_table(growth, axis))
    if growth.rounds:
        console.print(_finished_table(growth))
    if growth.message is not None:
        console.print(f"sequences that finish: {growth.message}", soft_wrap=True)
    console.print(
        "predicted: the least time of the step's bytes and operations by ceilings measured just before it; growth: to "
        "the row above; last over new: the last groups of a long call over those of a short one right after it; "
        f"! spread above {HIGH_SPREAD:.0%}: differences of that size may be noise",
        soft_wrap=True,
    )


def _axis_table(growth: Growth, axis: str) -> Table:
    plan, base = growth.plan, growth.plan.base
    others = ", ".join(f"{name} {getattr(base, name)}" for name in ("batch", "prefix", "depth") if name != axis)
    table = _table(f"Step time by {axis} ({others}): {plan.model.name}, {plan.attention}")
    for heading in (axis, "ms", "spread", "predicted", "ratio", "growth", "predicted"):
        table.add_column(heading, justify="right")
    points = growth.points[axis]
    for point, factors in zip(points, growth_factors(points, plan.num_unique), strict=True):
        step, size = point.step(plan.num_unique), str(getattr(point.work, axis))
        if step is None:
            table.add_row(size, "-", "", "", "", "", point.message)
            continue
        table.add_row(
            size,
            f"{step.median:.1f}",
            _spread(step.spread),
            f"{point.predicted_ms:.1f}",
            f"{step.median / point.predicted_ms:.2f}",
            *("", "") if factors is None else (f"{factors[0]:.2f}", f"{factors[1]:.2f}"),
        )
    return table


def _finished_table(growth: Growth) -> Table:
    """The long calls in stretches, each twice as long as the one before, and the short ones."""
    base, rounds = growth.plan.base, growth.rounds
    table = _table(f"Groups of {base.batch} sequences of one call, below a prefix of {base.prefix}")
    for heading in ("finished before", "groups", "first tokens, ms", "spread", "step, ms", "spread"):
        table.add_column(heading, justify="right")
    num_groups = len(rounds[0].many)
    for first, last in pairwise(sorted({1, *(num_groups // part for part in (8, 4, 2)), num_groups})):
        finished = f"{first * base.batch} to {(last - 1) * base.batch}"
        table.add_row(finished, *_cells([r.many[first:last] for r in rounds]))
    table.add_row("a new call", *_cells([r.few[1:] for r in rounds]))
    factors = (growth.growth_of_first_tokens(), growth.growth_of_steps())
    table.add_row("last over new", "", *(text for f in factors for text in (f"{f.median:.3f}", _spread(f.spread))))
    return table


def _cells(parts: Sequence[Groups]) -> list[str]:
    first_token_ms = Series([ms for part in parts for ms in part.first_token_ms])
    step_ms = Series([ms for part in parts for ms in part.step_ms])
    times = (text for series in (first_token_ms, step_ms) for text in (f"{series.median:.1f}", _spread(series.spread)))
    return [str(len(step_ms.values)), *times]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.HORIZONTALS, padding=(0, 1, 0, 0))


def _spread(spread: float | None) -> str:
    if spread is None:
        return "-"
    return f"{spread:.0%}{' !' if spread > HIGH_SPREAD else ''}"
