"""Times single calls with cold caches, several kinds of calls turn by turn."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from engine.bench.micro.cache_flush import CacheFlush
from engine.bench.micro.micro_results import TimedWith
from engine.cuda_graphs import capture
from engine.memory import is_out_of_memory

K = TypeVar("K")

MIN_ITERS, MAX_ITERS = 5, 1000
_WARM_UP_SHARE = 0.1  # of the time that the rounds may take


class ColdCall(Protocol):
    """A call that can be timed again and again."""

    timed_with: TimedWith

    def __call__(self) -> float:
        """Empties the caches, then makes the call and returns its time in ms."""


class HostCall:
    """Timed by the host's monotonic clock: for a call that has done its work when it returns."""

    timed_with = TimedWith.CLOCK

    def __init__(self, call: Callable[[], Any], flush: CacheFlush):
        self._call, self._flush = call, flush

    def __call__(self) -> float:
        self._flush()
        start = time.perf_counter()
        self._call()
        return (time.perf_counter() - start) * 1e3


class CudaCall:
    """Captured in a CUDA graph, whose replay is timed by two events of the device.

    A call that cannot be captured, which ``say`` is told, is launched anew each time: its time may then have gaps in it
    that the host leaves. The flush is queued before the first event, and takes longer than the launch of a graph.
    """

    def __init__(
        self, call: Callable[[], Any], device: torch.device, flush: CacheFlush, say: Callable[[str], None]
    ):
        self._flush = flush
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            self._run, self._kept, _ = capture(call, device)  # results lie in the graph's memory
            self.timed_with = TimedWith.CUDA_GRAPH
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            say(f"no CUDA graph ({str(error).partition(chr(10))[0]}): timed as launched from Python")
            self._run, self.timed_with = call, TimedWith.EVENTS

    def __call__(self) -> float:
        self._flush()
        self._start.record()
        self._run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


def make_cold_call(
    call: Callable[[], Any], device: torch.device, flush: CacheFlush, say: Callable[[str], None]
) -> ColdCall:
    return CudaCall(call, device, flush, say) if device.type == "cuda" else HostCall(call, flush)


def time_in_turns(
    calls: Mapping[K, Callable[[], float]], num_iters: int | None, num_warmup: int | None, budget_s: float
) -> tuple[dict[K, list[float]], int]:
    """``(the times of each call, one a round; the number of rounds before those)``. A round makes every call once, in
    an order that is drawn anew: what ran before a call can cost it some percent, flushed caches or not.

    Rounds are as many as are asked for; where None are, as many as ``budget_s`` seconds for each call allow, from
    ``MIN_ITERS`` to ``MAX_ITERS``, after a tenth of that, or one, that is not counted.
    """
    budget_s *= len(calls)
    order = random.Random(0)
    warmed_up = _rounds(calls, order, num_warmup, 1, budget_s * _WARM_UP_SHARE)
    times = _rounds(calls, order, num_iters, MIN_ITERS, budget_s)
    return {key: [one[key] for one in times] for key in calls}, len(warmed_up)


def _rounds(
    calls: Mapping[K, Callable[[], float]], order: random.Random, count: int | None, least: int, budget_s: float
) -> list[dict[K, float]]:
    rounds: list[dict[K, float]] = []
    end = time.monotonic() + budget_s

    def wanted() -> bool:
        if count is not None:
            return len(rounds) < count
        return len(rounds) < least or (len(rounds) < MAX_ITERS and time.monotonic() < end)

    while wanted():
        rounds.append({key: calls[key]() for key in order.sample(list(calls), len(calls))})
    return rounds
