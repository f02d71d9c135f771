"""What attention takes within decode steps, timed where it runs.

The difference of two modes' steps would say it too, but drowns it in the noise of everything else that a step does.
"""

import statistics
import time
from types import TracebackType
from typing import Any, Self

import torch

from engine.model import Transformer


class AttentionSpans:
    """``with AttentionSpans(model, device) as spans: ...`` times the decode steps that are made inside, one by one.

    A step's span is what a method can change of it: in each layer from the projected queries, keys and values to the
    output projection, and from the logits to the next forward pass, where attention is planned. Some of that is the
    same in all modes (the rotary embedding, choosing tokens): ``noattention`` has nothing else, and its span is to be
    subtracted. Passes before the first logits, a prefill, do not count.

    It listens by PyTorch's module hooks, two a layer. On CUDA the times are those of events in the device's queue.
    """

    def __init__(self, model: Transformer, device: torch.device):
        self._model, self._device = model, device
        self._steps: list[list[tuple[Any, Any]]] = []  # (start, end) of each piece of a span
        self._start: Any = None

    def __enter__(self) -> Self:
        model = self._model
        self._hooks = [
            model.head.register_forward_hook(self._after_logits),
            model.register_forward_pre_hook(self._before_pass),
        ]
        for layer in model.layers:
            self._hooks += [
                layer.attention.qkv_proj.register_forward_hook(self._after_projection),
                layer.attention.o_proj.register_forward_pre_hook(self._before_projection),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def median_ms(self) -> float:
        """Of the steps' spans; 0 without a step. The median step's sequences are of medium length."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return statistics.median([sum(map(self._elapsed_ms, step)) for step in self._steps] or [0.0])

    # Hooks return None: anything else would take the place of a module's input or output.

    def _after_logits(self, *_: object) -> None:
        self._start = self._now()

    def _before_pass(self, *_: object) -> None:
        if self._start is not None:
            self._steps.append([(self._start, self._now())])
            self._start = None

    def _after_projection(self, *_: object) -> None:
        if self._steps:
            self._start = self._now()

    def _before_projection(self, *_: object) -> None:
        if self._start is not None:
            self._steps[-1].append((self._start, self._now()))
            self._start = None

    def _now(self) -> Any:
        """A point in time, on CUDA in the device's queue."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed_ms(self, piece: tuple[Any, Any]) -> float:
        start, end = piece
        return start.elapsed_time(end) if self._device.type == "cuda" else (end - start) * 1e3
