"""Triton's attention against the float64 reference: by Triton's interpreter, or on a GPU where there is one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import assert_state, make_inputs, make_segment

from kernels import Segment, reference

pytest.importorskip("triton", reason="Triton is for Linux")
from kernels.gpu import attention
from kernels.gpu.attention import Tile, TritonSegment, choose_tile, cut_head_dim, run_merged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def check(segment, inputs, scale=None, expected=None):
    q, k, v = inputs
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if expected is None:
        expected = reference.segment_attention(q.double(), k.double(), v.double(), segment, scale)
    out, lse = TritonSegment(segment, DEVICE).run(*(x.to(DEVICE) for x in inputs), scale)
    assert out.dtype == q.dtype and lse.is_contiguous()
    assert_state(out, lse, *expected, q.dtype)


CASES = {
    "one shared prefix": ([12], [37], False),
    "ragged decode rows": ([1] * 6, [9, 3, 12, 1, 7, 7], False),
    "empty rows": ([1, 1, 2, 0, 1], [0, 5, 0, 4, 3], False),
    "all empty": ([2, 1], [0, 0], False),
    "uneven groups": ([3, 1, 27], [5, 11, 2], False),
    "causal prefill": ([37, 7], [37, 7], True),
    "causal after a history": ([3, 4, 1], [70, 4, 6], True),
    "causal, more queries than keys": ([5, 20], [3, 2], True),
    "causal, one query each": ([1, 1, 1], [4, 0, 4], True),
    "causal with empty rows": ([2, 0, 3], [0, 3, 8], True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, dtype):
    segment, arena = make_segment(*CASES[case])
    check(segment, make_inputs(segment, arena, 6, 2, 64, dtype))


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (12, 4), (5, 5), (71, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 80, 96, 112, 128, 160, 256])
def test_head_shapes(heads, head_dim):
    for causal in (False, True):
        segment, arena = make_segment([2, 1, 3], [6, 1, 9], causal)
        check(segment, make_inputs(segment, arena, *heads, head_dim, torch.float16))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_lengths_around_those_of_blocks(length):
    for q_lens, causal in (([length], True), ([3, length], False)):
        segment, arena = make_segment(q_lens, [length] * len(q_lens), causal)
        check(segment, make_inputs(segment, arena, 4, 2, 32, torch.float16))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=5),
    causal=st.booleans(),
    shuffle=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
)
def test_any_rows(rows, causal, shuffle, heads):
    q_lens, k_lens = zip(*rows, strict=True)
    segment, arena = make_segment(q_lens, k_lens, causal, shuffle=shuffle)
    check(segment, make_inputs(segment, arena, *heads, 16, torch.float32))


def test_no_queries():
    segment, arena = make_segment([0, 0], [3, 4], False)
    out, lse = TritonSegment(segment, DEVICE).run(
        *(x.to(DEVICE) for x in make_inputs(segment, arena, 4, 2, 16, torch.float32)), 0.25
    )
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_keys_that_no_row_names_are_not_read():
    segment, arena = make_segment([1, 9, 0, 2], [70, 3, 5, 0], False)
    q, k, v = make_inputs(segment, arena, 4, 2, 16, torch.float32)
    expected = reference.segment_attention(q.double(), k.double(), v.double(), segment, 0.25)
    named = torch.zeros(arena, dtype=torch.bool)
    for start, length in zip(segment.k_starts[:2], segment.k_lens[:2], strict=True):
        named[start : start + length] = True
    k[~named], v[~named] = float("nan"), float("nan")
    check(segment, (q, k, v), expected=expected)


def test_nan_in_a_key_that_is_read_shows():
    segment, arena = make_segment([1, 1], [9, 9], False)
    q, k, v = (x.to(DEVICE) for x in make_inputs(segment, arena, 2, 1, 16, torch.float32))
    k[segment.k_starts[1] + 4] = float("nan")
    out, lse = TritonSegment(segment, DEVICE).run(q, k, v, 0.25)
    assert out[0].isfinite().all() and lse[0].isfinite().all() and out[1].isnan().all() and lse[1].isnan().all()


def test_strides_as_the_engine_has_them():
    """Queries are a view of a fused projection, arenas are head-major."""
    segment, arena = make_segment([2, 3], [40, 9], True)
    q, k, v = make_inputs(segment, arena, 6, 2, 32, torch.float16)
    fused = torch.cat([q, torch.full((5, 4, 32), float("nan"), dtype=q.dtype)], 1)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    check(segment, (fused[:, :6], k, v))
    every_other = torch.stack([q, q], 3).flatten(2)[:, :, ::2]
    check(segment, (every_other, k, v))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 600.0])
def test_scores_of_any_size(scale):
    """Log-sum-exps from about 0 to beyond 10,000 of either sign."""
    segment, arena = make_segment([3], [50], False)
    inputs = make_inputs(segment, arena, 2, 2, 32, torch.float32)
    expected = reference.segment_attention(*(x.double() for x in inputs), segment, scale)
    out, lse = TritonSegment(segment, DEVICE).run(*(x.to(DEVICE) for x in inputs), scale)
    torch.testing.assert_close(lse.double().cpu(), expected[1], atol=5e-6, rtol=2e-6)
    # A score's rounding is relative to its size, and a probability's to the score's.
    error = 2e-6 * max(1.0, scale * 32)
    torch.testing.assert_close(out.double().cpu(), expected[0], atol=error, rtol=error)


@pytest.mark.slow  # ten seconds in the interpreter
def test_200_thousand_keys_of_one_query():
    segment, arena = make_segment([1], [200_000], True)
    check(segment, make_inputs(segment, arena, 2, 1, 16, torch.float32))


@pytest.mark.slow  # a minute in the interpreter
def test_4096_rows():
    lens = np.random.default_rng(0).integers(0, 9, 4096)
    segment, arena = make_segment([1] * 4096, lens, True)
    check(segment, make_inputs(segment, arena, 2, 1, 16, torch.float32))


class TestSplitKeys:
    def num_parts(self, q_lens, k_lens, heads):
        segment, arena = make_segment(q_lens, k_lens, True)
        q, *_ = make_inputs(segment, arena, *heads, 16, torch.float32)
        return TritonSegment(segment, DEVICE).launch(q.to(DEVICE), heads[1]).num_parts

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_few_queries_have_their_keys_split(self, dtype):
        segment, arena = make_segment([1, 2], [3000, 100], True)
        inputs = make_inputs(segment, arena, 4, 2, 32, dtype)
        assert TritonSegment(segment, DEVICE).launch(inputs[0].to(DEVICE), 2).num_parts > 1
        check(segment, inputs)

    def test_enough_tiles_do_not(self):
        assert self.num_parts([1] * 2000, [300] * 2000, (2, 2)) == 1
        assert self.num_parts([1], [300], (2, 2)) == 1, "too few keys"
        assert self.num_parts([1], [100_000], (1, 1)) >= 16

    def test_rows_shorter_than_a_part(self):
        segment, arena = make_segment([1] * 3, [2000, 0, 1], False)
        check(segment, make_inputs(segment, arena, 2, 1, 16, torch.float32))


class TestSeveralSegments:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_are_merged_into_the_attention_over_all_keys(self, dtype):
        whole, arena = make_segment([1] * 4, [700] * 4, False)
        q, k, v = make_inputs(whole, arena, 4, 2, 32, dtype)
        borders = [0, 0, 130, 131, 700]
        parts = [
            Segment(whole.q_offsets, whole.k_starts + first, np.full(4, last - first))
            for first, last in zip(borders, borders[1:], strict=False)
        ]
        expected = reference.segment_attention(q.double(), k.double(), v.double(), whole, 0.2)
        segments = [TritonSegment(part, DEVICE) for part in parts]
        for order in (segments, segments[::-1]):
            out, lse = run_merged(order, *(x.to(DEVICE) for x in (q, k, v)), 0.2)
            assert out.dtype == dtype
            assert_state(out, lse, *expected, dtype)

    def test_that_are_empty_give_the_empty_state(self):
        empty, arena = make_segment([2], [0], False)
        inputs = [x.to(DEVICE) for x in make_inputs(empty, arena, 2, 1, 16, torch.float32)]
        out, lse = run_merged([TritonSegment(empty, DEVICE)] * 3, *inputs, 1.0)
        assert (out == 0).all() and (lse == float("-inf")).all()


class TestWhatIsNotSupported:
    @pytest.mark.parametrize(
        ("dtype", "head_dim", "message"),
        [
            (torch.float64, 16, "queries are torch.float64, keys torch.float64; accepted: both the same of"),
            (torch.float16, 264, "the head dimension is 264; accepted: up to 256; use the reference backend"),
        ],
    )
    def test_is_refused(self, dtype, head_dim, message):
        segment, arena = make_segment([1], [3], False)
        with pytest.raises(ValueError, match=message):
            TritonSegment(segment, DEVICE).run(
                *(x.to(DEVICE) for x in make_inputs(segment, arena, 2, 1, head_dim, dtype)), 1.0
            )

    def test_keys_of_another_dtype(self):
        segment, arena = make_segment([1], [3], False)
        q, k, v = (x.to(DEVICE) for x in make_inputs(segment, arena, 2, 1, 16, torch.float32))
        with pytest.raises(ValueError, match="queries are torch.float32, keys torch.float16"):
            TritonSegment(segment, DEVICE).run(q, k.half(), v.half(), 1.0)


def test_tiles():
    assert [cut_head_dim(d) for d in (8, 16, 32, 40, 64, 80, 96, 112, 120, 128, 160, 192, 256)] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0), (128, 0), (128, 0), (128, 32),
        (128, 64), (256, 0),
    ]  # fmt: skip
    assert choose_tile(torch.bfloat16, 128, 1) == Tile(16, 64, 4, 3)
    assert choose_tile(torch.bfloat16, 128, 10_000) == Tile(128, 64, 8, 3)
    assert attention._num_processors(torch.device("cpu")) == 8
