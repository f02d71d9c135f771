import weakref

import pytest
import torch
from models import hf_model, our_engine, passes

import engine.arena
from engine.activations import activation_bytes
from engine.errors import InputError
from engine.kv_cache import KVCache
from engine.sampling import SamplingParams


def test_an_arena_is_given_back_before_a_larger_one_takes_its_place(monkeypatch):
    """The second wave needs more room than the first, of which nothing is left: two arenas would take twice as much."""
    alive, num_made = weakref.WeakSet(), 0

    class Counted(KVCache):
        def __init__(self, *args):
            nonlocal num_made
            assert len(alive) == 0, "the arena before is still there"
            super().__init__(*args)
            alive.add(self)
            num_made += 1

    monkeypatch.setattr(engine.arena, "KVCache", Counted)
    ours = our_engine(hf_model(), max_batch_size=1)
    for method in ("hydragen", "hydragen_noshared"):
        ours.release_caches()
        ours.generate([[1], [2] * 50], SamplingParams(temperature=0, max_tokens=3), attention=method)
    assert num_made == 4


GREEDY = SamplingParams(temperature=0, max_tokens=3)
PROMPTS = [[1, 2, 3] * 40, [4, 5, 6, 7] * 30, [8] * 120]


def needed(ours, prompts) -> int:
    """Bytes of one wave of ``prompts``, which share nothing: their cache and their prefill."""
    num_tokens = sum(len(prompt) for prompt in prompts)
    model = ours.model
    activations = activation_bytes(
        model.config, torch.float32, 1, num_tokens, len(prompts), model.prefill_chunk
    )
    return (num_tokens + 2 * len(prompts)) * ours.arena.bytes_per_token + activations


def give(monkeypatch, num_bytes: int) -> None:
    """Leaves that much free memory beside what the arena holds."""
    monkeypatch.setattr(engine.arena, "_FRACTION", 1)
    monkeypatch.setattr(engine.arena, "available_bytes", lambda group: num_bytes)


def num_waves(ours) -> int:
    with passes(ours.model) as seen:
        ours.generate(PROMPTS, GREEDY)
    return sum(p.is_prefill for p in seen)


def test_a_wave_leaves_room_for_its_activations(monkeypatch):
    ours = our_engine(hf_model())
    for num_bytes, expected in ((needed(ours, PROMPTS), 1), (needed(ours, PROMPTS) - 1, 2)):
        ours.release_caches()
        give(monkeypatch, num_bytes)
        assert num_waves(ours) == expected
    ours.release_caches()
    give(monkeypatch, needed(ours, PROMPTS[:1]) - 1)
    with pytest.raises(InputError, match=r"^prompt 0 needs room for 122 tokens .* GiB for activations on each rank; "):
        ours.generate(PROMPTS, GREEDY)
    assert ours.arena.num_used == 0


def test_beside_a_cache_set_up_ahead_only_activations_need_room(monkeypatch):
    ours = our_engine(hf_model())
    ours.setup_caches(366)
    room = needed(ours, PROMPTS) - 366 * ours.arena.bytes_per_token
    ours.arena._limit = 0  # of a call that found no memory
    give(monkeypatch, room - 1)
    assert num_waves(ours) == 2, "free memory is looked up anew before anything is refused"
    give(monkeypatch, room)
    assert num_waves(ours) == 1
    ours.arena._limit = 0
    give(monkeypatch, 100)
    with pytest.raises(InputError, match=r"^prompt 0 needs 0.00 GiB for activations .* set up a smaller cache"):
        ours.generate(PROMPTS, GREEDY)


def test_free_memory_is_looked_up_once_a_call_and_beside_a_set_up_cache_only_to_refuse(monkeypatch):
    ours, count = our_engine(hf_model()), 0

    def counted(group):
        nonlocal count
        count += 1
        return 2**30

    monkeypatch.setattr(engine.arena, "available_bytes", counted)
    for max_batch_size in (1, 3):  # in waves, and at once
        ours.max_batch_size, count = max_batch_size, 0
        ours.generate(PROMPTS, GREEDY)
        assert count == 1
    ours.setup_caches(400)
    count = 0
    ours.generate(PROMPTS, GREEDY)
    assert count == 0
    ours.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20))  # in waves, for want of room
    assert count == 1


def test_what_an_earlier_call_left_above_kept_levels_makes_way(monkeypatch):
    """The arena is cut to what is in use when activations need the memory, and grows by no more than is missing."""
    ours = our_engine(hf_model())
    ours.append_shared([[7] * 30])
    size = ours.arena.bytes_per_token
    ours.generate([[1], [2], [3]], SamplingParams(temperature=0, max_tokens=140), shared_cache_op="preserve")
    assert ours.arena.capacity == 30 + 3 * 140
    room = needed(ours, PROMPTS) + 30 * size
    give(monkeypatch, room - ours.arena.capacity * size)
    with passes(ours.model) as seen:
        left = ours.generate(PROMPTS, GREEDY, shared_cache_op="preserve")
    assert sum(p.is_prefill for p in seen) == 1 and ours.arena.capacity == 30 + 366
    whole = ours.generate([[7] * 30 + prompt for prompt in PROMPTS], GREEDY)
    assert [r.token_ids for r, in left] == [r.token_ids for r, in whole]


def test_an_empty_arena_makes_way_for_activations(monkeypatch):
    """What one call left is not in the way of the next, which needs a small cache and large activations."""
    ours = our_engine(hf_model())
    give(monkeypatch, needed(ours, PROMPTS))
    ours.generate([[1], [2], [3]], SamplingParams(temperature=0, max_tokens=140))
    assert ours.arena.capacity > 366
    held = ours.arena.capacity * ours.arena.bytes_per_token
    give(monkeypatch, needed(ours, PROMPTS) - held)
    assert num_waves(ours) == 1 and ours.arena.capacity == 366


def test_a_cache_of_the_exact_need_serves_one_wave():
    ours = our_engine(hf_model())
    prompts = [[1], [2, 3], [4, 5, 6]]  # 1.5 times the rooms would make them equal
    for method, room in (("hydragen", 12), ("hydragen_noshared", 12)):
        ours.setup_caches(room)
        with passes(ours.model) as seen:
            ours.generate(prompts, GREEDY, attention=method)
        assert [p.num_tokens for p in seen] == [6, 3, 3]


@pytest.mark.parametrize("in_use", [False, True])
def test_an_arena_whose_growth_failed_can_be_used(monkeypatch, in_use):
    ours, plain = our_engine(hf_model()), our_engine(hf_model())
    expected = [plain.generate([[7] * 30 + end], GREEDY)[0][0].token_ids for end in ([1], [2] * 60)]
    if in_use:
        ours.append_shared([[7] * 30])
        ends, op = [[1], [2] * 60], "preserve"
    else:
        ends, op = [[7] * 30 + [1], [7] * 30 + [2] * 60], "wipe"
        ours.generate([ends[0]], GREEDY)
    capacity = ours.arena.capacity
    arena_of, num_left = KVCache._arena, 3

    def fails(self, num_slots):
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise torch.OutOfMemoryError("no more")
        return arena_of(self, num_slots)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "_arena", fails)
        with pytest.raises(torch.OutOfMemoryError):
            ours.generate([ends[1]], GREEDY, shared_cache_op=op)
    assert ours.arena.capacity == (capacity if in_use else 0)
    assert ours.arena.num_used == (30 if in_use else 0)
    for end, tokens in zip(ends, expected, strict=True):
        assert ours.generate([end], GREEDY, shared_cache_op=op)[0][0].token_ids == tokens
