import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import hf_model
from strategies import SETTINGS

from engine.config import ModelConfig
from engine.kv_cache import KVCache, SlotAllocator

# --- slots ---


class PlainAllocator:
    """The reference: one flag a slot."""

    def __init__(self, capacity):
        self.taken = [False] * capacity

    def allocate(self, length):
        for start in range(len(self.taken) - length + 1):
            if not any(self.taken[start : start + length]):
                self.mark(start, length, True)
                return start
        return None

    def mark(self, start, length, taken):
        assert all(t != taken for t in self.taken[start : start + length])
        self.taken[start : start + length] = [taken] * length


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(0, 9)),
        st.tuples(st.just("allocate_all"), st.lists(st.integers(0, 7), max_size=5)),
        st.tuples(st.just("free"), st.integers(0, 1000)),
        st.tuples(st.sampled_from(["grow", "cut"]), st.integers(0, 6)),
        st.tuples(st.just("copy"), st.just(None)),
    ),
    max_size=60,
)


@given(st.integers(0, 20), OPERATIONS)
@settings(SETTINGS, max_examples=200)
def test_first_fit_is_that_of_a_list_of_flags(capacity, operations):
    allocator, plain = SlotAllocator(capacity), PlainAllocator(capacity)
    held = []
    for name, value in operations:
        if name == "allocate":
            start = allocator.allocate(value)
            assert start == plain.allocate(value)
            held += [(start, value)] if start is not None else []
        elif name == "allocate_all":
            before = list(plain.taken)
            starts = allocator.allocate_all(value)
            expected = [plain.allocate(length) for length in value]
            if None in expected:
                plain.taken, expected = before, None
            assert starts == expected
            held += zip(starts, value, strict=True) if starts is not None else []
        elif name == "free" and held:
            start, length = held.pop(value % len(held))
            allocator.free(start, length)
            plain.mark(start, length, False)
        elif name == "grow":
            allocator.resize(allocator.capacity + value)
            plain.taken += [False] * value
        elif name == "cut":
            end = max((start + length for start, length in held), default=0)
            assert allocator.end_of_used == end
            allocator.resize(min(allocator.capacity, end + value))
            del plain.taken[end + value :]
        elif name == "copy":
            trial = allocator.copy()
            trial.resize(trial.capacity + 50)
            assert trial.allocate(50) is not None and trial.num_free >= allocator.num_free
        assert (allocator.capacity, allocator.num_free) == (len(plain.taken), plain.taken.count(False))
    for start, length in held:
        allocator.free(start, length)
    # Whatever the order of giving back, the free ranges join to one.
    assert allocator.allocate(allocator.capacity) == 0 and allocator.num_free == 0


# --- keys and values ---


@pytest.fixture
def config():
    return ModelConfig.from_hf(hf_model().config.to_dict())


def contents(cache, config):
    """Each layer's keys and values, without the scratch slot behind them."""
    layers = [cache.layer(index) for index in range(config.num_layers)]
    return [[arena[:-1].clone() for arena in layer] for layer in layers]


def filled(config, num_slots):
    cache = KVCache(config, 2, num_slots, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for index in range(config.num_layers):
        for arena in cache.layer(index):
            arena[:num_slots] = torch.randn(num_slots, 2, config.head_dim, generator=generator)
    return cache


def resize_in_vain(cache, num_slots, monkeypatch):
    """Memory fails in the middle of the second layer."""
    arena_of, num_left = KVCache._arena, 3

    def fails(self, num_slots):
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise MemoryError
        return arena_of(self, num_slots)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "_arena", fails)
        with pytest.raises(MemoryError):
            cache.resize(num_slots)


def test_slots_are_finite_before_they_are_written(config):
    cache = KVCache(config, 2, 5, torch.bfloat16, torch.device("cpu"))
    for keys, values in contents(cache, config):
        assert keys.shape == values.shape == (5, 2, config.head_dim) and keys.dtype == torch.bfloat16
        assert not keys.any() and not values.any()
    assert KVCache.bytes_per_slot(config, 2, torch.bfloat16) * 5 == sum(
        arena.nbytes for layer in contents(cache, config) for arena in layer
    )


def test_the_scratch_slot_is_behind_all_others(config):
    cache = filled(config, 4)
    for num_slots in (4, 9, 3):
        cache.resize(num_slots)
        assert cache.scratch_slot == num_slots == len(cache.layer(0)[0]) - 1


def test_growing_keeps_what_there_is(config):
    cache = filled(config, 4)
    before = [[arena.clone() for arena in layer] for layer in contents(cache, config)]
    cache.resize(9)
    assert cache.num_slots == 9
    for layer, old in zip(contents(cache, config), before, strict=True):
        for arena, was in zip(layer, old, strict=True):
            assert torch.equal(arena[:4], was) and not arena[4:].any() and was.any()


def test_cutting_keeps_what_is_left(config, monkeypatch):
    cache = filled(config, 9)
    before = contents(cache, config)
    resize_in_vain(cache, 4, monkeypatch)
    for num_slots in (4, 6):
        cache.resize(num_slots)
        assert cache.num_slots == num_slots
        for layer, old in zip(contents(cache, config), before, strict=True):
            for arena, was in zip(layer, old, strict=True):
                assert arena.shape[0] == num_slots and torch.equal(arena[:4], was[:4]) and not arena[4:].any()


def test_growing_that_failed_midway_can_be_tried_again(config, monkeypatch):
    cache = filled(config, 4)
    before = contents(cache, config)
    resize_in_vain(cache, 9, monkeypatch)
    assert cache.num_slots == 4
    for keys, values in contents(cache, config):
        assert keys.shape == values.shape, "attention reads both by the same strides"
    cache.resize(6)
    for layer, old in zip(contents(cache, config), before, strict=True):
        for arena, was in zip(layer, old, strict=True):
            assert arena.shape[0] == 6 and torch.equal(arena[:4], was) and not arena[4:].any()


def test_copies_and_clears_touch_their_range_only(config):
    cache = filled(config, 12)
    before = contents(cache, config)
    cache.copy(1, 2, [4, 8])
    cache.clear(10, 1)
    for layer, old in zip(contents(cache, config), before, strict=True):
        for arena, was in zip(layer, old, strict=True):
            expected = was.clone()
            expected[4:6] = expected[8:10] = was[1:3]
            expected[10] = 0
            assert torch.equal(arena, expected)
