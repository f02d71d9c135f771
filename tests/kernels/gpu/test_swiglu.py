"""SwiGLU by Triton, against float64."""

import pytest
import torch
from gpu_operations import DEVICE, TOLERANCE, assert_close
from operations import activated, randn

from kernels import Backend
from kernels.swiglu import swiglu

pytest.importorskip("triton", reason="Triton is for Linux")

OVERFLOWS = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in the interpreter


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (3, 7), (17, 48), (5, 0), (2, 1024), (3, 2500)], ids=str)
def test_swiglu(shape, dtype):
    gate_up = randn(shape[0], 2 * shape[1], dtype=dtype) * 8
    assert_close(swiglu(gate_up.to(DEVICE), Backend.TRITON), activated(gate_up.double()), dtype)


def test_strided_rows():
    wide = randn(8, 90, dtype=torch.float32).to(DEVICE)
    gate_up = wide[::2, 5:79]
    assert_close(swiglu(gate_up, Backend.TRITON), activated(gate_up.double().cpu()), torch.float32)


@OVERFLOWS
def test_large_gates():
    nan, inf = float("nan"), float("inf")
    gates = torch.tensor([[-3e38, -1e30, -300.0, -89.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 3e38, inf, nan]])
    result = swiglu(torch.cat([gates, torch.ones_like(gates)], 1).to(DEVICE), Backend.TRITON)[0].cpu()
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -5e-31, 0.0, 5e-31, 88.0, 3e38, inf, nan])
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-35, equal_nan=True)


@OVERFLOWS
def test_large_halves_overflow_only_in_the_result():
    gate_up = torch.tensor([[-6e4, 6e4, 200.0, 6e4, 1.0, 400.0]], dtype=torch.float16)
    result = swiglu(gate_up.to(DEVICE), Backend.TRITON)[0].cpu()
    assert result.tolist() == [0.0, 6e4, float("inf")]
