"""Who gets room in the arena, and when it is given back. Nothing is computed here."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import hf_model, our_model
from strategies import SETTINGS, prompt_sets

from engine.arena import Arena, NoRoomError
from engine.attention import METHODS, Keeps, get_method
from engine.prefix_tree import build_from_prompts
from engine.tree_room import ResidentNode, TreeRoom

MODEL = our_model(hf_model())


def make_room(prompts, num_tokens, method="hydragen", kept=None, own=2, arena=None):
    """Each sequence with ``own`` slots for what it generates, in an arena that was set up."""
    tree = build_from_prompts(prompts)
    if arena is None:
        arena = Arena(MODEL)
        arena.set_up(num_tokens)
    return TreeRoom(arena, MODEL, tree, get_method(method), tree.table.suffix_length + own, kept or {}), arena, tree


def prefill(room, tree):
    """What an executor does to ``node_hidden``."""
    for node in {node for i in room.running for node in tree.leaf_path(i)}:
        room.node_hidden.setdefault(node, torch.empty(0))


def check_layout(room, arena, tree):
    """Everything that runs lies somewhere, nothing overlaps, and what is in use is what the arena counts."""
    placement, table = room.placement, tree.table
    ranges = [(int(placement.sequence_starts[i]), int(placement.sequence_slots[i])) for i in room.running]
    nodes = sorted({node for i in room.running for node in tree.leaf_path(i)})
    assert all(placement.node_starts[node] >= 0 for node in nodes)
    if placement.keeps is Keeps.NODES:
        # Nodes that wait for the next sequence are there as well.
        there = np.flatnonzero(placement.node_starts >= 0).tolist()
        ranges += [(int(placement.node_starts[node]), int(table.node_length[node])) for node in there]
        waiting = set(tree.leaf_path(room.num_admitted)) if room.num_waiting else set()
        assert set(there) <= set(nodes) | waiting
    elif placement.keeps is Keeps.HISTORIES:
        for node in nodes:
            holders = placement.sequence_starts[[i for i in room.running if node in tree.leaf_path(i)]]
            assert placement.node_starts[node] - table.node_position[node] in holders
    taken = [slot for start, length in ranges for slot in range(start, start + length)]
    assert len(set(taken)) == len(taken) == arena.num_used and all(0 <= slot < arena.capacity for slot in taken)


@given(prompt_sets(), st.sampled_from(sorted(METHODS)), st.integers(1, 5), st.integers(0, 40), st.data())
@settings(SETTINGS, max_examples=200)
def test_sequences_come_in_order_and_leave_in_any(prompts, method, limit, spare, data):
    room, arena, tree = make_room(prompts, max(map(len, prompts)) + 2 + spare, method)
    came = []
    while room.num_waiting or len(room.running):
        if room.num_waiting and len(room.running) < limit:
            before = room.running
            new = room.admit(limit - len(before), "it")
            came += new.tolist()
            assert len(new) or len(before), "the next one has room where nothing runs"
            assert room.running.tolist() == sorted({*before.tolist(), *new.tolist()}) and len(room.running) <= limit
            prefill(room, tree)
            check_layout(room, arena, tree)
        if len(room.running):
            ended = data.draw(st.lists(st.sampled_from(room.running.tolist()), unique=True, min_size=1))
            room.release(np.array(sorted(ended)))
            check_layout(room, arena, tree)
    assert came == list(range(tree.num_sequences)) and arena.num_used == 0 and room.node_hidden == {}


def test_waiting_sequences_take_the_place_of_those_that_ended():
    """A node of 4 and room for three sequences of 3; then the next node comes as soon as there is room for it."""
    prompts = [[1, 1, 1, 1, i] for i in range(2, 7)] + [[2, 2, 2, i] for i in range(2)]
    room, arena, tree = make_room(prompts, 4 + 3 * 3)
    assert room.admit(10, "it").tolist() == [0, 1, 2]
    prefill(room, tree)
    start = room.placement.sequence_starts[1]
    assert len(room.admit(10, "it")) == 0
    room.release(np.array([1]))
    assert room.admit(10, "it").tolist() == [3] and room.placement.sequence_starts[3] == start
    prefill(room, tree)
    room.release(np.array([0, 2]))
    assert room.admit(10, "it").tolist() == [4]  # the next one has a node of 3 above it, and 3 slots are left
    prefill(room, tree)
    room.release(np.array([3, 4]))
    assert arena.num_used == 0, "nobody below the node is left"
    assert room.admit(10, "it").tolist() == [5, 6]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_limit_is_kept(method):
    room, _, tree = make_room([[1, 1, i] for i in range(2, 9)], 1000, method)
    assert room.admit(3, "it").tolist() == [0, 1, 2]
    prefill(room, tree)
    room.release(np.array([0]))
    assert room.admit(1, "it").tolist() == [3]


def test_a_node_stays_while_one_below_it_waits():
    room, arena, tree = make_room([[1, 1, 1, 1, i] for i in range(2, 5)], 4 + 3)
    for sequence in range(3):
        assert room.admit(10, "it").tolist() == [sequence]
        assert room.placement.node_starts.tolist() == [0]
        prefill(room, tree)
        hidden = room.node_hidden[0]
        room.release(np.array([sequence]))
        assert (room.node_hidden.get(0) is hidden) == (sequence < 2) == bool(arena.num_used)


def test_a_history_is_copied_from_whoever_still_has_it():
    """The baseline's node lies in the range of a sequence; when that one ends, in another's."""
    room, _, tree = make_room([[1, 1, 1, 1, i] for i in range(2, 7)], 1000, "hydragen_noshared")
    room.admit(3, "it")
    prefill(room, tree)
    starts = room.placement.sequence_starts.copy()
    assert room.placement.node_starts.tolist() == [starts[0]]
    room.release(np.array([0]))
    assert room.placement.node_starts.tolist() == [starts[1]]
    room.admit(1, "it")
    assert room.placement.node_starts.tolist() == [starts[1]], "it is there, and need not be computed again"
    room.release(np.array([1, 2]))
    assert room.placement.node_starts.tolist() == room.placement.sequence_starts[[3]].tolist()
    room.release(np.array([3]))
    assert room.placement.node_starts.tolist() == [-1] and room.node_hidden == {}


def test_one_that_alone_has_no_room():
    room, arena, tree = make_room([[1] * 50, [2]], 10)
    with pytest.raises(NoRoomError, match="^the prompt needs room for 52 tokens .*; there is room for 10; set up"):
        room.admit(5, "the prompt")
    assert arena.num_used == 0 and len(room.running) == 0
    room.skip()
    assert room.admit(5, "it").tolist() == [1]


def test_kept_nodes_stay_where_they_are():
    arena = Arena(MODEL)
    arena.set_up(20)
    (slot,) = arena.allocate([4], "it")
    hidden = torch.ones(1)
    kept = {0: ResidentNode(slot, 4, hidden)}
    room, _, tree = make_room([[1, 1, 1, 1, i] for i in range(2, 5)], 20, kept=kept, arena=arena)
    assert room.admit(5, "it").tolist() == [0, 1, 2] and arena.num_used == 4 + 9
    assert room.node_hidden == {0: hidden} and room.placement.node_starts.tolist() == [slot]
    room.close()
    assert arena.num_used == 4


def test_nodes_that_are_handed_over_are_the_callers():
    room, arena, tree = make_room([[1, 1, 1, 1, i] for i in range(2, 5)], 20)
    room.admit(5, "it")
    prefill(room, tree)
    handed = room.hand_over([0])
    room.close()
    assert handed[0].length == 4 == arena.num_used
    arena.free(handed[0].slot, handed[0].length)


@pytest.mark.parametrize("failed", [False, True])
def test_what_may_hold_nan_is_zeroed_when_it_is_given_back(failed):
    room, arena, tree = make_room([[1, 1, 1, 1, i] for i in range(2, 5)], 4 + 9)
    room.admit(5, "it")
    keys, values = (x[: arena.capacity] for x in arena.cache.layer(0))
    keys[:], values[:] = float("nan"), float("nan")
    if failed:
        room.expect_nan()
    room.close()
    assert bool(keys.isfinite().all()) == bool(values.isfinite().all()) == failed


def test_an_arena_that_grows_below_running_sequences_grows_by_more_than_is_missing():
    """Growing moves what is in use, so it should not happen at every step."""
    tree = build_from_prompts([[i, i] for i in range(30)])
    arena = Arena(MODEL)
    room = TreeRoom(arena, MODEL, tree, get_method("hydragen"), tree.table.suffix_length + 8, {})
    capacities = []
    for limit in (20, 1, 1, 1):
        room.admit(limit, "it")
        capacities.append(arena.capacity)
    assert capacities == [200, 225, 225, 253]
    room.close()


def test_what_a_prefill_takes_besides_is_counted():
    tree = build_from_prompts([[i, i] for i in range(3)])
    rooms = tree.table.suffix_length + 8
    with pytest.raises(NoRoomError, match=r"it needs .* and 1048576\.\d\d GiB for activations"):
        TreeRoom(Arena(MODEL), MODEL, tree, get_method("hydragen"), rooms, {}, extra_bytes=2**50).admit(3, "it")
