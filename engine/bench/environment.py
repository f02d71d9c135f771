"""What a measurement ran on: enough to tell whether two results can be compared."""

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.cpu import read_cpu
from engine.installed import installed_versions
from engine.prefill import DENSE
from kernels import Backend, available_backends, available_operations_backends


@dataclass(frozen=True)
class Execution:
    """How the engine is to run, as ``engine.engine.Engine`` has it."""

    attention_backend: str | None = None
    operations_backend: str | None = None
    cuda_graphs: bool = False
    prefill: str | None = None


def describe_execution(execution: Execution, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Its part of the environment: what was asked for, or else the defaults."""
    attention = Backend.TRITON if execution.cuda_graphs else available_backends(device, dtype)[0]
    return {
        "attention_backend": execution.attention_backend or str(attention),
        "operations_backend": execution.operations_backend or str(available_operations_backends(device, dtype)[0]),
        "cuda_graphs": execution.cuda_graphs,
        "prefill": execution.prefill or DENSE,
    }


# Distributions whose version can change a result, the peers that a sweep runs beside the engine included.
_DISTRIBUTIONS = ("torch", "triton", "llvmlite", "numpy", "transformers", "vllm", "flash-attn", "tributary")


def describe_environment(
    device: torch.device, dtype: torch.dtype, world_size: int, execution: Execution = Execution()
) -> dict[str, object]:
    """Plain data (text, numbers, booleans, None) about the machine, the libraries and the process.

    ``device_name`` is the GPU's or the CPU's model. ``cpu_bf16`` says whether the CPU multiplies bfloat16 natively:
    without that, bfloat16 on it is emulated and its times say little (None: unknown). ``attention_backend`` and
    ``operations_backend`` are those of ``execution``, or the defaults here, for most segments and tensors.
    ``versions`` has the installed libraries only. Nothing that identifies the machine or its user is included.
    """
    cpu = read_cpu()
    environment: dict[str, object] = {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.name,
        "dtype": str(dtype).removeprefix("torch."),
        "world_size": world_size,
        "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count(),
        "cpu_name": cpu.name,
        "cpu_bf16": cpu.has_bf16,
        **describe_execution(execution, device, dtype),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        # torch with its build, such as "+cpu", which metadata may lack
        "versions": installed_versions(_DISTRIBUTIONS) | {"torch": str(torch.__version__)},
        "git_revision": _git_revision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment["device_memory_bytes"] = properties.total_memory
        environment["compute_capability"] = f"{properties.major}.{properties.minor}"
    return environment


def _git_revision() -> str | None:
    """The commit of the engine's own checkout, with ``-dirty`` when it has changes; None when it is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed copy: git would answer for whatever repository surrounds it
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a file system too slow to ask
        return None
    return done.stdout.strip() if done.returncode == 0 else None
