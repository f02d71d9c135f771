"""The tables of a growth measurement: each step beside what is predicted for it."""

import statistics

from rich import box
from rich.console import Console
from rich.table import Table

from engine.bench.growth import Growth, growth_factors
from engine.bench.timing import HIGH_SPREAD, summarize


def print_growth(growth: Growth, console: Console) -> None:
    """Prints a table for each axis and one for finished sequences; a high spread is marked ``!``."""
    for axis in growth.points:
        console.print(_axis_table(growth, axis))
    console.print(_finished_table(growth))
    console.print(
        "predicted: the least time of the step's bytes and operations by ceilings measured just before it; growth: to "
        f"the row above; ! spread above {HIGH_SPREAD:.0%}: differences of that size may be noise",
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
    base = growth.plan.base
    table = _table(f"Groups of {base.batch} sequences of one call, below a prefix of {base.prefix}")
    for heading in ("finished before", "groups", "first tokens, ms", "spread", "step, ms", "spread"):
        table.add_column(heading, justify="right")
    for stretch in growth.stretches:
        table.add_row(
            f"{stretch.first_finished} to {stretch.last_finished}",
            str(len(stretch.step_ms)),
            *(
                text
                for times in (stretch.first_token_ms, stretch.step_ms)
                for text in (
                    f"{statistics.median(times):.1f}",
                    _spread(summarize(times).relative if len(times) > 1 else None),
                )
            ),
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.HORIZONTALS, padding=(0, 1, 0, 0))


def _spread(spread: float | None) -> str:
    if spread is None:
        return "-"
    return f"{spread:.0%}{' !' if spread > HIGH_SPREAD else ''}"
