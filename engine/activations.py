"""Bytes that forward passes take beside weights and KV cache, from the model's shapes alone.

Shapes: T tokens of a forward pass, C of them at once in projections and MLP, B sequences.
"""

import numpy as np
import torch

from engine.config import ModelConfig
from engine.model import PREFILL_CHUNK, Transformer
from engine.prefix_tree import PrefixTree

_FLOAT32 = 4
# Below one level of nodes: a merge holds two states and makes a third. Each level more may add one: on CUDA all of them
# are there when they are merged.
_STATES = 3
# What sparse attention returns, and the same in the model's dtype.
_SPARSE_STATES = 2


def activation_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    world_size: int,
    num_tokens: int,
    num_sequences: int,
    chunk: int = PREFILL_CHUNK,
    num_levels: int = 1,
    index_bytes: int = 0,
) -> int:
    """The most that one of ``world_size`` ranks takes: in a prefill of ``num_tokens``, or in a decode step.

    ``num_tokens`` are those of the largest forward pass; a decode step has a token of each of ``num_sequences``, and
    its logits. ``num_levels`` of nodes are above them at most. A sparse prefill takes ``index_bytes`` for its masks.
    """
    num_states = _STATES + max(0, num_levels - 1)
    # The logits of the step before are there while the next runs; choosing from them takes a float32 copy.
    logits = num_sequences * -(-config.vocab_size // world_size) * (dtype.itemsize + _FLOAT32)
    prefill = _forward_bytes(config, dtype, world_size, num_tokens, chunk, num_states, index_bytes)
    return max(prefill, _forward_bytes(config, dtype, world_size, num_sequences, chunk, num_states) + logits)


def _forward_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    world_size: int,
    T: int,
    chunk: int,
    num_states: int,
    index_bytes: int = 0,
) -> int:
    C = min(T, chunk)
    num_heads, mlp_size = config.num_heads // world_size, config.intermediate_size // world_size
    q_size = num_heads * config.head_dim
    # All tokens' residual stream, cos and sin, and one layer's queries stay throughout the layer.
    lasting = T * ((config.hidden_size + q_size) * dtype.itemsize + 2 * config.head_dim * _FLOAT32)
    state = T * (q_size + num_heads) * _FLOAT32  # out and lse
    attention = max(num_states * state, _SPARSE_STATES * state + index_bytes)
    mlp = (T * q_size + C * (2 * config.hidden_size + 3 * mlp_size)) * dtype.itemsize
    return lasting + max(attention, mlp)


def tree_activation_bytes(
    model: Transformer, tree: PrefixTree, new_nodes: np.ndarray, new_sequences: slice, num_sequences: int
) -> int:
    """The most that one rank takes to prefill nodes and the suffixes of sequences (depth-first numbers) of ``tree``,
    and then to decode ``num_sequences``."""
    passes = _passes(tree, new_nodes, new_sequences)
    num_tokens = max((int(num_new.sum()) for num_new, _ in passes), default=0)
    dtype, sparse = model.embedding.weight.dtype, model.sparse_prefill
    num_levels = int(tree.table.node_depth.max(initial=-1)) + 1
    index_bytes = 0
    if sparse is not None:
        about = (model.num_kv_heads, model.config.head_dim, model.embedding.weight.device)
        index_bytes = max(sparse.index_bytes(*lengths, *about) for lengths in passes)
    return activation_bytes(
        model.config, dtype, model.group.size, num_tokens, num_sequences, model.prefill_chunk, num_levels, index_bytes
    )


def _passes(tree: PrefixTree, new_nodes: np.ndarray, new_sequences: slice) -> list[tuple[np.ndarray, np.ndarray]]:
    """The forward passes of a prefill, the new nodes of one depth or all suffixes: the new tokens of each of its nodes
    or sequences, and all tokens up to the last of these."""
    table = tree.table
    depths, lengths = table.node_depth[new_nodes], table.node_length[new_nodes]
    ends = table.node_position[new_nodes] + lengths
    passes = [(lengths[depths == depth], ends[depths == depth]) for depth in np.unique(depths)]
    suffixes = table.suffix_length[new_sequences]
    return [*passes, (suffixes, table.suffix_position[new_sequences] + suffixes)]
