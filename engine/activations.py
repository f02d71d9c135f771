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


def activation_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    world_size: int,
    num_tokens: int,
    num_sequences: int,
    chunk: int = PREFILL_CHUNK,
    num_levels: int = 1,
) -> int:
    """The most that one of ``world_size`` ranks takes: in a prefill of ``num_tokens``, or in a decode step.

    ``num_tokens`` are those of the largest forward pass; a decode step has a token of each of ``num_sequences``, and
    its logits. ``num_levels`` of nodes are above them at most.
    """
    num_states = _STATES + max(0, num_levels - 1)
    # The logits of the step before are there while the next runs; choosing from them takes a float32 copy.
    logits = num_sequences * -(-config.vocab_size // world_size) * (dtype.itemsize + _FLOAT32)
    prefill = _forward_bytes(config, dtype, world_size, num_tokens, chunk, num_states)
    return max(prefill, _forward_bytes(config, dtype, world_size, num_sequences, chunk, num_states) + logits)


def _forward_bytes(
    config: ModelConfig, dtype: torch.dtype, world_size: int, T: int, chunk: int, num_states: int
) -> int:
    C = min(T, chunk)
    num_heads, mlp_size = config.num_heads // world_size, config.intermediate_size // world_size
    q_size = num_heads * config.head_dim
    # All tokens' residual stream, cos and sin, and one layer's queries stay throughout the layer.
    lasting = T * ((config.hidden_size + q_size) * dtype.itemsize + 2 * config.head_dim * _FLOAT32)
    attention = num_states * T * (q_size + num_heads) * _FLOAT32  # out and lse
    mlp = (T * q_size + C * (2 * config.hidden_size + 3 * mlp_size)) * dtype.itemsize
    return lasting + max(attention, mlp)


def tree_activation_bytes(
    model: Transformer, tree: PrefixTree, new_nodes: np.ndarray, new_sequences: slice, num_sequences: int
) -> int:
    """The most that one rank takes to prefill nodes and the suffixes of sequences (depth-first numbers) of ``tree``,
    and then to decode ``num_sequences``."""
    num_tokens = _largest_prefill(tree, new_nodes, new_sequences)
    dtype = model.embedding.weight.dtype
    num_levels = int(tree.table.node_depth.max(initial=-1)) + 1
    return activation_bytes(
        model.config, dtype, model.group.size, num_tokens, num_sequences, model.prefill_chunk, num_levels
    )


def _largest_prefill(tree: PrefixTree, new_nodes: np.ndarray, new_sequences: slice) -> int:
    """Tokens of the largest forward pass of a prefill: the new nodes of one depth, or all suffixes."""
    table = tree.table
    passes = np.bincount(table.node_depth[new_nodes], weights=table.node_length[new_nodes])
    return max(int(passes.max(initial=0)), int(table.suffix_length[new_sequences].sum()))
