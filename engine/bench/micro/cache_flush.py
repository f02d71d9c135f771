"""Empties a device's caches of what is to be timed: in a decode step every layer meets keys that are in none."""

import re
from pathlib import Path

import torch

from engine.bench.streamed_buffer import StreamedBuffer

_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE_BYTES = 64 << 20
_TIMES_THE_CACHE = 4  # a cache need not throw the oldest data out first
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class CacheFlush:
    """``flush()`` reads several times as many bytes as the last-level cache holds.

    Reading leaves nothing behind that would have to be written back while the next call is timed. On a CPU every thread
    reads a part, so that the caches that it has to itself are emptied, too.
    """

    def __init__(self, device: torch.device, cache_bytes: int | None = None):
        self._buffer = StreamedBuffer(_TIMES_THE_CACHE * (cache_bytes or last_level_cache_bytes(device)), device)

    @property
    def num_bytes(self) -> int:
        return self._buffer.num_bytes

    def __call__(self) -> None:
        self._buffer.read()


def last_level_cache_bytes(device: torch.device, cpu_caches: Path = _CPU_CACHES) -> int:
    """Of the GPU its second-level cache; of the CPU its largest cache, or 64 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [_num_bytes(path.read_text()) for path in cpu_caches.glob("index*/size")]
    return max(sizes, default=0) or _UNKNOWN_CACHE_BYTES


def _num_bytes(text: str) -> int:
    """Of ``32768K``; 0 of what is no size."""
    size = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(size[1]) * _UNITS[size[2]] if size else 0
