"""The merge of any number of states in one pass, by every backend, against the reference applied again and again."""

import pytest
import torch

from kernels import Backend, merge_states, reference, simd
from kernels.merge import merge_stacked

BACKENDS = [Backend.ATEN, Backend.SIMD, Backend.TRITON]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    if request.param == Backend.SIMD and simd.host() is None:
        pytest.skip("kernels cannot be compiled for this CPU, or no llvmlite")
    if request.param == Backend.TRITON:
        pytest.importorskip("triton", reason="Triton is for Linux")
    return request.param


def states(num_states, num_queries=5, num_heads=3, head_dim=24):
    generator = torch.Generator().manual_seed(num_states)
    outs = torch.randn(num_states, num_queries, num_heads, head_dim, generator=generator)
    lses = torch.randn(num_states, num_queries, num_heads, generator=generator) * 20
    empty = torch.rand(num_states, num_queries, num_heads, generator=generator) < 0.3
    if num_queries > 1:
        empty[:, 1] = True
    outs[empty], lses[empty] = 0.0, float("-inf")
    return outs, lses


def expected(outs, lses):
    state = outs[0].double(), lses[0].double()
    for other in zip(outs[1:].double(), lses[1:].double(), strict=True):
        state = reference.merge(*state, *other)
    return state


def check(outs, lses, backend):
    wanted = expected(outs, lses)
    outs = outs.clone()
    outs[lses == float("-inf")] = float("nan")  # of an empty state the output is not looked at
    out, lse = merge_stacked(outs, lses, backend)
    assert out.dtype == lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(lse.double(), wanted[1], atol=2e-6, rtol=4e-7)
    torch.testing.assert_close(out.double(), wanted[0], atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("num_states", [1, 2, 3, 9, 64])
@pytest.mark.parametrize("head_dim", [1, 16, 17, 80, 128])
def test_is_the_reference_applied_again_and_again(backend, num_states, head_dim):
    check(*states(num_states, head_dim=head_dim), backend)


def test_more_states_than_the_vector_code_has_room_for():
    check(*states(65, head_dim=8), None)


def test_one_row_and_none(backend):
    check(*states(3, num_queries=1, num_heads=1), backend)
    out, lse = merge_stacked(torch.empty(2, 0, 3, 8), torch.empty(2, 0, 3), backend)
    assert out.shape == (0, 3, 8) and lse.shape == (0, 3)


def test_sums_of_large_size(backend):
    outs, lses = states(4)
    lses[:, 2] += 1e4
    lses[:, 3] -= 1e4
    wanted = expected(outs, lses)
    out, lse = merge_stacked(outs, lses, backend)
    torch.testing.assert_close(lse.double(), wanted[1], atol=2e-6, rtol=2e-7)
    # Weights are exponentials of differences of the sums, which float32 knows to 1e-3 at 10,000.
    torch.testing.assert_close(out.double(), wanted[0], atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_shows_and_stays_where_it_is(backend, where):
    outs, lses = torch.ones(3, 3, 2, 16), torch.zeros(3, 3, 2)
    outs[where, 0, 1, 5], lses[where, 1] = float("nan"), float("nan")
    out, lse = merge_stacked(outs, lses, backend)
    assert out[0].isnan().sum() == 1 and lse[0].isfinite().all()
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert out[2].isfinite().all() and lse[2].isfinite().all()


def test_two_are_those_of_the_merge_of_two(backend):
    outs, lses = states(2)
    out, lse = merge_stacked(outs, lses, backend)
    for mine, theirs in zip((out, lse), merge_states(outs[0], lses[0], outs[1], lses[1]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=5e-6)
