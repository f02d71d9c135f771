import pytest
import torch

from kernels import linear as module
from kernels.linear import linear

# One rounding of the result; float32 also sums 96 products.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_float64(dtype, native, rows, with_bias, monkeypatch):
    """Both ways to multiply, whatever this CPU has, with blocks that do not divide the output features."""
    monkeypatch.setattr(module, "_multiplies_natively", lambda _: native)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 96 * 7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 96, generator=generator).to(dtype)
    weight = torch.randn(50, 96, generator=generator).to(dtype)
    bias = torch.randn(50, generator=generator).to(dtype) if with_bias else None
    out = linear(x, weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert out.dtype == dtype and out.shape == (rows, 50)
    scale = float(expected.abs().max()) if rows else 1.0
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale / 8)
