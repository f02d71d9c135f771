"""The engine's attention methods as modes of a sweep."""

from dataclasses import asdict

import numpy as np

from engine.attention import Auto
from engine.bench.environment import Execution
from engine.bench.memory_model import cache_tokens
from engine.bench.results import Cell
from engine.engine import Engine
from engine.errors import InputError
from engine.model import Transformer
from engine.sampling import SamplingParams


class EngineMode:
    """One attention method on a loaded model, which other modes may use too.

    The prompt is kept as a shared level. Its end has the logits of the first token already, so generating one token
    takes no step, and n tokens take n - 1.
    """

    def __init__(self, method: str, model: Transformer, execution: Execution = Execution()):
        self.method = method
        self.engine = Engine(model, **asdict(execution))
        self._batch_size = self._num_shared = self._length = 0

    def set_up(self, cell: Cell) -> None:
        self._batch_size, self._num_shared = cell.batch_size, cell.num_shared
        self._length = cell.num_shared + cell.num_unique
        self.engine.max_batch_size = cell.batch_size
        if tokens := cache_tokens(cell):
            self.engine.setup_caches(tokens)

    def prefill(self, prompt: list[int]) -> None:
        self.engine.empty_shared()
        self.engine.append_shared([prompt], attention=self.method, planned_length=self._length)

    def generate(self, num_tokens: int) -> None:
        params = SamplingParams(n=self._batch_size, temperature=0, max_tokens=num_tokens, ignore_eos=True)
        sizes: list[int] = []
        self.engine.generate(
            [()],
            params,
            attention=self.method,
            shared_cache_op="preserve",
            planned_length=self._length,
            on_tokens=lambda num_new, num_ended: sizes.append(num_new),
        )
        if sizes[0] != self._batch_size:  # what was timed is not the cell
            raise InputError(
                f"memory has room for {sizes[0]} of {self._batch_size} sequences at once; accepted: all, or the time "
                "would be that of smaller batches; use a smaller one or more ranks"
            )

    def choice(self) -> str | None:
        """What ``auto`` does with the prompt of the cell: ``shared`` or ``unshared``; None of other methods."""
        if self.method != Auto.name:
            return None
        pays = self.engine.crossover.pays(np.array([self._batch_size]), np.array([self._num_shared]))
        return "shared" if pays[0] else "unshared"

    def release(self) -> None:
        self.engine.release_caches()
