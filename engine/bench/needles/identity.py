"""What tells a model, or a text, from another of the same name."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint import TOKENIZER_FILES, Checkpoint, load_config
from engine.config import ModelConfig
from engine.shards import MANIFEST_FILE, open_shards

_LENGTH = 12  # of a digest, in hexadecimal digits


def model_digest(folder: Path) -> str:
    """Of the weights, the config and the tokenizer in a model's folder: the same for its shards, in whatever dtype. In
    the Hub's cache, whose folders are named after commits, the commit: there weights may be missing yet."""
    if folder.parent.name == "snapshots":
        return folder.name[:_LENGTH]
    if (folder / MANIFEST_FILE).exists():
        manifest = open_shards(folder).manifest
        config, fingerprint = manifest.config, manifest.fingerprint
    else:
        with Checkpoint(folder) as checkpoint:
            config, fingerprint = load_config(folder), checkpoint.fingerprint()
    digest = hashlib.sha256(fingerprint.encode())
    digest.update(_config_bytes(config))
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:_LENGTH]


def config_digest(config: ModelConfig) -> str:
    """Of a model with random weights, which its config, its name and a seed draw: the same in whatever dtype."""
    return hashlib.sha256(_config_bytes(config)).hexdigest()[:_LENGTH]


def _config_bytes(config: ModelConfig) -> bytes:
    return json.dumps(replace(config, dtype=torch.float32).to_hf(), sort_keys=True).encode()


def text_digest(pieces: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(f"{piece}\n".encode())
    return digest.hexdigest()[:_LENGTH]
