"""What the methods plan for a small tree, table by table."""

import numpy as np
import pytest
import torch
from models import hf_model, our_model

from engine.attention import METHODS, Auto, Keeps, Placement, Runs, get_method
from engine.attention.crossover import ALWAYS, NEVER, Crossover
from engine.attention.placement import place_in_order
from engine.errors import InputError
from engine.executor import Executor
from engine.kv_cache import KVCache
from engine.prefix_tree import build_from_levels

#   node 0: 7 8 9          positions 0-2
#     node 1: 1 2          positions 3-4
#       sequence 0: 3      position 5
#       sequence 1: -
#     sequence 2: 4 5 6    positions 3-5
#   node 2: 5              position 0
#     sequence 3: 1 1      positions 1-2
#   sequence 4: 6 6        positions 0-1
TREE = build_from_levels(
    [[[7, 8, 9], [5], []], [[1, 2], [], [], []], [[3], [], [4, 5, 6], [1, 1], [6, 6]]],
    parents=[[0, 0, 1, 2], [0, 0, 1, 2, 3]],
)
SUFFIX_LENS = [1, 0, 3, 2, 2]
POSITIONS = [5, 5, 3, 1, 0]
ROOMS = np.array([3, 2, 5, 4, 4])  # two new tokens each


def suffix_runs(placement, sequences, num_new, own_lens):
    s = np.array(sequences)
    return Runs(
        num_new=np.array(num_new),
        positions=np.array(POSITIONS)[s],
        own_starts=placement.suffix_starts(s),
        own_lens=np.array(own_lens),
        own_rooms=placement.suffix_rooms(s),
        paths=TREE.paths(TREE.table.leaf_node[s]),
    )


def tables(segments):
    """Each segment as (q_offsets, k_starts, k_lens, causal)."""
    return [(s.q_offsets.tolist(), s.k_starts.tolist(), s.k_lens.tolist(), s.causal) for s in segments]


def test_the_tree_is_the_one_in_the_drawing():
    assert [(n.parent, n.tokens.tolist(), n.first_leaf, n.num_leaves) for n in TREE.nodes] == [
        (-1, [7, 8, 9], 0, 3),
        (0, [1, 2], 0, 2),
        (-1, [5], 3, 1),
    ]
    assert TREE.order == (0, 1, 2, 3, 4)
    assert [len(s) for s in TREE.suffixes] == SUFFIX_LENS


def placed(first: int, slots: int) -> Placement:
    """Of hydragen: nodes at 100, 200 and 300, sequences ``slots`` slots apart from ``first`` on."""
    placement = Placement(TREE, Keeps.NODES)
    placement.node_starts[:] = [100, 200, 300]
    placement.sequence_starts[:] = first + slots * np.arange(5)
    placement.sequence_slots[:] = slots
    return placement


def test_hydragen_plans_one_segment_a_level_and_one_for_the_suffixes():
    method = get_method("hydragen")
    placement = placed(400, 5)
    prefill = suffix_runs(placement, [0, 2, 3, 4], [1, 3, 2, 2], [1, 3, 2, 2])
    assert tables(method.shared_segments(TREE, placement, prefill)) == [
        ([0, 4, 6, 8], [100, 300, 0], [3, 1, 0], False),
        ([0, 1, 8], [200, 0], [2, 0], False),
    ]
    assert tables(method.own_segments(prefill)) == [([0, 1, 4, 6, 8], [400, 410, 415, 420], [1, 3, 2, 2], True)]
    assert method.own_segments(prefill)[0].k_rooms.tolist() == [5] * 4

    decode = suffix_runs(placement, [0, 1, 2, 3, 4], [1] * 5, [2, 1, 4, 3, 3])
    assert tables(method.shared_segments(TREE, placement, decode)) == [
        ([0, 3, 4, 5], [100, 300, 0], [3, 1, 0], False),
        ([0, 2, 5], [200, 0], [2, 0], False),
    ]
    assert tables(method.own_segments(decode)) == [
        ([0, 1, 2, 3, 4, 5], [400, 405, 410, 415, 420], [2, 1, 4, 3, 3], True)
    ]


def test_hydragen_plans_no_level_that_nobody_left_has():
    method = get_method("hydragen")
    placement = placed(400, 5)

    def shared(*sequences):
        ones = [1] * len(sequences)
        return method.shared_segments(TREE, placement, suffix_runs(placement, sequences, ones, ones))

    assert tables(shared(1, 3)) == [
        ([0, 1, 2], [100, 300], [3, 1], False),
        ([0, 1, 2], [200, 0], [2, 0], False),
    ]
    assert tables(shared(2, 3)) == [([0, 1, 2], [100, 300], [3, 1], False)]
    assert shared(4) == []


def test_noshared_plans_one_segment_over_whole_histories():
    method = get_method("hydragen_noshared")
    placement, _ = place_in_order(TREE, Keeps.HISTORIES, ROOMS)  # histories of 5 5 3 1 0 and ROOMS: 8 7 8 5 4 slots
    prefill = suffix_runs(placement, [0, 2, 3, 4], [1, 3, 2, 2], [1, 3, 2, 2])
    assert method.shared_segments(TREE, placement, prefill) == []
    assert tables(method.own_segments(prefill)) == [([0, 1, 4, 6, 8], [0, 15, 23, 28], [6, 6, 3, 2], True)]
    assert method.own_segments(prefill)[0].k_rooms.tolist() == [8, 8, 5, 4]
    decode = suffix_runs(placement, [1, 2], [1, 1], [1, 4])
    assert tables(method.own_segments(decode)) == [([0, 1, 2], [8, 15], [6, 7], True)]


