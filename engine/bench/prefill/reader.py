"""Reads prompts with one prefill method, on a model that others may use too."""

from collections.abc import Sequence

from engine.arena import NoRoomError
from engine.attention import Streaming
from engine.bench.environment import Execution
from engine.bench.prefill.column import Column
from engine.distributed import TPGroup
from engine.engine import Engine
from engine.errors import InputError
from engine.model import Transformer


class Reader:
    """One column's engine. Every rank makes the same calls."""

    def __init__(self, column: Column, model: Transformer, execution: Execution):
        self.column = column
        self._group: TPGroup = model.group
        self._num_layers = model.config.num_layers
        self._engine = Engine(
            model,
            max_batch_size=1,
            attention_backend=execution.attention_backend,
            operations_backend=execution.operations_backend,
            prefill=execution.prefill,
        )

    def set_up(self, num_tokens: int) -> None:
        """Takes the cache of a prompt. Raises NoRoomError where memory has no room for it, on all ranks."""
        try:
            self._engine.setup_caches(num_tokens)
        except InputError as error:
            raise NoRoomError(str(error)) from error

    def first_token(self, prompt: Sequence[int]) -> int:
        """Computes the prompt, from nothing, and chooses the token after it, greedily."""
        self._engine.empty_shared()
        logits = self._engine.append_shared([prompt], attention=self.column.attention)
        return int(logits.argmax(-1))

    def density(self, prompt: Sequence[int]) -> tuple[float, ...]:
        """Of each layer what part of attention's work is done for the prompt, in the mean over all ranks' heads.

        Counting takes time and memory, so this is a reading of its own, which of every method is the first.
        """
        sparse = self._engine.sparse_prefill
        if sparse is None:
            self.first_token(prompt)  # as warm as the others for what is timed
            method = self.column.streaming
            return (1.0 if method is None else _streaming_density(method, len(prompt)),) * self._num_layers
        with sparse.measured() as density:
            self.first_token(prompt)
        # Nothing was sparse where the prompt was too short.
        return density.mean_by_layer(self._group) or (1.0,) * self._num_layers

    def release(self) -> None:
        """Gives the memory back."""
        self._engine.release_caches()


def _streaming_density(method: Streaming, num_tokens: int) -> float:
    """Each query sees the keys up to its own, or as many as the cache that the method imitates has."""
    kept = min(method.n_init + method.n_local, num_tokens)
    growing, full = kept * (kept + 1) // 2, (num_tokens - kept) * kept
    return (growing + full) / (num_tokens * (num_tokens + 1) // 2)
