"""The rotation by Triton, as of complex numbers in float64."""

import pytest
import torch
from gpu_operations import DEVICE, TOLERANCE, assert_close
from operations import randn, rotary_inputs, rotated

from kernels import Backend
from kernels.rotary import apply_rotary_, rotate_into_cache_

pytest.importorskip("triton", reason="Triton is for Linux")

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# Of a head, and of what is rotated of it.
HEAD_DIMS = pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(2, 2), (20, 6), (32, 32), (64, 64), (80, 32), (80, 80), (96, 96), (112, 56), (128, 128), (128, 64), (256, 256)],
)
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True])


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def check_in_place(num_tokens, num_heads, head_dim, rotary_dim, interleaved, dtype):
    """Of a view of some heads; the others stay."""
    whole, cos, sin = rotary_inputs(num_tokens, num_heads + 2, head_dim, rotary_dim, interleaved, dtype)
    before = whole.clone()
    whole, *angles = on_device(whole, cos, sin)
    apply_rotary_(whole[:, :num_heads], *angles, interleaved, Backend.TRITON)
    assert_close(whole[:, :num_heads], rotated(before[:, :num_heads], cos, sin, interleaved), dtype)
    assert torch.equal(whole[:, num_heads:].cpu(), before[:, num_heads:])


def check_into_cache(
    heads, head_dim, rotary_dim, interleaved, dtype, *, num_tokens=3, by_head=True, slots=None, num_slots=9
):
    """Rows of the arena that no slot names stay as they are."""
    Hq, Hkv = heads
    qkv, cos, sin = rotary_inputs(num_tokens, Hq + 2 * Hkv, head_dim, rotary_dim, interleaved, dtype)
    q, k, v = qkv.clone().split((Hq, Hkv, Hkv), dim=1)
    shapes = [(Hkv, num_slots, head_dim), (num_slots, Hkv, head_dim)]
    arenas = [torch.full(shape, 7.0, dtype=dtype, device=DEVICE) for shape in shapes]
    arenas = [arenas[0].transpose(0, 1), arenas[1]][:: 1 if by_head else -1]
    if slots is None:
        slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(0))[:num_tokens]
    qkv, *angles = on_device(qkv, cos, sin)
    rotate_into_cache_(qkv, *angles, *arenas, slots.to(DEVICE), interleaved, Backend.TRITON)
    keys, values = arenas
    assert_close(qkv[:, :Hq], rotated(q, cos, sin, interleaved), dtype)
    assert_close(keys[slots], rotated(k, cos, sin, interleaved), dtype)
    assert torch.equal(values[slots].cpu(), v)
    others = torch.ones(num_slots, dtype=torch.bool)
    others[slots] = False
    assert (keys[others] == 7).all() and (values[others] == 7).all()


@HEAD_DIMS
@INTERLEAVED
def test_head_dims(head_dim, rotary_dim, interleaved):
    check_in_place(2, 3, head_dim, rotary_dim, interleaved, torch.float32)
    check_into_cache((3, 2), head_dim, rotary_dim, interleaved, torch.float32)


@DTYPES
@INTERLEAVED
def test_dtypes(dtype, interleaved):
    check_in_place(4, 5, 80, 32, interleaved, dtype)
    check_into_cache((5, 1), 80, 32, interleaved, dtype, by_head=False)


@pytest.mark.parametrize("heads", [(1, 1), (12, 4), (32, 8), (71, 1), (40, 40)], ids=str)
def test_heads_of_one_program_and_of_several(heads):
    check_in_place(2, heads[0], 64, 64, False, torch.float16)
    check_into_cache(heads, 64, 64, False, torch.float16)


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_tokens(num_tokens):
    check_in_place(num_tokens, 3, 16, 16, False, torch.float32)
    check_into_cache((2, 1), 16, 16, False, torch.float32, num_tokens=num_tokens)


def test_strides():
    """Slots of every other place, and heads and tokens with gaps between them."""
    check_into_cache((2, 1), 16, 16, False, torch.float32, slots=torch.arange(6)[::2])
    wide = randn(6, 8, 24, dtype=torch.float32).to(DEVICE)
    x, before = wide[::2, ::2, 3:19], wide.double().cpu()
    _, cos, sin = rotary_inputs(3, 1, 16, 16, False, torch.float32)
    apply_rotary_(x, *on_device(cos, sin), False, Backend.TRITON)
    before[::2, ::2, 3:19] = rotated(before[::2, ::2, 3:19], cos, sin, False)
    assert_close(wide, before, torch.float32)


@pytest.mark.parametrize("by_head", [True, False])
def test_places_beyond_32_bits(by_head):
    """Three heads of a slot, or three slots, that lie 2^30 elements apart. Only what is written takes memory."""
    memory = torch.empty(2**31 + 128, dtype=torch.float16, device=DEVICE)
    strides = (32, 2**30, 1) if by_head else (2**30, 32, 1)
    keys, values = (memory.as_strided((3, 3, 16), strides, offset) for offset in (0, 16))
    slots = torch.tensor([2, 0, 1])
    qkv, cos, sin = rotary_inputs(3, 8, 16, 16, False, torch.float16)
    k, v = qkv[:, 2:].clone().split(3, dim=1)
    qkv, *angles = on_device(qkv, cos, sin)
    rotate_into_cache_(qkv, *angles, keys, values, slots.to(DEVICE), False, Backend.TRITON)
    assert_close(keys[slots], rotated(k, cos, sin, False), torch.float16)
    assert torch.equal(values[slots].cpu(), v)


def test_nan_stays_in_its_pair():
    x, cos, sin = rotary_inputs(3, 2, 16, 16, False, torch.float32)
    x[1, 0, 3] = float("nan")
    x, *angles = on_device(x, cos, sin)
    apply_rotary_(x, *angles, False, Backend.TRITON)
    assert x[1, 0, [3, 11]].isnan().all() and x.isnan().sum() == 2
