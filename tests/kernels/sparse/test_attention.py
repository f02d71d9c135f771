"""Sparse attention by every backend against the expanded mask in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import assert_state
from sparse_rows import make_rows, make_sparse_inputs, random_index

from kernels import merge_states, reference, simd
from kernels.segment import Segment
from kernels.sparse.attention import SparsePlan, available_sparse_backends
from kernels.sparse.index import SparseIndex
from kernels.sparse.reference import expanded_mask, sparse_attention
from kernels.sparse.rows import SparseRows
from kernels.sparse.simd import SimdTasks

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = [backend for backend in available_sparse_backends(CPU, torch.float32) if backend != "triton"]
ROWS = {
    "a prompt": [(300, [300])],
    "less than a tile": [(5, [5])],
    "a token": [(1, [1])],
    "one query after a history": [(1, [200])],
    "a suffix, tiles that begin in the middle": [(70, [100, 41, 59])],
    "ragged": [(130, [130]), (1, [64]), (64, [64, 64]), (40, [3, 200, 47])],
    "a row without queries": [(20, [20]), (0, [70]), (65, [65])],
}


def check(rows, arena, H, Hkv, D, dtype, backend, seed=0):
    q, k, v = make_sparse_inputs(rows, arena, H, Hkv, D, dtype, seed)
    index, scale = random_index(rows, H, seed), D**-0.5
    expected = sparse_attention(q.double(), k.double(), v.double(), rows, index, scale)
    out, lse = SparsePlan(rows, CPU, dtype, backend).run(q, k, v, index, scale)
    assert_state(out, lse, *expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROWS)
def test_matches_the_expanded_mask(case, dtype, backend):
    rows, arena = make_rows(*ROWS[case])
    check(rows, arena, 8, 2, 64, dtype, backend)


@pytest.mark.parametrize("head_dim", [16, 40, 80, 128, 192, 256])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.skipif(simd.host() is None, reason="kernels cannot be compiled for this CPU, or no llvmlite")
def test_heads(heads, head_dim):
    rows, arena = make_rows((100, [30, 90]))
    for dtype in DTYPES if heads == (4, 4) else (torch.float32,):
        check(rows, arena, *heads, head_dim, dtype, "simd")


@pytest.mark.skipif(simd.host() is None, reason="kernels cannot be compiled for this CPU, or no llvmlite")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_least_target(dtype):
    rows, arena = make_rows(*ROWS["ragged"])
    q, k, v = make_sparse_inputs(rows, arena, 4, 2, 40, dtype)
    index = random_index(rows, 4)
    expected = sparse_attention(q.double(), k.double(), v.double(), rows, index, 0.2)
    assert_state(*SimdTasks(rows, simd.Target.avx2()).run(q, k, v, index, 0.2), *expected, dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    histories=st.lists(
        st.tuples(st.integers(1, 150), st.lists(st.integers(0, 130), max_size=3)), min_size=1, max_size=3
    ),
    heads=st.sampled_from([(4, 1), (5, 5), (8, 4)]),
    seed=st.integers(0, 2**16),
)
def test_any_rows(histories, heads, seed):
    rows, arena = make_rows(*[(new, [*before, new]) for new, before in histories])
    check(rows, arena, *heads, 24, torch.float32, BACKENDS[0], seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_excluded_is_not_read(backend, dtype):
    """Each key and value of a history that the queries after it do not see is NaN: all is as it was."""
    rows, arena = make_rows((64, [200, 184]), (50, [300, 50]))
    q, k, v = make_sparse_inputs(rows, arena, 4, 4, 32, dtype)
    index = random_index(rows, 4, density=0.2)
    index = SparseIndex.of(index.distances, index.columns, None, index.tiles, index.tiles_of_head)  # no dense head
    expected = SparsePlan(rows, CPU, dtype, backend).run(q, k, v, index, 0.2)
    poisoned = torch.ones(arena, 4, dtype=torch.bool)
    for row in range(rows.num_rows):
        seen = expanded_mask(index, rows, row).any(1)  # (H, N)
        slots = torch.from_numpy(rows.slots(row))
        poisoned[slots] &= ~seen.T
        assert (~seen).sum(-1).min() > 40
    for x in (k, v):
        x[poisoned] = float("nan")
    for found, wanted in zip(SparsePlan(rows, CPU, dtype, backend).run(q, k, v, index, 0.2), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_of_everything_is_dense_attention(backend):
    rows, arena = make_rows((130, [50, 100]))
    q, k, v = make_sparse_inputs(rows, arena, 4, 2, 32, torch.float32)
    index = SparseIndex.of(torch.ones(1, 4, 3, dtype=torch.bool))
    found = SparsePlan(rows, CPU, torch.float32, backend).run(q, k, v, index, 0.2)
    slots = torch.from_numpy(rows.slots(0))
    together = Segment(np.array([0, 130]), np.array([0]), np.array([150]), True)
    expected = reference.segment_attention(q.double(), k.double()[slots], v.double()[slots], together, 0.2)
    assert_state(*found, *expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_merge_with_those_of_other_keys(backend):
    rows, arena = make_rows((100, [100]))
    q, k, v = make_sparse_inputs(rows, arena + 50, 4, 2, 32, torch.float32)
    index = random_index(rows, 4)
    more = Segment(np.array([0, 100]), np.array([arena]), np.array([50]), False)
    own = SparsePlan(rows, CPU, torch.float32, backend).run(q, k, v, index, 0.2)
    other = reference.segment_attention(q, k, v, more, 0.2)
    wide = q.double(), k.double(), v.double()
    expected = reference.merge(
        *sparse_attention(*wide, rows, index, 0.2), *reference.segment_attention(*wide, more, 0.2)
    )
    assert_state(*merge_states(*own, *other), *expected, torch.float32)


def test_strides(target):
    """Queries, keys and values as parts of wider tensors."""
    rows, arena = make_rows((100, [100]))
    q, k, v = (x.repeat(1, 2, 1)[:, ::2] for x in make_sparse_inputs(rows, arena, 4, 4, 32, torch.float32))
    index = random_index(rows, 4)
    expected = sparse_attention(q.double(), k.double(), v.double(), rows, index, 0.2)
    assert_state(*SparsePlan(rows, CPU, torch.float32).run(q, k, v, index, 0.2), *expected, torch.float32)


def test_a_backend_that_is_not_there():
    rows = SparseRows.contiguous([1], [0], [1])
    with pytest.raises(ValueError, match="sparse attention backend 'fast' cannot run float32 on cpu; accepted: "):
        SparsePlan(rows, CPU, torch.float32, "fast")
