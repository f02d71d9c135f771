"""A windowed segment as several without a window, against a dense mask in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Segment
from kernels.reference import segment_attention
from kernels.window import within_window

Hq, Hkv, D = 4, 2, 8


def visible(segment, q_positions, window):
    """(T, S) bool, from the definition."""
    num_keys = int((segment.k_starts + segment.k_lens).max(initial=0))
    mask = torch.zeros(segment.num_queries, num_keys, dtype=torch.bool)
    for row in range(segment.num_rows):
        begin, end = segment.q_offsets[row : row + 2].tolist()
        start, length = int(segment.k_starts[row]), int(segment.k_lens[row])
        keys = np.arange(length)
        for query in range(begin, end):
            seen = segment.k_positions[row] + keys > q_positions[query] - window
            if segment.causal:
                seen &= keys < length - (end - 1 - query)
            mask[query, start : start + length] = torch.from_numpy(seen)
    return mask


def dense(q, k, v, mask):
    group = Hq // Hkv
    scores = torch.einsum("qhd,khd->qhk", q, k.repeat_interleave(group, 1)) * 0.3
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    probs = (scores - lse.masked_fill(lse.isinf(), 0)[..., None]).exp()
    return torch.einsum("qhk,khd->qhd", probs, v.repeat_interleave(group, 1)), lse


def check(segment, q_positions, window):
    generator = torch.Generator().manual_seed(0)
    mask = visible(segment, q_positions, window)
    q = torch.randn(segment.num_queries, Hq, D, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, mask.shape[1], Hkv, D, generator=generator, dtype=torch.float64)
    expected = dense(q, k, v, mask)
    parts = within_window(segment, q_positions, window)
    outs, lses = map(torch.stack, zip(*[segment_attention(q, k, v, part, 0.3) for part in parts], strict=True))
    lse = lses.logsumexp(0)
    out = ((lses - lse.masked_fill(lse.isinf(), 0)).exp()[..., None] * outs).sum(0)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
    return parts


def own(num_new, histories):
    """Runs of new tokens, each after some of its own: keys from position 3 on."""
    num_new, histories = np.array(num_new), np.array(histories)
    lens = num_new + histories
    offsets = np.concatenate([[0], np.cumsum(num_new)])
    starts = np.cumsum(lens) - lens
    positions = np.concatenate([np.arange(n) + h + 3 for n, h in zip(num_new, histories, strict=True)])
    return Segment(offsets, starts, lens, True, lens, np.full(len(lens), 3)), positions


@pytest.mark.parametrize("window", [1, 2, 7, 63, 64, 65, 130, 200, 1000])
def test_causal(window):
    check(*own([200, 1, 0, 70], [0, 150, 4, 80]), window)


@pytest.mark.parametrize("window", [1, 5, 40, 100])
def test_shared(window):
    """Queries of several sequences, at positions of their own, over nodes; one row has no keys, one no queries."""
    offsets = np.array([0, 130, 131, 131, 140])
    segment = Segment(offsets, np.array([0, 0, 50, 20]), np.array([60, 0, 10, 30]), k_positions=np.array([10, 0, 0, 2]))
    check(segment, np.random.default_rng(0).integers(30, 90, 140), window)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=4),
    st.integers(1, 30),
    st.booleans(),
)
def test_any(runs, window, causal):
    segment, positions = own(*zip(*runs, strict=True))
    check(Segment(*[getattr(segment, n) for n in ("q_offsets", "k_starts", "k_lens")], causal, None,
                  segment.k_positions), positions, window)  # fmt: skip


def test_a_window_that_nothing_feels_changes_nothing():
    segment, positions = own([5, 1], [3, 9])
    (part,) = within_window(segment, positions, 10)
    assert part is segment
    part, *_ = within_window(segment, positions, 9)
    assert part is not segment


def test_few_keys_lie_outside_the_shared_rows():
    """A decode step of sequences of one length reads each key once; one of unlike lengths each but the edge."""
    segment = Segment(np.array([0, 8]), np.array([0]), np.array([100]), k_positions=np.array([0]))
    (alike,) = check(segment, np.full(8, 110), 50)
    assert (alike.k_starts[0], alike.k_lens[0]) == (61, 39) and alike.num_rows == 1
    shared, single = check(segment, 110 + np.arange(8), 50)
    assert (shared.k_starts[0], shared.k_lens[0]) == (68, 32)
    assert single.k_lens.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
