"""The retrieval model as it is trained: a Llama, in the fewest operations that a CPU differentiates fast.

Shapes: B documents, N tokens, H query heads, G key/value heads, D head dimension, C hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_NORM_EPS = 1e-5
MAX_POSITIONS = 32768


@dataclass(frozen=True)
class ModelShape:
    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6

    @property
    def inverse_frequencies(self) -> Tensor:
        """``(D / 2,)``, in radians a token."""
        return self.rope_theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)


class Block(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.shape = shape
        hidden, query_size = shape.hidden_size, shape.num_heads * shape.head_dim
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, query_size + 2 * shape.num_kv_heads * shape.head_dim)
        self.output = nn.Linear(query_size, hidden)  # a bias, as Llama's attention_bias has it
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        hidden, num_heads, num_rotated = shape.hidden_size, shape.num_heads, shape.num_heads + shape.num_kv_heads
        qkv = self.qkv(F.rms_norm(x, (hidden,), self.attention_norm, RMS_NORM_EPS))
        qkv = qkv.unflatten(-1, (-1, shape.head_dim))
        first, second = qkv[:, :, :num_rotated].float().chunk(2, -1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(qkv.dtype)
        q, k = (part.transpose(1, 2) for part in rotated.tensor_split([num_heads], 2))
        v = qkv[:, :, num_rotated:].transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(F.rms_norm(x, (hidden,), self.mlp_norm, RMS_NORM_EPS)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class RetrievalModel(nn.Module):
    """Embeddings are tied: the output head is the embedding."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``(B, N, C)``, normalised, of token ids ``(B, N)`` at ``positions`` ``(N,)``."""
        angles = positions.double()[:, None] * self.shape.inverse_frequencies
        cos, sin = (f(angles).float()[None, :, None] for f in (torch.cos, torch.sin))
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.rms_norm(x, (self.shape.hidden_size,), self.norm, RMS_NORM_EPS)

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., V)`` of ``(..., C)``."""
        return hidden @ self.embedding.T


# ---- the start

# Heads of the first layer that begin by looking so many tokens back, at nothing else: one, the step from which
# induction follows; five, how far a needle's name stands before its colour, and a question's before the answer; and
# three, how far "key" stands before a passkey, which other numbers do not have there.
OFFSETS = (1, 5, 3)
_OFFSET_LOGIT = 6.0  # the height of each frequency's cosine
_SLOWEST = 0.04  # radians a token: frequencies above tell neighbouring positions apart
_OFFSET_WEIGHT_SCALE = 0.1
_QUERY_KEY_LIKENESS = 0.9
_VALUE_OUTPUT_LIKENESS = 0.5
_CASE_LIKENESS = 0.8
_EMBEDDING_STD = 0.09


@torch.no_grad()
def start(model: RetrievalModel, same_words: list[tuple[int, int]], seed: int) -> None:
    """Sets the weights that training starts from.

    They are random, but heads of the first layer look a fixed distance back (``OFFSETS``) by their biases. In the
    layers above queries resemble keys, so that like attends to like, and output projections undo value projections, so
    that what is attended to is copied ("mimetic initialization", Trockman and Kolter, arXiv:2305.09828, which has the
    opposite sign for the latter). Words that differ in their case alone, ``same_words``, have similar embeddings.
    """
    shape, generator = model.shape, torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for layer, gain in ((block.qkv, 1), (block.gate_up, 1), (block.output, 0.5), (block.down, 0.5)):
            layer.weight.normal_(0, gain / math.sqrt(layer.weight.shape[1]), generator=generator)
        block.qkv.bias.zero_()
        block.output.bias.zero_()
    model.embedding.normal_(0, _EMBEDDING_STD, generator=generator)
    for one, other in same_words:
        rest = math.sqrt(1 - _CASE_LIKENESS**2)
        model.embedding[other] = _CASE_LIKENESS * model.embedding[one] + rest * model.embedding[other]
    _look_back(model.blocks[0], shape)
    for block in model.blocks[1:]:
        _match_and_copy(block, shape)


def _look_back(block: Block, shape: ModelShape) -> None:
    """Heads 0, 1, ... attend ``OFFSETS`` tokens back: constant queries and keys, the query's rotated by the offset."""
    weight, bias = (t.unflatten(0, (-1, shape.head_dim)) for t in (block.qkv.weight, block.qkv.bias))
    frequencies = shape.inverse_frequencies.float()
    size = math.sqrt(_OFFSET_LOGIT * math.sqrt(shape.head_dim)) * (frequencies > _SLOWEST)
    for head, offset in enumerate(OFFSETS):
        bias[head] = torch.cat([size * torch.cos(-offset * frequencies), size * torch.sin(-offset * frequencies)])
        weight[head] *= _OFFSET_WEIGHT_SCALE
    group = shape.num_heads // shape.num_kv_heads
    for kv_head in {shape.num_heads + head // group for head in range(len(OFFSETS))}:
        bias[kv_head, : shape.head_dim // 2] = size
        weight[kv_head] *= _OFFSET_WEIGHT_SCALE


def _match_and_copy(block: Block, shape: ModelShape) -> None:
    weight = block.qkv.weight.unflatten(0, (-1, shape.head_dim))
    output = block.output.weight.unflatten(1, (-1, shape.head_dim))
    for head in range(shape.num_heads):
        kv_head = shape.num_heads + head // (shape.num_heads // shape.num_kv_heads)
        rest = math.sqrt(1 - _QUERY_KEY_LIKENESS**2)
        weight[head] = _QUERY_KEY_LIKENESS * weight[kv_head] + rest * weight[head]
        value = weight[kv_head + shape.num_kv_heads]
        output[:, head] = _VALUE_OUTPUT_LIKENESS * value.T + (1 - _VALUE_OUTPUT_LIKENESS) * output[:, head]
