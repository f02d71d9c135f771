"""How far to trust a share of right answers."""

import math
from dataclasses import dataclass

_Z = 1.959964  # of a standard normal variable: 95% of it lies within as many deviations


@dataclass(frozen=True)
class Accuracy:
    """``num_right`` of ``num_asked`` answers are right."""

    num_right: float  # a sum of parts, where an answer can be partly right
    num_asked: int

    def __add__(self, other: "Accuracy") -> "Accuracy":
        return Accuracy(self.num_right + other.num_right, self.num_asked + other.num_asked)

    @property
    def share(self) -> float | None:
        """None when nothing was asked."""
        return self.num_right / self.num_asked if self.num_asked else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the share of right answers (Wilson, 1927), within 0 and 1.

        It says how well so few answers stand for more of the same kind, each right or wrong by itself.
        """
        n = self.num_asked
        if not n:
            return 0.0, 1.0
        share, z2 = self.num_right / n, _Z * _Z
        middle = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def text(self) -> str:
        """Such as ``98.4% (95.5-99.5)``."""
        if self.share is None:
            return "-"
        low, high = self.interval
        return f"{self.share:.1%} ({100 * low:.1f}-{100 * high:.1f})"


NOTHING_ASKED = Accuracy(0, 0)
