"""Which results of a microbenchmark may be compared, and how two of them do."""

from collections.abc import Iterator, Sequence

from engine.bench.micro.micro_results import RowResult
from engine.bench.ratio import Ratio


def setting_of(result: RowResult) -> tuple[str, str, str]:
    """What results that are compared have in common: sweep, device and dtype."""
    device_name, dtype = (str(result.environment.get(name, "unknown")) for name in ("device_name", "dtype"))
    return result.sweep, device_name, dtype


def ratio(over: Sequence[RowResult], under: Sequence[RowResult]) -> Ratio | None:
    """The times of ``over`` added up, over those of ``under``; None where one of them has no times.

    In one run the ratio is the median of those of the rounds, and the spread theirs. Of rows that ran at other times
    it is that of the medians, and the spreads of all of them count, for none of the machine's drift cancels.
    """
    rows = [*over, *under]
    if not (over and under) or not all(row.median_ms for row in rows):
        return None
    if len({(row.run, len(row.times_ms)) for row in rows}) == 1 and rows[0].run:
        return Ratio.of_rounds(*([sum(times) for times in _rounds(side)] for side in (over, under)))
    return Ratio.of_runs(*([row.times_ms for row in side] for side in (over, under)))


def _rounds(rows: Sequence[RowResult]) -> Iterator[tuple[float, ...]]:
    return zip(*(row.times_ms for row in rows), strict=True)
