"""The trained model as a Hugging Face-format checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.checkpoint import write_checkpoint
from engine.config import ModelConfig
from training.model import MAX_POSITIONS, RMS_NORM_EPS, Block, RetrievalModel
from training.vocabulary import BOS_ID, EOS_ID, tokenizer_files


def export(model: RetrievalModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config, float32 weights and tokenizer. Raises InputError when ``folder`` already holds a model."""
    files = tokenizer_files(tokenizer, MAX_POSITIONS)
    write_checkpoint(folder, hf_config(model), _tensors(model), extra_files=files)


def hf_config(model: RetrievalModel) -> ModelConfig:
    shape = model.shape
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "rms_norm_eps": RMS_NORM_EPS,
            "rope_theta": shape.rope_theta,
            "max_position_embeddings": MAX_POSITIONS,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "torch_dtype": "float32",
        }
    )


def _tensors(model: RetrievalModel) -> Iterator[tuple[str, Tensor]]:
    with torch.no_grad():
        yield "model.embed_tokens.weight", model.embedding.detach()
        for number, block in enumerate(model.blocks):
            for name, tensor in _block_tensors(block):
                yield f"model.layers.{number}.{name}", tensor.detach().contiguous()
        yield "model.norm.weight", model.norm.detach()


def _block_tensors(block: Block) -> Iterator[tuple[str, Tensor]]:
    shape = block.shape
    sizes = [shape.num_heads * shape.head_dim] + [shape.num_kv_heads * shape.head_dim] * 2
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", getattr(block.qkv, kind).split(sizes), strict=True):
            yield f"self_attn.{name}_proj.{kind}", part
        yield f"self_attn.o_proj.{kind}", getattr(block.output, kind)
    gate, up = block.gate_up.weight.chunk(2)
    yield "mlp.gate_proj.weight", gate
    yield "mlp.up_proj.weight", up
    yield "mlp.down_proj.weight", block.down.weight
    yield "input_layernorm.weight", block.attention_norm
    yield "post_attention_layernorm.weight", block.mlp_norm
