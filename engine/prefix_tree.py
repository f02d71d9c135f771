"""The prefix tree of shared prompts.

Every sequence is a path of nodes from a root, followed by the sequence's own *suffix*, which may be empty. A node is a
run of tokens that the sequences below it share, so its keys and values are computed and stored once. Sequences are
numbered depth-first, which makes the sequences below any node one contiguous range; ``PrefixTree.order`` leads back to
the caller's numbering. Siblings stand in the order in which they first occur in the caller's prompts.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.errors import InputError


@dataclass(frozen=True, eq=False)
class Node:
    """A run of tokens shared by the sequences ``first_leaf : first_leaf + num_leaves`` (depth-first numbers)."""

    index: int  # position in PrefixTree.nodes
    parent: int  # index of the node above, -1 for a root
    depth: int  # nodes above this one
    tokens: np.ndarray  # (length,) int64, read-only, never empty
    start: int  # position of the first token in its sequences: the tokens above
    first_leaf: int
    num_leaves: int

    @property
    def end(self) -> int:
        """The position after the last token: tokens on the path from the root, this node's included."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, eq=False)
class TreeTable:
    """A tree's numbers, for work on many nodes or sequences at once: int64, (N,) for its nodes, (B,) for sequences."""

    node_parent: np.ndarray  # (N,) as ``Node.parent`` and so on
    node_depth: np.ndarray
    node_length: np.ndarray
    node_position: np.ndarray  # of the first token: the tokens above
    node_first: np.ndarray  # the sequences below a node are node_first : node_last
    node_last: np.ndarray
    leaf_node: np.ndarray  # (B,)
    suffix_position: np.ndarray  # of a sequence's first suffix token: the tokens that its nodes hold
    suffix_length: np.ndarray

    @classmethod
    def of(cls, tree: "PrefixTree") -> "TreeTable":
        rows = [(n.parent, n.depth, len(n.tokens), n.start, n.first_leaf, n.num_leaves) for n in tree.nodes]
        parent, depth, length, position, first, count = np.array(rows, dtype=np.int64).reshape(-1, 6).T
        leaf_node = np.array(tree.leaf_nodes, dtype=np.int64)
        ends = np.append(position + length, 0)  # the last one for sequences without a node, whose number is -1
        suffix_length = np.array([len(suffix) for suffix in tree.suffixes], dtype=np.int64)
        return cls(parent, depth, length, position, first, first + count, leaf_node, ends[leaf_node], suffix_length)


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Shared nodes and what each sequence adds to them. Made by the builders of this module, not by hand.

    Everything indexed by a sequence, ``order`` itself included, is in depth-first order. Two trees compare by identity.
    """

    nodes: tuple[Node, ...]  # depth-first: a parent comes before its children
    order: tuple[int, ...]  # order[i]: the caller's number of depth-first sequence i
    leaf_nodes: tuple[int, ...]  # the node that sequence i's suffix follows, -1 where nothing is shared
    suffixes: tuple[np.ndarray, ...]  # (length,) int64, read-only: the tokens below that node

    @property
    def num_sequences(self) -> int:
        return len(self.order)

    @cached_property
    def table(self) -> TreeTable:
        return TreeTable.of(self)

    def paths(self, nodes: np.ndarray) -> np.ndarray:
        """(A, R) int64: the nodes at each depth down to each of ``nodes`` (R,), itself included, -1 below it.

        A is the largest number of nodes on one of these paths. A node of -1 has an empty one.
        """
        table, current = self.table, np.array(nodes, dtype=np.int64)
        depths = np.where(current >= 0, np.append(table.node_depth, -1)[current], -1)
        paths = np.full((int(depths.max(initial=-1)) + 1, len(current)), -1, dtype=np.int64)
        rows = np.flatnonzero(current >= 0)
        while len(rows):
            paths[table.node_depth[current[rows]], rows] = current[rows]
            current[rows] = table.node_parent[current[rows]]
            rows = rows[current[rows] >= 0]
        return paths

    def leaf_path(self, i: int) -> list[int]:
        """Indices of the nodes above sequence ``i``'s suffix, from the root down."""
        path = []
        node = self.leaf_nodes[i]
        while node >= 0:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]

    def suffix_tokens(self, i: int) -> np.ndarray:
        """The tokens of sequence ``i`` below its last node: (length,) int64, possibly empty."""
        return self.suffixes[i]

    def suffix_start(self, i: int) -> int:
        """The position of sequence ``i``'s first suffix token: the tokens that its nodes hold."""
        node = self.leaf_nodes[i]
        return self.nodes[node].end if node >= 0 else 0

    def sequence_length(self, i: int) -> int:
        """Tokens of the whole sequence ``i``."""
        return self.suffix_start(i) + len(self.suffixes[i])

    def sequence_tokens(self, i: int) -> np.ndarray:
        """The whole sequence ``i``: (length,) int64, a copy."""
        return np.concatenate([*(self.nodes[node].tokens for node in self.leaf_path(i)), self.suffixes[i]])


