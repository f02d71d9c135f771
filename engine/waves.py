"""Work that does not fit at once runs in waves: stretches of sequences, depth-first, so subtree by subtree."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from engine.prefix_tree import PrefixTree


def restrict(tree: PrefixTree, first: int, last: int) -> tuple[PrefixTree, list[int]]:
    """The tree of sequences ``first : last`` (depth-first numbers), and each of its nodes' index in ``tree``.

    ``order`` keeps the caller's numbers of the whole tree.
    """
    nodes, whole_index, new_index = [], [], {-1: -1}
    for node in tree.nodes:
        leaves = range(max(node.first_leaf, first), min(node.first_leaf + node.num_leaves, last))
        if not leaves:
            continue
        new_index[node.index] = len(nodes)
        whole_index.append(node.index)
        nodes.append(
            replace(
                node,
                index=len(nodes),
                parent=new_index[node.parent],
                first_leaf=leaves.start - first,
                num_leaves=len(leaves),
            )
        )
    leaf_nodes = tuple(new_index[n] for n in tree.leaf_nodes[first:last])
    return PrefixTree(tuple(nodes), tree.order[first:last], leaf_nodes, tree.suffixes[first:last]), whole_index


def waves(num_sequences: int, max_batch_size: int, fits: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """Stretches ``first : last`` that cover all sequences, each as long as ``fits(first, last)`` allows.

    ``fits`` is asked anew for every wave, when the one before has ended. A wave of one sequence is yielded though it
    does not fit: the caller says why in its own words.
    """
    first = 0
    while first < num_sequences:
        low, high = first + 1, min(first + max_batch_size, num_sequences)  # low fits, or nothing does
        if fits(first, high):
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            if fits(first, middle):
                low = middle
            else:
                high = middle
        yield first, low
        first = low
