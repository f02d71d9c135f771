"""Sparse prefill of a loaded model: the attention of a forward pass, by each head's pattern.

Shapes: R runs of new tokens, A depth of the prefix tree, P pieces, T queries, S slots, H query heads of this rank,
D head dimension.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from engine.attention import Keeps, Placement, Runs
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.prefill.head_config import HeadPatterns
from engine.prefill.method import PrefillMethod
from engine.prefix_tree import PrefixTree
from kernels import Backend
from kernels.sparse import SparseIndex, SparsePlan, SparseRows, lower, num_pairs, num_seen, predicted_index_bytes


class SparsePrefill:
    """The patterns of this rank's heads. What fraction of attention's work is done is counted where it is ``measured``.
    """

    def __init__(self, heads: HeadPatterns, dense_below: int):
        self._heads, self._dense_below = heads, dense_below
        self._density: "Density | None" = None

    @classmethod
    def of(cls, method: PrefillMethod, model_name: str, config: ModelConfig, group: TPGroup) -> "SparsePrefill | None":
        """None of the dense method. Raises InputError for one that does not fit the model."""
        if method.is_dense:
            return None
        if group.rank == 0 and (note := method.note(model_name)):
            print(f"notice: {note}", file=sys.stderr)
        num_heads = config.num_heads // group.size
        own = slice(group.rank * num_heads, (group.rank + 1) * num_heads)
        return cls(tuple(layer[own] for layer in method.heads(model_name, config)), method.dense_below)

    @contextmanager
    def measured(self) -> Iterator["Density"]:
        """Inside, what is looked at is counted, which takes its time."""
        self._density = Density(len(self._heads))
        try:
            yield self._density
        finally:
            self._density = None

    def plan(
        self,
        tree: PrefixTree,
        placement: Placement,
        runs: Runs,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend | None,
    ) -> "SparsePrefillPlan | None":
        """For the new tokens of ``runs``; None where they are too few for any of it to be sparse, or keep no keys.

        Runs that are too short by themselves see all their keys.
        """
        is_short = runs.num_new < self._dense_below
        if placement.keeps is Keeps.NOTHING or is_short.all():
            return None
        plan = SparsePlan(sparse_rows(tree, placement, runs), device, dtype, backend)
        return SparsePrefillPlan(self._heads, plan, is_short, self._density)

    def index_bytes(
        self, num_new: np.ndarray, num_keys: np.ndarray, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> int:
        """The most that the masks of one forward pass take on this rank: ``num_new`` (R,) tokens, the last of
        ``num_keys`` (R,)."""
        if (num_new < self._dense_below).all():
            return 0
        sizes = (num_new, num_keys, num_kv_heads, head_dim, device)
        return max(predicted_index_bytes(layer, *sizes) for layer in set(self._heads))


class SparsePrefillPlan:
    """The attention of one forward pass, made anew in every layer for the queries and keys that it has."""

    def __init__(self, heads: HeadPatterns, plan: SparsePlan, is_dense: np.ndarray, density: "Density | None"):
        self._heads, self._plan, self._is_dense, self._density = heads, plan, is_dense.tolist(), density

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float, layer: int
    ) -> torch.Tensor:
        """``(T, H, D)`` in the queries' dtype."""
        rows = self._plan.rows
        index = lower(self._heads[layer], q_THD, k_SHD, rows, scale, self._is_dense)
        if self._density is not None:
            self._density.add(layer, index, rows)
        return self._plan.run(q_THD, k_SHD, v_SHD, index, scale)[0].to(q_THD.dtype)


class Density:
    """Pairs of a query and a key that were looked at, and all that causality allows, layer by layer."""

    def __init__(self, num_layers: int):
        self._seen: list[int | torch.Tensor] = [0] * num_layers
        self._all = [0] * num_layers

    def add(self, layer: int, index: SparseIndex, rows: SparseRows) -> None:
        self._seen[layer] = self._seen[layer] + num_seen(index, rows)
        self._all[layer] += num_pairs(rows)

    @property
    def by_layer(self) -> list[list[float]]:
        """Of each layer what fraction was looked at by each head of this rank; nothing of one that was not sparse."""
        pairs = zip(self._seen, self._all, strict=True)
        return [(seen.double() / every).tolist() if every else [] for seen, every in pairs]

    def mean_by_layer(self, group: TPGroup) -> tuple[float, ...]:
        """Likewise in the mean over the heads of all ranks, which make the same call; empty if nothing was sparse."""
        of_ranks = group.gather_objects(self.by_layer)
        layers = [sum(parts, []) for parts in zip(*of_ranks, strict=True)]
        return tuple(sum(layer) / len(layer) for layer in layers if layer)


def sparse_rows(tree: PrefixTree, placement: Placement, runs: Runs) -> SparseRows:
    """The new tokens of ``runs``, and where the keys before them lie."""
    first = runs.positions + runs.own_lens - runs.num_new
    return SparseRows(runs.q_offsets, first, *_pieces(tree, placement, runs))


def _pieces(tree: PrefixTree, placement: Placement, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Where the keys of each run lie, from its sequence's first token to the last new one: ``k_starts``, ``k_lens``
    ``(R, P)``."""
    if placement.keeps is Keeps.HISTORIES:
        return (runs.own_starts - runs.positions)[:, None], (runs.own_lens + runs.positions)[:, None]
    is_node = runs.paths >= 0
    starts = np.where(is_node, placement.node_starts[runs.paths], 0)
    lens = np.where(is_node, tree.table.node_length[runs.paths], 0)
    return np.vstack([starts, runs.own_starts]).T, np.vstack([lens, runs.own_lens]).T
