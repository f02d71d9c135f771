import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from engine.config import ModelConfig
from engine.errors import InputError
from engine.rope_config import RopeConfig

SIZES = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=3e-6,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=128,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=0.7,
    mscale_all_dim=1.1,
    truncate=False,
)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    partial_rotary_factor=0.75,
    short_factor=[1.0, 1.5, 2.5],
    long_factor=[1.0, 4, 9.25],
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-mha": LlamaConfig(**SIZES | dict(num_key_value_heads=None)),
    "llama-biases-head-dim": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=10),
    "llama-3.2-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3, eos_token_id=[5, 6]),
    "llama-linear": LlamaConfig(**SIZES, rope_parameters=dict(rope_type="linear", rope_theta=1e6, factor=2.5)),
    "llama-bf16": LlamaConfig(**SIZES, dtype="bfloat16", bos_token_id=None, eos_token_id=None),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=12),
    "mistral-window": MistralConfig(**SIZES, sliding_window=100),
    "llama-dynamic": LlamaConfig(**SIZES, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.5)),
    "phi3": Phi3Config(**SIZES | dict(vocab_size=32064), sliding_window=511),
    "phi3-longrope": Phi3Config(
        **SIZES, original_max_position_embeddings=128, rope_parameters=LONGROPE, eos_token_id=[3, 4], pad_token_id=None
    ),
    "glm": GlmConfig(**SIZES, head_dim=16, eos_token_id=[7, 8], pad_token_id=None),
    "glm-no-bias": GlmConfig(
        **SIZES, head_dim=12, attention_bias=False, eos_token_id=9, pad_token_id=None,
        rope_parameters=dict(rope_type="default", rope_theta=5e4, partial_rotary_factor=1.0),
    ),
    "qwen2": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3-bias": Qwen3Config(**SIZES, attention_bias=True),
}


def as_transformers_4(raw: dict) -> dict:
    """The same config in the spelling that transformers 4 wrote."""
    raw = dict(raw)
    rope = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        raw["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    return raw


def config_file(config) -> dict:
    """What the file holds: no tuples, no torch types."""
    return json.loads(config.to_json_string(use_diff=False))


@pytest.fixture
def raw() -> dict:
    return config_file(CONFIGS["llama"]) | {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_transformers_reads_in_both_spellings(name):
    theirs = CONFIGS[name]
    ours = ModelConfig.from_hf(config_file(theirs))
    assert ModelConfig.from_hf(as_transformers_4(config_file(theirs))) == ours

    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.dtype == (theirs.dtype or torch.float32)
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [] if eos is None else [eos])
    rope = dict(theirs.rope_parameters)
    assert (ours.rope.type, ours.rope.theta) == (rope.pop("rope_type"), rope.pop("rope_theta"))
    ours_of = {name: getattr(ours.rope, name) for name in rope}
    assert rope == {name: list(value) if isinstance(value, tuple) else value for name, value in ours_of.items()}
    if "window" in name or name == "phi3":
        assert ours.sliding_window == theirs.sliding_window

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert ours.num_parameters == model.num_parameters()
    names = {name.split("layers.0.")[-1] for name, _ in model.named_parameters()}
    assert ours.fused_qkv == ("self_attn.qkv_proj.weight" in names)
    assert ours.fused_gate_up == ("mlp.gate_up_proj.weight" in names)
    assert ours.qkv_bias == ("self_attn.q_proj.bias" in names)
    assert ours.o_bias == ("self_attn.o_proj.bias" in names)
    assert ours.mlp_bias == ("mlp.down_proj.bias" in names)
    assert ours.qk_norm == ("self_attn.q_norm.weight" in names)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_writes_transformers_loads(name, tmp_path):
    ours = ModelConfig.from_hf(config_file(CONFIGS[name]))
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is type(CONFIGS[name])
    assert ModelConfig.from_hf(config_file(theirs)) == ours
    assert ModelConfig.from_hf(ours.to_hf()) == ours


@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig, Phi3Config, GlmConfig, Qwen2Config, Qwen3Config])
def test_a_field_left_out_means_what_it_means_to_transformers(family):
    given = {name: SIZES[name] for name in ("intermediate_size", "num_hidden_layers")}
    given |= {"vocab_size": 151552, "num_attention_heads": 32, "hidden_size": 128, "sliding_window": None}
    theirs = config_file(family(**given))
    assert ModelConfig.from_hf(given | {"model_type": family.model_type}) == ModelConfig.from_hf(theirs)


def test_mistrals_window_is_on_when_left_out():
    given = SIZES | {"model_type": "mistral", "max_position_embeddings": 8192}
    assert ModelConfig.from_hf(given).sliding_window == 4096
    assert ModelConfig.from_hf(given | {"max_position_embeddings": 4096}).sliding_window is None  # nobody feels it


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_has_other_names_for_longrope(name):
    given = SIZES | {"model_type": "phi3", "original_max_position_embeddings": 128, "eos_token_id": 3}
    scaling = {"type": name, "short_factor": [1] * 4, "long_factor": [2] * 4}
    config = ModelConfig.from_hf(given | {"rope_scaling": scaling})
    assert (config.rope.type, config.rope.long_factor) == ("longrope", (2.0,) * 4)
    assert config.rope.original_max_position_embeddings == 128


