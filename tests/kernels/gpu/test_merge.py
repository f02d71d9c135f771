import pytest
import torch

from kernels import reference

pytest.importorskip("triton", reason="Triton is for Linux")
from kernels.gpu.merge import merge_stacked

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("num_states", [1, 2, 3, 9, 70])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_the_reference_applied_again_and_again(num_states, head_dim, dtype):
    generator = torch.Generator().manual_seed(num_states)
    outs = torch.randn(num_states, 5, 3, head_dim, generator=generator)
    lses = torch.randn(num_states, 5, 3, generator=generator) * 20
    empty = torch.rand(num_states, 5, 3, generator=generator) < 0.3
    empty[:, 1] = True
    lses[empty], outs[empty] = float("-inf"), 0.0
    lses[:, 2] += 1e4
    lses[:, 3] -= 1e4
    expected = outs[0].double(), lses[0].double()
    for state in zip(outs[1:].double(), lses[1:].double(), strict=True):
        expected = reference.merge(*expected, *state)
    out, lse = merge_stacked(outs.to(DEVICE), lses.to(DEVICE), dtype)
    assert out.dtype == dtype and lse.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double().cpu(), expected[1], atol=1e-6, rtol=2e-7)
    # Weights are exponentials of differences of the lse, which has float32's rounding: 1e-3 at 10,000.
    large = expected[1].abs() > 1000
    error = torch.where(large, 4e-3, 2e-6)[..., None] + unit
    assert ((out.double().cpu() - expected[0]).abs() <= error * expected[0].abs().clamp(min=1)).all()
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()


def test_nan_shows_and_stays_where_it_is():
    outs, lses = torch.ones(2, 3, 2, 16), torch.zeros(2, 3, 2)
    outs[1, 0], lses[0, 1] = float("nan"), float("nan")
    out, lse = (x.cpu() for x in merge_stacked(outs.to(DEVICE), lses.to(DEVICE), torch.float32))
    assert out[0].isnan().all() and lse[0].isfinite().all()
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert out[2].isfinite().all() and lse[2].isfinite().all()
