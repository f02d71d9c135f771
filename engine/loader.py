"""Loads one rank's part of a model: from a shard directory, a checkpoint, or made up.

Whatever the source, a ``TensorShard`` says what a rank holds, so that the numbers are the same, bit for bit.
"""

import hashlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from engine.checkpoint import CONFIG_FILE, Checkpoint, check_weights, load_config, resolve_model
from engine.config import ModelConfig
from engine.cpu import read_cpu
from engine.distributed import TPGroup
from engine.dummy import dummy_tensor
from engine.errors import InputError
from engine.finite_weights import check_all_finite
from engine.huge_pages import use_huge_pages
from engine.layers import WeightSlot
from engine.mapped_weights import as_one
from engine.memory import available_bytes
from engine.messages import one_line
from engine.model import Transformer
from engine.presets import find_preset
from engine.sharding import TensorShard, check_world_size
from engine.shards import ShardDir, open_shards

LoadFormat = Literal["auto", "dummy"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILE = "tokenizer.json"
_default_dtype_lock = threading.Lock()  # the default dtype is the process's, not the thread's

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedModel:
    """One rank's part of a model, ready to run."""

    model: Transformer
    config: ModelConfig  # the model's; its dtype is that of the parameters
    folder: Path | None  # where the tokenizer's files are, if there are any; None for a preset


@dataclass(frozen=True)
class _Source:
    config: ModelConfig
    folder: Path | None
    # The shard's parts, one after the other along its dimension, with or without its padding.
    read: Callable[[TensorShard], list[Tensor]]
    is_mapped: bool  # they lie in mapped files, and may stay in use there


def load_model(
    name: str | Path,
    group: TPGroup,
    *,
    tp_dir: str | Path | None = None,
    load_format: LoadFormat = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Loads this rank's part of a model to ``group.device``. Every rank makes the same call; all fail, or none.

    ``name`` is a local folder, a Hub id, or with ``load_format`` "dummy", for random weights that ``seed`` draws, also
    a preset. With ``tp_dir`` weights, config and tokenizer are those of that shard directory, whose model must have
    the shapes of ``name``; another name is only warned of. ``dtype`` "auto" is that of the shards or the config.
    Raises InputError for what cannot be loaded, on every rank the error of the first that failed.
    """
    name = str(name)
    wanted_dtype = _parse_dtype(dtype)
    _check_load_format(load_format, tp_dir)

    with ExitStack() as stack:

        def prepare() -> tuple[_Source, Transformer]:
            """All that can fail soon: headers are checked, and memory is reserved, before anything is read."""
            if tp_dir is not None:
                source = _shard_source(Path(tp_dir).expanduser(), name, revision, group, stack)
            elif load_format == "dummy":
                source = _dummy_source(name, revision, seed)
            else:
                source = _checkpoint_source(name, revision, group, stack)
            config = replace(source.config, dtype=wanted_dtype or source.config.dtype)
            return source, _allocate(config, group)

        source, model = _together(group, prepare)
        model.name = name
        free = available_bytes(group)
        _together(group, lambda: _check_room(model, free, group))
        if group.rank == 0:
            _notice_emulation(model.config.dtype, group.device)
        _together(group, lambda: _fill(model, source))
    return LoadedModel(model, model.config, source.folder)


def read_config(
    name: str | Path,
    *,
    tp_dir: str | Path | None = None,
    load_format: LoadFormat = "auto",
    dtype: str = "auto",
    revision: str | None = None,
) -> ModelConfig:
    """The config that ``load_model`` would give the model, ``dtype`` included; reads and downloads no weights."""
    name, wanted_dtype = str(name), _parse_dtype(dtype)
    _check_load_format(load_format, tp_dir)
    if tp_dir is not None:
        config = open_shards(Path(tp_dir).expanduser()).manifest.config
    elif load_format == "dummy":
        config = _dummy_source(name, revision, 0).config
    else:
        config = load_config(resolve_model(name, revision, weights=False))
    return replace(config, dtype=wanted_dtype or config.dtype)


def find_checkpoint(name: str, revision: str | None, num_ranks: int) -> Path:
    """The folder of a model's weights, downloaded where they are not there.

    Raises InputError for a model that cannot be had, or cannot be cut for ``num_ranks``: before its weights are
    downloaded.
    """
    config = load_config(resolve_model(name, revision, weights=False))
    check_world_size(config.num_heads, config.num_kv_heads, config.intermediate_size, num_ranks)
    return resolve_model(name, revision)


def _shard_source(tp_dir: Path, name: str, revision: str | None, group: TPGroup, stack: ExitStack) -> _Source:
    shards = open_shards(tp_dir)
    num_splits = shards.manifest.num_splits
    if num_splits != group.size:
        raise InputError(
            f"{tp_dir} holds shards for {num_splits} ranks, but the world size is {group.size}; start {num_splits} "
            f"(torchrun --nproc_per_node={num_splits}), cut the model again with --num-splits {group.size}, or leave "
            "--tp-dir out"
        )
    if group.rank == 0:
        _compare(shards, name, revision)
    file = stack.enter_context(shards.open_rank(group.rank))
    return _Source(shards.manifest.config, tp_dir, lambda shard: [file.read(shard.name)], is_mapped=True)


def _checkpoint_source(name: str, revision: str | None, group: TPGroup, stack: ExitStack) -> _Source:
    folder = find_checkpoint(name, revision, group.size)
    config = load_config(folder)
    checkpoint = stack.enter_context(Checkpoint(folder))
    check_weights(checkpoint, config)

    def read(shard: TensorShard) -> list[Tensor]:
        if shard.dim is None:
            return [checkpoint.read(shard.name)]
        return [checkpoint.read(shard.name, shard.dim, *stretch) for stretch in shard.stretches]

    # One of several ranks would keep whole files mapped for the few of its parts that lie there as it needs them.
    return _Source(config, folder, read, is_mapped=group.size == 1 and checkpoint.is_mapped)


def _dummy_source(name: str, revision: str | None, seed: int) -> _Source:
    """A local folder comes before the preset of that name, and a preset before the Hub."""
    preset = None if (Path(name).expanduser() / CONFIG_FILE).is_file() else find_preset(name)
    if preset is None:
        folder = resolve_model(name, revision, weights=False)
        config = load_config(folder)
    elif revision is None:
        folder, config = None, preset
    else:
        raise InputError(f"revision {revision!r} has no effect on the preset {name}; leave it out")

    def read(shard: TensorShard) -> list[Tensor]:
        return [shard.cut(dummy_tensor(shard.name, shard.full_shape, config.dtype, seed))]

    return _Source(config, folder, read, is_mapped=False)


def _compare(shards: ShardDir, name: str, revision: str | None) -> None:
    """Sets the model that the user named against the shards that they gave.

    Raises InputError when the two have other shapes or compute other numbers. What is harmless, or cannot be found
    out, goes to stderr.
    """
    manifest, path = shards.manifest, Path(name).expanduser()
    folder = None
    try:
        folder = resolve_model(name, revision, weights=False)
    except InputError as error:
        if path.exists():
            raise
        print(
            f"notice: {name} is not at hand; config and tokenizer are those of {shards.folder} ({error})",
            file=sys.stderr,
        )
    config = find_preset(name) if folder is None else load_config(folder)
    if config is not None:
        _check_same_model(shards, config, name)
    if not _is_same_name(manifest.model_name, name):
        print(
            f"warning: the weights in {shards.folder} are of {one_line(manifest.model_name)}; they run, not those of "
            f"{name}",
            file=sys.stderr,
        )
    if folder is not None and (folder / _TOKENIZER_FILE).is_file() and _TOKENIZER_FILE in manifest.files:
        named = hashlib.sha256((folder / _TOKENIZER_FILE).read_bytes()).hexdigest()
        if named != manifest.files[_TOKENIZER_FILE].sha256:
            print(
                f"warning: {shards.folder} has another tokenizer than {name}; the directory's is used", file=sys.stderr
            )


def _check_same_model(shards: ShardDir, named: ModelConfig, name: str) -> None:
    own = shards.manifest.config
    free = {"dtype", "bos_token_id", "eos_token_ids"}
    if own.rope.type in ("default", "linear"):
        free.add("max_position_embeddings")  # the others scale by it
    for field in fields(ModelConfig):
        ours, theirs = getattr(own, field.name), getattr(named, field.name)
        if field.name not in free and ours != theirs:
            raise InputError(
                f"{field.name} is {ours} in {shards.folder}, but {theirs} in {name}; accepted: shards of the same "
                f"model; cut {name} with tools/make_tp_files.py, or name "
                f"{one_line(shards.manifest.model_name)}"
            )


def _is_same_name(sharded: str, given: str) -> bool:
    """Hub ids ignore case; a folder can be spelled in several ways."""
    a, b = Path(sharded).expanduser(), Path(given).expanduser()
    return sharded.lower() == given.lower() or (a.is_dir() and b.is_dir() and a.samefile(b))


def _check_load_format(load_format: str, tp_dir: str | Path | None) -> None:
    if load_format not in ("auto", "dummy"):
        raise InputError(f"load format {load_format!r} is not known; accepted: auto, dummy")
    if load_format == "dummy" and tp_dir is not None:
        raise InputError(f"--load-format dummy reads no weights, --tp-dir {tp_dir} gives some; leave one of them out")


def _notice_emulation(dtype: torch.dtype, device: torch.device) -> None:
    """Says on stderr when ``dtype`` is slow on the device: what it then takes would look like a fault of ours."""
    if device.type == "cuda" and dtype == torch.float32:
        print(
            "notice: PyTorch's flash attention on CUDA has no float32; attention runs the plain reference, which is "
            "for tests and very slow: --dtype bfloat16",
            file=sys.stderr,
        )
    if device.type == "cpu" and dtype != torch.float32 and read_cpu().has_bf16 is False:
        print(
            "notice: this CPU has no bfloat16 instructions and has to emulate 16-bit products; float32 is faster here: "
            "--dtype float32",
            file=sys.stderr,
        )


def _parse_dtype(name: str) -> torch.dtype | None:
    """None for "auto"."""
    if name != "auto" and name not in DTYPES:
        raise InputError(f"dtype {name!r} is not known; accepted: auto, {', '.join(DTYPES)}")
    return DTYPES.get(name)


def _allocate(config: ModelConfig, group: TPGroup) -> Transformer:
    """The model on the group's device, its parameters uninitialised."""
    try:
        with _default_dtype(config.dtype), group.device:
            return Transformer(config, group)
    except torch.OutOfMemoryError as error:
        num_bytes = config.num_parameters * config.dtype.itemsize // group.size
        raise InputError(_no_room(num_bytes, f"{group.device} has free")) from error


def _check_room(model: Transformer, free: int, group: TPGroup) -> None:
    """Raises InputError when the host has less than ``free`` bytes for the model's parameters: it lends out more than
    it has, and ends the process that uses it."""
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if group.device.type == "cpu" and num_bytes > free:
        raise InputError(_no_room(num_bytes, f"the {free / 1e9:,.1f} GB that are free for it"))


def _no_room(num_bytes: int, what: str) -> str:
    return (
        f"a rank's weights take {num_bytes / 1e9:,.1f} GB, more than {what}; use more devices, a smaller dtype or a "
        "smaller model"
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    with _default_dtype_lock:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _fill(model: Transformer, source: _Source) -> None:
    """Gives every parameter its weights; afterwards none is uninitialised."""
    weights: dict[str, Tensor] = {}
    for parameter, slots in _slots_of_parameters(model):
        if not (source.is_mapped and _use_as_it_lies(parameter, slots, source)):
            use_huge_pages(parameter)
            for slot in slots:
                _copy(slot, source.read(slot.shard))
        weights |= {slot.shard.name: slot.target for slot in slots}
    check_all_finite(weights)
    num_filled = sum(weight.numel() for weight in weights.values())
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    assert num_filled == num_elements, f"{num_filled} of {num_elements} elements were loaded"


def _slots_of_parameters(model: Transformer) -> Iterator[tuple[nn.Parameter, list[WeightSlot]]]:
    """Each parameter with its slots, which come one after the other."""
    parameters = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
    slots = itertools.groupby(list(model.weight_slots()), lambda slot: slot.target.untyped_storage().data_ptr())
    for address, of_parameter in slots:
        yield parameters[address], list(of_parameter)


def _use_as_it_lies(parameter: nn.Parameter, slots: list[WeightSlot], source: _Source) -> bool:
    """Puts the parameter and its slots where the weights lie in a mapped file; False where they have to be copied: to
    another device or dtype, or because they lie apart, in stripes or without their padding."""
    if parameter.device.type != "cpu":
        return False
    parts = [source.read(slot.shard) for slot in slots]
    flat = as_one([part for of_slot in parts for part in of_slot])
    if flat is None or flat.dtype != parameter.dtype or flat.numel() != parameter.numel():
        return False
    parameter.data = flat.view(parameter.shape)
    rows = [slot.shard.shape[0] for slot in slots]
    for slot, of_slot, target in zip(slots, parts, parameter.data.split(rows), strict=True):
        _check_shape(slot, of_slot)
        slot.target.data = target
    return True


def _copy(slot: WeightSlot, parts: list[Tensor]) -> None:
    """Of any dtype. Padding that the parts do not have becomes zeros."""
    _check_shape(slot, parts)
    dim, end = slot.shard.dim or 0, 0
    for part in parts:
        slot.target.narrow(dim, end, part.shape[dim]).copy_(part)
        end += part.shape[dim]
    slot.target.narrow(dim, end, slot.shard.padded_length - end).zero_()


def _check_shape(slot: WeightSlot, parts: list[Tensor]) -> None:
    """A part of another shape would be broadcast."""
    shard, dim = slot.shard, slot.shard.dim or 0
    length = sum(part.shape[dim] for part in parts)
    assert length in (shard.length, shard.padded_length), f"{shard.name}: {length} of {shard}"
    for part in parts:
        expected = (*shard.shape[:dim], part.shape[dim], *shard.shape[dim + 1 :])
        assert part.shape == expected, f"{shard.name}: {tuple(part.shape)} for {expected}"


def _together(group: TPGroup, action: Callable[[], T]) -> T:
    """Runs ``action`` on every rank; when it fails on any, raises on all of them, so that none waits for another.

    A user's mistake becomes the same InputError everywhere: that of the first rank that failed.
    """
    if group.size == 1:
        return action()
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the other ranks have to hear of it
        failure = error
    messages = group.gather_objects(None if failure is None else _described(failure))
    for rank, message in enumerate(messages):
        if message is not None:
            is_mistake, text = message
            raise (InputError if is_mistake else RuntimeError)(f"rank {rank}: {text}") from failure
    return result


def _described(error: Exception) -> tuple[bool, str]:
    """Whether the user can put it right, and what to tell."""
    if isinstance(error, InputError | OSError):
        return True, str(error)
    return False, f"{type(error).__name__}: {error}"
