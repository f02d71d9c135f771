"""Hugging Face-format checkpoints: found locally or on the Hub, checked against their config, read and written.

A checkpoint is a folder with ``config.json`` and weights: one file, or several and their index. Safetensors are read
and written, PyTorch's older ``.bin`` files are read where there are none.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import InputError
from engine.files import partial_path, write_whole
from engine.json_fields import read_json
from engine.messages import one_line, shown
from engine.safetensors_writer import SafetensorsWriter, num_bytes
from engine.weight_files import WeightFile, open_weights

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_WEIGHTS_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
# Any of them makes a folder a model's.
ALL_WEIGHTS_FILES = (WEIGHTS_FILE, INDEX_FILE, BIN_WEIGHTS_FILE, BIN_INDEX_FILE)
# What travels with a model so that text can be encoded, here and by other libraries.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)

# Anything else cannot be a Hub id and is taken for a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class _Format:
    """Under which names a folder holds its weights: one file, which comes first, or the index of several."""

    file: str
    index: str
    suffix: str  # of the files that the index names

    def is_in(self, folder: Path) -> bool:
        return (folder / self.file).is_file() or (folder / self.index).is_file()


_SAFETENSORS = _Format(WEIGHTS_FILE, INDEX_FILE, ".safetensors")
_BIN = _Format(BIN_WEIGHTS_FILE, BIN_INDEX_FILE, ".bin")


def resolve_model(name_or_path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a model: a local one, or a Hub id's in the cache, downloaded first where it is not there.

    Only the files that the engine reads are downloaded; with ``weights`` False, no weights. ``HF_HOME``,
    ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` count as always. Raises InputError for a model that cannot be had.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InputError(f"revision {revision!r} has no effect on the local folder {name}; leave it out")
        if not (path / CONFIG_FILE).is_file():
            raise InputError(f"{name} has no {CONFIG_FILE}; accepted: a folder with a Hugging Face-format model")
        return path
    if path.exists():
        raise InputError(f"{name} is a file; accepted: a model's folder or a Hub id; give the folder that holds it")
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"no such folder: {name!r}; accepted: a local folder, a Hub id (owner/name), or a preset's name with "
            "--load-format dummy; check the spelling"
        )
    small = [CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES]
    folder = _snapshot(name, revision, [*small, WEIGHTS_FILE, INDEX_FILE] if weights else small)
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{name} has no {CONFIG_FILE} on the Hub; accepted: a Hugging Face-format model")
    return _with_weights(name, folder) if weights else folder


def _with_weights(name: str, folder: Path) -> Path:
    """The snapshot with what its index names, and with ``.bin`` weights where it has no safetensors."""
    # The folder is named after the commit: the weights must be of the same one, whatever is pushed meanwhile.
    if not _SAFETENSORS.is_in(folder):
        folder = _snapshot(name, folder.name, [BIN_WEIGHTS_FILE, BIN_INDEX_FILE])
    found = _find_format(folder)
    if found is not None and not (folder / found.file).is_file():
        files = sorted(set(_read_index(folder, found).values()))
        folder = _snapshot(name, folder.name, [glob.escape(file) for file in files])
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # here, as it adds a quarter of a second to every start
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} is gated; ask for access at https://huggingface.co/{name} and log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"no such model: {name} is neither a local folder nor a model on the Hub that this account sees; "
            "check the spelling, or log in (hf auth login, or HF_TOKEN) for a private one"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r}; accepted: a branch, tag or commit of it") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} is neither a local folder nor complete in the Hub's cache, and the Hub cannot be reached; check "
            f"the connection, unset HF_HUB_OFFLINE, or fetch it elsewhere (hf download {name})"
        ) from error
    except Exception as error:  # whatever the transport raises: which library that is differs between versions
        lines = str(error).strip().splitlines()
        raise InputError(f"cannot download {name}: {lines[0] if lines else type(error).__name__}") from error


def load_config(folder: Path) -> ModelConfig:
    """``config.json``, with the end-of-sequence ids of ``generation_config.json`` where there is one."""
    path = folder / CONFIG_FILE
    try:
        config = ModelConfig.from_hf(read_json(path))
        if (folder / GENERATION_CONFIG_FILE).is_file():
            path = folder / GENERATION_CONFIG_FILE
            config = config.with_generation_config(read_json(path))
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    return config


def _find_format(folder: Path) -> _Format | None:
    return next((form for form in (_SAFETENSORS, _BIN) if form.is_in(folder)), None)


def _read_index(folder: Path, form: _Format) -> dict[str, str]:
    """The file of each tensor. An index comes from strangers: it may only name files of its own folder."""
    path = folder / form.index
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map; accepted: an object of tensor names and files; fetch it again")
    for file in weight_map.values():
        is_plain = isinstance(file, str) and Path(file).name == file and not set(file) & set("\\\0")
        if not is_plain or not file.endswith(form.suffix):
            raise InputError(
                f"{path} names the file {shown(file)}; accepted: plain names of {form.suffix} files beside it; "
                "do not trust this model"
            )
    return weight_map


class Checkpoint:
    """The tensors of a folder, read where they are needed and only as far as asked for. A context manager.

    Files are opened on first use and mapped, so that what is read takes no memory of its own until it is copied.
    Raises InputError, naming file and tensor, for what is missing, damaged or quantised.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_files: dict[str, WeightFile] = {}
        form = _find_format(folder)
        if form is None:
            raise InputError(
                f"{folder} has no weights; accepted: {WEIGHTS_FILE}, {BIN_WEIGHTS_FILE}, or {INDEX_FILE}, "
                f"{BIN_INDEX_FILE} and the files that they name; convert others with transformers' save_pretrained, "
                "or use --load-format dummy"
            )
        if (folder / form.file).is_file():
            self._files = dict.fromkeys(self._open(form.file).names(), form.file)
            return
        self._files = _read_index(folder, form)
        missing = sorted(file for file in set(self._files.values()) if not (folder / file).is_file())
        if missing:
            raise InputError(f"{folder} lacks {_listed(missing)}, which {form.index} names; fetch the model again")

    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file_of(name).dtype(name)

    def num_bytes(self, name: str) -> int:
        """The size of the whole tensor."""
        return num_bytes(self.dtype(name), self.shape(name))

    def files(self) -> list[Path]:
        """Those that hold the tensors, sorted."""
        return [self.folder / file for file in sorted(set(self._files.values()))]

    @property
    def is_mapped(self) -> bool:
        """Whether all that is read lies in the files' pages. Opens every file."""
        return all(self._open(file).is_mapped for file in set(self._files.values()))

    def read(self, name: str, dim: int | None = None, start: int = 0, length: int | None = None) -> Tensor:
        """The tensor, or its part ``start : start + length`` of ``dim``: a view of the mapped file, not to be written.

        ``length`` of None goes to the end. It is contiguous where it was stored so and is no part of a later dimension
        than the first.
        """
        if dim is None:
            assert start == 0 and length is None, "a part needs its dimension"
            return self._file_of(name).read(name)
        size = self.shape(name)[dim]
        stop = size if length is None else start + length
        assert 0 <= start <= stop <= size, f"{name}: {start}:{stop} of dimension {dim}, which has {size}"
        return self._file_of(name).read(name, dim, start, stop)

    def fingerprint(self) -> str:
        """A hash of four numbers of each tensor: different for a model that was trained on, without reading it all."""
        digest = hashlib.sha256()
        for name in self.names():
            flat = self.read(name).flatten()
            sample = flat[:: max(1, flat.numel() // 4)].contiguous()
            digest.update(f"{name} {self.dtype(name)} {self.shape(name)}".encode())
            digest.update(sample.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _file_of(self, name: str) -> WeightFile:
        if name not in self._files:
            raise InputError(f"{self.folder} has no tensor {name}; it has {_listed(self.names())}")
        return self._open(self._files[name])

    def _open(self, file: str) -> WeightFile:
        if file not in self._open_files:
            self._open_files[file] = open_weights(self.folder / file)
        return self._open_files[file]

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open_files.values():
            file.close()
        self._open_files.clear()


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model under its Hugging Face name, in the order of the forward pass."""
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    projections = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.o_bias),
        "mlp.gate_proj": (ffn, hidden, config.mlp_bias),
        "mlp.up_proj": (ffn, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, ffn, config.mlp_bias),
    }
    if config.fused_qkv:
        num_out = sum(projections.pop(f"self_attn.{part}_proj")[0] for part in "qkv")
        projections["self_attn.qkv_proj"] = (num_out, hidden, False)
    if config.fused_gate_up:
        num_out = sum(projections.pop(f"mlp.{part}_proj")[0] for part in ("gate", "up"))
        projections["mlp.gate_up_proj"] = (num_out, hidden, False)
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    for name, (num_out, num_in, has_bias) in projections.items():
        layer[f"{name}.weight"] = (num_out, num_in)
        if has_bias:
            layer[f"{name}.bias"] = (num_out,)
    layer["post_attention_layernorm.weight"] = (hidden,)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_weights(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises InputError, in one line, unless the tensors are those of ``config``: none missing, misshapen or unknown.

    Known extras are let pass: RoPE frequencies, which the config implies, and a tied output head that equals the
    embeddings (transformers would use one that differs, whatever the config says).
    """
    expected, stored = weight_shapes(config), set(checkpoint.names())
    extra = {name for name in stored - set(expected) if not name.endswith("rotary_emb.inv_freq")}
    problems = []
    if missing := [name for name in expected if name not in stored]:
        problems.append(f"missing {_listed(missing)}")
    shapes = {name: checkpoint.shape(name) for name in expected if name in stored}
    if wrong := [f"{name} {shape}, not {expected[name]}" for name, shape in shapes.items() if shape != expected[name]]:
        problems.append(f"wrong shape: {_listed(wrong)}")
    if config.tie_word_embeddings and "lm_head.weight" in extra and "model.embed_tokens.weight" in stored:
        extra.remove("lm_head.weight")
        fits = shapes["model.embed_tokens.weight"] == expected["model.embed_tokens.weight"]  # if not, that is said
        if fits and not _are_equal(checkpoint, "lm_head.weight", "model.embed_tokens.weight"):
            problems.append("lm_head.weight differs from the embeddings, but tie_word_embeddings is true")
    if extra:
        problems.append(f"unexpected {_listed(sorted(extra))}")
    if problems:
        raise InputError(
            f"{checkpoint.folder}: the weights do not fit {CONFIG_FILE}: {'; '.join(problems)}; "
            "use the config that belongs to them"
        )


def _are_equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    shape = checkpoint.shape(a)
    if shape != checkpoint.shape(b):
        return False
    step = 4096  # rows at a time, so that a comparison across dtypes copies little
    parts = ((start, min(step, shape[0] - start)) for start in range(0, shape[0], step))
    return all(torch.equal(checkpoint.read(a, 0, *part), checkpoint.read(b, 0, *part)) for part in parts)


def _listed(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(one_line(name, 120) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = 5 * 10**9,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a checkpoint that this engine and transformers load, holding one tensor at a time.

    ``tensors`` are exactly those of ``weight_shapes(config)``, in any order, of the config's dtype; ``extra_files``
    small ones that go with them, such as a tokenizer's, by name. Weights get their names when all are written and
    ``config.json`` comes last, so that a run that is stopped leaves nothing that loads. Raises InputError when
    ``folder`` already holds a model.
    """
    shards = _plan_shards(config, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    check_holds_no_model(folder)
    for leftover in folder.glob(partial_path(Path("*.safetensors")).name):
        leftover.unlink()  # of a run that was killed

    count = len(shards)
    files = [WEIGHTS_FILE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    with ExitStack() as stack:
        writers: dict[str, SafetensorsWriter] = {}
        for file, shard in zip(files, shards, strict=True):
            writer = stack.enter_context(
                SafetensorsWriter(folder / file, {name: (config.dtype, shape) for name, shape in shard.items()})
            )
            writers |= dict.fromkeys(shard, writer)
        for name, tensor in tensors:
            writers.pop(name).write(name, tensor)
        assert not writers, f"never given: {sorted(writers)}"
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(num_bytes(config.dtype, shape) for shard in shards for shape in shard.values())
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, data in (extra_files or {}).items():
        write_whole(folder / file, data)
    _write_json(folder / CONFIG_FILE, config.to_hf())


def _plan_shards(config: ModelConfig, max_shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Consecutive tensors in files of at most ``max_shard_bytes``, or one tensor where that alone is larger."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_shard_bytes
    for name, shape in weight_shapes(config).items():
        size = num_bytes(config.dtype, shape)
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = shape
        room -= size
    return shards


def check_holds_no_model(folder: Path) -> None:
    """Raises InputError when a checkpoint could not be written to ``folder``, because it holds one, or parts of one."""
    present = sorted(path.name for path in folder.iterdir() if _is_model_file(path)) if folder.is_dir() else []
    if present:
        raise InputError(f"{folder} already holds {_listed(present)}; choose another folder, or remove these first")


def _is_model_file(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name in (CONFIG_FILE, *ALL_WEIGHTS_FILES)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