def build_from_prompts(prompts: Sequence[Sequence[int]], *, min_shared: int = 1) -> PrefixTree:
    """The tree of every prefix that two or more of ``prompts`` share, as long runs as possible.

    A shared run shorter than ``min_shared`` tokens makes no node: its tokens go to the front of each run below it
    (child nodes, which may reach the minimum with them, and suffixes). Runs are measured from the nearest node above.

    ``prompts`` hold token ids, as lists or one-dimensional integer arrays (which are read faster).
    Raises InputError for no prompts, an empty one, anything but token ids, and a ``min_shared`` below 1.

    Cost: one lexicographic sort, by whole-prompt byte comparisons, and one comparison per neighbouring pair.
    """
    if isinstance(min_shared, bool) or not isinstance(min_shared, int) or min_shared < 1:
        raise InputError(f"min_shared: got {min_shared!r}; accepted: an integer of 1 or more (tokens); 1 shares all")
    if len(prompts) == 0:
        raise InputError("prompts: got none; accepted: one prompt or more, each with at least one token; add a prompt")
    # Prompts with a common beginning are neighbours in any order of fixed-width encodings that compares left to right,
    # so raw bytes serve, whatever their endianness, and memcmp does the comparing.
    encoded = [_as_tokens(prompt, f"prompt {i}").tobytes() for i, prompt in enumerate(prompts)]
    by_content = sorted(range(len(encoded)), key=encoded.__getitem__)
    if len(encoded[by_content[0]]) == 0:
        raise InputError(f"prompt {by_content[0]}: got no tokens; accepted: one or more; remove it or give it BOS")
    tokens = [np.frombuffer(prompt, dtype=np.uint32) for prompt in encoded]
    shared = [_common_prefix(tokens[a], tokens[b]) for a, b in zip(by_content, by_content[1:])]

    parents: list[int] = []
    runs: list[np.ndarray] = []
    leaf_parents = [-1] * len(tokens)
    suffixes = [tokens[0]] * len(tokens)
    intervals = _shared_intervals(shared)
    following = 0
    above = [(len(tokens), 0, -1)]  # kept nodes around the position: (last position + 1, end in tokens, index)
    for position, sequence in enumerate(by_content):
        while above[-1][0] <= position:
            above.pop()
        while following < len(intervals) and intervals[following][0] == position:
            _, stop, end = intervals[following]
            following += 1
            _, parent_end, parent = above[-1]
            if end - parent_end >= min_shared:
                above.append((stop, end, len(runs)))
                parents.append(parent)
                runs.append(tokens[sequence][parent_end:end])
        _, end, leaf_parents[sequence] = above[-1]
        suffixes[sequence] = tokens[sequence][end:]
    return _assemble(parents, runs, leaf_parents, suffixes)


