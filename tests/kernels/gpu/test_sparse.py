"""Triton's sparse attention against the expanded mask in float64: by Triton's interpreter, or on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import assert_state
from sparse_rows import make_rows, make_sparse_inputs, random_index

from kernels.sparse.index import SparseIndex
from kernels.sparse.patterns import AShape, BlockSparse, Dense, TriShape, VerticalSlash, lower
from kernels.sparse.reference import expanded_mask, sparse_attention

pytest.importorskip("triton", reason="Triton is for Linux")
from kernels.gpu.sparse import TritonTasks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
ROWS = {
    "a prompt": [(200, [200])],
    "a token": [(1, [1])],
    "one query after a history": [(1, [150])],
    "a suffix, tiles that begin in the middle": [(70, [60, 41, 59])],
    "ragged": [(100, [100]), (1, [64]), (40, [3, 130, 47])],
    "a row without queries": [(20, [20]), (0, [70]), (65, [65])],
}


def on_device(index: SparseIndex) -> SparseIndex:
    return SparseIndex(**{name: tensor.to(DEVICE) for name, tensor in vars(index).items()})


def check(rows, arena, H, Hkv, D, dtype, seed=0):
    q, k, v = make_sparse_inputs(rows, arena, H, Hkv, D, dtype, seed)
    index, scale = random_index(rows, H, seed), D**-0.5
    expected = sparse_attention(q.double(), k.double(), v.double(), rows, index, scale)
    out, lse = TritonTasks(rows, DEVICE).run(*(x.to(DEVICE) for x in (q, k, v)), on_device(index), scale)
    assert out.dtype == dtype and lse.is_contiguous()
    assert_state(out, lse, *expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROWS)
def test_matches_the_expanded_mask(case, dtype):
    rows, arena = make_rows(*ROWS[case])
    check(rows, arena, 4, 2, 32, dtype)


@pytest.mark.parametrize(("H", "Hkv", "D"), [(4, 4, 16), (5, 1, 40), (6, 2, 80), (4, 2, 128), (4, 4, 192)])
def test_head_shapes(H, Hkv, D):
    rows, arena = make_rows((70, [30, 70]))
    check(rows, arena, H, Hkv, D, torch.float16)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    histories=st.lists(st.tuples(st.integers(1, 80), st.lists(st.integers(0, 90), max_size=2)), min_size=1, max_size=2),
    seed=st.integers(0, 2**16),
)
def test_any_rows(histories, seed):
    rows, arena = make_rows(*[(new, [*before, new]) for new, before in histories])
    check(rows, arena, 4, 2, 16, torch.float32, seed)


def test_the_index_is_built_there():
    rows, arena = make_rows((200, [200]), (70, [130, 70]))
    q, k, v = (x.to(DEVICE) for x in make_sparse_inputs(rows, arena, 5, 1, 32, torch.float32))
    patterns = [Dense(), AShape(4, 70), TriShape(3, 10, 70), VerticalSlash(40, 120), BlockSparse(2)]
    index = lower(patterns, q, k, rows, 0.2)
    assert index.distances.device.type == DEVICE.type
    expected = sparse_attention(q.double(), k.double(), v.double(), rows, index, 0.2)
    assert_state(*TritonTasks(rows, DEVICE).run(q, k, v, index, 0.2), *(x.cpu() for x in expected), torch.float32)


def test_what_is_excluded_is_not_read():
    """Each key of a history that the queries after it do not see is NaN."""
    rows, arena = make_rows((64, [200, 184]))
    q, k, v = make_sparse_inputs(rows, arena, 4, 4, 16, torch.float32)
    index = random_index(rows, 4, density=0.2)
    index = SparseIndex.of(index.distances, index.columns, None, index.tiles, index.tiles_of_head)  # no dense head
    expected = sparse_attention(q.double(), k.double(), v.double(), rows, index, 0.2)
    seen = expanded_mask(index, rows, 0).any(1)
    poisoned = torch.ones(arena, 4, dtype=torch.bool)
    poisoned[torch.from_numpy(rows.slots(0))] = ~seen.T
    assert (~seen).sum(-1).min() > 40
    k[poisoned], v[poisoned] = float("nan"), float("nan")
    found = TritonTasks(rows, DEVICE).run(*(x.to(DEVICE) for x in (q, k, v)), on_device(index), 0.2)
    assert_state(*found, *expected, torch.float32)


def test_no_queries():
    rows, arena = make_rows((0, [5]))
    q, k, v = make_sparse_inputs(rows, arena, 4, 2, 16, torch.float32)
    index = SparseIndex.of(torch.ones(1, 4, 1, dtype=torch.bool))
    out, lse = TritonTasks(rows, DEVICE).run(*(x.to(DEVICE) for x in (q, k, v)), on_device(index), 0.2)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)
