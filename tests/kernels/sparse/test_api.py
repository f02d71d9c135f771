"""The functions over whole tensors, against attention written out."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.sparse import block_sparse_attention, streaming_forward, vertical_slash_sparse_attention

B, H, HKV, Q, N, D = 2, 4, 2, 150, 300, 32


@pytest.fixture
def qkv():
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, heads, length, D, generator=g) for heads, length in ((H, Q), (HKV, N), (HKV, N)))


def written_out(q, k, v, mask, scale=D**-0.5):
    """``mask (B, H, Q, N)`` or what broadcasts to it, without causality."""
    query = torch.arange(N - Q, N)[:, None]
    mask = mask & (torch.arange(N) <= query)
    k, v = (x.double().repeat_interleave(H // HKV, 1) for x in (k, v))
    scores = (q.double() @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def assert_result(result, expected):
    out, lse = result
    torch.testing.assert_close(out.double(), expected[0], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), expected[1], atol=5e-6, rtol=1e-5)
    assert lse.dtype == torch.float32 and out.shape == (B, H, Q, D) and lse.shape == (B, H, Q)


def test_vertical_slash_takes_indices(qkv):
    g = torch.Generator().manual_seed(1)
    verticals, slashes = torch.randint(N, (B, H, 9), generator=g), torch.randint(70, (B, H, 1), generator=g)
    verticals[..., 0] = verticals[..., 1]  # one comes twice
    query, key = torch.arange(N - Q, N)[:, None], torch.arange(N)
    mask = torch.zeros(B, H, Q, N, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            mask[b, h, :, verticals[b, h]] = True
            apart = query // 64 - key // 64
            for slash in (0, *slashes[b, h].tolist()):
                mask[b, h] |= (apart == slash // 64) | (apart == -(-slash // 64))
    found = vertical_slash_sparse_attention(*qkv, verticals, slashes, return_lse=True)
    assert_result(found, written_out(*qkv, mask))
    again = vertical_slash_sparse_attention(*qkv, verticals.int().flip(-1), slashes.int(), return_lse=True)
    assert_result(again, written_out(*qkv, mask))


def test_streaming(qkv):
    query, key = torch.arange(N - Q, N)[:, None], torch.arange(N)
    mask = (key < 5) | (query // 64 - key // 64 <= 1)
    assert_result(streaming_forward(*qkv, 5, 60, return_lse=True), written_out(*qkv, mask))


@pytest.mark.parametrize(
    "attend",
    [
        lambda *qkv, **more: vertical_slash_sparse_attention(*qkv, N, N, **more),
        lambda *qkv, **more: vertical_slash_sparse_attention(
            *qkv, torch.arange(N).expand(B, H, N), torch.empty(B, H, 0, dtype=torch.int64), **more
        ),
        lambda *qkv, **more: block_sparse_attention(*qkv, 9, **more),
        lambda *qkv, **more: streaming_forward(*qkv, 0, N, **more),
        lambda *qkv, **more: streaming_forward(*qkv, N, 1, **more),
    ],
    ids=["budgets", "indices", "blocks", "window", "sinks"],
)
class TestEverything:
    """Budgets that cover all keys give dense attention."""

    def test_is_dense(self, qkv, attend):
        all_keys = torch.ones(1, dtype=torch.bool)
        assert_result(attend(*qkv, return_lse=True), written_out(*qkv, all_keys))
        assert_result(attend(*qkv, scale=0.5, return_lse=True), written_out(*qkv, all_keys, 0.5))

    @pytest.mark.parametrize("layout", ["token-major", "v apart", "a part of a longer one", "last dimension strided"])
    def test_any_layout(self, qkv, attend, layout):
        q, k, v = qkv
        if layout == "token-major":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
        elif layout == "v apart":
            v = v.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "a part of a longer one":
            k, v = (F.pad(x, (0, 0, 3, 4))[:, :, 3 : 3 + N] for x in (k, v))
        else:
            q, k, v = (x.repeat_interleave(2, -1)[..., ::2] for x in qkv)
        expected = written_out(*qkv, torch.ones(1, dtype=torch.bool))
        assert_result(attend(q, k, v, return_lse=True), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(qkv, dtype):
    low = tuple(x.to(dtype) for x in qkv)
    out = streaming_forward(*low, 5, 60)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), streaming_forward(*(x.float() for x in low), 5, 60), atol=2e-2, rtol=2e-2)


def test_backends_agree(qkv):
    one, other = (block_sparse_attention(*qkv, 2, backend=name) for name in ("aten", "reference"))
    torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-6)


def test_names_come_from_kernels():
    assert kernels.vertical_slash_sparse_attention is vertical_slash_sparse_attention
    assert kernels.block_sparse_attention is block_sparse_attention
    assert kernels.streaming_forward is streaming_forward


def broken(**changes):
    sizes = {"q": (B, H, Q, D), "k": (B, HKV, N, D), "v": (B, HKV, N, D)} | changes
    return tuple(torch.zeros(size) for size in sizes.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (broken(q=(H, Q, D)), r"q \(4, 150, 32\), .*accepted: q \(B, H, Q, D\)"),
        (broken(v=(B, HKV, N, D + 1)), "accepted: q"),
        (broken(k=(B, 3, N, D), v=(B, 3, N, D)), "heads a multiple of KV heads"),
        (broken(q=(B, H, N + 1, D)), "no more queries than keys"),
        (broken(q=(B, H, 0, D)), "none of these 0"),
        (broken(q=(B, H, Q, 16)), "equal batch and head dimension"),
        ((*broken()[:2], broken()[2].double()), "accepted: one dtype, on one device"),
    ],
)
def test_tensors_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        streaming_forward(*arguments, 1, 1)


@pytest.mark.parametrize(
    ("v_idx", "s_idx", "message"),
    [
        (torch.zeros(B, H, 1), torch.zeros(B, H, 1).int(), r"v_idx is \(2, 4, 1\) torch.float32; accepted: integers"),
        (torch.zeros(B, 1, 1).int(), torch.zeros(B, H, 1).int(), r"v_idx is \(2, 1, 1\)"),
        (torch.zeros(B, H, 1).int(), 5, "s_idx is 5; accepted: integers"),
        (torch.zeros(B, H, 1).bool(), torch.zeros(B, H, 1).int(), r"v_idx is \(2, 4, 1\) torch.bool; accepted: int"),
        (torch.zeros(B, H, 1).cfloat(), torch.zeros(B, H, 1).int(), r"v_idx is \(2, 4, 1\) torch.complex64"),
        (True, True, "v_idx is True; accepted: integers"),
        (torch.full((B, H, 1), N), torch.zeros(B, H, 1).int(), "v_idx goes from 300 to 300; accepted: from 0 to 299"),
        (torch.zeros(B, H, 1).int(), torch.full((B, H, 1), -1), "s_idx goes from -1 to -1"),
        (-1, 4, "num_vertical is -1"),
    ],
)
def test_indices_that_do_not_fit(qkv, v_idx, s_idx, message):
    with pytest.raises(ValueError, match=message):
        vertical_slash_sparse_attention(*qkv, v_idx, s_idx)


def test_integers_and_gradients_are_refused(qkv):
    with pytest.raises(ValueError, match="q, k and v are torch.int32; accepted: floating-point numbers"):
        streaming_forward(*(x.int() for x in qkv), 1, 1)
    q, k, v = qkv
    with pytest.raises(ValueError, match="no gradients; accepted: inference"):
        block_sparse_attention(q, k.requires_grad_(), v, 1)
    with torch.no_grad():
        assert block_sparse_attention(q, k, v, 1).isfinite().all()
