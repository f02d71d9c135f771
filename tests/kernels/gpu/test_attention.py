"""Triton's attention against the float64 reference: by Triton's interpreter, or on a GPU where there is one."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import assert_state, make_inputs, make_segment

from kernels import Segment, reference

pytest.importorskip("triton", reason="Triton is for Linux")
from kernels.gpu.attention import LaidOut, TritonPlan, cut_head_dim, num_processors
from kernels.gpu.attention_items import HeadShape, Item, Tile, choose_tile, lay_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def check(segment, inputs, scale=None, expected=None):
    q, k, v = inputs
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if expected is None:
        expected = reference.segment_attention(q.double(), k.double(), v.double(), segment, scale)
    out, lse = TritonPlan([segment], DEVICE).run(*(x.to(DEVICE) for x in inputs), scale)
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


HEADS = [(1, 1), (8, 1), (12, 4), (5, 5), (71, 1)]
HEAD_DIMS = [16, 32, 40, 64, 80, 96, 112, 128, 160, 256]


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    # Each is a kernel to be compiled for a GPU, which takes its time: there not every pair.
    list(product(HEADS, HEAD_DIMS) if DEVICE.type == "cpu" else zip(HEADS * 2, HEAD_DIMS, strict=True)),
    ids=str,
)
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
    out, lse = TritonPlan([segment], DEVICE).run(
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
    out, lse = TritonPlan([segment], DEVICE).run(q, k, v, 0.25)
    assert out[0].isfinite().all() and lse[0].isfinite().all() and out[1].isnan().all() and lse[1].isnan().all()


def test_strides_as_the_engine_has_them():
    """Queries are a view of a fused projection, arenas are head-major."""
    segment, arena = make_segment([2, 3], [40, 9], True)
    q, k, v = make_inputs(segment, arena, 6, 2, 32, torch.float16)
    fused = torch.cat([q, torch.full((5, 4, 32), float("nan"), dtype=q.dtype)], 1)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    check(segment, (fused[:, :6], k, v))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 600.0])
def test_scores_of_any_size(scale):
    """Log-sum-exps from about 0 to beyond 10,000 of either sign."""
    segment, arena = make_segment([3], [50], False)
    inputs = make_inputs(segment, arena, 2, 2, 32, torch.float32)
    expected = reference.segment_attention(*(x.double() for x in inputs), segment, scale)
    out, lse = TritonPlan([segment], DEVICE).run(*(x.to(DEVICE) for x in inputs), scale)
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


def layout_of(segments, heads, head_dim=16, dtype=torch.float32, fixed=False):
    return lay_out(segments, HeadShape(*heads, head_dim, dtype), 8, fixed)


class TestSplitKeys:
    def num_parts(self, q_lens, k_lens, heads):
        segment, _ = make_segment(q_lens, k_lens, True)
        layout, items = layout_of([segment], heads)
        assert sum(launch.num_items for launch in layout.launches) == len(items)
        return max(1, layout.num_planes)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_few_queries_have_their_keys_split(self, dtype):
        segment, arena = make_segment([1, 2], [3000, 100], True)
        assert layout_of([segment], (4, 2))[0].num_planes > 1
        check(segment, make_inputs(segment, arena, 4, 2, 32, dtype))

    def test_enough_tiles_do_not(self):
        assert self.num_parts([1] * 2000, [300] * 2000, (2, 2)) == 1
        assert self.num_parts([1], [300], (2, 2)) == 1, "too few keys"
        assert self.num_parts([1], [100_000], (1, 1)) >= 16

    def test_rows_shorter_than_a_part(self):
        segment, arena = make_segment([1] * 3, [2000, 0, 1], False)
        check(segment, make_inputs(segment, arena, 2, 1, 16, torch.float32))

    def test_a_short_row_is_not_cut_as_a_long_one_is(self):
        segment, _ = make_segment([1, 1], [2000, 256], False)
        _, items = layout_of([segment], (1, 1))
        assert sorted(items[items[:, Item.KEY] == segment.k_starts[1], Item.NUM_KEYS]) == [256]


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
        for order in (parts, parts[::-1]):
            out, lse = TritonPlan(order, DEVICE).run(*(x.to(DEVICE) for x in (q, k, v)), 0.2)
            assert out.dtype == dtype
            assert_state(out, lse, *expected, dtype)

    def test_that_are_empty_give_the_empty_state(self):
        empty, arena = make_segment([2], [0], False)
        inputs = [x.to(DEVICE) for x in make_inputs(empty, arena, 2, 1, 16, torch.float32)]
        out, lse = TritonPlan([empty] * 3, DEVICE).run(*inputs, 1.0)
        assert (out == 0).all() and (lse == float("-inf")).all()


def decode_segments(num_queries, prefix, own_lens, rooms=None):
    """Two levels of shared nodes, the second of some sequences only, and own keys: segments, queries, keys, values."""
    own, arena = make_segment([1] * num_queries, own_lens, True, rooms)
    level = Segment(np.array([0, num_queries]), np.array([arena]), np.array([prefix]))
    half = num_queries // 2
    second = Segment(np.array([0, half, num_queries]), np.array([arena + prefix, 0]), np.array([7, 0]))
    return [own, level, second], arena + prefix + 9


def expected_of(segments, q, k, v, scale):
    state = reference.segment_attention(q.double(), k.double(), v.double(), segments[0], scale)
    for segment in segments[1:]:
        other = reference.segment_attention(q.double(), k.double(), v.double(), segment, scale)
        state = reference.merge(*state, *other)
    return state


class TestADecodeStep:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("head_dim", [32, 80])
    def test_is_two_launches(self, dtype, head_dim):
        own_lens = [3, 0, 40, 17, 1, 64, 65, 2, 0, 33, 5, 8]
        segments, arena = decode_segments(12, 70, own_lens)
        segments = [*segments, Segment(np.array([0, 12]), np.array([0]), np.array([0]))]  # a level without keys
        layout, _ = layout_of(segments, (8, 2), head_dim, dtype)
        if dtype == torch.float32 and head_dim == 80:  # has small tiles alone
            assert len(layout.launches) == 1 and layout.merges_last
        else:
            assert [launch.merges for launch in layout.launches] == [False, True] and not layout.merges_last
        q, k, v = make_inputs(segments[0], arena, 8, 2, head_dim, dtype)
        out, lse = TritonPlan(segments, DEVICE).run(*(x.to(DEVICE) for x in (q, k, v)), 0.2)
        assert_state(out, lse, *expected_of(segments, q, k, v, 0.2), dtype)

    def test_without_any_key_is_the_empty_state(self):
        segments, arena = decode_segments(12, 0, [0] * 12)
        segments = segments[:2]
        q, k, v = (x.to(DEVICE) for x in make_inputs(segments[0], arena, 8, 2, 32, torch.float32))
        assert layout_of(segments, (8, 2), 32)[0].launches[-1].merges
        out, lse = TritonPlan(segments, DEVICE).run(q, k, v, 0.2)
        assert (out == 0).all() and (lse == float("-inf")).all()

    def test_nan_in_a_shared_key_shows_in_all_that_read_it(self):
        segments, arena = decode_segments(12, 70, [5] * 12)
        q, k, v = (x.to(DEVICE) for x in make_inputs(segments[0], arena, 8, 2, 32, torch.float32))
        k[segments[2].k_starts[0] + 1] = float("nan")
        out, lse = TritonPlan(segments, DEVICE).run(q, k, v, 0.2)
        assert out[:6].isnan().all() and lse[:6].isnan().all()
        assert out[6:].isfinite().all() and lse[6:].isfinite().all()

    def test_many_planes_are_merged_by_a_launch_of_their_own(self):
        segments, arena = decode_segments(12, 2700, [5] * 12)
        layout, _ = layout_of(segments, (8, 1), 32, torch.float16)
        assert layout.num_planes > 9 and layout.merges_last and not any(launch.merges for launch in layout.launches)
        q, k, v = make_inputs(segments[0], arena, 8, 1, 32, torch.float16)
        out, lse = TritonPlan(segments, DEVICE).run(*(x.to(DEVICE) for x in (q, k, v)), 0.2)
        assert_state(out, lse, *expected_of(segments, q, k, v, 0.2), torch.float16)

    def test_keys_of_few_sequences_are_split_and_merged_at_the_end(self):
        segments, arena = decode_segments(2, 600, [520, 3])
        layout, _ = layout_of(segments, (2, 1))
        assert len(layout.launches) == 1 and layout.merges_last
        q, k, v = make_inputs(segments[0], arena, 2, 1, 16, torch.float32)
        out, lse = TritonPlan(segments, DEVICE).run(*(x.to(DEVICE) for x in (q, k, v)), 0.2)
        assert_state(out, lse, *expected_of(segments, q, k, v, 0.2), torch.float32)


class TestAFixedLayout:
    """What a CUDA graph is captured for."""

    def test_outlasts_any_change_of_lengths_within_its_rooms(self):
        def layout(own_lens, prefix, num_queries=12):
            segments, _ = decode_segments(num_queries, prefix, own_lens, rooms=[1000] * num_queries)
            return layout_of(segments, (8, 2), 64, torch.bfloat16, fixed=True)[0]

        first = layout([1] * 12, 513)
        assert layout(list(range(12)), 513) == layout([1000] * 12, 1024) == layout([0] * 12, 600) == first
        assert layout([1] * 12, 1025) != first, "a longer node is split into more parts"

    def test_rows_that_come_and_go_within_a_power_of_two_change_nothing(self):
        def layout(q_lens):
            segment, _ = make_segment(q_lens, [300] * len(q_lens), False)
            return layout_of([segment], (8, 2), 64, torch.bfloat16, fixed=True)[0].launches

        assert layout([50, 50, 60]) == layout([60, 40, 30, 30]), "8 tiles at most"

    def test_items_that_are_left_over_do_nothing(self):
        segments, arena = decode_segments(11, 70, [3] * 11)
        q, k, v = make_inputs(segments[0], arena, 8, 2, 32, torch.float32)
        heads = HeadShape(8, 2, 32, torch.float32)
        layouts = [lay_out(segments, heads, 8, fixed) for fixed in (False, True)]
        exact, padded = (LaidOut(layout, torch.from_numpy(items).to(DEVICE)) for layout, items in layouts)
        assert len(padded.items) > len(exact.items)
        states = [laid_out.run(*(x.to(DEVICE) for x in (q, k, v)), 0.2) for laid_out in (exact, padded)]
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


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
            TritonPlan([segment], DEVICE).run(
                *(x.to(DEVICE) for x in make_inputs(segment, arena, 2, 1, head_dim, dtype)), 1.0
            )

    def test_a_scale_that_turns_the_order_of_scores(self):
        segment, arena = make_segment([1], [3], False)
        with pytest.raises(ValueError, match="the scale is -0.5; accepted: above 0"):
            TritonPlan([segment], DEVICE).run(
                *(x.to(DEVICE) for x in make_inputs(segment, arena, 2, 1, 16, torch.float32)), -0.5
            )

    def test_keys_of_another_dtype(self):
        segment, arena = make_segment([1], [3], False)
        q, k, v = (x.to(DEVICE) for x in make_inputs(segment, arena, 2, 1, 16, torch.float32))
        with pytest.raises(ValueError, match="queries are torch.float32, keys torch.float16"):
            TritonPlan([segment], DEVICE).run(q, k.half(), v.half(), 1.0)


def test_tiles():
    assert [cut_head_dim(d) for d in (8, 16, 32, 40, 64, 80, 96, 112, 120, 128, 160, 192, 256)] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0), (128, 0), (128, 0), (128, 32),
        (128, 64), (256, 0),
    ]  # fmt: skip
    assert choose_tile(torch.bfloat16, 128, 1) == Tile(16, 64, 4, 3)
    assert choose_tile(torch.bfloat16, 128, 10_000) == Tile(128, 64, 8, 3)
    assert num_processors(torch.device("cpu")) == 8
