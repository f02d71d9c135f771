"""Rotary position embedding (RoFormer, arXiv:2104.09864): frequencies, their scalings, and the cos/sin table.

Some types go by the sequence's length. That is the planned one, from the first token on, so that all of a sequence's
keys are rotated alike; transformers goes by the length so far, and leaves older keys as they were.

Shapes: P positions, D rotated dimensions of a head. Everything is float32. The order of operations matters: a
frequency that is off in its last bit is off by 0.01 radians at position 100,000. It is that of transformers, so that
logits agree.
"""

import math

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.rope_config import RopeConfig


def rope_length(config: ModelConfig, planned_length: int) -> int:
    """What of a sequence's planned length its frequencies go by: those for which this is equal are rotated alike.

    0 where the length is within the original context, or does not count.
    """
    rope, original_length = config.rope, _original_length(config.rope, config.max_position_embeddings)
    if rope.type == "dynamic" and planned_length > config.max_position_embeddings:
        return planned_length
    return original_length + 1 if rope.type == "longrope" and planned_length > original_length else 0


def inv_freq(
    rope: RopeConfig, rotary_dim: int, max_position_embeddings: int, length: int = 0
) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, ``(D/2,)`` float32 on the CPU, and the factor on cos and sin.

    ``max_position_embeddings`` stands in for a missing ``original_max_position_embeddings``; ``length`` is the
    sequence's ``rope_length``.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    if rope.type == "dynamic":
        return 1.0 / _dynamic_theta(rope, rotary_dim, max_position_embeddings, length) ** exponents, 1.0
    periods = rope.theta**exponents  # positions per radian
    frequencies = 1.0 / periods
    original_length = _original_length(rope, max_position_embeddings)
    if rope.type == "default":
        return frequencies, 1.0
    if rope.type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, frequencies, original_length), 1.0
    factor = max_position_embeddings / original_length if rope.factor is None else rope.factor
    if rope.type == "longrope":
        factors = rope.long_factor if length > original_length else rope.short_factor
        attention_factor = _longrope_attention_factor(rope, factor, original_length)
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * periods), attention_factor
    return _yarn(rope, periods, factor, original_length), _yarn_attention_factor(rope, factor)


def cos_sin_table(
    config: ModelConfig, num_positions: int, device: torch.device | str | None = None, length: int = 0
) -> Tensor:
    """``(P, 2, D/2)`` float32: ``[:, 0]`` is cos and ``[:, 1]`` sin of each position's angles, scaled for attention.

    ``length`` is the sequences' ``rope_length``. A position is a float32, which counts exactly up to 2^24.
    """
    assert num_positions <= 2**24, f"{num_positions} positions do not fit float32"
    frequencies, attention_scaling = inv_freq(
        config.rope, config.rotary_dim, config.max_position_embeddings, length
    )
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = positions[:, None] * frequencies.to(device)
    return torch.stack((angles.cos(), angles.sin()), dim=1).mul_(attention_scaling)


def _original_length(rope: RopeConfig, max_position_embeddings: int) -> int:
    return rope.original_max_position_embeddings or max_position_embeddings


def _dynamic_theta(rope: RopeConfig, rotary_dim: int, max_position_embeddings: int, length: int) -> Tensor | float:
    """Dynamic NTK scaling: theta grows with the length, so that the slowest pair turns as far as it was trained to.

    u/emozilla's, of NTK-aware scaling (arXiv:2309.00071, section 2.3).
    """
    if not length:
        return rope.theta
    stretch = rope.factor * torch.tensor(length) / max_position_embeddings - (rope.factor - 1)
    return rope.theta * stretch ** (rotary_dim / (rotary_dim - 2))


def _longrope_attention_factor(rope: RopeConfig, factor: float, original_length: int) -> float:
    """The factor on cos and sin (LongRoPE, arXiv:2402.13753; Phi-3, arXiv:2404.14219)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0


def _llama3(rope: RopeConfig, frequencies: Tensor, original_length: int) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by ``factor``, short ones kept, those between blended.

    The band's edges are ``original_length / low_freq_factor`` and ``original_length / high_freq_factor`` positions
    (``apply_scaling`` in Meta's llama-models).
    """
    wavelengths = 2 * math.pi / frequencies
    turns = original_length / wavelengths  # within the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept) * frequencies / rope.factor + kept * frequencies
    is_long = wavelengths > original_length / rope.low_freq_factor
    is_short = wavelengths < original_length / rope.high_freq_factor
    return torch.where(is_long, frequencies / rope.factor, torch.where(is_short, frequencies, blended))


def _yarn(rope: RopeConfig, periods: Tensor, factor: float, original_length: int) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv:2309.00071, section 3.2).

    Pairs that turn more than ``beta_fast`` times within the original context keep their frequency, those that turn
    less than ``beta_slow`` times are stretched by ``factor``, with a linear ramp over the pairs between.
    """
    rotary_dim = 2 * len(periods)

    def pair_that_turns(times: float) -> float:
        """The index (a fraction) of the pair that turns so often in the original context: theta^(-2i/D), inverted."""
        return rotary_dim * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first or 0.001  # a ramp of no width is a step
    kept = 1 - ((torch.arange(len(periods), dtype=torch.float32) - first) / width).clamp(0, 1)
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    """The factor on cos and sin that lowers the softmax's temperature (arXiv:2309.00071, section 3.4).

    ``mscale`` and ``mscale_all_dim`` (DeepSeek's variant of it) count only together, and zero as absent.
    """

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
