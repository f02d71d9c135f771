"""The shard directory: a checkpoint cut ahead of time, one safetensors file for each tensor-parallel rank.

It holds ``rank-00000-of-00008.safetensors`` and so on, with tensors under their Hugging Face names; ``config.json``,
``generation_config.json`` and the tokenizer's files; and ``tp_manifest.json``, which describes all of them and is
written last: a directory without it is unfinished and never loads. ``engine.shard_writer`` makes such a directory.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from engine.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE, load_config
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.json_fields import load_json
from engine.mapped_safetensors import MappedSafetensors
from engine.messages import one_line, shown
from engine.model import Transformer
from engine.safetensors_writer import SAFETENSORS_DTYPES
from engine.sharding import Rule, TensorShard

FORMAT_VERSION = 1
MANIFEST_FILE = "tp_manifest.json"

# Called with (bytes done, bytes in all).
OnProgress = Callable[[int, int], None]

_HASH_CHUNK = 1 << 22  # bytes

# Of a file that may lie in a shard directory: no path, and fit to be printed.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

_MAX_NAMED = 100  # bad files in one message; more are counted


def rank_file(rank: int, num_splits: int) -> str:
    return f"rank-{rank:05}-of-{num_splits:05}.safetensors"


def rank_shards(config: ModelConfig, rank: int, num_splits: int) -> list[TensorShard]:
    """What a rank holds, in the order of its file. Raises InputError when the model cannot be cut so."""
    with torch.device("meta"):
        model = Transformer(config, TPGroup(rank, num_splits))
    return [slot.shard for slot in model.weight_slots()]


@dataclass(frozen=True)
class TensorRecord:
    """How a tensor is cut: the part of a ``TensorShard`` that is the same on every rank."""

    rule: Rule
    shape: tuple[int, ...]  # of the whole tensor
    dim: int | None

    @classmethod
    def of(cls, shard: TensorShard) -> "TensorRecord":
        return cls(shard.rule, shard.full_shape, shard.dim)


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    size: int  # bytes
    sha256: str  # of all its bytes, as ``sha256sum`` prints it


@dataclass(frozen=True)
class Manifest:
    """What ``tp_manifest.json`` says."""

    model_name: str
    num_splits: int
    config: ModelConfig  # its dtype is that of the shards
    fingerprint: str  # tells apart weights that share a config
    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileRecord]

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model_name": self.model_name,
            "num_splits": self.num_splits,
            "dtype": dtype_name(self.config.dtype),
            "config": self.config.to_hf(),
            "fingerprint": self.fingerprint,
            "tensors": {name: asdict(record) for name, record in self.tensors.items()},
            "files": {name: asdict(record) for name, record in self.files.items()},
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Manifest":
        """Raises KeyError, TypeError or ValueError when a field is missing, of a wrong type or contradicts another."""
        num_splits = _typed(raw["num_splits"], int)
        config = ModelConfig.from_hf(_typed(raw["config"], dict))
        if raw["dtype"] != dtype_name(config.dtype):
            raise ValueError(f"dtype is {shown(raw['dtype'])}, but the config's {dtype_name(config.dtype)!r}")
        manifest = cls(
            model_name=_typed(raw["model_name"], str),
            num_splits=num_splits,
            config=config,
            fingerprint=_typed(raw["fingerprint"], str),
            tensors={name: _tensor_record(value) for name, value in _typed(raw["tensors"], dict).items()},
            files={name: _file_record(value) for name, value in _typed(raw["files"], dict).items()},
        )
        # Ends at the first that is missing, since num_splits may be any number.
        for name in (rank_file(rank, num_splits) for rank in range(num_splits)):
            if name not in manifest.files:
                raise ValueError(f"no record of {name}")
        for name in manifest.files:
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(f"file {shown(name)} is not a plain name")
        return manifest


@dataclass(frozen=True)
class ShardDir:
    """A finished shard directory. Only ``open_shards`` makes one, so its manifest fits this engine."""

    folder: Path
    manifest: Manifest

    def open_rank(self, rank: int) -> MappedSafetensors:
        """A rank's mapped file, a context manager. No other rank's file is touched.

        Raises InputError unless its size is the recorded one and its header that of this rank's model.
        """
        name = rank_file(rank, self.manifest.num_splits)
        problem = self._size_problem(name)
        if problem is None:
            try:
                file = MappedSafetensors(self.folder / name)
            except SafetensorError as error:
                problem = f"{name} is not safetensors ({one_line(str(error))})"
            else:
                problem = self._header_problem(file, rank)
                if problem is None:
                    return file
                file.close()
        raise InputError(f"{self.folder}: {problem}; copy the file again, or cut the model again with --force")

    def problem_of(self, name: str, on_bytes: Callable[[int], None] | None = None) -> str | None:
        """What is wrong with a file, in a few words; None when nothing is.

        Size and header are looked at; the checksum too, which reads all of the file, when there is an ``on_bytes``,
        called with the number of bytes after each piece.
        """
        ranks = {rank_file(rank, self.manifest.num_splits): rank for rank in range(self.manifest.num_splits)}
        if problem := self._size_problem(name):
            return problem
        if on_bytes is not None and _sha256(self.folder / name, on_bytes) != self.manifest.files[name].sha256:
            return f"{name} has another checksum than when it was written"
        if name not in ranks:
            return None
        try:
            with MappedSafetensors(self.folder / name) as file:
                return self._header_problem(file, ranks[name])
        except SafetensorError as error:
            return f"{name} is not safetensors ({one_line(str(error))})"

    def _size_problem(self, name: str) -> str | None:
        path, expected = self.folder / name, self.manifest.files[name].size
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        return None if size == expected else f"{name} has {size} bytes, not {expected}"

    def _header_problem(self, file: MappedSafetensors, rank: int) -> str | None:
        config, num_splits = self.manifest.config, self.manifest.num_splits
        expected = {shard.name: (config.dtype, shard.shape) for shard in rank_shards(config, rank, num_splits)}
        found = {name: (SAFETENSORS_DTYPES.get(file.dtype(name)), file.shape(name)) for name in file.names()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if not wrong:
            return None
        first = wrong[0]
        return (
            f"{rank_file(rank, num_splits)} holds other tensors than its rank needs, such as {one_line(first)}: "
            f"{_described(found.get(first))}, not {_described(expected.get(first))}"
        )


def open_shards(folder: Path) -> ShardDir:
    """Reads and checks the manifest; the ranks' files are not looked at.

    Raises InputError, naming the file, when the directory is unfinished, its manifest damaged or of another format,
    its config changed, or the tensors are cut by other rules than this engine's.
    """
    path = folder / MANIFEST_FILE
    recut = "cut the model again with tools/make_tp_files.py --force"
    again = f"accepted: as it was written; {recut}"
    try:
        raw = load_json(path)
        version = raw["format_version"]
        if version == FORMAT_VERSION:
            manifest = Manifest.from_json(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} has no {MANIFEST_FILE}; accepted: a directory that tools/make_tp_files.py has finished; "
            "check the path, or run it again"
        ) from None
    except KeyError as error:
        raise InputError(f"{path} has no field {error}; {again}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({one_line(str(error), 500)}); {again}") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {shown(version)}; accepted: {FORMAT_VERSION}; {recut}")
    if load_config(folder) != manifest.config:
        raise InputError(f"{folder}: {CONFIG_FILE} or {GENERATION_CONFIG_FILE} differs from {MANIFEST_FILE}; {again}")
    shards = rank_shards(manifest.config, 0, manifest.num_splits)
    if {shard.name: TensorRecord.of(shard) for shard in shards} != manifest.tensors:
        raise InputError(f"{path}: the tensors are not cut by the rules of this engine; {again}")
    return ShardDir(folder, manifest)


def verify(folder: Path, checksums: bool = True, on_progress: OnProgress | None = None) -> ShardDir:
    """Checks every file against the manifest: size, header and, with ``checksums``, all bytes.

    Raises InputError, one line that names every bad file, up to a hundred.
    """
    shards = open_shards(folder)
    files = shards.manifest.files
    total, done = sum(record.size for record in files.values()), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    problems = [problem for name in files if (problem := shards.problem_of(name, on_bytes if checksums else None))]
    if problems:
        named = "; ".join(problems[:_MAX_NAMED])
        raise InputError(
            f"{folder}: bad files, {len(problems)} of {len(files)}: {named}; "
            "copy them again, or cut the model again with --force"
        )
    return shards


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _typed(value: Any, kind: type) -> Any:
    """``value``, when it is of that type; an int of 64 bits at most, so that it fits a message."""
    too_long = isinstance(value, int) and abs(value) >= 2**63
    if not isinstance(value, kind) or isinstance(value, bool) or too_long:
        raise TypeError(f"{shown(value)} where a {kind.__name__} belongs")
    return value


def _tensor_record(raw: Any) -> TensorRecord:
    shape = tuple(_typed(size, int) for size in _typed(raw["shape"], list))
    return TensorRecord(Rule(raw["rule"]), shape, None if raw["dim"] is None else _typed(raw["dim"], int))


def _file_record(raw: Any) -> FileRecord:
    return FileRecord(_typed(raw["size"], int), _typed(raw["sha256"], str))


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def _described(tensor: tuple[torch.dtype | None, tuple[int, ...]] | None) -> str:
    if tensor is None:
        return "none"
    dtype, shape = tensor
    return f"{'another dtype' if dtype is None else dtype_name(dtype)} {shown(shape)}"
