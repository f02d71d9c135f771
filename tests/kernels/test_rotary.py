import pytest
import torch

from kernels.rotary import apply_rotary_

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [2, 16, 18, 80])
def test_rotates_pairs_in_place(dtype, head_dim):
    """A pair (d, d + D/2) turns by its angle: checked as complex numbers in float64, on a strided view."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(5, 7, head_dim, generator=generator).to(dtype)
    x, before = whole[:, :4], whole.clone()
    angles = torch.randn(5, 1, head_dim // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    apply_rotary_(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    half = head_dim // 2
    pairs = torch.complex(before[:, :4, :half].double(), before[:, :4, half:].double())
    turned = pairs * torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(x.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)
    torch.testing.assert_close(whole[:, 4:], before[:, 4:], rtol=0, atol=0)
