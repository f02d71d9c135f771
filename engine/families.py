"""The supported model families: how each transformers class reads its config, and in what its layers differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InputError
from engine.messages import shown


@dataclass(frozen=True)
class Family:
    """How one transformers class reads its config.

    A bias is True, False or the name of the config field that says so.
    """

    model_type: str
    defaults: Mapping[str, Any]  # what a field means that is left out
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    fused_qkv: bool = False  # query, key and value projections are one tensor
    fused_gate_up: bool = False
    rope_interleaved: bool = False  # a rotated pair are neighbours; otherwise they are half the rotated part apart
    partial_rotary: bool = False  # whether the config says how much of a head is rotated
    rope_names: Mapping[str, str] = field(default_factory=dict)  # other names of RoPE types
    window: bool = False  # sliding_window counts, in every layer
    window_switch: bool = False  # a sliding window is off unless use_sliding_window is true
    extra: Mapping[str, Any] = field(default_factory=dict)  # what to_hf adds


# A new family that differs in these ways only is one entry.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        window=True,
    ),
    "Phi3ForCausalLM": Family(
        model_type="phi3",
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        fused_qkv=True,
        fused_gate_up=True,
        partial_rotary=True,
        rope_names={"su": "longrope", "yarn": "longrope"},
        window=True,
    ),
    "GlmForCausalLM": Family(
        model_type="glm",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-07,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "eos_token_id": [151329, 151336, 151338],
        },
        qkv_bias="attention_bias",
        fused_gate_up=True,
        rope_interleaved=True,
        partial_rotary=True,
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        qkv_bias=True,
        window_switch=True,
        extra={"use_sliding_window": False},
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        window_switch=True,
        extra={"use_sliding_window": False},
    ),
}


def family_of(architecture: str) -> Family:
    """Raises InputError for an architecture that is not supported."""
    if architecture not in FAMILIES:
        raise InputError(
            f"architecture {shown(architecture)} is not supported; accepted: {', '.join(FAMILIES)}; use such a model"
        )
    return FAMILIES[architecture]
