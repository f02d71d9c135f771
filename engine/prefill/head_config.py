"""A sparse pattern for each head of a model, from a JSON file as MInference (arXiv:2407.02490) publishes them.

The file is a list over layers of ``{"head": [type, number, number, score]}``, or an object with that list under
``heads`` and, beside it, how it was found. The types, and what their numbers are:

    vertical_and_slash  verticals, slashes
    stream_llm          first keys, local window
    block_sparse        blocks for each block of queries, 0. With a 1 in place of the 0, as MInference's own search
                        writes it, the first number is not read: its program keeps 100 blocks in any case.
    dense               0, 0: all keys

The score is that of the search, and is not read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.json_fields import load_json
from engine.messages import shown
from kernels.sparse.patterns import AShape, BlockSparse, Dense, Pattern, VerticalSlash

HeadPatterns = tuple[tuple[Pattern, ...], ...]  # layer by layer, for every query head

# What MInference gives to heads that it knows nothing of.
DEFAULT_PATTERN = VerticalSlash(1000, 6096)
_PUBLISHED_BLOCKS = 100

_FOLDER = Path(__file__).parent / "published"
_LLAMA_31 = "Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern.json"
_PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31,
    "meta-llama/Meta-Llama-3.1-8B-Instruct": _LLAMA_31,
    "microsoft/Phi-3-mini-128k-instruct": "Phi_3_mini_128k_instruct_kv_out_v32_fit_o_best_pattern.json",
}
_BY_LOWER_NAME = {name.lower(): file for name, file in _PUBLISHED.items()}


def get_support_models() -> list[str]:
    """The Hub ids of models whose published configurations come with the project."""
    return list(_PUBLISHED)


def find_head_config(name: str) -> Path | None:
    """The file for a model's Hub id, whatever its case, or for a local folder of its name; None where there is none."""
    if file := _BY_LOWER_NAME.get(name.lower()):
        return _FOLDER / file
    last = Path(name).name.lower()
    return next((_FOLDER / file for known, file in _BY_LOWER_NAME.items() if known.rpartition("/")[2] == last), None)


def is_published(name: str) -> bool:
    """Whether a model's Hub id is one that a published file is for, and not only of the same name."""
    return name.lower() in _BY_LOWER_NAME


def read_head_config(path: Path, num_layers: int, num_heads: int) -> HeadPatterns:
    """The patterns of a file. Raises InputError, naming what is wrong, unless each head of each layer has one."""
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{path} cannot be read ({reason}); accepted: a JSON file with a pattern for each head"
        ) from error
    layers = content.get("heads") if isinstance(content, dict) else content
    if not isinstance(layers, list) or len(layers) != num_layers:
        found = f"{len(layers)} layers" if isinstance(layers, list) else shown(layers)
        raise InputError(
            f"{path} has {found}; accepted: a list of {num_layers} layers, as the model has; use another file"
        )
    return tuple(_layer(path, number, layer, num_heads) for number, layer in enumerate(layers))


def write_head_config(heads: Sequence[Sequence[tuple[Pattern, float]]], provenance: dict[str, Any]) -> bytes:
    """A file as ``read_head_config`` takes it, of each head's pattern and score, with how they were found beside it."""
    layers = [{str(head): [*_entry(pattern), score] for head, (pattern, score) in enumerate(layer)} for layer in heads]
    lines = ",\n  ".join(json.dumps(layer) for layer in layers)
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in provenance.items())
    return f'{{\n{head} "heads": [\n  {lines}\n ]\n}}\n'.encode()


def _layer(path: Path, number: int, layer: Any, num_heads: int) -> tuple[Pattern, ...]:
    where = f"{path}, layer {number}"
    if not isinstance(layer, dict):
        raise InputError(f"{where} is {shown(layer)}; accepted: an object with a pattern for each head")
    wanted = [str(head) for head in range(num_heads)]
    if missing := [head for head in wanted if head not in layer]:
        raise InputError(
            f"{where} has no pattern for head {', '.join(missing[:8])}{' ...' * (len(missing) > 8)}; accepted: one for "
            f"each of the model's {num_heads}; add it"
        )
    if extra := [head for head in layer if head not in set(wanted)]:
        raise InputError(
            f"{where} has a head {shown(extra[0])}; accepted: 0 to {num_heads - 1}; is it another model's?"
        )
    return tuple(_pattern(f"{where}, head {head}", layer[head]) for head in wanted)


def _pattern(where: str, entry: Any) -> Pattern:
    is_entry = isinstance(entry, list) and len(entry) >= 3 and isinstance(entry[0], str)
    if not is_entry or not all(type(number) is int for number in entry[1:3]):
        raise InputError(f"{where} is {shown(entry)}; accepted: [type, number, number, score]")
    kind, first, second = entry[:3]
    try:
        if kind == "vertical_and_slash":
            return VerticalSlash(first, second)
        if kind == "stream_llm":
            return AShape(first, second)
        if kind == "block_sparse":
            return BlockSparse(_PUBLISHED_BLOCKS if second == 1 else first)
        if kind == "dense":
            return Dense()
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    accepted = "vertical_and_slash, stream_llm, block_sparse, dense"
    raise InputError(f"{where} has the type {shown(kind)}; accepted: {accepted}")


def _entry(pattern: Pattern) -> list[str | int]:
    match pattern:
        case VerticalSlash(num_vertical, num_slash):
            return ["vertical_and_slash", num_vertical, num_slash]
        case AShape(n_init, n_local):
            return ["stream_llm", n_init, n_local]
        case BlockSparse(num_blocks):
            return ["block_sparse", num_blocks, 0]
        case Dense():
            return ["dense", 0, 0]
    raise ValueError(f"files have no type for {pattern}")
