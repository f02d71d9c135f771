"""Runs the model over a prefix tree that has its place in the arena: prefill level by level, then decode steps.

Shapes: B sequences, R runs of new tokens, T new tokens, N nodes, A depth of the tree.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention import AttentionMethod, Placement, Runs
from engine.kv_cache import KVCache
from engine.model import Step, Transformer
from engine.prefix_tree import PrefixTree, levels
from kernels import AttentionPlan, Backend, Segment
from kernels.attention import PlannedSegment
from kernels.window import within_window


@dataclass(frozen=True)
class ResidentNode:
    """A node whose keys and values are in the arena."""

    slot: int  # of its first token
    length: int
    hidden: torch.Tensor  # (hidden,): the normalised hidden state of its last token


class Executor:
    """One tree, one method, one placement. Sequences are numbered depth-first, as in the tree.

    ``resident`` holds the nodes, by index, that need no prefill.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache | None,
        method: AttentionMethod,
        tree: PrefixTree,
        placement: Placement,
        resident: Mapping[int, ResidentNode],
        backend: Backend | None = None,
    ):
        self.model, self.cache, self.method = model, cache, method
        self.tree, self.placement, self.backend = tree, placement, backend
        self.window = model.config.sliding_window
        self.device = model.embedding.weight.device
        self.dtype = model.embedding.weight.dtype
        self.resident = resident
        self.node_hidden = {index: node.hidden for index, node in resident.items()}
        self.suffix_lens = np.array([len(suffix) for suffix in tree.suffixes], dtype=np.int64)
        self.suffix_positions = np.array([tree.suffix_start(i) for i in range(tree.num_sequences)], dtype=np.int64)
        self.paths = _leaf_paths(tree)
        self._active = np.empty(0, dtype=np.int64)
        self._shared_plan: list[PlannedSegment] = []

    def prefill(self) -> torch.Tensor:
        """``(B, hidden)``: the hidden state that each sequence's first new token is chosen from.

        Nodes are computed from the roots down, all nodes of one depth in one forward pass; then all suffixes.
        """
        tree = self.tree
        for index, node in self.resident.items():
            self._copy_below(index, node.slot)
        for level in levels(tree):
            new = [index for index in level if index not in self.node_hidden]
            if new:
                hidden = self._forward([tree.nodes[i].tokens for i in new], self._node_runs(new), last_only=True)
                self.node_hidden.update(zip(new, hidden.unbind(0), strict=True))
                for index in new:
                    self._copy_below(index, int(self.placement.node_starts[index]))
        rows = {int(i): row for row, i in enumerate(np.flatnonzero(self.suffix_lens))}
        hidden = None
        if rows:
            active = np.array(list(rows), dtype=np.int64)
            runs = self._suffix_runs(active, self.suffix_lens[active], self.suffix_lens[active])
            hidden = self._forward([tree.suffixes[i] for i in rows], runs, last_only=True)
        return torch.stack(
            [
                hidden[rows[i]] if i in rows else self.node_hidden[tree.leaf_nodes[i]]
                for i in range(tree.num_sequences)
            ]
        )

    def decode(self, active: np.ndarray, num_generated: np.ndarray, tokens: torch.Tensor) -> torch.Tensor:
        """One new token for each sequence of ``active`` (R,), which has ``num_generated`` (R,) with the new one.

        Returns ``(R, hidden)``.
        """
        own_lens = self.suffix_lens[active] + num_generated
        runs = self._suffix_runs(active, np.ones_like(active), own_lens)
        positions = runs.positions + own_lens - 1
        # A window moves with every step.
        if self.window is not None or not np.array_equal(active, self._active):
            shared_segments = self.method.shared_segments(self.tree, self.placement, runs)
            self._shared_plan = self._plan(shared_segments, positions)
            self._active = active
        plan = AttentionPlan(self._plan(self.method.own_segments(runs), positions) + self._shared_plan)
        slots = runs.own_starts + own_lens - 1
        step = Step(tokens, self._tensor(positions), self._tensor(slots) if self.cache else None, None)
        return self.model(step, plan, self.cache)

    def new_nodes(self) -> dict[int, ResidentNode]:
        """The nodes that ``prefill`` computed, as they lie in the arena, where they take nothing without a cache."""
        starts = self.placement.node_starts
        return {
            i: ResidentNode(int(starts[i]), len(self.tree.nodes[i].tokens) if self.cache else 0, hidden)
            for i, hidden in self.node_hidden.items()
            if i not in self.resident
        }

    def _forward(self, tokens: list[np.ndarray], runs: Runs, last_only: bool) -> torch.Tensor:
        """Hidden states of all tokens of the runs, or of each run's last one."""
        segments = self.method.own_segments(runs) + self.method.shared_segments(self.tree, self.placement, runs)
        within = np.concatenate([np.arange(n) for n in runs.num_new])
        positions = np.repeat(runs.positions, runs.num_new) + within
        slots = np.repeat(runs.own_starts, runs.num_new) + within
        step = Step(
            self._tensor(np.concatenate(tokens)),
            self._tensor(positions),
            self._tensor(slots) if self.cache else None,
            self._tensor(runs.q_offsets[1:] - 1) if last_only else None,
        )
        return self.model(step, AttentionPlan(self._plan(segments, positions)), self.cache)

    def _plan(self, segments: list[Segment], q_positions: np.ndarray) -> list[PlannedSegment]:
        if self.window is not None:
            segments = [part for segment in segments for part in within_window(segment, q_positions, self.window)]
        return [PlannedSegment(segment, self.device, self.dtype, self.backend) for segment in segments]

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def _copy_below(self, index: int, source: int) -> None:
        if self.cache is None:
            return
        node = self.tree.nodes[index]
        targets = [t for t in self.method.copies(self.tree, self.placement, node) if t != source]
        self.cache.copy(source, len(node.tokens), targets)

    def _node_runs(self, nodes: list[int]) -> Runs:
        """All tokens of some nodes of one depth."""
        tree = self.tree
        lens = np.array([len(tree.nodes[i].tokens) for i in nodes], dtype=np.int64)
        depth = tree.nodes[nodes[0]].depth
        leaves = [tree.nodes[i].first_leaf for i in nodes]
        return Runs(
            num_new=lens,
            positions=np.array([tree.nodes[i].start for i in nodes], dtype=np.int64),
            own_starts=self.placement.node_starts[nodes],
            own_lens=lens,
            own_rooms=lens,
            paths=self.paths[:depth, leaves],
        )

    def _suffix_runs(self, active: np.ndarray, num_new: np.ndarray, own_lens: np.ndarray) -> Runs:
        return Runs(
            num_new=num_new,
            positions=self.suffix_positions[active],
            own_starts=self.placement.suffix_starts[active],
            own_lens=own_lens,
            own_rooms=self.placement.suffix_rooms[active],
            paths=self.paths[:, active],
        )


def _leaf_paths(tree: PrefixTree) -> np.ndarray:
    """(A, B) int64: the node at each depth above each sequence's suffix, -1 past the last one."""
    paths = np.full((max((n.depth for n in tree.nodes), default=-1) + 1, tree.num_sequences), -1, dtype=np.int64)
    for node in tree.nodes:
        paths[node.depth, node.first_leaf : node.first_leaf + node.num_leaves] = node.index
    return paths
