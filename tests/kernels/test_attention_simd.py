"""Our own CPU attention: what its tiles, blocks, parts and targets could get wrong, against the float64 reference."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from segments import TOLERANCE, assert_state, make_inputs, make_segment

from kernels import Segment, merge_states, reference, simd
from kernels.attention_simd import SimdPlan, _Table

pytestmark = pytest.mark.skipif(simd.host() is None, reason="kernels cannot be compiled for this CPU, or no llvmlite")

# What this machine has, and the least that is supported, which runs here too.
TARGETS = ["host", "avx2"]


def target_of(name: str) -> simd.Target:
    return simd.host() if name == "host" else simd.Target.avx2()


def expected_state(q, k, v, segment, scale):
    return reference.segment_attention(q.double(), k.double(), v.double(), segment, scale)


CASES = {
    # query lengths, key lengths, causal, query heads, KV heads, head dimension
    "several blocks of keys": ([1, 1, 1], [64, 65, 200], False, 6, 2, 64),
    "several tiles of rows": ([2, 1], [70, 130], False, 8, 1, 64),
    "several tasks a row": ([100, 3], [100, 3], True, 4, 2, 32),
    "causal across blocks": ([70, 1, 139], [70, 90, 139], True, 2, 1, 16),
    "causal, blind queries in a tile": ([20, 5], [7, 5], True, 6, 2, 16),
    "a group of more heads than a task has rows": ([2, 1], [70, 5], True, 130, 1, 16),
    "odd head dimension": ([3, 1], [66, 5], False, 4, 2, 33),
    "least head dimension": ([3, 1], [66, 5], False, 2, 2, 1),
    "one more than a vector": ([2, 2], [66, 5], True, 4, 2, 17),
    "head dimension 80": ([1, 2], [130, 64], False, 5, 1, 80),
    "head dimension 256": ([1, 2], [130, 64], False, 2, 1, 256),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype, target):
    q_lens, k_lens, causal, Hq, Hkv, D = CASES[case]
    segment, arena = make_segment(q_lens, k_lens, causal)
    q, k, v = make_inputs(segment, arena, Hq, Hkv, D, dtype)
    state = SimdPlan([segment], target_of(target)).run(q, k, v, D**-0.5)
    assert_state(*state, *expected_state(q, k, v, segment, D**-0.5), dtype)


def test_large_scores():
    """Scores of hundreds, of both signs: their exponentials would overflow, were they not relative to the maximum."""
    segment, arena = make_segment([2, 1], [150, 70], False)
    q, k, v = make_inputs(segment, arena, 4, 2, 32, torch.float32)
    q *= 40
    state = SimdPlan([segment]).run(q, k, v, 1.0)
    expected_out, expected_lse = expected_state(q, k, v, segment, 1.0)
    assert expected_lse.max() > 200
    # An error of one rounding in a score of s is one of s * 2**-24 in its probability.
    torch.testing.assert_close(state[0].double(), expected_out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(state[1].double(), expected_lse, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_keys", [511, 512, 1100, 5000])
def test_keys_split_between_threads(num_keys, num_threads):
    """Rows too few to keep the threads busy, a causal mask in the last part; beside a long row one that ends before
    the last part begins."""
    segment, arena = make_segment([3, 1], [num_keys, 40], True)
    q, k, v = make_inputs(segment, arena, 3, 1, 16, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        parts = _Table([segment], 1, 3, num_threads).num_parts
        state = SimdPlan([segment]).run(q, k, v, 0.25)
    finally:
        torch.set_num_threads(before)
    assert parts == (1 if num_threads == 1 or num_keys < 1024 else min(num_keys // 512, 2 * num_threads))
    assert_state(*state, *expected_state(q, k, v, segment, 0.25), torch.float32)


def test_tasks_that_end_at_the_same_time_are_not_split():
    def parts(k_lens, num_kv_heads, num_threads):
        segment, _ = make_segment([1] * len(k_lens), k_lens, False)
        return _Table([segment], num_kv_heads, 3, num_threads).num_parts

    assert parts([5000, 5000], 1, 2) == parts([5000], 4, 2) == parts([5000, 4000, 900], 1, 2) == 1
    assert parts([5000], 3, 2) > 1 and parts([5000, 40], 1, 2) > 1 and parts([5000], 1, 2) > 1


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_keys", [40, 3000], ids=["whole", "in parts"])
@pytest.mark.parametrize("plain", [True, False], ids=["float32", "another dtype and layout"])
@pytest.mark.usefixtures("four_threads")
def test_merges_with_a_state(num_keys, plain):
    """As ``merge_states`` does; rows without keys on either side, or on both."""
    first, arena = make_segment([1, 1, 1, 1], [30, 30, 0, 0], False)
    second, _ = make_segment([1, 1, 1, 1], [num_keys, 0, 5, 0], False)
    q, k, v = make_inputs(first, max(arena, num_keys + 10), 6, 2, 24, torch.float32)
    state, other = (SimdPlan([s]).run(q, k, v, 0.2) for s in (first, second))
    assert _Table([second], 2, 3, torch.get_num_threads()).num_parts == (1 if num_keys == 40 else 2)
    expected = merge_states(*(x.clone() for x in (*state, *other)))
    if not plain:
        state = state[0].double().transpose(0, 1).contiguous().transpose(0, 1), state[1]
    out, lse = SimdPlan([second]).run(q, k, v, 0.2, state)
    torch.testing.assert_close(out.float(), expected[0], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, expected[1], atol=2e-6, rtol=2e-6)
    assert (lse[3] == float("-inf")).all() and (out[3] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_threads", [1, 4])
def test_keys_in_several_ranges(dtype, num_threads):
    """Segments of equal rows are one table: empty ranges, a causal one, ranges split between threads."""
    causal, arena = make_segment([3, 1, 2], [70, 1, 1400], True)
    ranges = [(np.array([5, 300, 0]), np.array([0, 17, 129])), (np.array([9, 9, 9]), np.array([1100, 0, 3]))]
    segments = [causal, *(Segment(causal.q_offsets, starts, lens) for starts, lens in ranges)]
    q, k, v = make_inputs(causal, arena, 6, 2, 24, dtype)
    expected = expected_state(q, k, v, causal, 0.2)
    for segment in segments[1:]:
        expected = reference.merge(*expected, *expected_state(q, k, v, segment, 0.2))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for order in (segments, segments[::-1]):
            assert_state(*SimdPlan(order).run(q, k, v, 0.2), *expected, dtype)
    finally:
        torch.set_num_threads(before)


def test_strided_inputs():
    """Queries inside a fused projection, arenas laid out head by head and token by token."""
    segment, arena = make_segment([3, 1], [66, 5], True)
    q, k, v = make_inputs(segment, arena, 4, 2, 16, torch.float32)
    expected = SimdPlan([segment]).run(q, k, v, 0.25)
    fused = torch.randn(q.shape[0], 9, 16)
    fused[:, 2:6] = q
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    spaced = torch.randn(q.shape[0], 4, 20)
    spaced[..., :16] = q
    for queries in (fused[:, 2:6], spaced[..., :16], q.transpose(0, 1).contiguous().transpose(0, 1)):
        out, lse = SimdPlan([segment]).run(queries, *by_head, 0.25)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=0)


def test_nothing_past_the_last_key_is_read():
    """A page that may not be read follows the arenas, in a process of its own: reading there would end it."""
    code = """
