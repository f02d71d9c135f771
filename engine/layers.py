"""Parallel layers. Each owns its sharding rule: what it holds of which checkpoint tensor on which rank.

Shapes: T tokens, I input features, O local output features, V local vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from engine.distributed import TPGroup
from engine.sharding import Rule, TensorShard, replicated, split, split_vocab
from kernels import Backend
from kernels.linear import linear
from kernels.norm import add_rms_norm_, rms_norm


@dataclass(frozen=True)
class WeightSlot:
    """Where a shard of a checkpoint tensor goes: ``target`` is a view of a parameter, of the shard's shape."""

    shard: TensorShard
    target: torch.Tensor


def _stack(shards: Sequence[TensorShard]) -> tuple[nn.Parameter, list[WeightSlot]]:
    """One parameter that holds the shards below each other (dimension 0), and the slot of each."""
    rows = [shard.shape[0] for shard in shards]
    parameter = nn.Parameter(torch.empty(sum(rows), *shards[0].shape[1:]), requires_grad=False)
    return parameter, [WeightSlot(s, t) for s, t in zip(shards, parameter.data.split(rows), strict=True)]


class ColumnParallelLinear(nn.Module):
    """Output features are split over ranks. Several checkpoint tensors that read the same input make one product."""

    def __init__(self, weights: Sequence[TensorShard], biases: Sequence[TensorShard] = ()):
        super().__init__()
        self.weight, self.slots = _stack(weights)
        self.bias = None
        if biases:
            self.bias, bias_slots = _stack(biases)
            self.slots += bias_slots

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """``(T, O)``: this rank's output features."""
        return linear(x_TI, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Input features are split over ranks; the partial products are summed over the group."""

    def __init__(self, name: str, shape: tuple[int, int], group: TPGroup, bias: bool = False):
        super().__init__()
        self.group = group
        self.weight, self.slots = _stack([split(f"{name}.weight", Rule.ROW, shape, 1, group.rank, group.size)])
        self.bias = None
        if bias:
            self.bias, bias_slots = _stack([replicated(f"{name}.bias", shape[:1])])
            self.slots += bias_slots

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """``(T, O)``, the same on every rank."""
        if self.group.size == 1:
            return linear(x_TI, self.weight, self.bias)
        out = self.group.all_reduce(linear(x_TI, self.weight))
        return out if self.bias is None else out.add_(self.bias)


class VocabParallelEmbedding(nn.Module):
    """Vocabulary rows are split over ranks; a token's row is zero on every rank but the one that holds it."""

    def __init__(self, name: str, shape: tuple[int, int], group: TPGroup):
        super().__init__()
        self.group = group
        self.weight, self.slots = _stack([split_vocab(name, shape, group.rank, group.size)])
        self.first = self.slots[0].shard.start

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """``(T, hidden)``."""
        if self.group.size == 1:
            return F.embedding(tokens_T, self.weight)
        local = tokens_T - self.first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.group.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(-1), 0))


class VocabParallelHead(nn.Module):
    """The output head, split like the embedding. Padding rows of the vocabulary give logits of -inf."""

    def __init__(self, name: str, shape: tuple[int, int], group: TPGroup, tied: VocabParallelEmbedding | None):
        super().__init__()
        shard = split_vocab(name, shape, group.rank, group.size)
        self.num_real = shard.length
        self.first = shard.start
        self.slots: list[WeightSlot] = []
        if tied is None:
            self.weight, self.slots = _stack([shard])
        else:
            self.weight = tied.weight

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """``(T, V)``: this rank's logits, in the input's dtype; column ``v`` is token ``first + v``."""
        logits_TV = linear(x_TI, self.weight)
        if self.num_real < logits_TV.shape[1]:
            logits_TV[:, self.num_real :] = float("-inf")
        return logits_TV


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv:1910.07467) over the last dimension."""

    def __init__(self, name: str, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.slots = _stack([replicated(f"{name}.weight", (size,))])

    def forward(self, x: torch.Tensor, backend: Backend | None) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, backend)

    def of_sum_(self, x_TI: torch.Tensor, y_TI: torch.Tensor, backend: Backend | None) -> torch.Tensor:
        """Adds ``y`` to ``x`` in place and normalises the sum."""
        return add_rms_norm_(x_TI, y_TI, self.weight, self.eps, backend)
