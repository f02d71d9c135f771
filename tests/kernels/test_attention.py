"""Every backend against the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import TOLERANCE, assert_state, make_inputs, make_segment

from kernels import AttentionPlan, Backend, Segment, available_backends, merge_states, reference, simd
from kernels.attention_aten import AtenSegment

CPU = torch.device("cpu")
# Where each backend runs, whether or not it is the one that would be taken.
BACKENDS = [
    ("cpu", Backend.SIMD),
    ("cpu", Backend.ATEN),
    pytest.param(("cuda", None), marks=pytest.mark.gpu),
    pytest.param(("cuda", Backend.TRITON), marks=pytest.mark.gpu),
]


def check(segment, arena, Hq, Hkv, D, dtype, where=("cpu", None)):
    device, backend = where
    if backend == Backend.SIMD and simd.host() is None:
        pytest.skip("kernels cannot be compiled for this CPU, or no llvmlite")
    q, k, v = make_inputs(segment, arena, Hq, Hkv, D, dtype)
    scale = D**-0.5
    expected_out, expected_lse = reference.segment_attention(q.double(), k.double(), v.double(), segment, scale)
    plan = AttentionPlan.of([segment], torch.device(device), dtype, backend)
    out, lse = plan.run_state(q.to(device), k.to(device), v.to(device), scale)
    assert_state(out, lse, expected_out, expected_lse, dtype)


CASES = {
    "one shared prefix": ([12], [37], False),
    "equal decode rows": ([1] * 6, [9] * 6, False),
    "ragged decode rows": ([1] * 6, [9, 3, 12, 1, 7, 7], False),
    "empty rows": ([1, 1, 2, 0, 1], [0, 5, 0, 4, 3], False),
    "all empty": ([2, 1], [0, 0], False),
    "uneven groups": ([3, 1, 7], [5, 11, 2], False),
    "causal prefill": ([7, 7, 7], [7, 7, 7], True),
    "causal ragged": ([3, 9, 1], [3, 9, 1], True),
    "causal after a history": ([3, 4, 1], [10, 4, 6], True),
    "causal, more queries than keys": ([5, 2], [3, 2], True),
    "causal, one query each": ([1, 1, 1], [4, 4, 4], True),
    "causal with empty rows": ([2, 0, 3], [0, 3, 8], True),
}


@pytest.mark.parametrize("where", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype, where):
    segment, arena = make_segment(*CASES[case])
    check(segment, arena, 6, 2, 64, dtype, where)


@pytest.mark.parametrize("where", BACKENDS, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (12, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 128, 256])
def test_head_shapes(heads, head_dim, where):
    dtype = torch.float32 if where[0] == "cpu" else torch.float16
    segment, arena = make_segment([2, 1, 3], [6, 0, 9], False)
    check(segment, arena, *heads, head_dim, dtype, where)
    segment, arena = make_segment([2, 1, 3], [6, 1, 9], True)
    check(segment, arena, *heads, head_dim, dtype, where)


@pytest.mark.parametrize("where", BACKENDS, ids=str)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=8),
    causal=st.booleans(),
    shuffle=st.booleans(),
    uniform_room=st.booleans(),
)
def test_any_rows(rows, causal, shuffle, uniform_room, where):
    q_lens, k_lens, extra = zip(*rows, strict=True)
    rooms = [max(k_lens) + 2] * len(rows) if uniform_room else [k + e for k, e in zip(k_lens, extra, strict=True)]
    segment, arena = make_segment(q_lens, k_lens, causal, rooms, shuffle)
    check(segment, arena, 4, 2, 16, torch.float32 if where[0] == "cpu" else torch.float16, where)


def test_reference_backend_is_selectable():
    segment, arena = make_segment([2, 3], [4, 4], True)
    check(segment, arena, 4, 2, 16, torch.float32, ("cpu", Backend.REFERENCE))


def test_unavailable_backend_is_refused():
    segment, _ = make_segment([1], [1], False)
    message = r"'aten' cannot run float64 on cpu; accepted: reference; use one of these"
    with pytest.raises(ValueError, match=message):
        AttentionPlan.of([segment], CPU, torch.float64, Backend.ATEN)


def test_the_backend_that_is_taken(monkeypatch):
    """Ours where it can be compiled; ATen's elsewhere, and for many queries a row where it has AMX."""
    few, many = make_segment([15, 15], [9, 9], False)[0], make_segment([16, 16], [9, 9], False)[0]

    def taken(segment, dtype):
        return AttentionPlan.of([segment], CPU, dtype).backends[0]

    monkeypatch.setattr(simd, "host", lambda: None)
    without_interpreter = [b for b in available_backends(CPU, torch.float32) if b != Backend.TRITON]
    assert without_interpreter == [Backend.ATEN, Backend.REFERENCE]
    monkeypatch.setattr(simd, "host", lambda: simd.Target.avx2())
    for has_amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert taken(many, torch.bfloat16) == (Backend.ATEN if has_amx else Backend.SIMD)
        assert taken(few, torch.bfloat16) == taken(many, torch.float32) == Backend.SIMD


