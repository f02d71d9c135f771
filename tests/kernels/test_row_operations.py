"""The operations around attention, against float64: compiled for this machine, for the least target, and PyTorch's."""

import pytest
import torch
from operations import TOLERANCE, activated, normalised, randn

from kernels import simd
from kernels.norm import add_rms_norm_, rms_norm
from kernels.swiglu import swiglu

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SHAPES = pytest.mark.parametrize("shape", [(0, 16), (1, 1), (3, 7), (33, 48), (5, 100)], ids=str)
pytestmark = pytest.mark.usefixtures("target")


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@DTYPES
@SHAPES
def test_rms_norm(shape, dtype):
    x, weight = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype, seed=1)
    assert_close(rms_norm(x, weight, 1e-5), normalised(x.double(), weight.double(), 1e-5), dtype)


@DTYPES
def test_rms_norm_of_heads_and_of_zeros(dtype):
    """Strided rows, more dimensions than two, and a row whose mean is 0."""
    x, weight = randn(4, 3, 20, dtype=dtype), randn(16, dtype=dtype, seed=1)
    x[1] = 0
    expected = normalised(x[..., :16].double(), weight.double(), 1e-5)
    assert_close(rms_norm(x[..., :16], weight, 1e-5), expected, dtype)
    assert_close(rms_norm(x[:, 1, :16], weight, 1e-5), expected[:, 1], dtype)


@DTYPES
@SHAPES
def test_add_rms_norm(shape, dtype):
    """What is normalised is the sum as it was rounded: the residual stream that later layers read."""
    x, y, weight = (randn(*size, dtype=dtype, seed=i) for i, size in enumerate((shape, shape, shape[1:])))
    added = (x.float() + y.float()).to(dtype)
    result = add_rms_norm_(x, y, weight, 1e-5)
    torch.testing.assert_close(x, added, rtol=0, atol=0)
    assert_close(result, normalised(added.double(), weight.double(), 1e-5), dtype)


@DTYPES
@SHAPES
def test_swiglu(shape, dtype):
    rows, features = shape
    gate_up = randn(rows, 2 * features, dtype=dtype) * 8
    # PyTorch's rounds the activation before it is multiplied.
    roundings = 1 if simd.host() else 3
    expected = activated(gate_up.double())
    tolerance = roundings * TOLERANCE[dtype]
    torch.testing.assert_close(swiglu(gate_up).double(), expected, rtol=tolerance, atol=tolerance)


def test_inputs_that_are_not_alike():
    """Weights with strides are read as they are meant."""
    x, weight = randn(3, 16, dtype=torch.float32), randn(32, dtype=torch.float32, seed=1)[::2]
    assert_close(rms_norm(x, weight, 1e-5), normalised(x.double(), weight.double(), 1e-5), torch.float32)
    added = normalised((x + x).double(), weight.double(), 1e-5)
    assert_close(add_rms_norm_(x.clone(), x, weight, 1e-5), added, torch.float32)


def test_swiglu_of_large_gates():
    gates = torch.tensor([[-1e30, -300.0, -88.0, 0.0, 88.0, 1e30, float("inf"), float("nan")]])
    result = swiglu(torch.cat([gates, torch.ones_like(gates)], dim=1))[0]
    torch.testing.assert_close(result[:7], torch.tensor([0.0, 0.0, 0.0, 0.0, 88.0, 1e30, float("inf")]))
    assert result[7].isnan()
