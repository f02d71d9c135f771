"""The norms by Triton, against float64."""

import pytest
import torch
from gpu_operations import DEVICE, TOLERANCE, assert_close
from operations import normalised, randn

from kernels import Backend
from kernels.norm import add_rms_norm_, rms_norm

pytest.importorskip("triton", reason="Triton is for Linux")
from kernels.gpu import norm

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# Rows that share a program, rows of their own, and rows that do not fit registers.
SHAPES = pytest.mark.parametrize(
    "shape", [(0, 16), (1, 1), (3, 7), (37, 48), (5, 100), (9, 768), (2, 1030), (2, 20_000)], ids=str
)
EPS = 1e-5


def norm_of(x, weight):
    return rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS, Backend.TRITON)


@DTYPES
@SHAPES
def test_rms_norm(shape, dtype):
    x, weight = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype, seed=1)
    assert_close(norm_of(x, weight), normalised(x.double(), weight.double(), EPS), dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4), (0, 3)], ids=str)
def test_any_dimensions_before_the_last(shape, dtype):
    x, weight = randn(*shape, 20, dtype=dtype), randn(20, dtype=dtype, seed=1)
    assert_close(norm_of(x, weight), normalised(x.double(), weight.double(), EPS), dtype)


@DTYPES
def test_heads_of_a_projection(dtype):
    """As queries and keys are normed: a view of some heads. Here there are gaps between them too."""
    qkv, weight = randn(9, 8, 45, dtype=dtype).to(DEVICE)[..., :40], randn(40, dtype=dtype, seed=1)
    for heads in (slice(0, 5), slice(5, 6)):
        expected = normalised(qkv[:, heads].double().cpu(), weight.double(), EPS)
        assert_close(norm_of(qkv[:, heads], weight), expected, dtype)


@DTYPES
@SHAPES
def test_add_rms_norm(shape, dtype):
    """What is normalised is the sum as it was rounded."""
    x, y = (randn(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = randn(shape[1], dtype=dtype, seed=2)
    total = x.clone().to(DEVICE)
    result = add_rms_norm_(total, y.to(DEVICE), weight.to(DEVICE), EPS, Backend.TRITON)
    assert_close(total, x.double() + y.double(), dtype)
    if dtype != torch.bfloat16 or DEVICE.type == "cuda":
        assert torch.equal(total.cpu(), (x.float() + y.float()).to(dtype))
    assert_close(result, normalised(total.double().cpu(), weight.double(), EPS), dtype)


@pytest.mark.parametrize("max_block", [16, norm._MAX_BLOCK])
def test_strided_rows(max_block, monkeypatch):
    """Parts of wider rows; what is beside them stays."""
    monkeypatch.setattr(norm, "_MAX_BLOCK", max_block)
    x, y = (randn(6, 90, dtype=torch.float32, seed=seed).to(DEVICE) for seed in (0, 1))
    weight, before = randn(50, dtype=torch.float32, seed=2), x.double().cpu()
    assert_close(norm_of(x[::2, 3:53], weight), normalised(before[::2, 3:53], weight.double(), EPS), torch.float32)
    result = add_rms_norm_(x[::2, 3:53], y[1:4, 9:59], weight.to(DEVICE), EPS, Backend.TRITON)
    expected = before.clone()
    expected[::2, 3:53] += y[1:4, 9:59].double().cpu()
    assert_close(x, expected, torch.float32)
    assert_close(result, normalised(expected[::2, 3:53], weight.double(), EPS), torch.float32)


@pytest.mark.parametrize("max_block", [16, norm._MAX_BLOCK])
def test_nan_shows_and_stays_in_its_row(max_block, monkeypatch):
    monkeypatch.setattr(norm, "_MAX_BLOCK", max_block)
    x, weight = torch.ones(30, 40), torch.ones(40)
    x[3, 39] = float("nan")
    result = norm_of(x, weight).cpu()
    assert result[3].isnan().all() and (result.isnan().any(1).sum() == 1)
    result = add_rms_norm_(torch.ones(30, 40, device=DEVICE), x.to(DEVICE), weight.to(DEVICE), EPS, Backend.TRITON)
    assert result[3].isnan().all() and (result.isnan().any(1).sum() == 1)


@pytest.mark.parametrize(
    ("value", "dtype"), [(6e4, torch.float16), (1e18, torch.float32), (1e-7, torch.float16), (0.0, torch.float32)]
)
def test_values_of_any_size(value, dtype):
    """The squares of large halves are beyond half precision; small ones leave eps alone."""
    x, weight = torch.full((2, 33), value, dtype=dtype), randn(33, dtype=dtype)
    assert_close(norm_of(x, weight), normalised(x.double(), weight.double(), EPS), dtype)
