"""Predicted memory of a sweep's cells, per rank, from the model's shapes alone: nothing is allocated."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from engine.activations import activation_bytes
from engine.attention import METHODS, Keeps, get_method
from engine.bench.results import Cell
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.kv_cache import KVCache
from engine.model import Transformer


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
    if method.keeps is Keeps.NOTHING:
        return 0
    # As EngineMode runs it: the prompt is a kept level, the sequences have nothing of their own but what they generate.
    copied = cell.num_shared if method.keeps is Keeps.HISTORIES else 0
    return cell.num_shared + cell.batch_size * (copied + own)


def footprint(config: ModelConfig, world_size: int, cell: Cell) -> Footprint | None:
    """What ``cell`` needs on each of ``world_size`` ranks, in the config's dtype.

    None for vLLM, which takes its share of the device when it starts, and runs what does not fit in turns. Raises
    InputError for a world size that the model cannot be cut into.
    """
    if cell.mode.startswith("vllm"):
        return None
    dtype = config.dtype
    weights, num_kv_heads = _weights(config, world_size)
    num_slots = cache_tokens(cell)
    if num_slots and cell.mode in METHODS:
        num_slots += 1  # KVCache's scratch slot
    cache = num_slots * KVCache.bytes_per_slot(config, num_kv_heads, dtype)
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
