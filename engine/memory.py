"""How much memory there is for a rank to take, agreed on by the ranks of a machine."""

import errno
import os
import re
from pathlib import Path

import torch

from engine.distributed import TPGroup

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
# Of a container: its limit, its use, and in its statistics the file cache, which counts as used but gives way, the part
# that was read more than once as well.
_CGROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    (  # version 1
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def available_bytes(group: TPGroup) -> int:
    """Bytes that this rank may still take on its device: the free memory, shared evenly by the ranks that live there.

    Every rank makes the same call.
    """
    if group.device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of earlier work is free too
        group.barrier()  # and what it keeps in the other ranks of the device
        free, _ = torch.cuda.mem_get_info(group.device)
        place, mapped = str(torch.cuda.get_device_properties(group.device).uuid), 0
    else:
        free, place, mapped = free_host_bytes(), os.uname().nodename, mapped_bytes()
    # Two ranks that asked a moment apart see different numbers; all that share a place go by its lowest.
    reports = [r for r in group.gather_objects((place, free, mapped)) if r[0] == place]
    free, in_use = min(free for _, free, _ in reports), sum(mapped for _, _, mapped in reports)
    return max(free - in_use, 0) // len(reports)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. For one on a CPU PyTorch has no exception of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and re.search("can('t|not) allocate memory", str(error), re.I) is not None


def describe_out_of_memory(error: BaseException) -> str:
    """An error of which ``is_out_of_memory`` is true, in one line."""
    return " ".join(["out of memory:", *str(error).splitlines()[:1]]).rstrip(":")


def free_host_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Free memory of the host or below the container's limit, whichever is less. Half of all where nothing tells."""
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = _fields(meminfo)["MemAvailable:"] * 1024
    for limit_name, used_name, cache_names in _CGROUP_FILES:
        limit = cgroup / limit_name
        if limit.exists() and limit.read_text().strip() != "max":
            used = int((cgroup / used_name).read_text())
            statistics = _fields(limit.parent / "memory.stat")
            reclaimable = sum(statistics[name] for name in cache_names)
            free = min(free, int(limit.read_text()) - used + reclaimable)
    return max(free, 0)


def mapped_bytes(status: Path = _STATUS) -> int:
    """Of this process's mapped files, the bytes in memory; 0 where nothing tells.

    The system counts them as free, since it can drop them and read them again. Weights that are used where they lie in
    a file are among them, and every step would read them again.
    """
    return _fields(status).get("RssFile:", 0) * 1024 if status.exists() else 0


def _fields(path: Path) -> dict[str, int]:
    """The first two words of each line that has a number second."""
    words = (line.split()[:2] for line in path.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}
