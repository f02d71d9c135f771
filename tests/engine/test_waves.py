from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SETTINGS, prompt_sets

from engine.prefix_tree import build_from_prompts, validate
from engine.waves import restrict, waves


@given(prompt_sets(), st.data())
@settings(SETTINGS, max_examples=150)
def test_a_stretch_of_a_tree_is_a_tree_of_its_sequences(prompts, data):
    tree = build_from_prompts(prompts)
    first = data.draw(st.integers(0, tree.num_sequences - 1))
    last = data.draw(st.integers(first + 1, tree.num_sequences))
    part, whole_index = restrict(tree, first, last)
    assert part.order == tree.order[first:last]
    assert [part.sequence_tokens(i).tolist() for i in range(last - first)] == [prompts[c] for c in part.order]
    assert [[whole_index[n] for n in part.leaf_path(i)] for i in range(last - first)] == [
        tree.leaf_path(i) for i in range(first, last)
    ]
    in_use = {n for i in range(first, last) for n in tree.leaf_path(i)}
    assert sorted(whole_index) == whole_index and set(whole_index) == in_use
    # Numbered anew from 0, it is a tree like any other.
    ranks = {caller: rank for rank, caller in enumerate(sorted(part.order))}
    validate(type(part)(part.nodes, tuple(ranks[c] for c in part.order), part.leaf_nodes, part.suffixes))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 25))
@settings(SETTINGS, max_examples=200)
def test_waves_are_as_long_as_fits(costs, max_batch_size, room):
    fits = lambda first, last: sum(costs[first:last]) <= room  # noqa: E731
    found = list(waves(len(costs), max_batch_size, fits))
    assert [i for wave in found for i in range(*wave)] == list(range(len(costs)))
    for first, last in found:
        assert last - first <= max_batch_size
        assert fits(first, last) or last == first + 1
        full = last == len(costs) or last - first == max_batch_size
        assert full or not fits(first, last + 1)


def test_what_fits_is_asked_anew_when_a_wave_has_ended():
    room = 4
    found = []
    for first, last in waves(9, 100, lambda first, last: last - first <= room):
        found.append((first, last))
        room -= 1
    assert found == [(0, 4), (4, 7), (7, 9)]
