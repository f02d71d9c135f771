"""Room in the KV arena: how large it is, what is free, and what the memory allows."""

from collections.abc import Sequence

from engine.errors import InputError
from engine.kv_cache import KVCache, SlotAllocator
from engine.memory import available_bytes
from engine.model import Transformer

# What the KV cache may take of the free memory; the rest is for the activations.
_FRACTION = 0.9


class Arena:
    """A ``KVCache`` that is sized by the work, up to the memory that is there, or ahead by ``set_up``.

    Every rank makes the same calls and places alike: the limit is agreed on, the allocator is deterministic.
    """

    def __init__(self, model: Transformer):
        self._config, self._num_kv_heads, self._group = model.config, model.num_kv_heads, model.group
        self._device, self._dtype = model.embedding.weight.device, model.embedding.weight.dtype
        self.cache: KVCache | None = None
        self._slots = SlotAllocator(0)
        self._max_slots: int | None = None  # found when it is first needed
        self._fixed = False

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take on this rank."""
        return KVCache.bytes_per_slot(self._config, self._num_kv_heads, self._dtype)

    @property
    def capacity(self) -> int:
        """Tokens that the arena has room for now."""
        return self._slots.capacity

    @property
    def num_used(self) -> int:
        return self._slots.capacity - self._slots.num_free

    @property
    def max_tokens(self) -> int:
        """Tokens that it can grow to."""
        if self._max_slots is None:
            self._max_slots = self.capacity + self._memory_limit()
        return self._max_slots

    def set_up(self, num_tokens: int) -> None:
        """Takes room for ``num_tokens`` tokens, which then neither grows nor shrinks. Nothing may be in use.

        Raises InputError when memory has less room than that.
        """
        if num_tokens < 1:
            raise InputError(f"the KV cache was given {num_tokens} tokens; accepted: 1 or more; raise it")
        self.release()
        limit = self._memory_limit()
        if num_tokens > limit:
            raise InputError(
                f"a KV cache of {num_tokens} tokens needs {num_tokens * self.bytes_per_token / 2**30:.2f} GiB on each "
                f"rank; accepted: at most {limit} tokens, which memory has room for; ask for fewer"
            )
        self._resize(num_tokens)
        self._max_slots, self._fixed = num_tokens, True

    def release(self) -> None:
        """Gives the memory back; from now on the arena is sized by the work. Nothing may be in use."""
        assert self.num_used == 0, "the arena is in use"
        self.cache, self._slots, self._max_slots, self._fixed = None, SlotAllocator(0), None, False

    def fits(self, ranges: Sequence[int]) -> bool:
        """Whether contiguous ranges of these lengths can be had, growing if need be."""
        trial = self._slots.copy()
        trial.grow(max(self.max_tokens, trial.capacity))
        return trial.allocate_all(ranges) is not None

    def allocate(self, ranges: Sequence[int], what: str) -> list[int]:
        """Starts of the ranges. Raises InputError, stating what ``what`` needed, when there is no room."""
        starts = self._slots.allocate_all(ranges)
        if starts is None and self.fits(ranges):
            kept = self.capacity if self.num_used else 0
            self._resize(min(self.max_tokens, kept + sum(ranges)))
            starts = self._slots.allocate_all(ranges)
        if starts is None:
            remedy = "set up a larger cache" if self._fixed else "use a shorter prompt, fewer new tokens or more ranks"
            held = f" ({self.num_used} more are held by kept levels)" if self.num_used else ""
            raise InputError(
                f"{what} needs room for {sum(ranges)} tokens in the KV cache; there is room for "
                f"{self.max_tokens - self.num_used}{held}; {remedy}"
            )
        return starts

    def free(self, start: int, length: int) -> None:
        self._slots.free(start, length)

    def clear(self, ranges: Sequence[int], starts: Sequence[int]) -> None:
        """Zeroes ranges that a failed computation may have left NaN in: masked reads need every slot to be finite."""
        if self.cache is not None:
            for start, length in zip(starts, ranges, strict=True):
                self.cache.clear(start, length)

    def _memory_limit(self) -> int:
        """Tokens that memory has room for: the same number on every rank."""
        mine = int(available_bytes(self._group) * _FRACTION) // self.bytes_per_token
        return min(self._group.gather_objects(mine))

    def _resize(self, num_slots: int) -> None:
        """A larger arena; what is in use keeps its place."""
        if self.cache is not None and self.num_used:
            self.cache.grow(num_slots)
        else:
            self.cache = None  # give it back before the new one is taken
            self.cache = KVCache(self._config, self._num_kv_heads, num_slots, self._dtype, self._device)
        self._slots.grow(num_slots)
