"""Room in the KV arena: how large it is, what is free, and what the memory allows."""

from collections.abc import Sequence

from engine.errors import InputError
from engine.kv_cache import KVCache, SlotAllocator
from engine.memory import available_bytes
from engine.model import Transformer

# What the KV cache and the activations may take of the free memory; the rest is for what nobody counts: fragments, the
# tables of a forward pass, the copies that sampling makes.
_FRACTION = 0.9


def usable(free_bytes: int) -> int:
    """Bytes of free memory that the KV cache and the activations may take."""
    return int(free_bytes * _FRACTION)


def fits_beside(free_bytes: int, cache_bytes: int, activation_bytes: int) -> bool:
    """Whether a KV cache can be set up in free memory, and then leaves enough of it for activations."""
    return cache_bytes <= usable(free_bytes) and activation_bytes <= usable(free_bytes - cache_bytes)


class NoRoomError(InputError):
    """Memory has no room for what was asked."""


class Arena:
    """A ``KVCache`` that is sized by the work, up to the memory that is there, or ahead by ``set_up``.

    Every rank makes the same calls and places alike: the limit is agreed on, the allocator is deterministic.
    """

    def __init__(self, model: Transformer):
        self._config, self._num_kv_heads, self._group = model.config, model.num_kv_heads, model.group
        self._device, self._dtype = model.embedding.weight.device, model.embedding.weight.dtype
        self.cache: KVCache | None = None
        self._slots = SlotAllocator(0)
        self._limit: int | None = None  # bytes for the cache and the activations; found when it is first needed
        self._limit_is_fresh = False  # whether it was found in the call that runs
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
        """Tokens that it can grow to, where activations take nothing."""
        return self.capacity if self._fixed else self._memory_limit() // self.bytes_per_token

    def begin_call(self) -> None:
        """A call of the engine begins. Other programs and tensors come and go, so free memory is looked up anew; beside
        a cache that was set up ahead only before something is refused, for it takes all ranks and some time."""
        self._limit_is_fresh = False
        if not self._fixed:
            self._limit = None

    def set_up(self, num_tokens: int) -> None:
        """Takes room for ``num_tokens`` tokens, which then neither grows nor shrinks. Nothing may be in use.

        Raises InputError when memory has less room than that.
        """
        if num_tokens < 1:
            raise InputError(f"the KV cache was given {num_tokens} tokens; accepted: 1 or more; raise it")
        self.release()
        limit = self.max_tokens
        if num_tokens > limit:
            raise InputError(
                f"a KV cache of {num_tokens} tokens needs {num_tokens * self.bytes_per_token / 2**30:.2f} GiB on each "
                f"rank; accepted: at most {limit} tokens, which memory has room for; ask for fewer"
            )
        self._resize(num_tokens)
        self._fixed = True

    def release(self) -> None:
        """Gives the memory back; from now on the arena is sized by the work. Nothing may be in use."""
        assert self.num_used == 0, "the arena is in use"
        self.cache, self._slots, self._limit, self._fixed = None, SlotAllocator(0), None, False

    def fits(self, ranges: Sequence[int], activation_bytes: int = 0) -> bool:
        """Whether contiguous ranges of these lengths can be had, beside activations, in an arena of another size if
        need be."""
        return self._find_size(ranges, activation_bytes) is not None

    def allocate(
        self, ranges: Sequence[int], what: str, activation_bytes: int = 0, *, spare: bool = False
    ) -> list[int]:
        """Starts of the ranges. Where the arena has to grow, ``spare`` makes it grow by more than is missing, if memory
        has it: growing moves what is in use. Raises NoRoomError, stating what ``what`` needed, when there is no room.
        """
        size = self._find_size(ranges, activation_bytes)
        if size is None:
            raise NoRoomError(self._refusal(ranges, what, activation_bytes))
        if spare and size > self.capacity:
            most = (self._memory_limit() - activation_bytes) // self.bytes_per_token
            size = min(most, max(size, self.capacity * 9 // 8))
        if size != self.capacity:
            self._resize(size)
        starts = self._slots.allocate_all(ranges)
        assert starts is not None, "the size was tried"
        return starts

    def free(self, start: int, length: int) -> None:
        self._slots.free(start, length)

    def clear(self, start: int, length: int) -> None:
        """Zeroes a range that a failed computation may have left NaN in."""
        if self.cache is not None:
            self.cache.clear(start, length)

    def _find_size(self, ranges: Sequence[int], activation_bytes: int) -> int | None:
        """Slots of the arena, now or resized, that holds the ranges and leaves room for activations; None: no room."""
        size = self._size_within(self._memory_limit(), ranges, activation_bytes)
        if size is None and not self._limit_is_fresh:
            self._limit = None
            size = self._size_within(self._memory_limit(), ranges, activation_bytes)
        return size

    def _size_within(self, limit: int, ranges: Sequence[int], activation_bytes: int) -> int | None:
        most = (limit - activation_bytes) // self.bytes_per_token
        if self.capacity <= most and self._slots.copy().allocate_all(ranges) is not None:
            return self.capacity
        if self._fixed:
            return None
        size = self._least_size(ranges)
        return size if size <= most else None

    def _least_size(self, ranges: Sequence[int]) -> int:
        """Slots of the smallest arena in which the ranges find room, and what is in use keeps its place."""
        trial = self._slots.copy() if self.num_used else SlotAllocator(0)
        trial.resize(trial.capacity + sum(ranges))
        assert trial.allocate_all(ranges) is not None, "they fit one after another at the end"
        return trial.end_of_used

    def _refusal(self, ranges: Sequence[int], what: str, activation_bytes: int) -> str:
        held = f" ({self.num_used} more are held by kept levels)" if self.num_used else ""
        remedy = "use a shorter prompt, fewer new tokens or more ranks"
        limit = self._memory_limit()
        if self._size_within(limit, ranges, 0) is None:
            room = self.max_tokens - self.num_used
            pieces = ", but not in one piece" if sum(ranges) <= room else ""
            return (
                f"{what} needs room for {sum(ranges)} tokens in the KV cache; there is room for "
                f"{room}{held}{pieces}; {'set up a larger cache' if self._fixed else remedy}"
            )
        taken = self.capacity if self._fixed else self._slots.end_of_used
        cache = f"room for {sum(ranges)} tokens in the KV cache{held} and " if not self._fixed else ""
        left = max(limit - taken * self.bytes_per_token, 0)
        if self._fixed:
            remedy = "set up a smaller cache, or use a shorter prompt or more ranks"
        return (
            f"{what} needs {cache}{activation_bytes / 2**30:.2f} GiB for activations on each rank; there are "
            f"{left / 2**30:.2f} GiB; {remedy}"
        )

    def _memory_limit(self) -> int:
        """Bytes that the cache and the activations may take together: the same number on every rank."""
        if self._limit is None:
            held = 0 if self.cache is None else self.capacity * self.bytes_per_token
            free = min(self._group.gather_objects(available_bytes(self._group)))
            # What the arena holds already counts towards the fraction, or the reserve would shrink from call to call.
            # A cache that was set up ahead is not given back, so only what is left beside it is divided.
            self._limit = usable(free) + held if self._fixed else usable(free + held)
            self._limit_is_fresh = True
        return self._limit

    def _resize(self, num_slots: int) -> None:
        """An arena of another size; what is in use keeps its place.

        When memory fails, what was in use is as it was, and an arena that was not in use is empty.
        """
        if self.num_used:
            if num_slots < self.capacity:  # first: a failure may leave fewer slots than there were, in some layers
                self._slots.resize(num_slots)
            self.cache.resize(num_slots)
            self._slots.resize(num_slots)
            return
        self.cache, self._slots = None, SlotAllocator(0)  # given back before the new one is taken
        self.cache = KVCache(self._config, self._num_kv_heads, num_slots, self._dtype, self._device)
        self._slots = SlotAllocator(num_slots)
