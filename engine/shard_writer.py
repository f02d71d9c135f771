"""Cuts a checkpoint into a shard directory (see ``engine.shards``), tensor by tensor.

The checkpoint is mapped and each rank's part goes straight into that rank's file, so that memory holds no more than
the ranks' parts of one tensor and one part of the next, whatever the model and the number of splits.
"""

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from engine.checkpoint import (
    ALL_WEIGHTS_FILES,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_FILES,
    Checkpoint,
    check_weights,
    load_config,
)
from engine.config import ModelConfig
from engine.errors import InputError
from engine.files import locked_directory, partial_path, write_whole
from engine.finite_weights import check_finite
from engine.messages import one_line
from engine.safetensors_writer import SafetensorsWriter, num_bytes
from engine.sharding import check_world_size
from engine.shards import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    OnProgress,
    ShardDir,
    TensorRecord,
    dtype_name,
    open_shards,
    rank_file,
    rank_shards,
)

# Also what an earlier, killed run was still writing, perhaps for another number of splits.
_RANK_FILE = re.compile(r"rank-\d{5}-of-\d{5}\.safetensors|\.rank-\d{5}-of-\d{5}\.safetensors\.partial")
_SMALL_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES)


@dataclass(frozen=True)
class Split:
    """What ``write_shards`` did."""

    shards: ShardDir
    written: bool  # False: the directory held this very split already


