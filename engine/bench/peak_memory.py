"""The most memory that a stretch of work takes on a device."""

from pathlib import Path
from types import TracebackType
from typing import Self

import torch


class PeakMemory:
    """``with PeakMemory(device) as peak: ...`` leaves the peak, in bytes, in ``peak.bytes``.

    On CUDA it is what PyTorch allocated; on CPU the process's resident memory, the interpreter and the weights
    included. 0 where the system does not tell.
    """

    bytes: int = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._reset_resident_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self.bytes = self._resident_peak()

    @staticmethod
    def _reset_resident_peak() -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
        except OSError:
            return  # the peak is then that of the whole process so far: an upper bound

    @staticmethod
    def _resident_peak() -> int:
        status = Path("/proc/self/status")
        if not status.exists():
            return 0
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
