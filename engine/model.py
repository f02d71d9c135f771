"""A Llama-family transformer for one tensor-parallel rank.

The forward pass is layer-major: within a layer, projections and MLP run in chunks of tokens, attention over all of
them at once. So beside the KV cache only the residual stream and one layer's queries grow with the prompt.

Shapes: T tokens, C tokens of a chunk, R rows that need logits, Hq and Hkv local query and KV heads, D head dimension,
P rotated dimensions of it, L positions, V local vocabulary, S slots of the KV arena.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.kv_cache import KVCache
from engine.layers import (
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    WeightSlot,
)
from engine.prefill.sparse import SparsePrefill
from engine.rope import cos_sin_table
from engine.sharding import Rule, check_world_size, fused, local_kv_heads, split, split_kv_heads
from kernels import Backend
from kernels.rotary import apply_rotary_, rotate_into_cache_
from kernels.swiglu import swiglu

# Tokens that go through projections and MLP at once: enough to fill the device, few enough to bound the memory.
PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class Step:
    """The new tokens of one forward pass, packed."""

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, each token's position in its sequence
    slots_T: torch.Tensor | None  # int64, the arena slot of each token's key and value; None: they are not kept
    rows_R: torch.Tensor | None  # int64, the tokens whose hidden states are wanted; None: all
    operations_backend: Backend | None  # what runs the operations around attention; None: the best there is


class PassAttention(Protocol):
    """The attention of one forward pass."""

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float, layer: int
    ) -> torch.Tensor:
        """``(T, Hq, D)``, in the queries' dtype, of the layer of this number."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, prefix: str, group: TPGroup):
        super().__init__()
        hidden, D, rank, size = config.hidden_size, config.head_dim, group.rank, group.size
        q_shape, kv_shape = (config.num_heads * D, hidden), (config.num_kv_heads * D, hidden)

        def shards(kind: str, last: slice) -> list:
            return [
                split(f"{prefix}.q_proj.{kind}", Rule.COLUMN, q_shape[last], 0, rank, size),
                split_kv_heads(f"{prefix}.k_proj.{kind}", kv_shape[last], config.num_kv_heads, rank, size),
                split_kv_heads(f"{prefix}.v_proj.{kind}", kv_shape[last], config.num_kv_heads, rank, size),
            ]

        weights = shards("weight", slice(None))
        if config.fused_qkv:
            weights = [fused(f"{prefix}.qkv_proj.weight", weights)]
        self.qkv_proj = ColumnParallelLinear(weights, shards("bias", slice(0, 1)) if config.qkv_bias else ())
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", (hidden, config.num_heads * D), group, config.o_bias)
        self.num_heads = config.num_heads // size
        self.num_kv_heads = local_kv_heads(config.num_kv_heads, rank, size)[1]
        self.head_dim = D
        self.scale = D**-0.5
        self.interleaved = config.rope_interleaved
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(f"{prefix}.q_norm", D, config.rms_norm_eps)
            self.k_norm = RMSNorm(f"{prefix}.k_norm", D, config.rms_norm_eps)

    def project(self, x_CI: torch.Tensor, backend: Backend | None) -> torch.Tensor:
        """``(C, Hq + 2 Hkv, D)``: queries, keys and values, before they are rotated."""
        Hq, Hkv = self.num_heads, self.num_kv_heads
        qkv_CHD = self.qkv_proj(x_CI).unflatten(-1, (Hq + 2 * Hkv, self.head_dim))
        if self.q_norm is not None:
            qkv_CHD[:, :Hq] = self.q_norm(qkv_CHD[:, :Hq], backend)
            qkv_CHD[:, Hq : Hq + Hkv] = self.k_norm(qkv_CHD[:, Hq : Hq + Hkv], backend)
        return qkv_CHD


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, prefix: str, group: TPGroup):
        super().__init__()
        shape = (config.intermediate_size, config.hidden_size)

        def shards(kind: str, last: slice) -> list:
            return [
                split(f"{prefix}.{part}_proj.{kind}", Rule.COLUMN, shape[last], 0, group.rank, group.size)
                for part in ("gate", "up")
            ]

        weights = shards("weight", slice(None))
        if config.fused_gate_up:
            weights = [fused(f"{prefix}.gate_up_proj.weight", weights)]
        self.gate_up_proj = ColumnParallelLinear(weights, shards("bias", slice(0, 1)) if config.mlp_bias else ())
        self.down_proj = RowParallelLinear(f"{prefix}.down_proj", shape[::-1], group, config.mlp_bias)

    def forward(self, x_CI: torch.Tensor, backend: Backend | None) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x_CI), backend))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int, group: TPGroup):
        super().__init__()
        prefix = f"model.layers.{index}"
        self.index = index
        self.input_norm = RMSNorm(f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, f"{prefix}.self_attn", group)
        self.post_attention_norm = RMSNorm(
            f"{prefix}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps
        )
        self.mlp = MLP(config, f"{prefix}.mlp", group)

    def forward(self, x_TI, step: Step, cos_T1P, sin_T1P, plan: PassAttention, cache: KVCache | None, chunk: int):
        """Adds the layer's output to the residual stream ``x (T, hidden)``, in place, and returns it."""
        T = x_TI.shape[0]
        attention, backend = self.attention, step.operations_backend
        chunks = [slice(first, min(first + chunk, T)) for first in range(0, T, chunk)]
        q_THD = x_TI.new_empty(T, attention.num_heads, attention.head_dim) if len(chunks) > 1 else None
        k_SHD, v_SHD = (None, None) if cache is None else cache.layer(self.index)
        for part in chunks:
            qkv_CHD = attention.project(self.input_norm(x_TI[part], backend), backend)
            cos, sin, interleaved = cos_T1P[part], sin_T1P[part], attention.interleaved
            if cache is None:
                apply_rotary_(qkv_CHD[:, : -attention.num_kv_heads], cos, sin, interleaved, backend)
            else:
                rotate_into_cache_(qkv_CHD, cos, sin, k_SHD, v_SHD, step.slots_T[part], interleaved, backend)
            q_CHD = qkv_CHD[:, : attention.num_heads]
            if q_THD is None:
                q_THD = q_CHD
            else:
                q_THD[part] = q_CHD
        out_TI = plan.run(q_THD, k_SHD, v_SHD, attention.scale, self.index).reshape(T, -1)
        for part in chunks:
            x_CI = x_TI[part]
            normalised_CI = self.post_attention_norm.of_sum_(x_CI, attention.o_proj(out_TI[part]), backend)
            x_CI += self.mlp(normalised_CI, backend)
        return x_TI


