"""Runs the model over a prefix tree that has its place in the arena: prefill level by level, then decode steps.

Shapes: B sequences, R of them or runs of new tokens, T new tokens, A depth of the tree.
"""

import numpy as np
import torch

from engine.attention import AttentionMethod, Placement, Runs
from engine.attention.turned import TurnedPlan
from engine.decode_graphs import DecodeGraphs, bucket_of
from engine.kv_cache import KVCache
from engine.model import PassAttention, Step, Transformer
from engine.prefix_tree import PrefixTree
from engine.prompt_logprobs import PromptLogprobs
from kernels import Planner, Segment
from kernels.window import within_window


class Executor:
    """One tree, one method. Sequences are numbered depth-first, as in the tree, and any of them may be run.

    ``placement`` says where those that are run lie, in ``cache``. ``node_hidden`` has the normalised hidden state of
    the last token, (hidden,), for each node whose keys and values are there: ``prefill`` adds those that it computes,
    and computes none of them again. Decode steps go through ``graphs`` where they are given.
    """

    def __init__(
        self,
        model: Transformer,
        method: AttentionMethod,
        tree: PrefixTree,
        placement: Placement,
        node_hidden: dict[int, torch.Tensor],
        cache: KVCache | None,
        graphs: DecodeGraphs | None = None,
    ):
        self._graphs = graphs
        self.model, self.method, self.tree, self.placement = model, method, tree, placement
        self.node_hidden, self.cache = node_hidden, cache
        self.window = model.config.sliding_window
        self.device = model.embedding.weight.device
        self.dtype = model.embedding.weight.dtype
        self._active = np.empty(0, dtype=np.int64)
        self._paths = np.empty((0, 0), dtype=np.int64)  # (A, R) of the active ones
        self._shared_segments: list[Segment] = []
        self._planner, self._turned_planner = (
            Planner(self.device, self.dtype, model.attention_backend) for _ in range(2)
        )

    def prefill(self, sequences: np.ndarray, prompt_logprobs: PromptLogprobs | None = None) -> torch.Tensor:
        """``(R, hidden)``: the hidden state that the first new token of each of ``sequences`` (R,) is chosen from.

        ``sequences`` ascend. Nodes are computed from the roots down, all nodes of one depth in one forward pass; then
        all suffixes. ``prompt_logprobs`` is told the hidden states of what it asks for.
        """
        tree, table = self.tree, self.tree.table
        paths = tree.paths(table.leaf_node[sequences])
        for nodes in (np.unique(level[level >= 0]) for level in paths):
            new = np.array([node for node in nodes.tolist() if node not in self.node_hidden], dtype=np.int64)
            if len(new):
                asked = None if prompt_logprobs is None else prompt_logprobs.nodes_asked(new)
                states = self._forward([tree.nodes[i].tokens for i in new], self._node_runs(new), asked)
                for index, node in enumerate(new.tolist()):
                    if asked is not None and asked[index]:
                        prompt_logprobs.score_node(node, self._end_of(tree.nodes[node].parent), states[index])
                    self.node_hidden[node] = states[index][-1].clone()  # a view would keep all of them
            for node in nodes.tolist():
                self._copy_below(node, sequences)
        lens = table.suffix_length[sequences]
        longer = sequences[lens > 0]
        ends = {}
        if len(longer):
            asked = None if prompt_logprobs is None else prompt_logprobs.suffixes_asked(longer)
            runs = self._suffix_runs(longer, paths[:, lens > 0], lens[lens > 0], lens[lens > 0])
            states = self._forward([tree.suffixes[i] for i in longer], runs, asked)
            for index, i in enumerate(longer.tolist()):
                if asked is not None and asked[index]:
                    prompt_logprobs.score_suffix(i, self._end_of(tree.leaf_nodes[i]), states[index])
                ends[i] = states[index][-1]
        return torch.stack([ends[i] if i in ends else self._end_of(tree.leaf_nodes[i]) for i in sequences.tolist()])

    def decode(self, active: np.ndarray, num_generated: np.ndarray, tokens: torch.Tensor) -> torch.Tensor:
        """One new token for each sequence of ``active`` (R,), which has ``num_generated`` (R,) with the new one.

        ``active`` ascends. Returns ``(R, hidden)``.
        """
        is_same = np.array_equal(active, self._active)
        if not is_same:
            self._active, self._paths = active, self.tree.paths(self.tree.table.leaf_node[active])
        own_lens = self.tree.table.suffix_length[active] + num_generated
        runs = self._suffix_runs(active, self._paths, np.ones_like(active), own_lens)
        if self._graphs is not None:
            runs = runs.padded(bucket_of(len(active)))
        # Rows that stand for no sequence are at position 0.
        positions = np.maximum(runs.positions + runs.own_lens - 1, 0)
        if not is_same or self.method.moves:
            self._shared_segments = self.method.shared_segments(self.tree, self.placement, runs)
        segments = self._within_window(self.method.own_segments(runs) + self._shared_segments, positions)
        slots = runs.own_starts + runs.own_lens - 1
        if self._graphs is not None:
            if self.cache is not None:
                slots[len(active) :] = self.cache.scratch_slot
            return self._graphs.run(tokens, positions, slots, segments, self.cache)
        step = self._step(tokens, positions, slots, None)
        return self.model(step, self._plan(segments), self.cache)

    def _forward(self, tokens: list[np.ndarray], runs: Runs, whole: np.ndarray | None) -> list[torch.Tensor]:
        """Each run's hidden states: of all its tokens where ``whole`` (R,) says so, else of its last one."""
        within = np.concatenate([np.arange(n) for n in runs.num_new])
        positions = np.repeat(runs.positions, runs.num_new) + within
        slots = np.repeat(runs.own_starts, runs.num_new) + within
        is_last = within == np.repeat(runs.num_new, runs.num_new) - 1
        wanted = is_last if whole is None else is_last | np.repeat(whole, runs.num_new)
        step = self._step(self._tensor(np.concatenate(tokens)), positions, slots, np.flatnonzero(wanted))
        hidden = self.model(step, self._prefill_plan(runs, positions), self.cache)
        return list(hidden.split(np.diff(np.flatnonzero(is_last[wanted]), prepend=-1).tolist()))

    def _prefill_plan(self, runs: Runs, positions: np.ndarray) -> PassAttention:
        if (sparse := self.model.sparse_prefill) is not None:
            backend = self.model.attention_backend
            plan = sparse.plan(self.tree, self.placement, runs, self.device, self.dtype, backend)
            if plan is not None:
                return plan
        segments = self.method.own_segments(runs) + self.method.shared_segments(self.tree, self.placement, runs)
        return self._plan(self._within_window(segments, positions))

    def _plan(self, segments: list[Segment]) -> PassAttention:
        turned = [segment for segment in segments if segment.q_turns is not None]
        if not turned:
            return self._planner.plan(segments)
        assert all(np.array_equal(s.q_turns, turned[0].q_turns) for s in turned), "queries are turned in one way"
        turns = self._tensor(turned[0].q_turns)
        plain = [segment for segment in segments if segment.q_turns is None]
        return TurnedPlan(
            self._planner.plan(plain), self._turned_planner.plan(turned), lambda q: self.model.turn_back(q, turns)
        )

    def _step(
        self, tokens: torch.Tensor, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray | None
    ) -> Step:
        return Step(
            tokens,
            self._tensor(positions),
            self._tensor(slots) if self.cache else None,
            None if rows is None else self._tensor(rows),
            self.model.operations_backend,
        )

    def _within_window(self, segments: list[Segment], q_positions: np.ndarray) -> list[Segment]:
        if self.window is None:
            return segments
        return [part for segment in segments for part in within_window(segment, q_positions, self.window)]

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def _end_of(self, node: int) -> torch.Tensor | None:
        """The hidden state of a node's last token; None of no node, -1."""
        return self.node_hidden[node] if node >= 0 else None

    def _copy_below(self, node: int, sequences: np.ndarray) -> None:
        """Copies a node to where those of ``sequences`` that are below it keep their own."""
        if self.cache is None:
            return
        source = int(self.placement.node_starts[node])
        targets = [target for target in self.placement.copies(node, sequences).tolist() if target != source]
        self.cache.copy(source, len(self.tree.nodes[node].tokens), targets)

    def _node_runs(self, nodes: np.ndarray) -> Runs:
        """All tokens of some nodes of one depth."""
        table = self.tree.table
        lens = table.node_length[nodes]
        return Runs(
            num_new=lens,
            positions=table.node_position[nodes],
            own_starts=self.placement.node_starts[nodes],
            own_lens=lens,
            own_rooms=lens,
            paths=self.tree.paths(table.node_parent[nodes]),
        )

    def _suffix_runs(self, sequences: np.ndarray, paths: np.ndarray, num_new: np.ndarray, own_lens: np.ndarray) -> Runs:
        return Runs(
            num_new=num_new,
            positions=self.tree.table.suffix_position[sequences],
            own_starts=self.placement.suffix_starts(sequences),
            own_lens=own_lens,
            own_rooms=self.placement.suffix_rooms(sequences),
            paths=paths,
        )
