"""Predicted memory of a sweep's cells, per rank, from the model's shapes alone: nothing is allocated."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from engine.activations import activation_bytes
from engine.attention import METHODS, AttentionMethod, get_method
from engine.bench.results import Cell
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.kv_cache import KVCache
from engine.model import Transformer
from engine.prefix_tree import build_from_levels


@dataclass(frozen=True)
class Footprint:
    """Bytes that one rank needs."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


def cache_tokens(cell: Cell) -> int:
    """Tokens whose keys and values are kept: the prompt, and what each sequence has of its own.

    The last generated token is never read again, so it has no place.
    """
    own = cell.num_unique - 1
    if cell.mode not in METHODS:
        return cell.batch_size * (cell.num_shared + own)
    method = get_method(cell.mode)
    if not method.uses_cache:
        return 0
    # Linear in both sizes: counted for small ones, for a cell that is too large to run may be too large to lay out.
    (t11, t12), (t21, t22) = ([_method_tokens(method, b, s, own) for s in (1, 2)] for b in (1, 2))
    per_token, per_sequence, per_both = t12 - t11, t21 - t11, t22 - t21 - t12 + t11
    tokens, sequences = cell.num_shared - 1, cell.batch_size - 1
    return t11 + tokens * per_token + sequences * per_sequence + tokens * sequences * per_both


def _method_tokens(method: AttentionMethod, batch_size: int, num_shared: int, own: int) -> int:
    """As EngineMode runs it: the prompt is a kept level, the sequences have nothing of their own but what they
    generate."""
    tree = build_from_levels([[[0] * num_shared], [()] * batch_size])
    return num_shared + sum(method.ranges(tree, np.full(batch_size, own, dtype=np.int64), {0: 0}))


def footprint(config: ModelConfig, world_size: int, cell: Cell) -> Footprint | None:
    """What ``cell`` needs on each of ``world_size`` ranks, in the config's dtype.

    None for vLLM, which takes its share of the device when it starts, and runs what does not fit in turns. Raises
    InputError for a world size that the model cannot be cut into.
    """
    if cell.mode.startswith("vllm"):
        return None
    dtype = config.dtype
    weights, num_kv_heads = _weights(config, world_size)
    cache = cache_tokens(cell) * KVCache.bytes_per_slot(config, num_kv_heads, dtype)
    activations = activation_bytes(config, dtype, world_size, cell.num_shared, cell.batch_size)
    if cell.mode == "hf":
        activations += cache // (2 * config.num_layers)  # a cache that grows by a token is copied, tensor by tensor
    return Footprint(weights, cache, activations)


@lru_cache
def _weights(config: ModelConfig, world_size: int) -> tuple[int, int]:
    """Bytes of a rank's parameters, and its KV heads."""
    with torch.device("meta"):
        model = Transformer(config, TPGroup(0, world_size, "meta"))
    num_bytes = sum(parameter.numel() for parameter in model.parameters()) * config.dtype.itemsize
    return num_bytes, model.num_kv_heads
