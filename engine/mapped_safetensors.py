"""A safetensors file whose tensors are used where they lie, whatever the file's size and the machine's memory.

The library reads the header and checks it against the file. Its tensors are not used, as PyTorch maps a file so that
the system sets memory aside for all of it, and refuses one that is larger.
"""

import json
import math
import mmap
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.safetensors_writer import SAFETENSORS_DTYPES

# Python's module names it from version 3.13 on: https://man7.org/linux/man-pages/man2/mmap.2.html
_MAP_NORESERVE = 0x4000 if sys.platform.startswith("linux") else 0


class MappedSafetensors:
    """Context manager. Raises SafetensorError for a file of another format, and OSError when it cannot be mapped."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="np") as file, path.open("rb") as raw:
            # What somebody writes to a tensor stays in this process, and takes memory only then.
            flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            self._memory = mmap.mmap(raw.fileno(), 0, flags=flags, prot=prot)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            self._shapes = {name: tuple(stored.get_shape()) for name, stored in slices.items()}
            self._dtypes = {name: stored.get_dtype() for name, stored in slices.items()}
        start = 8 + int.from_bytes(self._memory[:8], "little")
        header = json.loads(self._memory[8:start])
        self._starts = {name: start + header[name]["data_offsets"][0] for name in self._shapes}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._known(name)]

    def dtype(self, name: str) -> str:
        """As safetensors calls it, those of quantised tensors included."""
        return self._dtypes[self._known(name)]

    def read(self, name: str) -> Tensor:
        """A view of the file's pages; it stays valid when the file is closed. Its dtype is in SAFETENSORS_DTYPES."""
        shape, dtype = self.shape(name), SAFETENSORS_DTYPES[self.dtype(name)]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        start = self._starts[name]
        return torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)

    def close(self) -> None:
        """The file is unmapped when the last tensor of it goes."""
        del self._memory

    def __enter__(self) -> "MappedSafetensors":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _known(self, name: str) -> str:
        if name not in self._shapes:
            raise SafetensorError(f"File does not contain tensor {name}")
        return name
