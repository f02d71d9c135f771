"""Files of weights behind one interface: safetensors, and the pickled dicts that ``torch.save`` writes."""

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import InputError
from engine.mapped_safetensors import MappedSafetensors
from engine.memory import is_out_of_memory
from engine.messages import one_line
from engine.safetensors_writer import SAFETENSORS_DTYPES

T = TypeVar("T")


class WeightFile(Protocol):
    """An open file of named tensors. Methods raise InputError, naming file and tensor, for what cannot be read."""

    is_mapped: bool  # what is read lies in the file's pages, not in memory of this process

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """Refuses the quantised, as ``read`` does."""
        ...

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or ``start : stop`` of its dimension ``dim``, not copied where the file is mapped."""
        ...

    def close(self) -> None:
        """What was read stays valid."""
        ...


def open_weights(path: Path) -> WeightFile:
    """By the end of its name: ``.bin`` is PyTorch's, all else safetensors."""
    return TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


class SafetensorsFile:
    """A mapped safetensors file."""

    is_mapped = True

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = MappedSafetensors(path)
        except SafetensorError as error:
            reason = one_line(str(error))
            raise InputError(f"{path} is truncated or not safetensors ({reason}); fetch it again") from error

    def names(self) -> list[str]:
        return self._file.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._asked(self._file.shape, name)

    def dtype(self, name: str) -> torch.dtype:
        stored = self._asked(self._file.dtype, name)
        if stored not in SAFETENSORS_DTYPES:
            raise _refused_dtype(self.path, name, stored, list(SAFETENSORS_DTYPES))
        return SAFETENSORS_DTYPES[stored]

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        self.dtype(name)
        tensor = self._file.read(name)
        return tensor if dim is None else tensor[(slice(None),) * dim + (slice(start, stop),)]

    def close(self) -> None:
        self._file.close()

    def _asked(self, question: Callable[[str], T], name: str) -> T:
        try:
            return question(name)
        except SafetensorError as error:
            what = f"{one_line(name)} ({one_line(str(error))})"
            raise InputError(f"{self.path}: cannot read {what}; fetch the file again") from error


class TorchFile:
    """What ``torch.save`` wrote of a state dict. Only tensors are unpickled, never code.

    The file is mapped, as safetensors are. Two kinds cannot be and are read whole, so that every rank then holds all of
    it: those that PyTorch wrote before version 1.6, which are no zip archives, and archives that are compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_mapped = _can_map(path)
        self._tensors = _load(path, self.is_mapped)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        stored = self._tensor(name).dtype
        accepted = list(SAFETENSORS_DTYPES.values())
        if stored not in accepted:
            raise _refused_dtype(self.path, name, _short(stored), [_short(dtype) for dtype in accepted])
        return stored

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        self.dtype(name)
        tensor = self._tensor(name)
        return tensor if dim is None else tensor[(slice(None),) * dim + (slice(start, stop),)]

    def close(self) -> None:
        self._tensors = {}

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise InputError(f"{self.path}: cannot read {name} (the file does not hold it); fetch the file again")
        return self._tensors[name]


def _load(path: Path, can_map: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():  # PyTorch's, of old formats: the user can do nothing about them
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which PyTorch's reader gives for an archive that ends too soon
            raise
        raise _refused_file(path, error) from error
    except Exception as error:  # a damaged file can raise anything, and which depends on PyTorch's version
        if is_out_of_memory(error):
            raise InputError(
                f"{path} has {path.stat().st_size / 1e9:,.1f} GB, more than PyTorch maps on this machine "
                f"({one_line(str(error))}); accepted: files smaller than its memory; save the model as safetensors"
            ) from error
        raise _refused_file(path, error) from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds {type(loaded).__name__}; accepted: a dict of names and tensors; use another")
    for name, value in loaded.items():
        is_dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if not isinstance(name, str) or not is_dense:
            what = type(value).__name__ if not isinstance(value, Tensor) else "a tensor that is sparse or has no data"
            raise InputError(f"{path} holds {what} as {name!r}; accepted: a dict of names and dense tensors")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _can_map(path: Path) -> bool:
    """Compressed archives must not be: PyTorch would take the compressed bytes for the tensors'."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception:  # no archive, or a damaged one, which raises anything: PyTorch then says what is wrong
        return False


def _refused_file(path: Path, error: Exception) -> InputError:
    """PyTorch's own messages are paragraphs that advise to switch the protection off."""
    if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
        return InputError(
            f"{path} asks for {unsafe[1]}, which is not a tensor and could run code; accepted: a dict of names and "
            "tensors; do not trust it, or take the model from safetensors"
        )
    if isinstance(error, pickle.UnpicklingError):
        reason = "its pickle is not one of tensors alone"
    else:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
    return InputError(f"{path} is truncated or not a PyTorch file of tensors ({reason}); fetch it again")


def _refused_dtype(path: Path, name: str, stored: str, accepted: list[str]) -> InputError:
    return InputError(
        f"{path}: {one_line(name)} is stored as {stored}; accepted: {', '.join(accepted)}; use an unquantised model"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
