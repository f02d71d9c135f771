import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config import ModelConfig
from engine.rope import cos_sin_table, inv_freq, rope_length

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, large theta": {"rope_type": "default", "rope_theta": 5e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.7},
    "llama3": LLAMA31,
    "llama3, factor 32": LLAMA31 | {"factor": 32.0, "low_freq_factor": 0.7, "high_freq_factor": 9.0},
    "llama3, original length left out": {k: v for k, v in LLAMA31.items() if not k.startswith("original")},
    "yarn": QWEN_YARN,
    "yarn, factor that is no power of two": QWEN_YARN | {"factor": 2.7},
    "yarn, betas": QWEN_YARN | {"beta_fast": 8.0, "beta_slow": 3.0},
    "yarn, not truncated": QWEN_YARN | {"truncate": False},
    "yarn, attention factor": QWEN_YARN | {"attention_factor": 0.8},
    "yarn, mscale": QWEN_YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, mscale alone": QWEN_YARN | {"mscale": 0.7},
    "yarn, mscale of zero": QWEN_YARN | {"mscale": 1.0, "mscale_all_dim": 0.0},
    "yarn, ramp of no width": QWEN_YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    "yarn, factor from the lengths": QWEN_YARN | {"factor": None},
    "yarn, factor of one": QWEN_YARN | {"factor": 1.0},
}


LENGTHS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic, factor that is no power of two": {"rope_type": "dynamic", "rope_theta": 5e6, "factor": 3.7},
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096},
    "longrope, attention factor": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
        "attention_factor": 1.19,
    },
    "longrope, factor": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, "factor": 7.0
    },
    "longrope of one length": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 131072},
}  # fmt: skip


def configs(name: str, head_dim: int = 128) -> tuple[LlamaConfig, ModelConfig]:
    theirs = LlamaConfig(
        vocab_size=320,
        hidden_size=4 * head_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict((ROPES | LENGTHS)[name]) | _factors(name, head_dim),
    )
    return theirs, ModelConfig.from_hf(theirs.to_dict())


def _factors(name: str, head_dim: int) -> dict[str, list[float]]:
    if not name.startswith("longrope"):
        return {}
    return {"short_factor": [1 + 0.01 * i for i in range(head_dim // 2)],
            "long_factor": [1 + 0.37 * i for i in range(head_dim // 2)]}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("planned", [1, 4096, 4097, 131072, 131073, 200001])
@pytest.mark.parametrize("name", LENGTHS)
def test_frequencies_of_a_length_are_those_of_transformers_bit_for_bit(name, planned, head_dim):
    theirs, ours = configs(name, head_dim)
    expected, expected_scaling = ROPE_INIT_FUNCTIONS[ours.rope.type](theirs, seq_len=torch.tensor(planned))
    actual, scaling = inv_freq(ours.rope, ours.head_dim, ours.max_position_embeddings, rope_length(ours, planned))
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    assert scaling == expected_scaling


def test_lengths_that_are_rotated_alike():
    _, dynamic = configs("dynamic")
    assert [rope_length(dynamic, n) for n in (1, 131072, 131073, 200000)] == [0, 0, 131073, 200000]
    assert dynamic.max_positions == 262144
    _, longrope = configs("longrope")
    assert [rope_length(longrope, n) for n in (1, 4096, 4097, 131072)] == [0, 0, 4097, 4097]
    assert longrope.max_positions == 131072
    _, yarn = configs("yarn")
    assert rope_length(yarn, 131072) == 0


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers_bit_for_bit(name, head_dim):
    theirs, ours = configs(name, head_dim)
    init = ROPE_INIT_FUNCTIONS.get(ours.rope.type, LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_scaling = init(theirs)
    actual, scaling = inv_freq(ours.rope, ours.head_dim, ours.max_position_embeddings)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert scaling == expected_scaling


def test_frequencies_follow_the_definition_in_double_precision():
    _, config = configs("default", 64)
    actual, _ = inv_freq(config.rope, 64, config.max_position_embeddings)
    expected = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=3e-7, atol=0)


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones():
    _, plain = configs("default, large theta")
    _, config = configs("yarn")
    scaled, scaling = inv_freq(config.rope, 128, config.max_position_embeddings)
    unscaled = 1e6 ** -(torch.arange(0, 128, 2) / 128)
    assert scaled[0] == unscaled[0]
    torch.testing.assert_close(scaled[-1], unscaled[-1] / 4)
    assert scaling == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("name", ["default", "llama3", "yarn, mscale"])
def test_table_is_that_of_transformers_up_to_the_last_position(name):
    theirs, ours = configs(name)
    table = cos_sin_table(ours, 131072)
    assert table.shape == (131072, 2, 64) and table.dtype == torch.float32 and table.is_contiguous()
    positions = torch.tensor([0, 1, 2, 777, 8191, 8192, 65535, 100003, 131071])
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[None])
    # Vectorised and scalar cosines may differ in the last bit, frequencies may not.
    torch.testing.assert_close(table[positions, 0], cos[0, :, :64], rtol=0, atol=2e-7)
    torch.testing.assert_close(table[positions, 1], sin[0, :, :64], rtol=0, atol=2e-7)


def test_table_of_no_positions_is_empty():
    _, config = configs("default")
    assert cos_sin_table(config, 0).shape == (0, 2, 64)
