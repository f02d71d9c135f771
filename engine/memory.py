"""How much memory the KV cache may take, agreed on by all ranks."""

import os
from pathlib import Path

import torch

from engine.distributed import TPGroup


def available_bytes(group: TPGroup) -> int:
    """Bytes that this rank may still take on its device: the free memory, shared evenly by the ranks that live there."""
    if group.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(group.device)
        place = str(torch.cuda.get_device_properties(group.device).uuid)
    else:
        free, place = _free_host_bytes(), os.uname().nodename
    # Two ranks that asked a moment apart see different numbers; all that share a place go by its lowest.
    reports = [r for r in group.gather_objects((place, free)) if r[0] == place]
    return min(free for _, free in reports) // len(reports)


def _free_host_bytes() -> int:
    """Free memory of the host or of the container's limit, whichever is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines()) if _is_linux() else {}
    if "MemAvailable" not in fields:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


def _is_linux() -> bool:
    return Path("/proc/meminfo").exists()