def build_from_levels(
    levels: Sequence[Sequence[Sequence[int]]], *, parents: Sequence[Sequence[int]] | None = None
) -> PrefixTree:
    """The tree that the caller lays out, level by level: nothing is searched for, merged or compressed.

    ``levels[0]`` holds the roots, each further level continues the one above, and the last level's entries are the
    sequences' suffixes (which may be empty): the tree has as many sequences, in that order. ``parents[l - 1][j]`` is
    the entry of level ``l - 1`` that entry ``j`` of level ``l`` continues, in any order; without ``parents`` a level
    divides evenly into consecutive blocks, one for each entry above. An entry of an upper level may be empty: it
    makes no node, and what continues it continues its parent.

    Raises InputError for levels that are missing, empty or do not divide, a parent that does not exist or that nothing
    continues, a sequence without any token, and anything but token ids.
    """
    if len(levels) == 0:
        raise InputError("levels: got none; accepted: one level or more, the last one holding the sequences; add one")
    _check_parents_given(levels, parents)
    node_parents: list[int] = []
    runs: list[np.ndarray] = []
    nodes_above, lengths_above = [-1], [0]  # for each entry of the level above: its last node, the tokens down to it
    for number, level in enumerate(levels):
        owners = _owners(levels, parents, number)
        entries = [_as_tokens(entry, f"level {number}, entry {j}") for j, entry in enumerate(level)]
        nodes = [nodes_above[owner] for owner in owners]
        lengths = [lengths_above[owner] + len(entry) for owner, entry in zip(owners, entries)]
        if number == len(levels) - 1:
            break
        for j, entry in enumerate(entries):
            if len(entry) > 0:
                node_parents.append(nodes[j])
                runs.append(entry)
                nodes[j] = len(runs) - 1
        nodes_above, lengths_above = nodes, lengths
    for j, length in enumerate(lengths):
        if length == 0:
            raise InputError(
                f"level {number}, entry {j}: got no tokens in it or above; accepted: one or more; add BOS at the root"
            )
    return _assemble(node_parents, runs, nodes, entries)


def repeat(tree: PrefixTree, counts: Sequence[int]) -> PrefixTree:
    """The tree for ``counts[j]`` samples of the caller's sequence ``j``; the samples of a sequence share all of it.

    The suffix of a sequence with several samples becomes a node with as many empty suffixes below. In the new tree's
    caller order the samples of one sequence follow each other. Raises InputError for a count below 1 or not one count
    for each sequence.
    """
    if len(counts) != tree.num_sequences:
        raise InputError(f"counts: got {len(counts)} for {tree.num_sequences} sequences; accepted: one each; match it")
    parents = [node.parent for node in tree.nodes]
    runs = [node.tokens for node in tree.nodes]
    leaf_parents: list[int] = []
    suffixes: list[np.ndarray] = []
    for i in np.argsort(tree.order):
        count, parent, suffix = counts[tree.order[i]], tree.leaf_nodes[i], tree.suffixes[i]
        if count < 1:
            raise InputError(f"counts: got {count} for sequence {tree.order[i]}; accepted: 1 or more; raise it")
        if count > 1 and len(suffix) > 0:
            parents.append(parent)
            runs.append(suffix)
            parent, suffix = len(runs) - 1, suffix[:0]
        leaf_parents += [parent] * count
        suffixes += [suffix] * count
    return _assemble(parents, runs, leaf_parents, suffixes)


def root_only(tree: PrefixTree) -> PrefixTree:
    """The same sequences with the roots alone shared: what lies below a root goes into each sequence's own suffix."""
    runs: list[np.ndarray] = []
    root_of = {}
    for node in tree.nodes:
        if node.depth == 0:
            root_of[node.index] = len(runs)
            runs.append(node.tokens)
    leaf_parents: list[int] = []
    suffixes: list[np.ndarray] = []
    for i in np.argsort(tree.order):
        path = tree.leaf_path(i)
        leaf_parents.append(root_of[path[0]] if path else -1)
        suffixes.append(np.concatenate([*(tree.nodes[node].tokens for node in path[1:]), tree.suffixes[i]]))
    return _assemble([-1] * len(runs), runs, leaf_parents, suffixes)


def select(tree: PrefixTree, sequences: Sequence[int]) -> PrefixTree:
    """The tree of some of the caller's ``sequences``, each once, numbered anew in the order in which they are given.

    Nodes with none of them below are left out; those with a single one stay.
    """
    place = np.argsort(tree.order)
    kept = sorted({node for j in sequences for node in tree.leaf_path(place[j])})
    new_index = {-1: -1} | {node: index for index, node in enumerate(kept)}
    return _assemble(
        [new_index[tree.nodes[node].parent] for node in kept],
        [tree.nodes[node].tokens for node in kept],
        [new_index[tree.leaf_nodes[place[j]]] for j in sequences],
        [tree.suffixes[place[j]] for j in sequences],
    )


