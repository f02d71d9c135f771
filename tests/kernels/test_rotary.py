"""The rotation, as of complex numbers in float64; compiled for this machine, for the least target, and PyTorch's."""

import pytest
import torch
from operations import TOLERANCE, rotary_inputs, rotated

from kernels.rotary import apply_rotary_, rotate_into_cache_

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# Of a head, and of what is rotated of it.
SIZES = [(2, 2), (16, 16), (18, 18), (80, 80), (80, 32), (20, 6)]
HEAD_DIMS = pytest.mark.parametrize(("head_dim", "rotary_dim"), SIZES)
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True])
pytestmark = pytest.mark.usefixtures("target")


def assert_close(actual, expected, dtype):
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)


@DTYPES
@HEAD_DIMS
@INTERLEAVED
def test_rotates_in_place(interleaved, head_dim, rotary_dim, dtype):
    """A view of some heads; the others stay."""
    whole, cos, sin = rotary_inputs(5, 7, head_dim, rotary_dim, interleaved, dtype)
    before = whole.clone()
    apply_rotary_(whole[:, :4], cos, sin, interleaved)
    assert_close(whole[:, :4], rotated(before[:, :4], cos, sin, interleaved), dtype)
    assert torch.equal(whole[:, 4:], before[:, 4:])


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize("keys_by_head", [True, False])
@INTERLEAVED
def test_into_the_cache(interleaved, keys_by_head, num_tokens, head_dim, rotary_dim, dtype):
    """Arenas laid out head by head and token by token; no other slot changes."""
    qkv, cos, sin = rotary_inputs(num_tokens, 5 + 2 * 3, head_dim, rotary_dim, interleaved, dtype)
    q, k, v = qkv.clone().split((5, 3, 3), dim=1)
    by_head = torch.full((3, 30, head_dim), 7.0, dtype=dtype).transpose(0, 1)
    arenas = [by_head, torch.full((30, 3, head_dim), 7.0, dtype=dtype)]
    arenas = arenas if keys_by_head else arenas[::-1]
    slots = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:num_tokens]
    rotate_into_cache_(qkv, cos, sin, *arenas, slots, interleaved)
    keys, values = arenas
    assert_close(qkv[:, :5], rotated(q, cos, sin, interleaved), dtype)
    assert_close(keys[slots], rotated(k, cos, sin, interleaved), dtype)
    assert torch.equal(values[slots], v)
    others = torch.ones(30, dtype=torch.bool)
    others[slots] = False
    assert (keys[others] == 7).all() and (values[others] == 7).all()


def test_inputs_that_are_not_alike():
    """Slots with strides are read as they are meant; arenas of another dtype are refused."""
    qkv, cos, sin = rotary_inputs(3, 4, 16, 16, False, torch.float32)
    arenas = [torch.zeros(8, 1, 16) for _ in range(2)]
    _, k, v = qkv.clone().split((2, 1, 1), dim=1)
    rotate_into_cache_(qkv, cos, sin, *arenas, torch.arange(6)[::2])
    assert_close(arenas[0][[0, 2, 4]], rotated(k, cos, sin, False), torch.float32)
    assert torch.equal(arenas[1][[0, 2, 4]], v)
    with pytest.raises(RuntimeError):
        rotate_into_cache_(qkv, cos, sin, *(arena.bfloat16() for arena in arenas), torch.arange(3))
