from fuzz.documents import as_files, changed
from fuzz.harness import for_cases, fuzz
from hypothesis import strategies as st

from engine.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE, load_config
from engine.config import ModelConfig
from engine.rope import inv_freq, rope_length

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": False, "dtype": "bfloat16"},
    "mistral": {"head_dim": 8, "sliding_window": 100, "torch_dtype": "float16"},
    "phi3": {"original_max_position_embeddings": 128, "sliding_window": None, "partial_rotary_factor": 0.5},
    "glm": {"head_dim": 16, "attention_bias": False, "partial_rotary_factor": 0.5},
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28, "layer_types": ["full_attention"] * 2},
    "qwen3": {"head_dim": 8, "sliding_window": 64, "eos_token_id": [2, 3], "quantization_config": None},
}
_ROPES = [
    None,
    {"rope_type": "default", "rope_theta": 5e5},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1,
     "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False, "attention_factor": None},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.5], "rope_theta": 1e4},
]  # fmt: skip

_NAMES = sorted({name for part in (_SIZES, *_FAMILIES.values()) for name in part}) + [
    "model_type", "rope_theta", "rope_scaling", "rope_parameters", "compression_config", "is_causal",
    "per_layer_config",
]  # fmt: skip
_VALUES = ["llama", "Phi3ForCausalLM", "float32", "torch.bfloat16", "swish", 4, 8, 64, 128, *_ROPES]


def _document(model_type: str, rope: dict | None, place: str) -> dict:
    return _SIZES | {"model_type": model_type} | _FAMILIES[model_type] | {place: rope}


CONFIGS = st.builds(
    _document, st.sampled_from(list(_FAMILIES)), st.sampled_from(_ROPES),
    st.sampled_from(["rope_scaling", "rope_parameters"]),
)  # fmt: skip
_CHANGED = changed(CONFIGS, _NAMES, _VALUES)
_GENERATION = as_files(
    changed(st.just({"eos_token_id": [2, 3], "temperature": 0.7}), ["eos_token_id"], [0, [1], 63, 64])
)

_PROBLEMS = [
    "model_type is", "architectures", "is missing", "hidden_act is", "rope_type is", "rope_scaling is", "factor is",
    "only rope_theta for", "_factor is '", "disagree", "a divisor of", "an integer from 1 to", "dtype is",
    "an id of the vocabulary", "true or false", "sliding_window is", "rms_norm_eps is",
]  # fmt: skip


def _use(config: ModelConfig) -> None:
    """What an accepted config has to be good for, before there is a model."""
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert config.num_parameters > 0
    for length in (1, min(config.max_positions, 2**24)):
        if config.rotary_dim <= 2**16:
            inv_freq(config.rope, config.rotary_dim, config.max_position_embeddings, rope_length(config, length))


@for_cases
def test_documents(num_cases):
    outcomes = fuzz(num_cases, _CHANGED, lambda document: _use(ModelConfig.from_hf(document)))
    assert outcomes.accepted_share > 0.05
    assert outcomes.share("model_type|architecture") < 0.5
    outcomes.assert_reached(_PROBLEMS)


@for_cases
def test_files(num_cases, tmp_path):
    def load(files: tuple[bytes, bytes | None]) -> None:
        for name, data in zip((CONFIG_FILE, GENERATION_CONFIG_FILE), files):
            (tmp_path / name).unlink(missing_ok=True)
            if data is not None:
                (tmp_path / name).write_bytes(data)
        _use(load_config(tmp_path))

    outcomes = fuzz(num_cases, st.tuples(as_files(_CHANGED), st.none() | _GENERATION), load)
    assert outcomes.accepted_share > 0.05
    assert outcomes.share("is not valid JSON|holds a ") < 0.5
    outcomes.assert_reached([f"{CONFIG_FILE}: config field", f"{GENERATION_CONFIG_FILE}: config field eos_token_id"])