def write_shards(
    folder: Path,
    outdir: Path,
    num_splits: int,
    *,
    model_name: str,
    dtype: torch.dtype | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Split:
    """Cuts the checkpoint in ``folder`` for ``num_splits`` ranks, in ``dtype`` or the config's own.

    A run that fails removes what it wrote; after one that is killed nothing loads and the next run starts over. A
    finished split of the same weights, by size and header of its files, is left alone. Raises InputError before
    anything is written when the model cannot be cut so, the checkpoint is incomplete, another run writes to
    ``outdir``, or it holds something else and not ``force``.
    """
    config = load_config(folder)
    config = config if dtype is None else replace(config, dtype=dtype)
    check_world_size(config.num_heads, config.num_kv_heads, config.intermediate_size, num_splits)
    with Checkpoint(folder) as checkpoint:
        check_weights(checkpoint, config)
        small_files = _small_files(folder, config)
        plan = Manifest(
            model_name=model_name,
            num_splits=num_splits,
            config=config,
            fingerprint=checkpoint.fingerprint(),
            tensors={shard.name: TensorRecord.of(shard) for shard in rank_shards(config, 0, num_splits)},
            files={name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in small_files.items()},
        )
        if finished := _finished(outdir, plan, force):
            return Split(finished, written=False)
        outdir.mkdir(parents=True, exist_ok=True)
        with locked_directory(outdir):
            if finished := _finished(outdir, plan, force):  # by another run meanwhile
                return Split(finished, written=False)
            _clear(outdir)
            try:
                return Split(_write(checkpoint, outdir, plan, small_files, on_progress), written=True)
            except BaseException as error:
                _clear(outdir)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    size = f"{num_splits * _rank_bytes(plan) / 1e6:,.1f} MB"
                    raise InputError(
                        f"{outdir}: {error.strerror}; the split takes {size}; make room for it, or choose another disk"
                    ) from error
                raise


class _HashingWriter(SafetensorsWriter):
    """Takes the file's checksum as it grows, for which the tensors have to come in the declared order.

    A thread of its own does that, one tensor behind at most: a checksum takes longer than all the rest.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        super().__init__(path, tensors)
        self._file.flush()
        self._order = iter(tensors)
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1)
        # Done when all that was written is in the digest. So far the file is its header.
        self._hashed = self._thread.submit(self._digest.update, partial_path(path).read_bytes())

    def write(self, name: str, tensor: Tensor) -> None:
        assert name == next(self._order), f"{name} is out of order"
        assert tensor.is_contiguous(), f"{name}: both threads read it where it lies"
        self._hashed.result()
        self._hashed = self._thread.submit(self._digest.update, _bytes(tensor))
        super().write(name, tensor)

    def record(self) -> FileRecord:
        """Of the finished file."""
        self._hashed.result()
        return FileRecord(self.path.stat().st_size, self._digest.hexdigest())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        super().__exit__(kind, error, trace)


def _write(
    checkpoint: Checkpoint,
    outdir: Path,
    plan: Manifest,
    small_files: Mapping[str, bytes],
    on_progress: OnProgress | None,
) -> ShardDir:
    dtype, num_splits = plan.config.dtype, plan.num_splits
    shards = [rank_shards(plan.config, rank, num_splits) for rank in range(num_splits)]
    done, total = 0, num_splits * _rank_bytes(plan)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                _HashingWriter(
                    outdir / rank_file(rank, num_splits), {shard.name: (dtype, shard.shape) for shard in of_rank}
                )
            )
            for rank, of_rank in enumerate(shards)
        ]
        stack.enter_context(_one_thread())
        for parts in zip(*shards, strict=True):
            full = checkpoint.read(parts[0].name)
            for writer, shard in zip(writers, parts, strict=True):
                part = shard.cut(full).to(dtype).contiguous()
                check_finite(shard.name, part)
                writer.write(shard.name, part)
                done += num_bytes(dtype, shard.shape)
                if on_progress is not None:
                    on_progress(done, total)
    for name, data in small_files.items():
        write_whole(outdir / name, data)
    files = {writer.path.name: writer.record() for writer in writers}
    manifest = replace(plan, files=files | dict(plan.files))
    write_whole(outdir / MANIFEST_FILE, _json(manifest.to_json()))
    return ShardDir(outdir, manifest)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Has PyTorch use one thread. Those that take checksums need the cores, on which others of its own would wait for
    each other, busily, after each of these short operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rank_bytes(plan: Manifest) -> int:
    """The size of the tensors in a rank's file, which is the same for every rank."""
    return sum(num_bytes(plan.config.dtype, shard.shape) for shard in rank_shards(plan.config, 0, plan.num_splits))


def _small_files(folder: Path, config: ModelConfig) -> dict[str, bytes]:
    """What goes beside the shards, by name. The config is written anew, since its dtype may be another."""
    names = [name for name in _SMALL_FILES if name != CONFIG_FILE and (folder / name).is_file()]
    return {CONFIG_FILE: _json(config.to_hf())} | {name: (folder / name).read_bytes() for name in names}


def _finished(outdir: Path, plan: Manifest, force: bool) -> ShardDir | None:
    """The planned split, where ``outdir`` holds it already; None when it is to be written.

    Raises InputError when ``outdir`` holds anything but this split, whole or not, unless ``force``; a checkpoint is
    refused all the same.
    """
    if not outdir.is_dir():
        if outdir.exists():
            raise InputError(f"{outdir} is a file; accepted: a folder to write to; choose another name")
        return None
    names = {path.name for path in outdir.iterdir()}
    if checkpoints := names & set(ALL_WEIGHTS_FILES):
        raise InputError(f"{outdir} holds a model ({min(checkpoints)}); accepted: an empty folder; choose another")
    if force:
        return None
    remedy = "choose another folder, or write over it with --force"
    if MANIFEST_FILE in names:
        try:
            shards = open_shards(outdir)
        except InputError as error:
            raise InputError(f"{outdir} holds a split that does not load: {error}") from error
        if difference := _difference(shards.manifest, plan):
            name = one_line(shards.manifest.model_name)
            raise InputError(f"{outdir} holds a split of {name} with {difference}; {remedy}")
        damaged = any(shards.problem_of(name) for name in shards.manifest.files)
        return None if damaged else shards
    if foreign := sorted(names - _own(names)):
        raise InputError(f"{outdir} holds {foreign[0]}, which is not of a split; {remedy}")
    return None


def _difference(found: Manifest, plan: Manifest) -> str | None:
    """What makes the split that was found another than the planned one, in a few words; None for the same."""
    if found.num_splits != plan.num_splits:
        return f"{found.num_splits} parts, not {plan.num_splits}"
    if found.config.dtype != plan.config.dtype:
        return f"{dtype_name(found.config.dtype)} weights, not {dtype_name(plan.config.dtype)}"
    if found.config != plan.config:
        return f"another config than {plan.model_name}'s"
    if found.fingerprint != plan.fingerprint:
        return f"other weights than {plan.model_name}'s"
    ranks = {rank_file(rank, plan.num_splits) for rank in range(plan.num_splits)}
    small = {name: record for name, record in found.files.items() if name not in ranks}
    changed = sorted(name for name in small.keys() | plan.files.keys() if small.get(name) != plan.files.get(name))
    return f"another {changed[0]} than {plan.model_name}'s" if changed else None


def _own(names: Iterable[str]) -> set[str]:
    """Those of ``names`` that a run that was killed can have left.

    The small files count only beside a rank's, as they are written after and removed before these: alone they are
    somebody's.
    """
    names = set(names)
    ranks = {name for name in names if _RANK_FILE.fullmatch(name)}
    return ranks | (names & _small_names() if ranks else set())


def _clear(outdir: Path) -> None:
    """Removes a split, whole or not: the manifest first, so that at no time what is left would load."""
    (outdir / MANIFEST_FILE).unlink(missing_ok=True)
    for name in sorted(_small_names()):
        (outdir / name).unlink(missing_ok=True)
    for path in list(outdir.iterdir()):
        if _RANK_FILE.fullmatch(path.name):
            path.unlink()


def _small_names() -> set[str]:
    names = {*_SMALL_FILES, MANIFEST_FILE}
    return names | {partial_path(Path(name)).name for name in names}


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.flatten().view(torch.uint8).numpy().data


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
