import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import HARD_CASES, SETTINGS, hard_cases, level_sets, prompt_sets

from engine.errors import InputError
from engine.prefix_tree import build_from_levels, build_from_prompts, flatten, levels, repeat, root_only, validate


def shape(tree):
    """``(nodes, sequences)``: each node as (parent, tokens), each depth-first sequence as (caller, node, suffix)."""
    nodes = [(node.parent, node.tokens.tolist()) for node in tree.nodes]
    suffixes = [suffix.tolist() for suffix in tree.suffixes]
    return nodes, list(zip(tree.order, tree.leaf_nodes, suffixes))


def shared_prefixes(prompts, min_shared=1):
    """The reference: ``{(prefix, prompts that begin with it)}``, one for each node that there should be.

    For every set of two or more prompts with a common prefix that no other prompt has, the longest; less those that
    are not ``min_shared`` longer than the longest one kept above them.
    """
    holders = {}
    for i, prompt in enumerate(prompts):
        for end in range(1, len(prompt) + 1):
            holders.setdefault(tuple(prompt[:end]), set()).add(i)
    longest = {}
    for prefix, sequences in holders.items():
        if len(sequences) > 1:
            longest[frozenset(sequences)] = max(longest.get(frozenset(sequences), ()), prefix, key=len)
    kept = {}
    for sequences, prefix in sorted(longest.items(), key=lambda item: len(item[1])):
        above = max((len(p) for s, p in kept.items() if sequences < s), default=0)
        if len(prefix) - above >= min_shared:
            kept[sequences] = prefix
    return {(prefix, sequences) for sequences, prefix in kept.items()}


def node_prefixes(tree):
    found = set()
    for node in tree.nodes:
        leaves = range(node.first_leaf, node.first_leaf + node.num_leaves)
        prefix = tuple(tree.sequence_tokens(leaves[0])[: node.end].tolist())
        found.add((prefix, frozenset(tree.order[i] for i in leaves)))
    return found


def test_finds_every_maximal_shared_prefix_and_meets_every_hard_case():
    met = set()

    @given(prompt_sets())
    @settings(SETTINGS, max_examples=300)
    def check(prompts):
        tree = build_from_prompts(prompts)
        validate(tree)
        assert flatten(tree) == prompts
        assert node_prefixes(tree) == shared_prefixes(prompts)
        met.update(hard_cases(prompts, tree))

    check()
    assert met == HARD_CASES


@given(prompt_sets(), st.integers(2, 5))
@settings(SETTINGS, max_examples=100)
def test_a_minimum_length_keeps_the_sequences_and_drops_short_nodes(prompts, min_shared):
    tree = build_from_prompts(prompts, min_shared=min_shared)
    validate(tree)
    assert flatten(tree) == prompts
    assert node_prefixes(tree) == shared_prefixes(prompts, min_shared)


@given(level_sets())
@settings(SETTINGS, max_examples=100)
def test_levels_come_back_as_given(levels_and_parents):
    given_levels, parents = levels_and_parents
    tree = build_from_levels(given_levels, parents=parents)
    validate(tree)
    expected = []
    for j in range(len(given_levels[-1])):
        sequence, entry = given_levels[-1][j], j
        for above, owners in zip(given_levels[-2::-1], parents[::-1]):
            entry = owners[entry]
            sequence = above[entry] + sequence
        expected.append(sequence)
    assert flatten(tree) == expected
    runs = sorted(tuple(entry) for level in given_levels[:-1] for entry in level if entry)
    assert sorted(tuple(node.tokens.tolist()) for node in tree.nodes) == runs


@given(prompt_sets(), st.data())
@settings(SETTINGS, max_examples=100)
def test_samples_of_a_prompt_share_all_of_it(prompts, data):
    counts = data.draw(st.lists(st.integers(1, 3), min_size=len(prompts), max_size=len(prompts)))
    tree = repeat(build_from_prompts(prompts), counts)
    validate(tree)
    assert flatten(tree) == [prompt for prompt, count in zip(prompts, counts) for _ in range(count)]
    several = [count > 1 for count in counts for _ in range(count)]
    assert all(len(tree.suffixes[i]) == 0 for i, caller in enumerate(tree.order) if several[caller])
    assert all(node.num_leaves > 1 for node in tree.nodes)


@given(level_sets())
@settings(SETTINGS, max_examples=100)
def test_root_only_shares_the_roots_and_nothing_else(levels_and_parents):
    tree = build_from_levels(levels_and_parents[0], parents=levels_and_parents[1])
    flat = root_only(tree)
    validate(flat)
    assert flatten(flat) == flatten(tree)
    assert [n.tokens.tolist() for n in flat.nodes] == [n.tokens.tolist() for n in tree.nodes if n.depth == 0]


@pytest.mark.parametrize(
    "prompts, nodes, sequences",
    [
        pytest.param([[1, 2, 3]], [], [(0, -1, [1, 2, 3])], id="one prompt"),
        pytest.param([[1], [2]], [], [(0, -1, [1]), (1, -1, [2])], id="nothing shared"),
        pytest.param([[5, 6]] * 3, [(-1, [5, 6])], [(0, 0, []), (1, 0, []), (2, 0, [])], id="identical"),
        pytest.param([[1, 2, 3], [1, 2]], [(-1, [1, 2])], [(0, 0, [3]), (1, 0, [])], id="a prefix of another"),
        pytest.param([[1, 5], [1, 6], [1, 7]], [(-1, [1])], [(0, 0, [5]), (1, 0, [6]), (2, 0, [7])], id="BOS only"),
        pytest.param(
            [[9, 1], [4, 4, 1], [9, 2], [7], [4, 4, 2, 0], [4, 4, 2, 1]],
            [(-1, [9]), (-1, [4, 4]), (1, [2])],
            [(0, 0, [1]), (2, 0, [2]), (1, 1, [1]), (4, 2, [0]), (5, 2, [1]), (3, -1, [7])],
            id="several roots, uneven, out of order",
        ),
    ],
)
def test_exact_trees(prompts, nodes, sequences):
    assert shape(build_from_prompts(prompts)) == (nodes, sequences)


