"""What tells a model, or a text, from another of the same name."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_LENGTH = 12  # of a digest, in hexadecimal digits
# Of a file larger than this, parts are read: training changes weights everywhere.
_READ_WHOLE = 64 * 2**20
_NUM_PARTS, _PART_BYTES = 256, 4096
_OF_A_MODEL = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


def model_digest(folder: Path) -> str:
    """Of the weights, configuration and tokenizer in a model's folder. In the Hub's cache, whose folders are named
    after commits, the commit: there weights may be missing yet.
    """
    if folder.parent.name == "snapshots":
        return folder.name[:_LENGTH]
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _OF_A_MODEL for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _READ_WHOLE:
                digest.update(file.read())
                continue
            for number in range(_NUM_PARTS):
                file.seek((size - _PART_BYTES) * number // (_NUM_PARTS - 1))
                digest.update(file.read(_PART_BYTES))
    return digest.hexdigest()[:_LENGTH]


def text_digest(pieces: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(f"{piece}\n".encode())
    return digest.hexdigest()[:_LENGTH]
