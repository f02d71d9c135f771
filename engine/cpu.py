"""What kind of CPU this is."""

import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class CPU:
    name: str  # its model
    has_bf16: bool | None  # multiplies bfloat16 natively; without that PyTorch emulates it. None: unknown


def read_cpu(path: Path = _CPUINFO) -> CPU:
    """The first processor of Linux's ``/proc/cpuinfo``; elsewhere what Python knows."""
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags") or fields.get("features")  # x86 and Arm spell it differently
    return CPU(name, None if flags is None else not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags.split()))
