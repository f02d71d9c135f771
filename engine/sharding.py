"""How one checkpoint tensor is cut for one tensor-parallel rank.

A parallel layer describes its weights as a list of ``TensorShard``. The same description cuts a checkpoint offline
(``tools/make_tp_files.py``) and slices it at load time, so the two cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from engine.errors import InputError


class Rule(StrEnum):
    """Why a tensor is cut the way it is; recorded in ``tp_manifest.json``."""

    REPLICATED = "replicated"  # every rank holds all of it
    COLUMN = "column"  # output rows split evenly
    ROW = "row"  # input columns split evenly; partial products are summed over ranks
    KV_HEADS = "kv_heads"  # output rows split by KV head; heads are replicated when there are fewer than ranks
    VOCAB = "vocab"  # vocabulary rows split evenly after padding; padding rows are zero
    FUSED = "fused"  # several projections below each other in one tensor, each split by its own rule


@dataclass(frozen=True)
class TensorShard:
    """The part of one checkpoint tensor that one rank holds.

    The part is the ``stretches`` of dimension ``dim``, each ``(start, length)``, one after the other, followed by zeros
    up to ``padded_length``. ``dim`` is ``None`` for a tensor that is held whole (then the rest describes dimension 0).
    """

    name: str  # the tensor's name in the Hugging Face checkpoint
    rule: Rule
    full_shape: tuple[int, ...]
    dim: int | None
    stretches: tuple[tuple[int, int], ...]
    padded_length: int

    @property
    def start(self) -> int:
        """Of the first stretch."""
        return self.stretches[0][0]

    @property
    def length(self) -> int:
        """Of all stretches."""
        return sum(length for _, length in self.stretches)

    @property
    def shape(self) -> tuple[int, ...]:
        """The local shape, padding included."""
        if self.dim is None:
            return self.full_shape
        return tuple(self.padded_length if d == self.dim else n for d, n in enumerate(self.full_shape))

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """The local part of ``full``: a view of one stretch without padding."""
        if self.dim is None:
            return full
        parts = [full.narrow(self.dim, start, length) for start, length in self.stretches]
        if self.padded_length > self.length:
            pad = list(full.shape)
            pad[self.dim] = self.padded_length - self.length
            parts.append(full.new_zeros(pad))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)


def replicated(name: str, shape: tuple[int, ...]) -> TensorShard:
    return TensorShard(name, Rule.REPLICATED, shape, None, ((0, shape[0]),), shape[0])


def split(name: str, rule: Rule, shape: tuple[int, ...], dim: int, rank: int, world_size: int) -> TensorShard:
    """An even split of dimension ``dim``, which ``world_size`` must divide (``check_world_size`` sees to it)."""
    assert shape[dim] % world_size == 0, f"{name}: {shape[dim]} does not divide into {world_size}"
    part = shape[dim] // world_size
    return TensorShard(name, rule, shape, dim, ((rank * part, part),), part)


def split_vocab(name: str, shape: tuple[int, ...], rank: int, world_size: int) -> TensorShard:
    """An even split of the vocabulary (dimension 0), padded at its end to a multiple of ``world_size``."""
    part = -(-shape[0] // world_size)
    start = min(rank * part, shape[0])
    length = min(part, shape[0] - start)
    return TensorShard(name, Rule.VOCAB, shape, 0, ((start, length),), part)


def local_kv_heads(num_kv_heads: int, rank: int, world_size: int) -> tuple[int, int]:
    """``(first, count)``: the KV heads of a rank. With fewer heads than ranks, neighbouring ranks share one."""
    if num_kv_heads >= world_size:
        count = num_kv_heads // world_size
        return rank * count, count
    return rank * num_kv_heads // world_size, 1


def split_kv_heads(
    name: str, shape: tuple[int, ...], num_kv_heads: int, rank: int, world_size: int
) -> TensorShard:
    """Rows of the KV heads that this rank's query heads read."""
    head_dim = shape[0] // num_kv_heads
    first, count = local_kv_heads(num_kv_heads, rank, world_size)
    rows = count * head_dim
    return TensorShard(name, Rule.KV_HEADS, shape, 0, ((first * head_dim, rows),), rows)


def fused(name: str, parts: Sequence[TensorShard]) -> TensorShard:
    """One tensor that holds the whole tensors of ``parts`` below each other (dimension 0), cut as they are."""
    assert all(part.dim == 0 and part.padded_length == part.length for part in parts)
    stretches, num_rows = [], 0
    for part in parts:
        stretches += [(num_rows + start, length) for start, length in part.stretches]
        num_rows += part.full_shape[0]
    shape = (num_rows, *parts[0].full_shape[1:])
    return TensorShard(name, Rule.FUSED, shape, 0, tuple(stretches), sum(part.length for part in parts))


def accepted_world_sizes(num_heads: int, num_kv_heads: int, intermediate_size: int) -> list[int]:
    """The world sizes a model can be cut into: query heads and the MLP divide evenly; KV heads divide, or replicate."""
    return [
        n
        for n in range(1, num_heads + 1)
        if num_heads % n == 0 and intermediate_size % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
    ]


def check_world_size(num_heads: int, num_kv_heads: int, intermediate_size: int, world_size: int) -> None:
    """Raises InputError, naming the counts that work, when the model cannot be cut into ``world_size`` parts."""
    accepted = accepted_world_sizes(num_heads, num_kv_heads, intermediate_size)
    if world_size not in accepted:
        raise InputError(
            f"cannot split {num_heads} query heads, {num_kv_heads} KV heads and an MLP of {intermediate_size} into "
            f"{world_size} parts; accepted: {', '.join(map(str, accepted))}; choose one of these as the number of "
            "ranks (--nproc_per_node) or splits (--num-splits)"
        )