def flatten(tree: PrefixTree) -> list[list[int]]:
    """Every sequence's tokens in the caller's order, nothing shared: the inverse of the builders."""
    return [tree.sequence_tokens(i).tolist() for i in np.argsort(tree.order)]


def levels(tree: PrefixTree) -> list[list[int]]:
    """Node indices by depth, each level in depth-first order: ``levels(tree)[0]`` are the roots."""
    by_depth: list[list[int]] = []
    for node in tree.nodes:
        if node.depth == len(by_depth):
            by_depth.append([])
        by_depth[node.depth].append(node.index)
    return by_depth


def validate(tree: PrefixTree) -> None:
    """Asserts what every builder promises. For tests: a failure is a fault of this module."""
    assert sorted(tree.order) == list(range(tree.num_sequences)), "order is no permutation"
    assert len(tree.leaf_nodes) == len(tree.suffixes) == tree.num_sequences > 0
    leaves: list[list[int]] = [[] for _ in tree.nodes]
    for i in range(tree.num_sequences):
        assert tree.sequence_length(i) == len(tree.sequence_tokens(i)) > 0, f"sequence {i} has no tokens"
        for node in tree.leaf_path(i):
            leaves[node].append(i)
    for position, node in enumerate(tree.nodes):
        assert node.index == position and node.parent < position, f"node {position} comes before its parent"
        above = tree.nodes[node.parent] if node.parent >= 0 else None
        assert node.depth == (above.depth + 1 if above else 0), f"node {position}: depth"
        assert node.start == (above.end if above else 0), f"node {position}: start"
        assert len(node.tokens) > 0, f"node {position} is empty"
        expected = list(range(node.first_leaf, node.first_leaf + node.num_leaves))
        assert leaves[position] == expected and expected, f"node {position}: leaves are not its contiguous range"
    firsts = [node.first_leaf for node in tree.nodes]
    assert firsts == sorted(firsts), "nodes are not in depth-first order"


def _as_tokens(values: Sequence[int], name: str) -> np.ndarray:
    """``values`` as (length,) uint32, which halves the bytes to compare. Raises InputError, naming ``name``."""
    accepted = "accepted: a list or one-dimensional array of integers from 0 to 4294967295; tokenize text first"
    if isinstance(values, list | tuple):
        try:
            return np.array(array("I", values), dtype=np.uint32)  # array() refuses fractions; numpy would truncate
        except (TypeError, OverflowError) as error:
            raise InputError(f"{name}: got tokens that are no token ids ({error}); {accepted}") from None
    tokens = np.asarray(values)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"{name}: got {type(values).__name__} of {tokens.dtype} and shape {tokens.shape}; {accepted}")
    if tokens.size and (tokens.min() < 0 or tokens.max() > 0xFFFFFFFF):
        raise InputError(f"{name}: got token ids from {tokens.min()} to {tokens.max()}; {accepted}")
    return tokens.astype(np.uint32)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The number of leading tokens that two non-empty prompts share."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


def _shared_intervals(shared: list[int]) -> list[tuple[int, int, int]]:
    """The maximal shared prefixes of sorted prompts, ``shared[i]`` being what prompts ``i`` and ``i + 1`` share.

    Returns ``(first, stop, length)``: prompts ``first : stop`` share ``length > 0`` tokens, and neither more of them
    share as many, nor do all of these share one more. The intervals nest, and an outer one comes before its inner ones.
    These are the lcp-intervals of Abouelhoda, Kurtz and Ohlebusch (Replacing suffix trees with enhanced suffix arrays,
    2004), found with a stack of those still open.
    """
    found = []
    open_intervals = [(0, 0)]  # (first, length), lengths increasing; the bottom one, of length 0, is no interval
    for stop, length in enumerate([*shared, 0], start=1):
        first = stop - 1
        while open_intervals[-1][1] > length:
            first, closed_length = open_intervals.pop()
            found.append((first, stop, closed_length))
        if open_intervals[-1][1] < length:
            open_intervals.append((first, length))
    return sorted(found, key=lambda interval: (interval[0], -interval[1]))


