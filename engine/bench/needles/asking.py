"""Asks a loaded model, with one attention method, questions about a document; and times it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from engine.bench.environment import Execution
from engine.bench.timing import Timer
from engine.distributed import TPGroup
from engine.engine import Engine
from engine.model import Transformer
from engine.sampling import SamplingParams

T = TypeVar("T")


def timed(group: TPGroup, fn: Callable[[], T]) -> tuple[T, float]:
    """What ``fn`` returns, and the time in ms that it took on the slowest rank. Every rank makes the same call."""
    group.barrier()
    with Timer(group.device) as timer:
        result = fn()
    return result, max(group.gather_objects(timer.ms))


class Asker:
    """One method on a model that others may use too. Answers are chosen greedily, and do not end early: every method
    does the same work."""

    def __init__(self, method: str, model: Transformer, execution: Execution, max_batch_size: int):
        self.method = method
        self._engine = Engine(model, max_batch_size=max_batch_size, **asdict(execution))
        self._planned_length: int | None = None

    def read(self, document: Sequence[int], planned_length: int) -> None:
        """Computes the document, from nothing, and keeps it. ``planned_length`` is that of a whole sequence."""
        self._planned_length = planned_length
        self._engine.empty_shared()
        self._engine.append_shared([document], attention=self.method, planned_length=planned_length)

    def density(self, document: Sequence[int], planned_length: int) -> tuple[float, ...]:
        """Reads the document, and returns what fraction of attention was computed in each layer; nothing where all of
        it is."""
        sparse = self._engine.sparse_prefill
        if sparse is None:
            return ()
        with sparse.measured() as density:
            self.read(document, planned_length)
        return density.mean_by_layer(self._engine.model.group)

    def ask(self, questions: Sequence[Sequence[int]], num_tokens: int) -> tuple[list[tuple[int, ...]], int]:
        """``num_tokens`` tokens after each question about the document, and how many were asked at once."""
        at_once: list[int] = []
        found = self._engine.generate(
            questions,
            _greedy(num_tokens),
            attention=self.method,
            shared_cache_op="preserve",
            planned_length=self._planned_length,
            on_tokens=lambda num_new, num_ended: at_once.append(num_new),
        )
        return [tuple(samples[0].token_ids) for samples in found], at_once[0]

    def complete(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, on_tokens: Callable[[int, int], None] | None = None
    ) -> list[tuple[int, ...]]:
        """``num_tokens`` tokens after each prompt; what prompts share is found by itself."""
        found = self._engine.generate(
            prompts, _greedy(num_tokens), attention=self.method, min_shared=_MIN_SHARED, on_tokens=on_tokens
        )
        return [tuple(samples[0].token_ids) for samples in found]

    def release(self) -> None:
        """Gives the memory of documents and answers back."""
        self._engine.release_caches()


_MIN_SHARED = 16  # tokens


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
