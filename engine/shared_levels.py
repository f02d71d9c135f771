"""Shared levels that are kept between calls: appended, truncated, emptied, and found again by what they hold.

Shapes: n prompts of a level, N nodes of a tree.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from engine.activations import activation_bytes, largest_prefill
from engine.arena import Arena
from engine.attention import AttentionMethod, get_method
from engine.errors import InputError
from engine.executor import Executor, ResidentNode
from engine.model import Transformer
from engine.prefix_tree import PrefixTree, build_from_levels


class SharedLevels:
    """Kept levels, as the caller laid them out, and where their nodes lie in the arena.

    Nodes are known by the tokens on the path from the root, so a level that holds the same prompt twice keeps it once.
    """

    def __init__(self, model: Transformer, arena: Arena):
        self._model, self._arena = model, arena
        self.levels: list[list[np.ndarray]] = []
        self.parents: list[list[int]] = []  # of each level but the first
        self._nodes: dict[bytes, ResidentNode] = {}
        self._methods: list[AttentionMethod] = []  # that computed each level

    def check(self, method: AttentionMethod) -> None:
        """Raises InputError when ``method`` cannot continue what is kept."""
        keyless = [m.name for m in self._methods if not m.uses_cache]
        if method.uses_cache and keyless:
            raise InputError(
                f"kept levels were computed with attention {keyless[0]!r}, which keeps no keys for {method.name!r} to "
                "read; empty or truncate them first, or use shared_cache_op='wipe'"
            )

    def resident(self, tree: PrefixTree) -> dict[int, ResidentNode]:
        """The nodes of ``tree`` that are kept, by index."""
        return {i: self._nodes[key] for i, key in enumerate(_path_keys(tree)) if key in self._nodes}

    def parents_of_next(self, num_prompts: int, parents: Sequence[int] | None) -> list[list[int]]:
        """``parents`` of all levels when one of ``num_prompts`` follows. Raises InputError when it does not divide."""
        if not self.levels:
            if parents is not None:
                raise InputError("parents were given for the first level, which continues nothing; leave them out")
            return []
        last = even_parents(len(self.levels[-1]), num_prompts) if parents is None else list(parents)
        return [*self.parents, last]

    def tree_of_next(self, prompts: Sequence[Sequence[int]], parents: Sequence[int] | None) -> PrefixTree:
        """The kept levels and one more below them, every entry of which ends in one empty suffix."""
        all_parents = self.parents_of_next(len(prompts), parents)
        ends = [()] * len(prompts)
        return build_from_levels([*self.levels, prompts, ends], parents=[*all_parents, list(range(len(prompts)))])

    def append(
        self,
        tree: PrefixTree,
        prompts: Sequence[Sequence[int]],
        parents: Sequence[int] | None,
        method: AttentionMethod,
    ) -> torch.Tensor:
        """Computes and keeps the nodes of ``tree_of_next(prompts, parents)``.

        Returns the hidden state after each entry's last token, (n, hidden), in the order of ``prompts``.
        """
        # A kept node has a range of its own. The baseline, which has none for nodes, gets an exact level all the same.
        layout = method if method.own_node_ranges or not method.uses_cache else get_method("hydragen")
        resident = self.resident(tree)
        slots = {i: node.slot for i, node in resident.items()}
        rooms = np.zeros(tree.num_sequences, dtype=np.int64)
        ranges = layout.ranges(tree, rooms, slots)
        model = self._model
        needed = activation_bytes(
            model.config,
            model.embedding.weight.dtype,
            model.group.size,
            largest_prefill(tree, resident),
            tree.num_sequences,
            model.prefill_chunk,
        )
        self._arena.begin_call()
        starts = self._arena.allocate(ranges, "the shared level", needed)
        try:
            placement = layout.place(tree, rooms, slots, starts)
            cache = self._arena.cache if method.uses_cache else None
            executor = Executor(self._model, cache, layout, tree, placement, resident)
            hidden = executor.prefill()
            if not bool(hidden.isfinite().all()):
                raise RuntimeError("the shared level is not kept: its hidden states are not finite")
        except BaseException:
            self._arena.clear(ranges, starts)
            for start, length in zip(starts, ranges, strict=True):
                self._arena.free(start, length)
            raise
        for i, key in enumerate(_path_keys(tree)):
            if i in resident:
                continue
            length = len(tree.nodes[i].tokens) if method.uses_cache else 0
            if key in self._nodes:
                self._arena.free(int(placement.node_starts[i]), length)
            else:
                self._nodes[key] = ResidentNode(int(placement.node_starts[i]), length, executor.node_hidden[i])
        self.parents = self.parents_of_next(len(prompts), parents)
        self.levels.append([np.asarray(entry, dtype=np.int64) for entry in prompts])
        self._methods.append(method)
        return hidden[torch.from_numpy(np.argsort(tree.order)).to(hidden.device)]

    def truncate(self, num_levels: int) -> None:
        """Keeps the first ``num_levels`` levels and drops the others."""
        if not 0 <= num_levels <= len(self.levels):
            raise InputError(f"cannot keep {num_levels} shared levels; accepted: 0 to {len(self.levels)}, as there are")
        self.levels, self.parents = self.levels[:num_levels], self.parents[: max(num_levels - 1, 0)]
        del self._methods[num_levels:]
        wanted: set[bytes] = set()
        if self.levels:
            last = self.levels[-1]
            ends = [*self.levels, [()] * len(last)]
            wanted = set(_path_keys(build_from_levels(ends, parents=[*self.parents, list(range(len(last)))])))
        for key in [key for key in self._nodes if key not in wanted]:
            node = self._nodes.pop(key)
            self._arena.free(node.slot, node.length)


def even_parents(num_above: int, num_below: int) -> list[int]:
    """The parent of each entry of a level that divides evenly over the level above. Raises InputError if uneven."""
    if num_below == 0 or num_below % num_above:
        raise InputError(
            f"{num_below} prompts do not divide evenly over the {num_above} of the level above; accepted: a multiple "
            f"of {num_above}; change the number, or name the parents"
        )
    return [j // (num_below // num_above) for j in range(num_below)]


def _path_keys(tree: PrefixTree) -> list[bytes]:
    """For each node a digest of the runs of tokens from the root down to it."""
    keys: list[bytes] = []
    for node in tree.nodes:
        above = keys[node.parent] if node.parent >= 0 else b""
        keys.append(hashlib.blake2b(above + node.tokens.tobytes(), digest_size=16).digest())
    return keys
