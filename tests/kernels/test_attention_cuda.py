"""The CUDA adapter: without a GPU on a stand-in that has FlashAttention-2's conventions, with one in the far arena."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import AttentionPlan, Backend, Segment, attention_cuda, reference
from kernels.attention_cuda import CudaSegment

CPU = torch.device("cpu")


def flash(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale, seqused_k):
    """``aten::_flash_attention_forward`` on packed rows: what it refuses, what it reads, and what it returns."""
    for table, rows in ((cum_seq_q, len(seqused_k) + 1), (cum_seq_k, len(seqused_k) + 1), (seqused_k, len(seqused_k))):
        assert table.dtype == torch.int32 and table.is_contiguous() and table.shape == (rows,)
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and dropout_p == 0 and not return_debug_mask
    # Beyond these its grid ends, and outputs stay as they were allocated.
    assert int(cum_seq_q.diff().max()) == max_q and int(seqused_k.max()) == max_k
    # It then swaps query heads and queries, for which some builds store the lse in another order.
    assert max_q > 1 or q.shape[1] == k.shape[1]
    segment = Segment(cum_seq_q.long().numpy(), cum_seq_k[:-1].long().numpy(), seqused_k.long().numpy(), is_causal)
    out, lse = reference.segment_attention(q, k, v, segment, scale)
    lse = lse.T.contiguous()
    return out, torch.where(lse == float("-inf"), float("inf"), lse), None, None, None


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(attention_cuda, "_flash", flash)


def inputs(num_queries: int, num_slots: int, Hq: int, Hkv: int, D: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values laid out as the engine has them: a view of a fused projection, head-major arenas."""
    generator = torch.Generator().manual_seed(num_queries)
    qkv = torch.randn(num_queries, Hq + 2 * Hkv, D, generator=generator)
    k, v = (torch.randn(Hkv, num_slots, D, generator=generator).transpose(0, 1) for _ in range(2))
    return qkv.split((Hq, Hkv, Hkv), dim=1)[0], k, v


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 20)), min_size=1, max_size=6),
    causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]),
)
def test_any_rows(rows, causal, heads):
    """Rows may have no queries or no keys, lie anywhere in the arena and overlap."""
    q_lens, k_lens, k_starts = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    segment = Segment(np.append(0, np.cumsum(q_lens)), k_starts, k_lens, causal)
    q, k, v = inputs(segment.num_queries, 32, *heads, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cuda, "_flash", flash)
        planned = CudaSegment(segment, CPU)
        for _ in range(2):  # a plan serves every layer
            out, lse = planned.run(q, k, v, 0.5)
    expected_out, expected_lse = reference.segment_attention(q, k, v, segment, 0.5)
    assert lse.is_contiguous()
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_nan_shows_where_queries_without_keys_do_not(stand_in):
    segment = Segment(np.array([0, 1, 2]), np.array([0, 4]), np.array([0, 2]))
    q, k, v = inputs(2, 8, 2, 1, 8)
    k[5] = float("nan")
    out, lse = CudaSegment(segment, CPU).run(q, k, v, 0.5)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all()
    assert out[1].isnan().all() and not lse[1].isfinite().any()


@pytest.mark.parametrize("head_dim", [4, 20, 264])
def test_head_dimensions_that_the_kernel_lacks(head_dim):
    segment = Segment(np.array([0, 1]), np.array([0]), np.array([1]))
    with pytest.raises(ValueError, match=f"the head dimension is {head_dim}; accepted: multiples of 8 up to 256"):
        CudaSegment(segment, CPU).run(*inputs(1, 2, 2, 1, head_dim), 0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda out, lse: (out, lse[None]),  # (1, heads, queries), as of the padded layout of old versions
        lambda out, lse: (out, lse.T),
        lambda out, lse: (out, lse.T.contiguous().T),  # of the right shape, stored the other way round
        lambda out, lse: (out, lse.double()),
        lambda out, lse: (out[:1], lse),
    ],
)
def test_another_layout_of_the_result_is_refused(monkeypatch, change):
    monkeypatch.setattr(attention_cuda, "_flash", lambda *args, **options: change(*flash(*args, **options)[:2]))
    segment = Segment(np.array([0, 2, 3]), np.array([0, 3]), np.array([3, 2]))
    with pytest.raises(RuntimeError, match="flash attention returned .* this version is not supported"):
        CudaSegment(segment, CPU).run(*inputs(3, 8, 4, 2, 8), 0.5)


def test_queries_that_no_row_covers_are_refused(stand_in):
    segment = Segment(np.array([0, 1]), np.array([0]), np.array([1]))
    with pytest.raises(AssertionError, match="2 queries for a segment of 1"):
        CudaSegment(segment, CPU).run(*inputs(2, 2, 2, 1, 8), 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [Backend.ATEN, Backend.TRITON], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_beyond_32_bits(causal, backend):
    """Keys whose offset in the arena, in elements, passes 2^31 for the last head, and 2^32 in bytes for the first."""
    Hkv, D, dtype = 2, 128, torch.bfloat16
    num_slots = 2**32 // (2 * D) + 4096
    needed = 2 * Hkv * num_slots * D * dtype.itemsize
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"needs {1.2 * needed / 2**30:.0f} GiB of free device memory")
    arenas = [torch.zeros(Hkv, num_slots, D, dtype=dtype, device="cuda").transpose(0, 1) for _ in range(2)]
    starts, lens = np.array([num_slots - 900, 5, num_slots - 300]), np.array([600, 7, 300])
    q_offsets = np.array([0, 3, 4, 6])
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn(907, Hkv, D, generator=generator).to(dtype) for _ in range(2)]
    slots = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lens, strict=True)])
    for arena, values in zip(arenas, small, strict=True):
        arena.index_copy_(0, torch.from_numpy(slots).cuda(), values.cuda())  # as the cache is written
    q = torch.randn(6, 4, D, generator=generator).to(dtype)
    plan = AttentionPlan.of([Segment(q_offsets, starts, lens, causal)], torch.device("cuda"), dtype, backend)
    out, lse = plan.run_state(q.cuda(), *arenas, D**-0.5)
    near = Segment(q_offsets, np.array([0, 600, 607]), lens, causal)
    expected_out, expected_lse = reference.segment_attention(
        q.double(), small[0].double(), small[1].double(), near, D**-0.5
    )
    torch.testing.assert_close(out.double().cpu(), expected_out, atol=1.6e-2, rtol=1.6e-2)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=4e-3, rtol=1e-5)
