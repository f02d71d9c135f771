"""Small checkpoints as transformers saves them, and the ways to cut them that matter."""

from pathlib import Path

from commands import load
from models import hf_model

from engine.checkpoint import weight_shapes, write_checkpoint
from engine.config import ModelConfig
from engine.dummy import dummy_tensor
from engine.presets import find_preset

_SIXTHS = dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8, intermediate_size=57)

# (family, changes of its config, number of ranks). The vocabulary of 67 divides by none but 1.
SPLITS = [
    ("llama", {}, 1),
    ("llama", {}, 2),
    ("llama", {}, 4),  # 2 KV heads
    ("llama", _SIXTHS, 3),
    ("llama", {"vocab_size": 5}, 4),  # the last rank holds padding only
    ("llama, multi-head, tied", {}, 1),
    ("llama, multi-head, tied", {}, 4),
    ("llama, biases, head_dim", {}, 4),
    ("phi3", {}, 1),
    ("phi3", {}, 4),
    ("glm", {}, 2),
    ("qwen2, tied", {}, 2),
    ("qwen3", {}, 2),
    ("qwen3, biases, multi-query", {}, 4),
]


def save_hf(folder: Path, family: str = "llama", seed: int = 0, **changes) -> Path:
    """``hf_model`` as several files and their index, with something in the place of a tokenizer."""
    hf_model(family, seed, **changes).save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def save_random(folder: Path, config: ModelConfig, files: dict[str, bytes] | None = None) -> Path:
    """A checkpoint of ``config`` with random weights, and further files by name."""
    tensors = ((name, dummy_tensor(name, shape, config.dtype)) for name, shape in weight_shapes(config).items())
    write_checkpoint(folder, config, tensors, 10**9, files or {})
    return folder


def save_tiny(folder: Path) -> Path:
    """What ``tools/make_checkpoint.py tiny`` writes: the preset ``tiny``, and a tokenizer of bytes, BOS first."""
    config = find_preset("tiny")
    return save_random(folder, config, load("tools/make_checkpoint.py").byte_tokenizer(config))
