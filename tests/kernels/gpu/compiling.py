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
from kernels.gpu import attention, logit_blocks, merge, norm, rotary, sparse, swiglu
from kernels.sparse import AShape, BlockSparse, SparseRows, VerticalSlash, lower

_POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
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
        """As Triton specialises it: None and an integer of 1 are constants, and what 16 divides is known to be so."""
        options = {name: value for name, value in keywords.items() if name in _OPTIONS}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            value = values[name]
            if name in keywords or value is None or (type(value) is int and value == 1):
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
            "divides_exactly": "div.rn.f32" in made.asm["ptx"],
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
    for dtype, D, P in ((torch.bfloat16, 128, 264), (torch.float16, 80, 3), (torch.float32, 256, 2)):
        with recorded(merge, "_merge") as seen:
            merge.merge_stacked(torch.empty(P, 64, 12, D), torch.empty(P, 64, 12), dtype)
        ((arguments, keywords),) = seen
        yield Launch.of(f"{dtype}, {P} states, heads of {D}", merge._merge, arguments, keywords)


def sparse_launches() -> Iterator[Launch]:
    """Heads with every kind of pattern; head dimensions with and without a rest."""
    for dtype, Hq, Hkv, D in (
        (torch.bfloat16, 32, 8, 128),
        (torch.bfloat16, 12, 4, 64),
        (torch.float16, 10, 2, 80),
        (torch.bfloat16, 16, 4, 256),
        (torch.float32, 12, 4, 64),
        (torch.float32, 4, 4, 128),
    ):
        rows = SparseRows.contiguous([256], [0], [512])
        q, (k, v) = torch.empty(256, Hq, D, dtype=dtype), torch.empty(2, 512, Hkv, D, dtype=dtype)
        patterns = [(VerticalSlash(64, 128), BlockSparse(3), AShape(4, 64))[head % 3] for head in range(Hq)]
        index = lower(patterns, q, k, rows, D**-0.5)
        with recorded(sparse, "_attend_sparse") as seen:
            sparse.TritonTasks(rows, torch.device("cpu")).run(q, k, v, index, D**-0.5)
        ((arguments, keywords),) = seen
        yield Launch.of(f"{dtype} {Hq}/{Hkv} heads of {D}", sparse._attend_sparse, arguments, keywords)


def norm_launches() -> Iterator[Launch]:
    """Rows of their own, rows that share a program, rows that do not fit registers; after a sum, and alone."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, shape, adds in (
        (bf16, (64, 4096), True),
        (fp32, (64, 768), True),
        (bf16, (64, 20_000), True),
        (bf16, (64, 32, 128), False),  # the heads of queries
    ):
        x, weight = torch.empty(shape, dtype=dtype), torch.empty(shape[-1], dtype=dtype)
        with recorded(norm, "_rms_norm") as seen:
            if adds:
                norm.add_rms_norm_(x, x, weight, 1e-5)
            else:
                norm.rms_norm(x, weight, 1e-5)
        ((arguments, keywords),) = seen
        yield Launch.of(f"{dtype} {shape}{', added' if adds else ''}", norm._rms_norm, arguments, keywords)


def swiglu_launches() -> Iterator[Launch]:
    with recorded(swiglu, "_swiglu") as seen:
        swiglu.swiglu(torch.empty(64, 2 * 14336, dtype=torch.bfloat16))
    ((arguments, keywords),) = seen
    yield Launch.of("torch.bfloat16, 14336 features", swiglu._swiglu, arguments, keywords)


def rotary_launches() -> Iterator[Launch]:
    """In place, and into arenas of more than 2^31 elements: whole heads in halves, parts of them interleaved."""
    cos = torch.empty(64, 1, 128)
    with recorded(rotary, "_rotate_in_place") as seen:
        rotary.apply_rotary_(torch.empty(64, 32, 128, dtype=torch.bfloat16), cos, cos)
    ((arguments, keywords),) = seen
    yield Launch.of("torch.bfloat16, 32 heads of 128", rotary._rotate_in_place, arguments, keywords)
    for dtype, Hq, Hkv, D, P, interleaved in (
        (torch.bfloat16, 32, 8, 128, 128, False),
        (torch.float32, 12, 4, 80, 32, True),
    ):
        arena = torch.empty(Hkv, 2**25, D, dtype=dtype, device="meta").transpose(0, 1)
        qkv, slots = torch.empty(64, Hq + 2 * Hkv, D, dtype=dtype), torch.empty(64, dtype=torch.int64)
        with recorded(rotary, "_rotate_into_cache") as seen:
            rotary.rotate_into_cache_(qkv, cos[..., :P], cos[..., :P], arena, arena, slots, interleaved)
        ((arguments, keywords),) = seen
        case = f"{dtype} {Hq}/{Hkv} heads of {D}, {P} rotated"
        yield Launch.of(case, rotary._rotate_into_cache, arguments, keywords)


def logit_block_launches() -> Iterator[Launch]:
    """Greedy rows; all rows of a draw, and some, which have a min-p; the entries of a block that was drawn."""
    logits, by_row = torch.empty(64, 128_256, dtype=torch.bfloat16, device="meta"), torch.empty(64)
    with recorded(logit_blocks, "_block_maxima") as seen:
        logit_blocks.block_maxima(logits, 128)
    ((arguments, keywords),) = seen
    yield Launch.of("torch.bfloat16, 128256 entries", logit_blocks._block_maxima, arguments, keywords)
    some = torch.empty(64, dtype=torch.int64)
    for dtype, width, rows, log_min_p, block in (
        (torch.bfloat16, 128_256, None, None, 128),
        (torch.float32, 128_256, some, by_row, 128),
        (torch.float32, 128, None, by_row, 1),
    ):
        with recorded(logit_blocks, "_block_masses") as seen:
            logit_blocks.block_masses(logits[:, :width].to(dtype), rows, by_row, by_row, log_min_p, block)
        ((arguments, keywords),) = seen
        case = f"{dtype}, {width} entries in blocks of {block}{', min-p' if log_min_p is not None else ''}"
        yield Launch.of(case, logit_blocks._block_masses, arguments, keywords)


def operation_launches() -> Iterator[Launch]:
    """Those around attention."""
    for launches in (norm_launches, swiglu_launches, rotary_launches, logit_block_launches):
        yield from launches()


if __name__ == "__main__":
    for launch in (*attention_launches(), *merge_launches(), *sparse_launches(), *operation_launches()):
        print(json.dumps(launch.compile(int(sys.argv[1]))))
