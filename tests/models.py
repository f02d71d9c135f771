"""Small random transformers models, the same weights in this engine, and the comparison of the two.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.engine import Engine
from engine.model import Step, Transformer
from engine.prefix_tree import PrefixTree, levels

# Of the largest value of what is compared.
TOLERANCE = 1e-5

_SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}


def _yarn(**changes):
    scaled = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    return _SIZES | {"rope_parameters": scaled | changes, "max_position_embeddings": 64}


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Every family, with every switch of its config that changes the result.
FAMILIES = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama, multi-head, tied": lambda: LlamaConfig(**_SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama, biases, head_dim": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True, head_dim=20),
    "llama, rope linear": lambda: LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.7}
    ),
    "llama, rope llama3": lambda: LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE),
    "llama, rope yarn": lambda: LlamaConfig(**_yarn(beta_fast=4.0, beta_slow=0.5)),
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=16, sliding_window=None),
    "mistral, window": lambda: MistralConfig(**_SIZES, head_dim=16, sliding_window=7),
    "phi3, window": lambda: Phi3Config(**_SIZES, sliding_window=5),
    "phi3": lambda: Phi3Config(**_SIZES),
    "phi3, partial rotary, tied": lambda: Phi3Config(
        **_SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),  # fmt: skip
    "glm": lambda: GlmConfig(**_SIZES | {"eos_token_id": []}, head_dim=16),
    "glm, no bias, most of the head": lambda: GlmConfig(
        **_SIZES | {"eos_token_id": []}, head_dim=20, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.8},
    ),  # fmt: skip
    "qwen2, tied": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2, rope yarn": lambda: Qwen2Config(**_yarn()),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "qwen3, biases, multi-query": lambda: Qwen3Config(
        **_SIZES | {"num_key_value_heads": 1}, head_dim=16, attention_bias=True, tie_word_embeddings=True
    ),
}

# RoPE that goes by a sequence's length. transformers goes by that of a forward pass: each sequence is to have its own.
BY_LENGTH = {
    "llama, rope dynamic": lambda: LlamaConfig(
        **_SIZES | {"max_position_embeddings": 32},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.5},
    ),
    "phi3, longrope": lambda: Phi3Config(
        **_SIZES | {"max_position_embeddings": 80}, original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.2, 1.4, 1.5], "long_factor": [1.0, 1.9, 2.8, 3.5, 5.5, 7.0],
        },
    ),
}  # fmt: skip


def hf_model(family: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A float32 model of transformers. Its weights are large enough that every part of it shows in the logits."""
    config = (FAMILIES | BY_LENGTH)[family]()
    for name, value in changes.items():
        assert hasattr(config, name), f"{family} has no field {name}"
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            value = noise * 0.3 + (0.0 if name.endswith("bias") else 1.0)
        else:
            value = noise * weight.shape[1] ** -0.5 * (2.0 if "q_proj" in name or "k_proj" in name else 1.0)
        weight.data.copy_(value)
    return model


def our_model(hf: PreTrainedModel, group: TPGroup | None = None, prefill_chunk: int = 2048) -> Transformer:
    """The rank's part of the same model."""
    model = Transformer(ModelConfig.from_hf(hf.config.to_dict()), group or TPGroup(), prefill_chunk)
    weights = hf.state_dict()
    for slot in model.weight_slots():
        slot.target.copy_(slot.shard.cut(weights[slot.shard.name]))
    return model


def our_engine(hf: PreTrainedModel, group: TPGroup | None = None, prefill_chunk: int = 2048, **options) -> Engine:
    return Engine(our_model(hf, group, prefill_chunk), **options)


@dataclass(frozen=True)
class Reference:
    """What transformers computes for one sequence."""

    logits: torch.Tensor  # (T, V)
    layers: list[torch.Tensor]  # the residual stream after each layer, (T, hidden)


@torch.inference_mode()
def reference(hf: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Reference]:
    """Each sequence on its own. They run as one batch, padded at the end, which no causal row before it can see."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
    layers = []

    def keep(_module, _args, output):
        layers.append((output[0] if isinstance(output, tuple) else output).clone())

    hooks = [layer.register_forward_hook(keep) for layer in hf.model.layers]
    try:
        logits = hf(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [Reference(logits[i, : len(s)], [x[i, : len(s)] for x in layers]) for i, s in enumerate(sequences)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """They differ by at most TOLERANCE of the largest expected value."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} and {tuple(expected.shape)}"
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= TOLERANCE * largest, f"{what}: off by {difference:.2e} of {largest:.2e}"


@dataclass
class Pass:
    """One forward pass of the model."""

    step: Step
    layers: list[torch.Tensor] = field(default_factory=list)  # the residual stream after each layer, (T, hidden)

    @property
    def num_tokens(self) -> int:
        return len(self.step.tokens_T)

    @property
    def is_prefill(self) -> bool:
        """Of a decode step the hidden states of all tokens are wanted."""
        return self.step.rows_R is not None


@contextmanager
def passes(model: Transformer) -> Iterator[list[Pass]]:
    """Records the forward passes that the model makes inside the block."""
    seen: list[Pass] = []
    before = model.register_forward_pre_hook(lambda _module, args: seen.append(Pass(args[0])))
    # The residual stream is updated in place.
    after = [
        layer.register_forward_hook(lambda _module, _args, output: seen[-1].layers.append(output.clone()))
        for layer in model.layers
    ]
    try:
        yield seen
    finally:
        for hook in (before, *after):
            hook.remove()


def places(tree: PrefixTree, num_steps: int) -> Iterator[list[tuple[int, int]]]:
    """For each forward pass of a wave that ends after ``num_steps`` tokens, each token's (prompt, position).

    A token that several prompts share stands under the first of them. Prompts have the caller's numbers.
    """
    for level in levels(tree):
        nodes = [tree.nodes[index] for index in level]
        yield [(tree.order[n.first_leaf], position) for n in nodes for position in range(n.start, n.end)]
    lengths = {i: (tree.suffix_start(i), tree.sequence_length(i)) for i in range(tree.num_sequences)}
    suffixes = [(tree.order[i], position) for i, (start, end) in lengths.items() for position in range(start, end)]
    if suffixes:
        yield suffixes
    for step in range(num_steps - 1):
        yield [(tree.order[i], end + step) for i, (_, end) in lengths.items()]


def assert_layers_close(seen: list[Pass], tree: PrefixTree, num_steps: int, expected: Sequence[Reference]) -> None:
    """Every token of every pass has transformers' residual stream after every layer."""
    for number, (made, where) in enumerate(zip(seen, places(tree, num_steps), strict=True)):
        assert made.step.positions_T.tolist() == [position for _, position in where], f"pass {number}"
        for layer, actual in enumerate(made.layers):
            rows = torch.stack([expected[prompt].layers[layer][position] for prompt, position in where])
            assert_close(actual, rows, f"pass {number}, layer {layer}")
