"""Work on a GPU captured once and launched again as a whole: a step of a small model is otherwise bound by launches."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

_WARM_UP_CALLS = 2  # compile kernels, choose algorithms and take workspaces, which a capture must not


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: graphs share a pool's memory, and cuBLAS its workspaces, within a stream only."""
    return torch.cuda.Stream(device)


def capture(work: Callable[[], T], device: torch.device, pool: object = None) -> tuple[Callable[[], None], T, object]:
    """``(replay, result, pool)``: ``replay()`` does the work again, on the same memory, and renews ``result`` in place.

    ``work`` must neither wait for the device nor read what is to change from anywhere but tensors that outlive the
    graph. Graphs that never run at the same time may share a ``pool`` of memory; None makes one.
    """
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = work()
    return graph.replay, result, graph.pool()
