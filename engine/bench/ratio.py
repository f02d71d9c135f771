"""A ratio of two measured times, and what is known of its error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from engine.bench.timing import HIGH_SPREAD, summarize


@dataclass(frozen=True)
class Ratio:
    """Of two times."""

    value: float
    spread: float | None  # 20th to 80th percentile as a fraction of it; None for a single round
    same_run: bool  # the two took turns

    @classmethod
    def of_rounds(cls, over: Sequence[float], under: Sequence[float]) -> Self | None:
        """Of two times that took turns, round by round: the median of the rounds' ratios, and their spread. None when
        no round's second time is above 0."""
        rounds = [a / b for a, b in zip(over, under, strict=True) if b > 0]
        if not rounds:
            return None
        found = summarize(rounds)
        return cls(found.median, found.relative if len(rounds) > 1 else None, True)

    @classmethod
    def of_runs(cls, over: Sequence[Sequence[float]], under: Sequence[Sequence[float]]) -> Self | None:
        """Of times of separate runs, each side's added up: that of the medians. The spreads of all that have one count,
        for none of the machine's drift cancels. None when the second is not above 0."""
        above, below = (sum(summarize(times).median for times in side) for side in (over, under))
        if below <= 0:
            return None
        spreads = [summarize(times).relative for times in (*over, *under) if len(times) > 1]
        return cls(above / below, math.hypot(*spreads) if spreads else None, False)

    @property
    def high_spread(self) -> bool:
        return self.spread is not None and self.spread > HIGH_SPREAD

    @property
    def text(self) -> str:
        """With two decimals."""
        return self.formatted(".2f")

    def formatted(self, spec: str) -> str:
        """``~`` before one of separate runs, ``!`` after one with a high spread."""
        return f"{'' if self.same_run else '~'}{self.value:{spec}}{' !' if self.high_spread else ''}"

    @property
    def words(self) -> str:
        return f"{self.text} (spread {'-' if self.spread is None else format(self.spread, '.0%')})"
