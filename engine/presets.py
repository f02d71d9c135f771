"""The shapes of well-known models, so that one runs with random weights and without a download.

The real ones are the ``config.json`` of the Hub id that names them.
"""

from dataclasses import replace

import torch

from engine.config import ModelConfig
from engine.rope_config import RopeConfig

_LLAMA31_ROPE = RopeConfig(
    "llama3",
    theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def _llama(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    *,
    max_position_embeddings: int,
    rope: RopeConfig | None = None,
    vocab_size: int = 32000,
    dtype: torch.dtype = torch.bfloat16,
    bos_token_id: int = 1,
    eos_token_ids: tuple[int, ...] = (2,),
) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        rms_norm_eps=1e-5,
        max_position_embeddings=max_position_embeddings,
        rope=rope or RopeConfig(),
        dtype=dtype,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
    )


def _code_llama(*sizes: int, vocab_size: int) -> ModelConfig:
    rope = RopeConfig(theta=1000000.0)
    return _llama(*sizes, max_position_embeddings=16384, rope=rope, vocab_size=vocab_size)


def _llama3(*sizes: int, max_position_embeddings: int, rope: RopeConfig) -> ModelConfig:
    return _llama(
        *sizes,
        max_position_embeddings=max_position_embeddings,
        rope=rope,
        vocab_size=128256,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


_CODE_LLAMA_7B = _code_llama(4096, 11008, 32, 32, 32, vocab_size=32016)
_CODE_LLAMA_13B = _code_llama(5120, 13824, 40, 40, 40, vocab_size=32016)
_CODE_LLAMA_34B = _code_llama(8192, 22016, 48, 64, 8, vocab_size=32000)  # the one without the infilling tokens
_LLAMA2_7B = _llama(4096, 11008, 32, 32, 32, max_position_embeddings=4096, dtype=torch.float16)
_LLAMA3_8B = _llama3(4096, 14336, 32, 32, 8, max_position_embeddings=8192, rope=RopeConfig(theta=500000.0))
_LLAMA31_8B = _llama3(4096, 14336, 32, 32, 8, max_position_embeddings=131072, rope=_LLAMA31_ROPE)
_LLAMA31_70B = _llama3(8192, 28672, 80, 64, 8, max_position_embeddings=131072, rope=_LLAMA31_ROPE)
_LLAMA31_INSTRUCT_EOS = (128001, 128008, 128009)

_PRESETS = {
    "tiny": _llama(64, 176, 2, 4, 2, max_position_embeddings=4096, vocab_size=512, dtype=torch.float32),
    "demo": _llama(512, 1408, 6, 8, 4, max_position_embeddings=32768, vocab_size=8192, dtype=torch.float32),
    "llama-125m": _llama(768, 2048, 12, 12, 4, max_position_embeddings=131072),
    "codellama/CodeLlama-7b-hf": _CODE_LLAMA_7B,
    "codellama/CodeLlama-7b-Instruct-hf": _CODE_LLAMA_7B,
    "codellama/CodeLlama-13b-hf": _CODE_LLAMA_13B,
    "codellama/CodeLlama-13b-Instruct-hf": _CODE_LLAMA_13B,
    "codellama/CodeLlama-34b-hf": _CODE_LLAMA_34B,
    "codellama/CodeLlama-34b-Instruct-hf": _CODE_LLAMA_34B,
    "01-ai/Yi-6B-200K": _llama(
        4096, 11008, 32, 32, 4, max_position_embeddings=200000, rope=RopeConfig(theta=10000000.0), vocab_size=64000
    ),
    "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA2_7B,
    "meta-llama/Meta-Llama-3-8B": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": replace(_LLAMA3_8B, eos_token_ids=(128001, 128009)),
    "meta-llama/Llama-3.1-8B": _LLAMA31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": replace(_LLAMA31_8B, eos_token_ids=_LLAMA31_INSTRUCT_EOS),
    "meta-llama/Llama-3.1-70B": _LLAMA31_70B,
    "meta-llama/Llama-3.1-70B-Instruct": replace(_LLAMA31_70B, eos_token_ids=_LLAMA31_INSTRUCT_EOS),
    "princeton-nlp/Sheared-LLaMA-1.3B": _llama(
        2048, 5504, 24, 16, 16, max_position_embeddings=4096, dtype=torch.float32
    ),
}
_BY_LOWER_NAME = {name.lower(): config for name, config in _PRESETS.items()}


def find_preset(name: str) -> ModelConfig | None:
    """The preset of that name or Hub id, whatever its case; None when there is none."""
    return _BY_LOWER_NAME.get(name.lower())


def preset_names() -> list[str]:
    """The names and Hub ids that ``find_preset`` knows, small models first."""
    return list(_PRESETS)