def test_equal_rows_make_one_call_of_aten_and_ragged_rows_few():
    segment, _ = make_segment([1] * 64, [9] * 64, False, rooms=[16] * 64)
    assert len(AtenSegment(segment).calls) == 1
    segment, _ = make_segment([1] * 64, list(range(1, 65)), False, rooms=[64] * 64)
    assert len(AtenSegment(segment).calls) <= 2


@pytest.mark.parametrize("backend", available_backends(CPU, torch.float32), ids=str)
def test_keys_past_the_room_are_never_read(backend):
    """NaN in every key that no row names, and in the rooms of rows without keys, leaves the result unchanged."""
    segment, arena = make_segment([1, 1, 1, 2], [4, 9, 2, 0], False, rooms=None)
    q, k, v = make_inputs(segment, arena, 4, 2, 16, torch.float32)
    named = torch.zeros(arena, dtype=torch.bool)
    for start, length in zip(segment.k_starts, segment.k_lens, strict=True):
        named[start : start + length] = True
    plan = AttentionPlan.of([segment], CPU, torch.float32, backend)
    expected = plan.run(q, k, v, 0.25)
    k[~named], v[~named] = float("nan"), float("nan")
    torch.testing.assert_close(plan.run(q, k, v, 0.25), expected, rtol=0, atol=0)
    assert torch.isfinite(expected).all() and named.sum() == 15


@pytest.mark.parametrize("backend", available_backends(CPU, torch.float32), ids=str)
def test_splitting_the_keys_changes_nothing(backend):
    """Attention over a set of keys is the merge of attention over its parts, whatever the order."""
    whole, arena = make_segment([1, 1, 1], [20, 20, 20], False)
    q, k, v = make_inputs(whole, arena, 4, 2, 32, torch.float32)
    parts = [
        Segment(whole.q_offsets, whole.k_starts + first, np.full(3, last - first), False)
        for first, last in ((0, 0), (0, 7), (7, 8), (8, 20))
    ]
    expected, _ = reference.segment_attention(q.double(), k.double(), v.double(), whole, 0.2)
    for order in (parts, parts[::-1]):
        out = AttentionPlan.of(order, CPU, torch.float32, backend).run(q, k, v, 0.2)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)


def test_merge():
    generator = torch.Generator().manual_seed(0)
    out_a, out_b = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64).unbind()
    lse_a, lse_b = (torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) * 20).unbind()
    for lse, out in ((lse_a, out_a), (lse_b, out_b)):
        lse[1], out[1] = float("-inf"), 0.0  # both empty
    lse_a[2], out_a[2] = float("-inf"), 0.0
    lse_b[3], out_b[3] = float("-inf"), 0.0
    expected_out, expected_lse = reference.merge(out_a, lse_a, out_b, lse_b)
    for a, b in (((out_a, lse_a), (out_b, lse_b)), ((out_b, lse_b), (out_a, lse_a))):
        out, lse = merge_states(*(x.float() for x in (*a, *b)))
        torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()