def test_short_runs_are_pushed_down_and_can_make_a_child_long_enough():
    prompts = [[1, 2, 3], [1, 2, 4], [1, 5]]
    assert shape(build_from_prompts(prompts, min_shared=2)) == (
        [(-1, [1, 2])],
        [(0, 0, [3]), (1, 0, [4]), (2, -1, [1, 5])],
    )
    assert shape(build_from_prompts(prompts, min_shared=3))[0] == []


def test_positions_and_paths():
    tree = build_from_prompts([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 9]])
    positions = [(node.start, node.end, node.depth, node.first_leaf, node.num_leaves) for node in tree.nodes]
    assert positions == [(0, 1, 0, 0, 3), (1, 3, 1, 0, 2)]
    assert [tree.leaf_path(i) for i in range(3)] == [[0, 1], [0, 1], [0]]
    assert [tree.suffix_start(i) for i in range(3)] == [3, 3, 1]
    assert [tree.sequence_length(i) for i in range(3)] == [4, 5, 2]
    assert levels(tree) == [[0], [1]]


def test_explicit_levels_divide_evenly_and_keep_single_children():
    tree = build_from_levels([[[1]], [[2], [2]], [[3], [], [5], [6]]])
    assert shape(tree) == (
        [(-1, [1]), (0, [2]), (0, [2])],
        [(0, 1, [3]), (1, 1, []), (2, 2, [5]), (3, 2, [6])],
    )
    assert shape(build_from_levels([[[1]], [[2]], [[3]]])) == ([(-1, [1]), (0, [2])], [(0, 1, [3])])


def test_an_empty_upper_entry_makes_no_node():
    tree = build_from_levels([[[1], []], [[2], []], [[3], [4]]])
    assert shape(tree) == ([(-1, [1]), (0, [2])], [(0, 1, [3]), (1, -1, [4])])


def test_many_prompts_with_a_long_shared_prefix_build_fast_and_keep_only_what_is_unique():
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 32000, 4096)
    prompts = [np.concatenate([prefix, [i, 7]]) for i in range(2000)]
    begin = time.perf_counter()
    tree = build_from_prompts(prompts)
    assert time.perf_counter() - begin < 2  # 0.06 s here; a loop over tokens takes minutes
    assert [len(node.tokens) for node in tree.nodes] == [4096]
    assert all(suffix.base is None for suffix in tree.suffixes)  # a view would keep its whole prompt in memory


def test_prompts_that_nest_deeper_than_python_recurses():
    tree = build_from_prompts([[1] * (i + 1) for i in range(1500)])
    assert len(tree.nodes) == 1499 and tree.nodes[-1].depth == 1498
    assert len(tree.leaf_path(tree.order.index(1499))) == 1499


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: build_from_prompts([]), "prompts: got none"),
        (lambda: build_from_prompts([[1], [], [2]]), "prompt 1: got no tokens"),
        (lambda: build_from_prompts([[1], [0.5]]), "prompt 1: got tokens that are no token ids"),
        (lambda: build_from_prompts([[1], [-1]]), "prompt 1: got tokens that are no token ids"),
        (lambda: build_from_prompts(["text"]), "prompt 0: got str"),
        (lambda: build_from_prompts([np.array([[1]])]), "prompt 0: got ndarray of int64 and shape"),
        (lambda: build_from_prompts([np.array([1, -2])]), "prompt 0: got token ids from -2 to 1"),
        (lambda: build_from_prompts([[1]], min_shared=0), "min_shared: got 0"),
        (lambda: build_from_levels([]), "levels: got none"),
        (lambda: build_from_levels([[[1]], []]), "level 1: got no prompts"),
        (lambda: build_from_levels([[[1], [2]], [[3], [4], [5]]]), "level 1: got 3 prompts to divide over the 2"),
        (lambda: build_from_levels([[[1], [2]], [[3]]]), "level 1: got 1 prompts to divide over the 2"),
        (lambda: build_from_levels([[[1], []], [[], []]]), "level 1, entry 1: got no tokens in it or above"),
        (lambda: build_from_levels([[[1]], [[2]]], parents=[]), "parents: got 0 lists for 2 levels"),
        (lambda: build_from_levels([[[1]], [[2]]], parents=[[0, 0]]), "parents of level 1: got 2 for 1 prompts"),
        (lambda: build_from_levels([[[1]], [[2]]], parents=[[1]]), "parents of level 1: got 1 for entry 0"),
        (lambda: build_from_levels([[[1], [2]], [[2]]], parents=[[0]]), "level 0, entry 1: got nothing below it"),
        (lambda: repeat(build_from_prompts([[1]]), [0]), "counts: got 0 for sequence 0"),
        (lambda: repeat(build_from_prompts([[1]]), [1, 1]), "counts: got 2 for 1 sequences"),
    ],
)
def test_mistakes_are_named_in_one_line(build, message):
    with pytest.raises(InputError) as error:
        build()
    assert str(error.value).startswith(message)
    assert "accepted: " in str(error.value) and "\n" not in str(error.value)