class Transformer(nn.Module):
    """One rank's part of the model. ``weight_slots`` says which shard of which checkpoint tensor goes where.

    Parameters are made uninitialised on the default device (``meta`` for the offline tool, which only reads the
    slots). Raises InputError when the model cannot be cut into ``group.size`` parts.
    """

    def __init__(self, config: ModelConfig, group: TPGroup, prefill_chunk: int = PREFILL_CHUNK):
        super().__init__()
        check_world_size(config.num_heads, config.num_kv_heads, config.intermediate_size, group.size)
        self.config = config
        self.name = ""  # what it was loaded as, by which methods know models
        self.group = group
        self.prefill_chunk = prefill_chunk
        self.attention_backend: Backend | None = None  # what evaluates attention; None: the best for each segment
        self.sparse_prefill: SparsePrefill | None = None  # how prompts are read; None: with all of attention
        self.operations_backend: Backend | None = None  # what runs the operations around it; None: the best there is
        vocab_shape = (config.vocab_size, config.hidden_size)
        self.embedding = VocabParallelEmbedding("model.embed_tokens.weight", vocab_shape, group)
        self.layers = nn.ModuleList(Layer(config, index, group) for index in range(config.num_layers))
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps)
        tied = self.embedding if config.tie_word_embeddings else None
        self.head = VocabParallelHead("lm_head.weight", vocab_shape, group, tied)
        self._cos_sin_L2P = torch.empty(0)
        self._rope_length = 0

    def weight_slots(self) -> Iterator[WeightSlot]:
        for module in self.modules():
            yield from getattr(module, "slots", ())

    @property
    def num_kv_heads(self) -> int:
        """KV heads that this rank holds."""
        return self.layers[0].attention.num_kv_heads

    @property
    def rotary_table(self) -> torch.Tensor:
        """(L, 2, P) float32: cosines and sines of the last ``prepare``."""
        return self._cos_sin_L2P

    def prepare(self, num_positions: int, rope_length: int = 0) -> None:
        """Makes the rotary table, for positions below ``num_positions`` of sequences of this ``rope_length``."""
        if self._cos_sin_L2P.shape[0] >= num_positions and self._rope_length == rope_length:
            return
        device = self.embedding.weight.device
        cos, sin = cos_sin_table(self.config, num_positions, device, rope_length).unbind(1)
        pairs_dim = -1 if self.config.rope_interleaved else -2  # where the two of a pair go, next to their number
        table = [torch.stack(pair, pairs_dim).flatten(-2) for pair in ((cos, cos), (-sin, sin))]
        self._cos_sin_L2P, self._rope_length = torch.stack(table, dim=1), rope_length

    def turn_back(self, q_THD: torch.Tensor, turns_T: torch.Tensor) -> torch.Tensor:
        """The queries as they would be so many positions earlier; ``q`` have been rotated to their own."""
        cos_T1P, sin_T1P = self._cos_sin_L2P[turns_T].unsqueeze(2).unbind(1)
        factor = self._cos_sin_L2P[0, 0, 0]  # which RoPE scales its rotations by, and which queries have already
        turned = q_THD.clone(memory_format=torch.contiguous_format)
        interleaved = self.config.rope_interleaved
        apply_rotary_(turned, cos_T1P / factor, -sin_T1P / factor, interleaved, self.operations_backend)
        return turned

    @torch.inference_mode()
    def forward(self, step: Step, plan: PassAttention, cache: KVCache | None) -> torch.Tensor:
        """``(R, hidden)``: normalised hidden states of the rows that ``step`` wants, the same on every rank.

        Keys and values are written to the cache; without one (attention disabled) they are dropped.
        """
        cos_T1P, sin_T1P = self._cos_sin_L2P[step.positions_T].unsqueeze(2).unbind(1)
        x_TI = self.embedding(step.tokens_T)
        for layer in self.layers:
            x_TI = layer(x_TI, step, cos_T1P, sin_T1P, plan, cache, self.prefill_chunk)
        return self.norm(x_TI if step.rows_R is None else x_TI[step.rows_R], step.operations_backend)

    @torch.inference_mode()
    def logits(self, hidden_RI: torch.Tensor) -> torch.Tensor:
        """``(R, V)``: this rank's part of the logits; column ``v`` is token ``head.first + v``, padding is -inf."""
        return self.head(hidden_RI)
