"""A safetensors file written tensor by tensor, so that memory holds one tensor at a time and not the file.

The format (github.com/huggingface/safetensors): 8 bytes of header length (little-endian), a JSON header that gives
each tensor's dtype, shape and byte range, then the tensors without gaps.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from engine.files import partial_path, replace_whole

# In a file of its own a mapped tensor then begins where a cache line does, unless one of an odd size comes before it.
_ALIGNMENT = 64  # bytes

# Names in the header. Quantised dtypes are left out on purpose: the engine reads none.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class SafetensorsWriter:
    """Context manager: declare every tensor, then ``write`` each once, in any order.

    The file appears under its name when the context ends without an error and every tensor was written; otherwise
    nothing is left.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._pending = set(tensors)
        header, self._offsets = _layout(self._tensors, metadata or {})
        self._file = partial_path(path).open("wb")
        self._file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Stores ``tensor``, of the declared dtype and shape. Once for each name."""
        assert name in self._pending, f"{name} was not declared, or was written before"
        given = (tensor.dtype, tuple(tensor.shape))
        assert given == self._tensors[name], f"{name}: declared {self._tensors[name]}, given {given}"
        self._file.seek(self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._start_writeback(name)
        self._pending.remove(name)

    def _start_writeback(self, name: str) -> None:
        """Has the disk begin with what was just written, for otherwise it idles until the sync at the end."""
        if hasattr(os, "posix_fadvise"):
            size = num_bytes(*self._tensors[name])
            # On Linux the request to drop these pages starts to write them; being dirty they are not dropped.
            os.posix_fadvise(self._file.fileno(), self._offsets[name], size, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    assert not self._pending, f"{self.path}: never written: {sorted(self._pending)}"
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                replace_whole(self.path)
        finally:
            partial_path(self.path).unlink(missing_ok=True)


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _layout(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, its length in front, and where in the file each tensor starts."""
    # transformers refuses a file that does not say which framework's tensors it holds.
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    starts, end = {}, 0
    # Wide dtypes first keeps every tensor aligned to its element size.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        start, end = end, end + num_bytes(dtype, shape)
        starts[name] = start
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data_start + start for name, start in starts.items()}