import ctypes, mmap
import numpy as np, torch
from kernels import Segment
from kernels.attention_simd import SimdPlan

def arena(num_keys, dtype):
    size = 4 * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    count = num_keys * 2 * 17
    flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=size - count * dtype.itemsize)
    return flat.fill_(0.5).view(2, num_keys, 17).transpose(0, 1)

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for num_keys in (1, 15, 63, 67):
        print(dtype, num_keys, flush=True)
        segment = Segment(np.array([0, 3]), np.array([0]), np.array([num_keys]), False)
        keys, values = arena(num_keys, dtype), arena(num_keys, dtype)
        out, _ = SimdPlan([segment]).run(torch.ones(3, 4, 17, dtype=dtype), keys, values, 0.25)
        torch.testing.assert_close(out, torch.full((3, 4, 17), 0.5))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended after {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
    assert len(done.stdout.splitlines()) == 12


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("where", ["key", "value", "query"])
def test_nan_shows(where, dtype):
    segment, arena = make_segment([1, 1], [70, 70], False)
    q, k, v = make_inputs(segment, arena, 2, 2, 16, dtype)
    damaged = {"key": k[segment.k_starts[1] + 3], "value": v[segment.k_starts[1] + 3], "query": q[1]}[where]
    damaged[1, 5] = float("nan")
    out, _ = SimdPlan([segment]).run(q, k, v, 0.25)
    is_nan = out.isnan().any(-1)
    assert is_nan.tolist() == [[False, False], [False, True]]


def test_a_row_does_not_depend_on_the_others():
    """Bit for bit, in a batch or alone: what a row computes is the same whichever tile or task it is in."""
    segment, arena = make_segment([1] * 9, [90 + row for row in range(9)], False)
    q, k, v = make_inputs(segment, arena, 6, 2, 32, torch.float32)
    out, lse = SimdPlan([segment]).run(q, k, v, 0.2)
    for row in (0, 4, 8):
        alone, _ = make_segment([1], [90 + row], False)
        alone = type(alone)(alone.q_offsets, segment.k_starts[row : row + 1], alone.k_lens, False)
        own = SimdPlan([alone]).run(q[row : row + 1], k, v, 0.2)
        assert torch.equal(own[0][0], out[row]) and torch.equal(own[1][0], lse[row])


def test_table_covers_every_query_and_key_once():
    segment, _ = make_segment([130, 0, 1, 7], [130, 5, 3000, 0], False)
    for num_threads in (1, 8):
        table = _Table([segment], 2, 3, num_threads)
        seen = np.zeros((2, segment.num_queries), dtype=np.int64)
        for query, num_queries, head, _, num_keys, *_ in table.tasks[:, 0].tolist():
            seen[head, query : query + num_queries] += num_keys
        expected = np.repeat(segment.k_lens, np.diff(segment.q_offsets))
        np.testing.assert_array_equal(seen, [expected, expected])
