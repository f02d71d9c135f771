"""The KV arena: keys and values of all sequences, in slots of one token each.

Shapes: S slots, Hkv local KV heads, D head dimension.
"""

import bisect
from collections.abc import Sequence

import torch

from engine.config import ModelConfig


class SlotAllocator:
    """Hands out contiguous ranges of slots, first fit. Deterministic, so that all ranks place alike."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, length), by start

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self._free)

    @property
    def end_of_used(self) -> int:
        """One past the last slot that is taken."""
        if self._free and sum(self._free[-1]) == self.capacity:
            return self._free[-1][0]
        return self.capacity

    def copy(self) -> "SlotAllocator":
        """An allocator in the same state, to try things on."""
        other = SlotAllocator(0)
        other.capacity, other._free = self.capacity, list(self._free)
        return other

    def resize(self, capacity: int) -> None:
        """Adds free slots at the end or takes some away."""
        end = self.capacity
        if capacity < end:
            assert capacity >= self.end_of_used, "slots in use"
            start, _ = self._free.pop()
            self.capacity = capacity
            self.free(start, capacity - start)
        else:
            self.capacity = capacity
            self.free(end, capacity - end)

    def allocate_all(self, lengths: Sequence[int]) -> list[int] | None:
        """Starts of ranges of these lengths; or None, and nothing is taken, when they do not all fit."""
        before = list(self._free)
        starts = []
        for length in lengths:
            start = self.allocate(length)
            if start is None:
                self._free = before
                return None
            starts.append(start)
        return starts

    def allocate(self, length: int) -> int | None:
        """The start of ``length`` adjacent free slots, or None. No slots need no place: 0."""
        if length == 0:
            return 0
        for index, (start, room) in enumerate(self._free):
            if room >= length:
                self._free[index : index + 1] = [(start + length, room - length)] if room > length else []
                return start
        return None

    def free(self, start: int, length: int) -> None:
        """Gives back a range that was allocated."""
        if length == 0:
            return
        index = bisect.bisect(self._free, (start, length))
        if index < len(self._free) and start + length == self._free[index][0]:
            length += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            start, before = self._free[index - 1][0], self._free[index - 1][1]
            self._free[index - 1] = (start, before + length)
        else:
            self._free.insert(index, (start, length))


def make_arena(
    num_slots: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``(S, Hkv, D)``, zeroed. In memory it is head-major: a head's keys follow each other, so attention streams them.
    On CPU that reads about twice as fast as keys that are interleaved by head."""
    return torch.zeros(num_kv_heads, num_slots, head_dim, dtype=dtype, device=device).transpose(0, 1)


class KVCache:
    """One arena of keys and one of values per layer, ``(S, Hkv, D)``, zeroed: every slot is finite at all times.

    But for one more slot behind them, ``scratch_slot``, which nobody reads: rows of no sequence write there.
    """

    def __init__(
        self, config: ModelConfig, num_kv_heads: int, num_slots: int, dtype: torch.dtype, device: torch.device
    ):
        self.num_slots = num_slots
        self._shape = (num_kv_heads, config.head_dim)
        self._dtype, self._device = dtype, device
        self._layers = [[self._arena(num_slots), self._arena(num_slots)] for _ in range(config.num_layers)]
        self.placement = object()  # another one when the arenas have moved

    def _arena(self, num_slots: int) -> torch.Tensor:
        return make_arena(num_slots + 1, *self._shape, self._dtype, self._device)

    @staticmethod
    def bytes_per_slot(config: ModelConfig, num_kv_heads: int, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * num_kv_heads * config.head_dim * dtype.itemsize

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each ``(S + 1, Hkv, D)``."""
        keys, values = self._layers[index]
        return keys, values

    @property
    def scratch_slot(self) -> int:
        return self.num_slots

    def copy(self, source: int, length: int, targets: list[int]) -> None:
        """Copies ``length`` slots from ``source`` on to each of ``targets``, in every layer."""
        for arenas in self._layers:
            for arena in arenas:
                kept = arena[source : source + length]
                for target in targets:
                    arena[target : target + length] = kept

    def clear(self, start: int, length: int) -> None:
        """Zeroes ``length`` slots from ``start`` on, in every layer."""
        for arenas in self._layers:
            for arena in arenas:
                arena[start : start + length] = 0

    def resize(self, num_slots: int) -> None:
        """Adds slots at the end or takes some away; the others keep their contents. Layer by layer, so that only one
        is there twice.

        When memory fails midway, every layer holds at least ``num_slots`` slots, and resizing can be tried again.
        """
        self.placement = object()
        kept = self.num_slots = min(self.num_slots, num_slots)
        for index in range(len(self._layers)):
            # Both or neither: attention reads them by the same strides. A failure may have left them longer.
            resized = [self._arena(num_slots), self._arena(num_slots)]
            for new, old in zip(resized, self._layers[index], strict=True):
                new[:kept] = old[:kept]
            del old  # or the next layer is made beside it
            self._layers[index] = resized
        self.num_slots = num_slots
