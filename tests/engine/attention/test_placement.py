"""Where the nodes and sequences of a small tree lie."""

import numpy as np

from engine.attention import Keeps, Placement
from engine.attention.placement import equal_where_cheap, place_in_order
from engine.prefix_tree import build_from_levels

# Node 0 has 3 tokens, node 1 below it 2, node 2 beside them 1; sequences 0 and 1 are below node 1, 2 below node 0,
# 3 below node 2, and 4 below none.
TREE = build_from_levels(
    [[[7, 8, 9], [5], []], [[1, 2], [], [], []], [[3], [], [4, 5, 6], [1, 1], [6, 6]]],
    parents=[[0, 0, 1, 2], [0, 0, 1, 2, 3]],
)
ROOMS = np.array([3, 2, 5, 4, 4])
ALL = np.arange(5)


def test_nodes_once_and_what_is_a_sequences_own():
    placement, num_slots = place_in_order(TREE, Keeps.NODES, ROOMS)
    assert num_slots == 6 + 18
    assert placement.node_starts.tolist() == [0, 3, 5]
    assert placement.suffix_starts(ALL).tolist() == [6, 9, 11, 16, 20]
    assert placement.suffix_rooms(ALL).tolist() == ROOMS.tolist()
    assert all(len(placement.copies(node, ALL)) == 0 for node in range(3))


def test_whole_histories():
    placement, num_slots = place_in_order(TREE, Keeps.HISTORIES, ROOMS)
    assert num_slots == 32 and placement.slots_for(ROOMS).tolist() == [8, 7, 8, 5, 4]
    assert placement.suffix_starts(ALL).tolist() == [5, 13, 18, 24, 28]
    assert placement.suffix_rooms(ALL).tolist() == ROOMS.tolist()
    assert placement.node_starts.tolist() == [0, 3, 23]  # in the range of the first sequence below each
    assert [placement.copies(node, ALL).tolist() for node in range(3)] == [[0, 8, 15], [3, 11], [23]]
    assert placement.copies(0, np.array([1, 4])).tolist() == [8]


def test_nothing():
    placement, num_slots = place_in_order(TREE, Keeps.NOTHING, ROOMS)
    assert num_slots == 0 and not placement.slots_for(ROOMS).any() and len(placement.copies(0, ALL)) == 0


def test_what_is_not_there_has_no_slot():
    placement = Placement(TREE, Keeps.NODES)
    assert (placement.node_starts == -1).all() and (placement.sequence_starts == -1).all()


def test_lengths_are_made_equal_only_where_that_is_cheap():
    assert equal_where_cheap(np.array([4, 3, 2])).tolist() == [4, 4, 4]
    assert equal_where_cheap(np.array([9, 1, 2])).tolist() == [9, 1, 2]
    assert equal_where_cheap(np.array([], dtype=np.int64)).tolist() == []
