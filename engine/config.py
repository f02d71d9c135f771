"""What a Hugging Face ``config.json`` says about a model, checked and in the engine's own words.

Every field of the supported families that changes a result is either represented here or refused by name.
Both spellings are read: transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``,
``dtype``). A field that is left out means what it means to transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.errors import InputError
from engine.families import FAMILIES, Family, family_of
from engine.json_fields import Fields, refused
from engine.rope_config import RopeConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Far above any model's. A config beyond them would take hours, or all of the memory, before anything is found wrong.
_MAX_SIZE = 2**31 - 1
_MAX_SIZES = {"num_layers": 1000, "num_heads": 4096}
_MAX_PARAMETERS = 2**50

@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family. Sizes are of the whole model, not of one rank.

    Raises InputError when the numbers do not make a model, or the architecture is unknown.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head before RoPE (Qwen3)
    sliding_window: int | None = None  # a token sees so many of the last ones, itself included; None: all before it
    dtype: torch.dtype = torch.float32
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_biases(self, family_of(self.architecture))

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated, the first ones."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def rope_interleaved(self) -> bool:
        """Whether the two of a rotated pair are neighbours (GLM); otherwise they are half the rotated part apart."""
        return family_of(self.architecture).rope_interleaved

    @property
    def fused_qkv(self) -> bool:
        """Whether the checkpoint has the query, key and value projections in one tensor."""
        return family_of(self.architecture).fused_qkv

    @property
    def fused_gate_up(self) -> bool:
        """Whether the checkpoint has the MLP's gate and up projections in one tensor."""
        return family_of(self.architecture).fused_gate_up

    @property
    def max_positions(self) -> int:
        """The longest sequence: with dynamic RoPE ``factor`` times what the model was trained for."""
        scale = self.rope.factor if self.rope.type == "dynamic" else 1.0
        return int(self.max_position_embeddings * scale)

    @property
    def num_parameters(self) -> int:
        """Elements of all weights; tied embeddings count once."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (q_size + kv_size)
        attention += self.qkv_bias * (q_size + 2 * kv_size) + self.o_bias * self.hidden_size
        attention += self.qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + mlp + norms) + self.hidden_size

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a ``config.json``. Raises InputError, naming the field, for what cannot be run."""
        architecture = _architecture(raw)
        family = family_of(architecture)
        fields = Fields(raw, family.defaults)
        num_layers = fields.integer("num_hidden_layers")
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", None)
        hidden_size = fields.integer("hidden_size")
        max_positions = fields.integer("max_position_embeddings")
        _refuse_unhandled(fields, family, architecture)
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=_head_dim(fields, hidden_size, num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            rope=RopeConfig.from_hf(fields, family.defaults, family.rope_names),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=_bias(fields, family.qkv_bias),
            o_bias=_bias(fields, family.o_bias),
            mlp_bias=_bias(fields, family.mlp_bias),
            qk_norm=family.qk_norm,
            sliding_window=_window(fields, family, num_layers, max_positions),
            dtype=_dtype_from_hf(fields),
            bos_token_id=fields.integer("bos_token_id", None),
            eos_token_ids=fields.token_ids("eos_token_id"),
        )

    def with_generation_config(self, raw: Mapping[str, Any]) -> "ModelConfig":
        """The config with the end-of-sequence ids of a ``generation_config.json``, where it names any."""
        eos_token_ids = Fields(raw).token_ids("eos_token_id")
        return replace(self, eos_token_ids=eos_token_ids) if eos_token_ids else self

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` in the spelling of transformers 4, which 5 reads too."""
        family = family_of(self.architecture)
        biases = ((family.qkv_bias, self.qkv_bias), (family.o_bias, self.o_bias), (family.mlp_bias, self.mlp_bias))
        eos = list(self.eos_token_ids)
        return {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_hf(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            **{name: value for name, value in biases if isinstance(name, str)},
            **_own_lengths(self.rope, family),
            **({"sliding_window": self.sliding_window} if family.window else {}),
            **({"partial_rotary_factor": self.rope.partial_rotary_factor} if family.partial_rotary else {}),
            **family.extra,
        }


def _check_numbers(config: ModelConfig) -> None:
    sizes = (
        "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_position_embeddings"
    )
    for name in sizes.split():
        most = _MAX_SIZES.get(name, _MAX_SIZE)
        if not 1 <= getattr(config, name) <= most:
            raise refused(name, getattr(config, name), f"an integer from 1 to {most}")
    if config.num_parameters > _MAX_PARAMETERS:
        raise InputError(
            f"the sizes in the config make a model of {config.num_parameters:.1e} parameters; accepted: up to "
            f"{_MAX_PARAMETERS:.1e}; correct them in config.json"
        )
    if config.num_heads % config.num_kv_heads:
        raise refused(
            "num_key_value_heads", config.num_kv_heads, f"a divisor of num_attention_heads ({config.num_heads})"
        )
    if config.rotary_dim % 2 or config.rotary_dim < 2:
        accepted = "an even number of rotated dimensions, as RoPE takes pairs"
        if config.rotary_dim < config.head_dim:
            raise refused("partial_rotary_factor", config.rope.partial_rotary_factor, accepted)
        raise refused("head_dim", config.head_dim, accepted)
    if config.rope.type == "dynamic" and config.rotary_dim < 4:
        raise refused("head_dim", config.head_dim, "at least 4 rotated dimensions for rope type dynamic")
    original_length = config.rope.original_max_position_embeddings or config.max_position_embeddings
    if config.rope.type == "longrope" and original_length < 2:  # the attention factor divides by its logarithm
        raise refused("original_max_position_embeddings", original_length, "at least 2 for rope type longrope")
    for name in ("short_factor", "long_factor"):
        factors = getattr(config.rope, name)
        if factors is not None and len(factors) != config.rotary_dim // 2:
            raise refused(name, f"{len(factors)} numbers", f"{config.rotary_dim // 2}, one for each rotated pair")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise refused("sliding_window", config.sliding_window, "an integer of at least 1, or null")
    if not config.rms_norm_eps > 0:
        raise refused("rms_norm_eps", config.rms_norm_eps, "a positive number")
    if config.dtype not in _DTYPES.values():
        raise refused("dtype", config.dtype, ", ".join(_DTYPES))
    for name, ids in (("bos_token_id", (config.bos_token_id,)), ("eos_token_id", config.eos_token_ids)):
        for token_id in ids:
            if token_id is not None and not 0 <= token_id < config.vocab_size:
                raise refused(name, token_id, f"an id of the vocabulary, 0 to {config.vocab_size - 1}")


def _check_biases(config: ModelConfig, family: Family) -> None:
    """Only what ``to_hf`` can say and transformers would run."""
    if config.sliding_window is not None and not family.window:
        raise refused("sliding_window", config.sliding_window, f"null for {config.architecture}")
    if config.rope.partial_rotary_factor != 1 and not family.partial_rotary:
        raise refused("partial_rotary_factor", config.rope.partial_rotary_factor, f"1 for {config.architecture}")
    for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
        allowed = getattr(family, name)
        if isinstance(allowed, bool) and getattr(config, name) != allowed:
            raise refused(name, getattr(config, name), f"{allowed} for {config.architecture}")
    if isinstance(family.o_bias, str) and config.qkv_bias != config.o_bias:
        raise refused("qkv_bias, o_bias", (config.qkv_bias, config.o_bias), f"equal for {config.architecture}")


def _architecture(raw: Mapping[str, Any]) -> str:
    """The first of ``architectures``, or, that absent, the one that ``model_type`` implies."""
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    names, model_type = raw.get("architectures"), raw.get("model_type")
    if not names:
        if not isinstance(model_type, str) or model_type not in by_type:
            raise refused("model_type", model_type, ", ".join(by_type), "there is no field architectures; add it")
        return by_type[model_type]
    if not isinstance(names, list | tuple) or not isinstance(names[0], str):
        raise refused("architectures", names, f"a list of one of {', '.join(FAMILIES)}")
    family = family_of(names[0])
    # transformers goes by model_type. Where the two disagree, one of the readings must be wrong.
    if model_type is not None and model_type != family.model_type:
        raise refused("model_type", model_type, f"{family.model_type} for {names[0]}")
    return names[0]


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    head_dim = fields.integer("head_dim", None)
    if head_dim is not None:
        return head_dim
    if num_heads < 1:
        raise refused("num_attention_heads", num_heads, "an integer of at least 1")
    if hidden_size % num_heads:
        raise refused("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads}), or a head_dim")
    return hidden_size // num_heads


def _bias(fields: Fields, bias: bool | str) -> bool:
    return bias if isinstance(bias, bool) else fields.boolean(bias, False)


def _dtype_from_hf(fields: Fields) -> torch.dtype:
    name = fields.either("dtype", "torch_dtype")
    if name is None:
        return torch.float32
    dtype = _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if dtype is None:
        raise refused("dtype", name, ", ".join(_DTYPES))
    return dtype


def _refuse_unhandled(fields: Fields, family: Family, architecture: str) -> None:
    """Refuses, by name, the fields that change the result and that the engine does not implement."""
    harmless: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "is_causal": (True,),
        "quantization_config": (None,),
        "compression_config": (None,),
        "per_layer_config": (None, {}),
    }
    for name, values in harmless.items():
        given = fields.values.get(name, values[0])
        if given not in values:
            accepted = " or ".join("null" if value is None else repr(value) for value in values)
            raise refused(name, given, accepted, "what it asks for is not implemented; use another model")
    for name, bias in (("attention_bias", family.qkv_bias), ("mlp_bias", family.mlp_bias)):
        if bias is False and fields.values.get(name):
            raise refused(name, fields.values[name], f"false for {architecture}, which has no such bias")


def _window(fields: Fields, family: Family, num_layers: int, max_positions: int) -> int | None:
    """The sliding window of all layers, None where no position would feel it. Refuses one of some layers only."""
    layer_types = fields.values.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list | tuple) or any(kind != "full_attention" for kind in layer_types):
            raise refused("layer_types", layer_types, "a list of full_attention only", "use another model")
    if family.window_switch:
        switched_on = fields.boolean("use_sliding_window", False)
        in_some_layer = fields.integer("max_window_layers", 28) < num_layers and layer_types is None
        if not (switched_on and in_some_layer):
            return None
    window = fields.integer("sliding_window", None)
    if window is None or window >= max_positions:
        return None
    if not family.window:
        raise refused(
            "sliding_window",
            window,
            f"null, or at least max_position_embeddings ({max_positions})",
            "windows that differ between layers are not implemented; use another model",
        )
    return window


def _own_lengths(rope: RopeConfig, family: Family) -> dict[str, int]:
    """The original length where transformers has one of its own for a family, which it would take for a missing one."""
    name = "original_max_position_embeddings"
    return {name: rope.original_max_position_embeddings or family.defaults[name]} if name in family.defaults else {}