def _check_parents_given(levels: Sequence[Sequence[Sequence[int]]], parents: Sequence[Sequence[int]] | None) -> None:
    if parents is not None and len(parents) != len(levels) - 1:
        raise InputError(
            f"parents: got {len(parents)} lists for {len(levels)} levels; accepted: {len(levels) - 1}, one for each "
            "level below the first; match them"
        )


def _owners(
    levels: Sequence[Sequence[Sequence[int]]], parents: Sequence[Sequence[int]] | None, number: int
) -> list[int]:
    """For each entry of level ``number``, the entry above that it continues (0, the empty top, for the first level)."""
    count = len(levels[number])
    if count == 0:
        raise InputError(f"level {number}: got no prompts; accepted: one or more; remove the level or fill it")
    if number == 0:
        return [0] * count
    count_above = len(levels[number - 1])
    if parents is None:
        if count % count_above != 0:
            raise InputError(
                f"level {number}: got {count} prompts to divide over the {count_above} of level {number - 1}; "
                f"accepted: a multiple of {count_above}, or any number with parents; change the number or pass parents"
            )
        return [j // (count // count_above) for j in range(count)]
    owners = list(parents[number - 1])
    if len(owners) != count:
        raise InputError(
            f"parents of level {number}: got {len(owners)} for {count} prompts; accepted: one for each; match them"
        )
    for j, owner in enumerate(owners):
        if owner not in range(count_above):
            raise InputError(
                f"parents of level {number}: got {owner} for entry {j}; accepted: 0 to {count_above - 1}, the entries "
                f"of level {number - 1}; correct it"
            )
    childless = sorted(set(range(count_above)) - set(owners))
    if childless:
        raise InputError(
            f"level {number - 1}, entry {childless[0]}: got nothing below it; accepted: one entry of level {number} or "
            "more; remove it or give it an empty one"
        )
    return owners


def _assemble(
    parents: list[int], runs: list[np.ndarray], leaf_parents: list[int], suffixes: list[np.ndarray]
) -> PrefixTree:
    """The finished tree of nodes ``(parents[k], runs[k])``, parents first, and the sequences in the caller's order."""
    top = len(runs)  # one more slot, above the roots: index -1
    first_sequence = [len(suffixes)] * top + [0]
    leaf_counts = [0] * (top + 1)
    children: list[list[tuple[int, int]]] = [[] for _ in range(top + 1)]  # (first sequence, node, or -1 for a suffix)
    for sequence, parent in enumerate(leaf_parents):
        children[parent].append((sequence, -1))
        first_sequence[parent] = min(first_sequence[parent], sequence)
        leaf_counts[parent] += 1
    for k in reversed(range(top)):
        children[parents[k]].append((first_sequence[k], k))
        first_sequence[parents[k]] = min(first_sequence[parents[k]], first_sequence[k])
        leaf_counts[parents[k]] += leaf_counts[k]

    nodes: list[Node] = []
    order: list[int] = []
    leaf_nodes: list[int] = []
    # An explicit stack: prompts that are prefixes of one another can nest deeper than Python recurses.
    pending = [(sequence, k, -1) for sequence, k in sorted(children[top], reverse=True)]
    while pending:
        sequence, k, parent = pending.pop()
        if k < 0:
            order.append(sequence)
            leaf_nodes.append(parent)
            continue
        above = nodes[parent] if parent >= 0 else None
        depth, start = (above.depth + 1, above.end) if above else (0, 0)
        nodes.append(Node(len(nodes), parent, depth, _own(runs[k]), start, len(order), leaf_counts[k]))
        index = len(nodes) - 1
        pending += [(below, child, index) for below, child in sorted(children[k], reverse=True)]
    return PrefixTree(tuple(nodes), tuple(order), tuple(leaf_nodes), tuple(_own(suffixes[j]) for j in order))


def _own(tokens: np.ndarray) -> np.ndarray:
    """A read-only int64 copy: a view would keep the whole prompt that it was cut from in memory."""
    copy = tokens.astype(np.int64)
    copy.flags.writeable = False
    return copy
