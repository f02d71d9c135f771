import pytest
import torch

from engine.config import ModelConfig
from engine.presets import find_preset, preset_names

# As published with the weights, or counted from them.
NUM_PARAMETERS = {
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "codellama/CodeLlama-13b-Instruct-hf": 13_016_028_160,
    "codellama/CodeLlama-34b-Instruct-hf": 33_743_970_304,
    "01-ai/Yi-6B-200K": 6_061_035_520,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "princeton-nlp/Sheared-LLaMA-1.3B": 1_345_423_360,
}


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_real_models_have_their_number_of_parameters(name):
    assert find_preset(name).num_parameters == NUM_PARAMETERS[name]


def test_llama_125m_is_the_benchmark_model():
    config = find_preset("llama-125m")
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (768, 2048, 12)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (12, 4, 64)
    assert config.vocab_size == 32000
    assert config.max_position_embeddings >= 131072
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("size", ["7b", "13b", "34b"])
def test_instruct_and_base_code_llamas_share_their_shards(size):
    base, instruct = (find_preset(f"codellama/CodeLlama-{size}{kind}-hf") for kind in ("", "-Instruct"))
    assert base == instruct
    assert base.rope.theta == 1e6 and base.max_position_embeddings == 16384


def test_names_are_found_whatever_their_case():
    assert find_preset("META-LLAMA/llama-3.1-8b") == find_preset("meta-llama/Llama-3.1-8B") is not None
    assert find_preset("meta-llama/Llama-9") is None


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_written_as_a_config_file(name):
    config = find_preset(name)
    assert ModelConfig.from_hf(config.to_hf()) == config