class TestAuto:
    placement = placed(400, 5)
    decode = suffix_runs(placement, [0, 1, 2, 3, 4], [1] * 5, [2, 1, 4, 3, 3])

    def shared(self, crossover, runs=decode):
        return tables(Auto(crossover).shared_segments(TREE, self.placement, runs))

    def test_that_always_shares_is_hydragen_but_for_nodes_of_one_sequence(self):
        assert self.shared(ALWAYS) == [
            ([0, 1, 2, 3, 4, 5], [0, 0, 0, 300, 0], [0, 0, 0, 1, 0], False),
            ([0, 3, 5], [100, 0], [3, 0], False),
            ([0, 2, 5], [200, 0], [2, 0], False),
        ]

    def test_that_never_shares_has_each_sequence_read_the_nodes_above_it_where_they_lie(self):
        assert self.shared(NEVER) == [
            ([0, 1, 2, 3, 4, 5], [100, 100, 100, 300, 0], [3, 3, 3, 1, 0], False),
            ([0, 1, 2, 3, 4, 5], [200, 200, 0, 0, 0], [2, 2, 0, 0, 0], False),
        ]

    def test_decides_node_by_node(self):
        assert self.shared(Crossover((2, 3), (9, 3))) == [
            ([0, 1, 2, 3, 4, 5], [0, 0, 0, 300, 0], [0, 0, 0, 1, 0], False),
            ([0, 1, 2, 3, 4, 5], [200, 200, 0, 0, 0], [2, 2, 0, 0, 0], False),
            ([0, 3, 5], [100, 0], [3, 0], False),
        ]

    def test_decides_anew_when_sequences_have_ended(self):
        runs = suffix_runs(self.placement, [0, 2, 3], [1] * 3, [2, 4, 3])
        assert self.shared(Crossover((2, 3), (4, 1)), runs) == [
            ([0, 1, 2, 3], [100, 100, 300], [3, 3, 1], False),
            ([0, 1, 2, 3], [200, 0, 0], [2, 0, 0], False),
        ]

    def test_a_prefill_shares(self):
        runs = suffix_runs(self.placement, [0, 2, 3, 4], [1, 3, 2, 2], [1, 3, 2, 2])
        hydragen = tables(get_method("hydragen").shared_segments(TREE, self.placement, runs))
        assert self.shared(NEVER, runs) == hydragen

    def test_windows_know_where_the_keys_stand(self):
        segments = Auto(NEVER).shared_segments(TREE, self.placement, self.decode)
        assert [s.k_positions.tolist() for s in segments] == [[0, 0, 0, 0, 0], [3, 3, 0, 0, 0]]


def test_a_crossover_is_that_of_the_next_smaller_number_of_queries():
    crossover = Crossover((2, 8, 16), (None, 100, 30))
    queries, lengths = np.array([1, 2, 7, 8, 15, 8, 16, 999]), np.array([10**6, 10**6, 10**6, 100, 100, 99, 30, 29])
    assert crossover.pays(queries, lengths).tolist() == [False, False, False, True, True, False, True, False]


def test_noattention_plans_and_keeps_nothing():
    method = get_method("noattention")
    placement, num_slots = place_in_order(TREE, method.keeps, ROOMS)
    runs = suffix_runs(placement, [0, 2], [1, 3], [1, 3])
    assert num_slots == 0 and method.shared_segments(TREE, placement, runs) == method.own_segments(runs) == []


def test_the_registry_names_what_it_holds():
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
    accepted = "hydragen, hydragen_noshared, noattention, auto, streaming"
    with pytest.raises(InputError, match=f"'x' is not known; accepted: {accepted}$"):
        get_method("x")


def decoded(name, poison):
    """Hidden states after one decode step of sequence 1, with NaN in the slots that ``poison(placement, capacity)``
    names, written between prefill and the step."""
    model = our_model(hf_model())
    model.prepare(16)
    method = get_method(name)
    placement, num_slots = place_in_order(TREE, method.keeps, ROOMS)
    cache = KVCache(model.config, model.num_kv_heads, num_slots, torch.float32, torch.device("cpu"))
    executor = Executor(model, method, TREE, placement, {}, cache)
    executor.prefill(np.arange(5))
    for keys, values in (cache.layer(index) for index in range(model.config.num_layers)):
        slots = poison(placement, len(keys))
        keys[slots] = values[slots] = float("nan")
    return executor.decode(np.array([1]), np.array([1]), torch.tensor([4]))


def test_a_sequence_of_the_baseline_reads_its_own_memory_and_nothing_else():

    def elsewhere(placement, capacity):
        """All slots but those of the history of 5 tokens and of the new one, which the step itself writes."""
        first = placement.sequence_starts[1]
        return [slot for slot in range(capacity) if not first <= slot < first + 6]

    clean = decoded("hydragen_noshared", lambda placement, capacity: [])
    assert torch.equal(decoded("hydragen_noshared", elsewhere), clean) and clean.isfinite().all()
    for offset in range(5):
        slot = lambda placement, capacity, offset=offset: [placement.sequence_starts[1] + offset]  # noqa: E731
        assert not decoded("hydragen_noshared", slot).isfinite().any()


def test_a_sequence_of_hydragen_reads_the_nodes_above_it():
    clean = decoded("hydragen", lambda placement, capacity: [])
    assert torch.allclose(clean, decoded("hydragen_noshared", lambda placement, capacity: []), atol=1e-5)
    for node, length in ((0, 3), (1, 2)):
        for offset in range(length):
            slot = lambda p, capacity, node=node, offset=offset: [p.node_starts[node] + offset]  # noqa: E731
            assert not decoded("hydragen", slot).isfinite().any()
    elsewhere = decoded("hydragen", lambda p, capacity: [p.node_starts[2], *range(p.sequence_starts[2], capacity)])
    assert torch.equal(elsewhere, clean)
