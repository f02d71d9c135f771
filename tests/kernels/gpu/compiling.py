"""Compiles Triton kernels for GPUs that are not there, as the shipped wrappers launch them.

``python compiling.py 90`` prints a JSON line for every launch on chips of compute capability 9.0. It runs in a process
of its own, as in that of the tests Triton's interpreter has taken the kernels' place.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import Segment
from kernels.gpu import attention, merge

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One launch, in the terms of Triton's compiler."""

    case: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int]

    @classmethod
    def of(cls, case: str, kernel: triton.JITFunction, arguments: tuple, keywords: dict[str, Any]) -> "Launch":
        """As Triton specialises it: an integer of 1 is a constant, and what 16 divides is known to be so."""
        options = {name: value for name, value in keywords.items() if name in _OPTIONS}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            value = values[name]
            if name in keywords or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
                attributes[index,] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[index,] = [["tt.divisibility", 16]]
        return cls(case, kernel, signature, constants, attributes, options)

    def compile(self, capability: int) -> dict[str, Any]:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return {
            "kernel": self.kernel.__name__,
            "case": self.case,
            "capability": capability,
            "shared_bytes": made.metadata.shared,
            **_resources(made.asm["ptx"]),
            "has_wgmma": "wgmma" in made.asm["ptx"],
            "cubin_bytes": len(made.asm["cubin"]),
        }


def _resources(ptx: str) -> dict[str, int]:
    """What ``ptxas -v`` says: Triton has two of it, for older and newer versions of PTX."""
    chip = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for ptxas in sorted((Path(nvidia.__file__).parent / "bin").glob("ptxas*")):
            command = [ptxas, "-v", "--gpu-name", chip, file.name, "-o", os.devnull]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                numbers = {what: int(number) for number, what in re.findall(r"(\d+) bytes (spill \w+)", done.stderr)}
                return {
                    "registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]),
                    "spilled_bytes": numbers["spill stores"] + numbers["spill loads"],
                }
    raise RuntimeError(f"no ptxas takes this: {done.stderr}")


@contextmanager
def recorded(module: Any, name: str) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Inside, the module's kernel is not launched: its arguments are kept."""
    kernel, seen = getattr(module, name), []

    class Recorder:
        def __getitem__(self, _grid: object) -> Callable[..., None]:
            return lambda *arguments, **keywords: seen.append((arguments, keywords))

    setattr(module, name, Recorder())
    try:
        yield seen
    finally:
        setattr(module, name, kernel)


def attention_launches() -> Iterator[Launch]:
    """Each tile in use, causal and not, keys split and not, head dimensions with and without a rest, merging or not."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, Hq, Hkv, D, q_lens, k_len, causal in (
        (bf16, 8, 1, 128, [4096], 8192, False),  # a shared prefix
        (bf16, 8, 1, 128, [1] * 264, 512, True),  # a decode step
        (bf16, 8, 1, 128, [1], 2**17, True),  # split keys
        (bf16, 32, 8, 128, [4096], 4096, True),  # a prefill
        (bf16, 12, 4, 64, [64], 4096, False),
        (fp16, 6, 2, 96, [512], 4096, False),
        (fp16, 10, 2, 80, [8], 4096, True),
        (bf16, 16, 4, 256, [512], 4096, True),
        (bf16, 71, 1, 64, [1] * 8, 512, True),
        (fp32, 12, 4, 64, [64], 512, True),
        (fp32, 8, 2, 256, [64], 512, False),
        (fp32, 4, 4, 128, [1], 4096, True),
    ):
        name = f"{dtype} {Hq}/{Hkv} heads of {D}, {len(q_lens)} x {q_lens[0]} queries, {k_len} keys"
        own = _segment(q_lens, k_len, causal)
        yield from _attention_launches(f"{name}{', causal' if causal else ''}", [own], Hq, Hkv, D, dtype)
    for dtype, Hq, Hkv, D in ((bf16, 8, 1, 128), (bf16, 12, 4, 64), (fp16, 10, 2, 80), (bf16, 16, 4, 256)):
        segments = [_segment([1] * 528, 512, True), _segment([528], 4096, False)]
        *_, last = _attention_launches(f"{dtype} {Hq}/{Hkv} heads of {D}, merging", segments, Hq, Hkv, D, dtype)
        assert last.constants["MERGES"]
        yield last


def _segment(q_lens: list[int], k_len: int, causal: bool) -> Segment:
    starts = np.arange(len(q_lens)) * k_len
    return Segment(np.append(0, np.cumsum(q_lens)), starts, np.full_like(starts, k_len), causal)


def _attention_launches(
    case: str, segments: list[Segment], Hq: int, Hkv: int, D: int, dtype: torch.dtype
) -> Iterator[Launch]:
    T, S = segments[0].num_queries, max(int((s.k_starts + s.k_lens).max()) for s in segments)
    q, (k, v) = torch.empty(T, Hq, D, dtype=dtype), torch.empty(2, S, Hkv, D, dtype=dtype)
    with recorded(attention, "_attend") as seen, recorded(merge, "_merge"):
        attention.TritonPlan(segments, torch.device("cpu")).run(q, k, v, D**-0.5)
    for arguments, keywords in seen:
        yield Launch.of(case, attention._attend, arguments, keywords)


def merge_launches() -> Iterator[Launch]:
    for dtype, D in ((torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 256)):
        with recorded(merge, "_merge") as seen:
            merge.merge_stacked(torch.empty(3, 64, 12, D), torch.empty(3, 64, 12), dtype)
        ((arguments, keywords),) = seen
        yield Launch.of(f"{dtype}, heads of {D}", merge._merge, arguments, keywords)


if __name__ == "__main__":
    for launch in (*attention_launches(), *merge_launches()):
        print(json.dumps(launch.compile(int(sys.argv[1]))))
