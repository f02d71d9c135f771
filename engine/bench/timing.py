"""Wall-clock timing of work on a device, and the spread of repeated times."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

HIGH_SPREAD = 0.1
"""A relative spread above this is flagged: differences of this size between two results may be noise."""


@dataclass(frozen=True)
class Spread:
    """Repeated times of the same work, in ms, summed up."""

    median: float
    p20: float
    p80: float
    minimum: float

    @property
    def relative(self) -> float:
        """The width from the 20th to the 80th percentile as a fraction of the median."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0


def summarize(times_ms: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile (linear interpolation) and minimum of at least one time."""
    if not times_ms:
        raise ValueError("no times to summarize")
    if len(times_ms) == 1:
        return Spread(*[float(times_ms[0])] * 4)
    p20, _, _, p80 = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Spread(median=statistics.median(times_ms), p20=p20, p80=p80, minimum=min(times_ms))


class Timer:
    """``with Timer(device) as t: ...`` leaves the elapsed wall-clock time, in ms, in ``t.ms``.

    On CUDA the device is drained before and after, so the time holds the work that was started inside, all of it and
    nothing else. Work that raises has no time: ``t.ms`` is then not set.
    """

    ms: float

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Self:
        self._synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._synchronize()
            self.ms = (time.perf_counter() - self._start) * 1e3

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def best_of(fn: Callable[[], Any], repeats: int, warmup: int, device: torch.device) -> list[float]:
    """The times, in ms, of ``repeats`` calls of ``fn`` after ``warmup`` calls that are not timed.

    Returns them all, in order: ``min`` of them is the best, ``summarize`` gives the spread.
    """
    for _ in range(warmup):
        fn()
    times_ms = []
    for _ in range(repeats):
        with Timer(device) as timer:
            fn()
        times_ms.append(timer.ms)
    return times_ms
