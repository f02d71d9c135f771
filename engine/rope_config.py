"""Rotary position embedding as a config says it: its type, its numbers, and how they are spelled in ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from engine.json_fields import Fields, agreed, refused

# RoPE divides by its numbers, in float32.
_LEAST_POSITIVE = torch.finfo(torch.float32).tiny

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

# The fields, besides theta, that each RoPE type reads.
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. A field that ``type`` does not read keeps its default.

    ``original_max_position_embeddings`` of None stands for the model's ``max_position_embeddings``; a ``factor`` of
    None, of yarn or longrope, for the ratio of the two. Raises InputError for an unknown type or numbers that make no
    embedding.
    """

    type: RopeType = "default"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # of a head's dimensions, the first ones, that are rotated
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None  # one for each rotated pair, in sequences of the original length
    long_factor: tuple[float, ...] | None = None  # and in longer ones

    def __post_init__(self) -> None:
        if self.type not in _ROPE_FIELDS:
            raise refused("rope_type", self.type, ", ".join(_ROPE_FIELDS), "use a model with one of these")
        if not self.theta > 1:
            raise refused("rope_theta", self.theta, "a number above 1")
        if not 0 < self.partial_rotary_factor <= 1:
            raise refused("partial_rotary_factor", self.partial_rotary_factor, "a number above 0 and up to 1")
        if self.factor is None and self.type in ("linear", "dynamic", "llama3"):
            raise refused("factor", None, f"a positive number for rope type {self.type}")
        if self.type == "dynamic" and self.factor < 1:
            raise refused("factor", self.factor, "a number of at least 1 for rope type dynamic")
        for name in ("factor", "attention_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if value is not None and not value >= _LEAST_POSITIVE:
                raise refused(name, value, f"a positive number, from {_LEAST_POSITIVE:.1e} on")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise refused(name, value, "a number of at least 0")
        if self.type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None or not 0 < low < high:
                raise refused("low_freq_factor, high_freq_factor", (low, high), "two numbers, 0 < first < second")
        if self.type == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = getattr(self, name)
                if not factors or not all(factor >= _LEAST_POSITIVE for factor in factors):
                    raise refused(name, factors, "a list of positive numbers, one for each rotated pair")
        if self.beta_fast < self.beta_slow:
            raise refused("beta_fast, beta_slow", (self.beta_fast, self.beta_slow), "beta_fast >= beta_slow")

    @classmethod
    def from_hf(cls, fields: Fields, defaults: Mapping[str, Any], names: Mapping[str, str]) -> "RopeConfig":
        """Reads the fields of a ``config.json``. ``defaults`` are what missing ones mean, ``names`` other names of
        types. Raises InputError, naming the field, for what is not known."""
        raw = fields.either("rope_parameters", "rope_scaling")
        raw = {} if raw is None else raw
        if not isinstance(raw, Mapping):
            raise refused("rope_scaling", raw, "a JSON object or null")
        rope_type = Fields(raw).either("rope_type", "type") or "default"
        if isinstance(rope_type, str):
            rope_type = names.get(rope_type, rope_type)
        if not isinstance(rope_type, str) or rope_type not in _ROPE_FIELDS:
            raise refused("rope_type", rope_type, ", ".join(_ROPE_FIELDS), "use a model with one of these")
        read = _ROPE_FIELDS[rope_type]
        # "finetuned" tells how published models were made; no implementation reads it.
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", *read}
        for name, value in raw.items():
            if name not in known and value is not None:
                raise refused(name, value, f"only {', '.join(read) or 'rope_theta'} for rope type {rope_type}")
        if "factor" in read and "factor" not in raw and rope_type != "longrope":
            raise refused("factor", None, f"a positive number for rope type {rope_type}")

        # transformers takes these two from the top level as well.
        both = {
            name: agreed(f"rope_scaling.{name}", raw.get(name), name, fields.values.get(name))
            for name in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
        }
        rope = Fields({**raw, **{name: value for name, value in both.items() if value is not None}}, defaults)
        values: dict[str, Any] = {"theta": rope.number("rope_theta", None)}
        values["partial_rotary_factor"] = rope.number("partial_rotary_factor", None)
        for name in read:
            if name == "truncate":
                values[name] = rope.boolean(name, True)
            elif name == "original_max_position_embeddings":
                values[name] = rope.integer(name, None)
            elif name in ("short_factor", "long_factor"):
                values[name] = rope.numbers(name)
            else:
                values[name] = rope.number(name, None)
        return cls(type=rope_type, **{name: value for name, value in values.items() if value is not None})

    def to_hf(self) -> dict[str, Any] | None:
        """The field ``rope_scaling``, in the spelling of transformers 4; theta has one of its own."""
        if self.type == "default":
            return None
        values = {name: getattr(self, name) for name in _ROPE_FIELDS[self.type]}
        # A factor of null is how a config says "the ratio of the lengths"; the other fields are simply left out.
        return {"rope_type": self.type} | {
            name: value for name, value in values.items() if value is not None or name == "factor"
        }