@pytest.mark.parametrize(
    "given",
    [
        {"model_type": "mistral", "sliding_window": 512},  # no position is further away
        {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False},
        {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
        {"model_type": "qwen3", "layer_types": ["full_attention"] * 3},
        {"model_type": "llama", "sliding_window": None, "pretraining_tp": 2, "attention_dropout": 0.1},
        {"model_type": "llama", "hidden_act": "swish", "quantization_config": None},
        {"model_type": "llama", "partial_rotary_factor": 1.0, "architectures": None},
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2, "finetuned": True}},
    ],
    ids=str,
)
def test_accepts_fields_that_change_nothing(given):
    plain = {name: given[name] for name in ("model_type",) if name in given}
    changed = {"rope_scaling"} & given.keys()  # says what it scales, and one field more that nothing depends on
    if changed:
        plain["rope_scaling"] = {k: v for k, v in given["rope_scaling"].items() if k != "finetuned"}
    assert ModelConfig.from_hf(SIZES | given) == ModelConfig.from_hf(SIZES | plain)


REFUSED = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported; accepted: LlamaFor"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": None, "model_type": "gpt2"}, "model_type is 'gpt2'"),
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"vocab_size": "320"}, "vocab_size is '320'; accepted: an integer"),
    ({"vocab_size": True}, "vocab_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": 50, "head_dim": None}, "hidden_size is 50"),
    ({"num_hidden_layers": 0}, "num_layers is 0"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
    ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
    ({"num_key_value_heads": 0}, "num_kv_heads is 0"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"intermediate_size": -1}, "intermediate_size is -1"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"dtype": "float64"}, "dtype is 'float64'; accepted: float32, bfloat16, float16"),
    ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype .* and torch_dtype .* disagree"),
    ({"bos_token_id": [1]}, "bos_token_id"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"eos_token_id": [2, 320]}, "eos_token_id is 320; accepted: .* 0 to 319"),
    ({"bos_token_id": -1}, "bos_token_id"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"is_causal": False}, "is_causal"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"compression_config": {"format": "int-quantized"}}, "compression_config"),
    ({"per_layer_config": {"0": {}}}, "per_layer_config"),
    ({"sliding_window": 511}, "sliding_window is 511; accepted: null, or at least max_position_embeddings"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"rope_parameters": None, "rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'; .*yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": ["linear"], "factor": 2.0}}, "rope_type is .'linear'.; "),
    ({"rope_parameters": None, "rope_scaling": {"rope_type": "longrope"}}, "short_factor is missing"),
    ({"rope_parameters": LONGROPE | {"long_factor": 2}}, "long_factor is 2; .* list"),
    ({"rope_parameters": LONGROPE | {"long_factor": [1, 2, "4"]}}, "long_factor is '4'"),
    ({"rope_parameters": LONGROPE | {"long_factor": [0] * 3}}, "long_factor is .0.0, "),
    ({"rope_parameters": LONGROPE | {"partial_rotary_factor": None}}, "short_factor is '3 numbers'; accepted: 4"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 0.5}}, "factor is 0.5; accepted: a number of at least 1"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim is 2; .* dynamic"),
    ({"rope_parameters": [1]}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters .* and rope_scaling .* disagree"),
    ({"rope_theta": 1234.0}, "rope_scaling.rope_theta .* and rope_theta .* disagree"),
    ({"rope_parameters": {"rope_type": "linear", "type": "yarn"}}, "rope_type .* and type .* disagree"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": None}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 32}}, "beta_fast"),
    ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "low_freq_factor"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
    ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 128.5}}, "original_max_position_embeddings"),
    ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings"),
    ({"rope_parameters": YARN | {"beta_slow": 17.0}}, "beta_fast, beta_slow"),
    ({"rope_parameters": YARN | {"truncate": None}}, "truncate"),
    ({"rope_parameters": YARN | {"attention_factor": -1.0}}, "attention_factor"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_refuses_by_name(raw, change, message):
    with pytest.raises(InputError, match=message) as caught:
        ModelConfig.from_hf(raw | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_shape_is_refused(raw, name):
    del raw[name]
    with pytest.raises(InputError, match=f"{name} is missing"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("phi3", {"partial_rotary_factor": 0.7, "eos_token_id": 1}, "partial_rotary_factor is 0.7; .* an even"),
        ("phi3", {"partial_rotary_factor": 1.5, "eos_token_id": 1}, "partial_rotary_factor is 1.5"),
        ("phi3", {"attention_bias": True, "eos_token_id": 1}, "attention_bias"),
        ("glm", {"mlp_bias": True, "eos_token_id": 1}, "mlp_bias"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, "sliding_window is 64"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding_window is 64"),
        ("qwen3", {"use_sliding_window": "no"}, "use_sliding_window"),
    ],
)
def test_refuses_what_a_family_does_not_have(model_type, change, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf(SIZES | {"model_type": model_type, "sliding_window": None} | change)


def test_original_length_may_be_at_the_top_level(raw):
    rope = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    config = ModelConfig.from_hf(raw | {"rope_parameters": rope, "original_max_position_embeddings": 256})
    assert config.rope.original_max_position_embeddings == 256


def test_generation_config_decides_where_generation_ends(raw):
    config = ModelConfig.from_hf(raw)
    assert config.with_generation_config({"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert config.with_generation_config({"eos_token_id": None}) == config
    assert config.with_generation_config({"temperature": 0.6}) == config
    with pytest.raises(InputError, match="eos_token_id"):
        config.with_generation_config({"eos_token_id": 1.5})


@pytest.mark.parametrize(
    "change", [{"o_bias": True}, {"qk_norm": True}, {"architecture": "Gpt"}, {"dtype": torch.int8}], ids=str
)
def test_a_config_that_no_file_could_say_is_refused(raw, change):
    fields = {name: getattr(ModelConfig.from_hf(raw), name) for name in ModelConfig.__dataclass_fields__}
    with pytest.raises(InputError):
        ModelConfig(**fields | change)


def test_rope_config_checks_itself():
    with pytest.raises(InputError, match="rope_type is 'ntk'"):
        RopeConfig(type="ntk")
