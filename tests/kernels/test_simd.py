"""The pieces that CPU kernels are written with, on this machine's target and on the least one."""

import math
import os
import subprocess
import sys

import pytest
import torch

from kernels import simd

needs_compiler = pytest.mark.skipif(
    simd.host() is None, reason="kernels cannot be compiled for this CPU, or no llvmlite"
)
TARGETS = ["host", "avx2"]


def apply(name, body, source, result, count):
    """Compiles ``body(kernel, source pointer, result pointer)``, one call for ``count`` elements, and runs it."""
    target = simd.host() if name == "host" else simd.Target.avx2()
    k = simd.Kernel("test", target)
    with k.tasks():
        x, y = k.pointer(0, simd.FLOATS[source.dtype]), k.pointer(1, simd.FLOATS[result.dtype])
        k.each_vector(count, lambda i, n: body(k, x, y, i, n))
    k.compile().launch(1, source, result)
    return result


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_exp2(target):
    x = torch.cat([torch.linspace(-126, 127, 100_003), torch.tensor([-math.inf, -1e30, -127.0, math.nan, 0.0, -0.0])])
    y = apply(target, lambda k, a, b, i, n: b.store(i, k.exp2(a.load_padded(i, n, k.lanes)), n), x, x.clone(), len(x))
    torch.testing.assert_close(y[:-6].double(), x[:-6].double().exp2(), rtol=2.5e-7, atol=0)
    assert y[-6:-3].tolist() == [0.0, 0.0, 0.0] and y[-3].isnan() and y[-2:].tolist() == [1.0, 1.0]


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_floats_are_read_and_rounded(target, dtype):
    """Every float16 or bfloat16 passes unchanged; float32 is rounded as PyTorch rounds it."""
    torch.manual_seed(0)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    bits = torch.randint(-(2**31), 2**31, (100_001,), dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(1000, dtype=torch.int32) << 16 | 0x3F008000).view(torch.float32)
    x = torch.cat([halves, bits.view(torch.float32), ties, torch.tensor([math.inf, -math.inf, math.nan])])
    x[x.abs() < 2**-126] = 0  # the CPU's own rounding takes such as 0
    y = apply(
        *(target, lambda k, a, b, i, n: b.store_floats(i, a.load_floats(i, n), n)),
        *(x, torch.empty(len(x), dtype=dtype), len(x)),
    )
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    z = apply(
        *(target, lambda k, a, b, i, n: b.store_floats(i, a.load_floats(i, n), n)),
        *(y, torch.empty(len(x), dtype=torch.float32), len(x)),
    )
    torch.testing.assert_close(z, y.float(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 15, 16, 17, 31, 47])
def test_nothing_past_the_count_is_written(target, count):
    x, y = torch.arange(64.0), torch.full((64,), -1.0)
    apply(target, lambda k, a, b, i, n: b.store_floats(i, a.load_floats(i, n), n), x, y, count)
    assert torch.equal(y[:count], x[:count]) and (y[count:] == -1).all()


@needs_compiler
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 1000])
def test_every_task_runs_once(num_tasks):
    k = simd.Kernel("count", simd.host())
    with k.tasks() as task:
        ran = k.pointer(0, simd.I32)
        ran[task] = ran[task] + 1
    ran = torch.zeros(1001, dtype=torch.int32)
    k.compile().launch(num_tasks, ran)
    assert (ran[:num_tasks] == 1).all() and (ran[num_tasks:] == 0).all()


@needs_compiler
def test_integers_and_floats_as_arguments():
    k = simd.Kernel("arguments", simd.host())
    with k.tasks():
        k.pointer(0, simd.F32)[0] = k.real(1)
        k.pointer(2, simd.I64)[0] = k.integer(3)
    real, integer = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    k.compile().launch(1, real, 0.1, integer, -(2**40))
    assert real.item() == torch.tensor(0.1).item() and integer.item() == -(2**40)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 64, 1000])
def test_rows_are_split_whole(num_rows):
    num_tasks, rows_per_task = simd.split_rows(num_rows)
    assert num_tasks * rows_per_task >= num_rows > (num_tasks - 1) * rows_per_task or num_rows == num_tasks == 0


def test_all_of_it_works_without_llvmlite():
    """A subprocess in which the wheel cannot be imported: every operation falls back to PyTorch's own."""
    code = """
import sys
sys.modules["llvmlite"] = None
import torch
from kernels import available_backends, simd
from kernels.norm import rms_norm
assert simd.host() is None
assert [str(b) for b in available_backends(torch.device("cpu"), torch.float32)] == ["aten", "reference"]
torch.testing.assert_close(rms_norm(torch.full((2, 4), 3.0), torch.ones(4), 0.0), torch.ones(2, 4))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
