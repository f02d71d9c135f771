"""Writes a preset as a Hugging Face-format checkpoint with random weights and, where it fits, a byte tokenizer."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from engine.checkpoint import weight_shapes, write_checkpoint
from engine.cli import make_app, run
from engine.config import ModelConfig
from engine.dummy import dummy_tensor
from engine.errors import InputError
from engine.presets import find_preset, preset_names
from engine.safetensors_writer import num_bytes

app = make_app()

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def main(
    preset: Annotated[str, typer.Argument(help="A preset's name or Hub id, such as tiny or llama-125m.")],
    outdir: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights.  [default: the preset's]")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights; as with --load-format dummy.")] = 0,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Layers.  [default: the preset's]")] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest file, such as 500MB or 5GB.")] = "5GB",
) -> None:
    """Write a preset as a Hugging Face-format checkpoint with random weights.

    The weights equal those of --load-format dummy with the same seed, bit for bit.

    \b
    Examples:
      python tools/make_checkpoint.py tiny models/tiny
      python tools/make_checkpoint.py codellama/CodeLlama-7b-hf models/7b-2-layers --num-layers 2 --dtype bfloat16
    """
    config = find_preset(preset)
    if config is None:
        raise InputError(f"no such preset: {preset}; accepted: {', '.join(preset_names())}; choose one of these")
    if dtype is not None:
        config = replace(config, dtype=getattr(torch, dtype))
    if num_layers is not None:
        config = replace(config, num_layers=num_layers)
    max_shard_bytes = parse_size(max_shard_size)

    write_checkpoint(outdir, config, _tensors(config, seed), max_shard_bytes, byte_tokenizer(config))
    gigabytes = config.num_parameters * config.dtype.itemsize / 1e9
    typer.echo(f"{outdir}: {config.num_parameters / 1e6:,.1f}M parameters, {gigabytes:.2f} GB of weights")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB``, ``2GiB`` or ``1000``."""
    match = re.fullmatch(r"(\d+)\s*([A-Z]*)", text.strip(), flags=re.ASCII | re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or not int(match[1]):
        raise InputError(f"size {text!r} is not understood; accepted: a whole number and B, KB, MB, GB, KiB, MiB, GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def byte_tokenizer(config: ModelConfig) -> dict[str, bytes]:
    """The files of a tokenizer with one token a byte, so that any text is a prompt; none if the ids do not suffice.

    The special tokens have the config's ids; the bytes take the lowest of the others.
    """
    special = {f"</s{i or ''}>": token_id for i, token_id in enumerate(config.eos_token_ids)}
    if config.bos_token_id is not None and config.bos_token_id not in special.values():
        special["<s>"] = config.bos_token_id
    free = [i for i in range(min(config.vocab_size, 256 + len(special))) if i not in special.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if len(free) < len(alphabet):
        return {}

    backend = Tokenizer(models.BPE(vocab=special | dict(zip(alphabet, free, strict=False)), merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if config.eos_token_ids:
        settings["eos_token"] = "</s>"
    if "<s>" in special:
        settings["bos_token"] = "<s>"
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", special["<s>"])]
        )
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }


def _tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The weights, one at a time, and a progress bar that starts with the first."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("writing", total=config.num_parameters * config.dtype.itemsize)
        for name, shape in weight_shapes(config).items():
            yield name, dummy_tensor(name, shape, config.dtype, seed)
            progress.advance(task, num_bytes(config.dtype, shape))


if __name__ == "__main__":
    run(app)
