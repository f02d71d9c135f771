"""A decode step of a shared prefix and own keys, where sizes and numbers are extreme: every backend that runs here,
against float64."""

import numpy as np
import pytest
import torch
from segments import TOLERANCE, assert_state, make_inputs

from kernels import AttentionPlan, Backend, Segment, available_backends, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if torch.cuda.is_available() else torch.float32
BACKENDS = available_backends(DEVICE, DTYPE)
FAST = [backend for backend in BACKENDS if backend not in (Backend.REFERENCE, Backend.TRITON)]
# Triton's interpreter takes a millisecond for what a GPU does in a microsecond.
MANY = [*FAST, pytest.param(Backend.TRITON, marks=() if torch.cuda.is_available() else pytest.mark.slow)]


def decode_step(prefix: int, own_lens) -> tuple[list[Segment], int]:
    """Own keys, then the prefix's: segments, and the arena's size."""
    own_lens, rows = np.asarray(own_lens, dtype=np.int64), len(own_lens)
    own = Segment(np.arange(rows + 1), prefix + np.cumsum(own_lens) - own_lens, own_lens, True)
    level = Segment(np.array([0, rows]), np.array([0]), np.array([prefix]))
    return [own, level], prefix + int(own_lens.sum())


def expected_state(segments, q, k, v, scale):
    states = [reference.segment_attention(q.double(), k.double(), v.double(), s, scale) for s in segments]
    return states[0] if len(states) == 1 else reference.merge(*states[0], *states[1])


def run(segments, inputs, scale, backend, dtype=DTYPE):
    plan = AttentionPlan.of(segments, DEVICE, dtype, backend)
    return plan.run_state(*(x.to(DEVICE) for x in inputs), scale)


def check(segments, arena, backend, heads=(4, 2, 32)):
    inputs = make_inputs(segments[0], arena, *heads, DTYPE)
    scale = heads[2] ** -0.5
    assert_state(*run(segments, inputs, scale, backend), *expected_state(segments, *inputs, scale), DTYPE)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(
    ("prefix", "own_lens"),
    [
        (0, [5, 1, 3]), (7, [0, 0, 0]), (0, [0, 0]), (7, [0, 4, 0]), (1, [1]), (0, [1]), (1, [0]),
        *((n, [n]) for n in (63, 64, 65, 127, 128, 129)), (128, [63, 64, 65, 127, 128, 129]),
    ],
    ids=str,
)  # fmt: skip
def test_lengths(prefix, own_lens, backend):
    segments, arena = decode_step(prefix, own_lens)
    check(segments, arena + 1, backend)  # an arena has a slot at least


@pytest.mark.parametrize("backend", MANY, ids=str)
@pytest.mark.parametrize(
    ("prefix", "own_lens"), [(200_000, [3]), (5, [200_000]), (9, [3] * 4096), (0, [1] * 4096)],
    ids=["200K shared keys", "200K own keys", "4096 sequences", "4096 sequences that share nothing"],
)  # fmt: skip
def test_many_keys_and_many_sequences(prefix, own_lens, backend):
    segments, arena = decode_step(prefix, own_lens)
    check(segments, arena, backend, heads=(2, 1, 16))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("target", [1e4, -1e4])
def test_log_sums_of_large_size(target, backend):
    """Every score of a row is near ``target``: exponentials of it do not exist, differences from it do."""
    segments, arena = decode_step(70, [66, 3])
    q, k, v = make_inputs(segments[0], arena, 4, 2, 32, torch.float32)
    q, k = (q * 0).contiguous(), (k * 0.01).contiguous()
    q[..., 0], k[..., 0] = 100.0, target / 100.0
    if DTYPE != torch.float32:
        q, k, v = (x.to(DTYPE) for x in (q, k, v))
    out, lse = run(segments, (q, k, v), 1.0, backend)
    expected_out, expected_lse = expected_state(segments, q, k, v, 1.0)
    assert (expected_lse.abs() > 9_990).all()
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=0, rtol=1e-6)
    # A score of 10,000 is known to 1e-3 in float32, and a probability as well.
    torch.testing.assert_close(out.double().cpu(), expected_out, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_of_any_size(size, backend):
    segments, arena = decode_step(70, [66, 3, 0])
    q, k, v = make_inputs(segments[0], arena, 4, 2, 32, torch.float32)
    size = size if DTYPE == torch.float32 else (6e-5 if size < 1 else 1e4)  # what the dtype has
    v = (v * size).to(DTYPE)
    q, k = q.to(DTYPE), k.to(DTYPE)
    out, lse = run(segments, (q, k, v), 0.2, backend)
    expected_out, expected_lse = expected_state(segments, q, k, v, 0.2)
    error = TOLERANCE[DTYPE] * size * (1 if DTYPE == torch.float32 else 2)
    torch.testing.assert_close(out.double().cpu(), expected_out, atol=error, rtol=0)
    error = 5e-3 if DTYPE == torch.float16 else 5e-6
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=error, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_tiny_queries_attend_evenly_and_huge_ones_to_one_key(backend):
    segments, arena = decode_step(70, [66, 3, 1])
    q, k, v = make_inputs(segments[0], arena, 2, 2, 32, torch.float32)
    tiny, huge = (q * 1e-6).to(DTYPE), (q * 1e3).to(DTYPE)
    k, v = k.to(DTYPE), v.to(DTYPE)
    out, _ = run(segments, (tiny, k, v), 1.0, backend)
    for row, (start, length) in enumerate(zip(segments[0].k_starts, segments[0].k_lens, strict=True)):
        seen = torch.cat([v[:70], v[start : start + length]]).double()
        torch.testing.assert_close(out[row].double().cpu(), seen.mean(0), atol=1e-3, rtol=0)
    out, _ = run(segments, (huge, k, v), 1.0, backend)
    expected, _ = expected_state(segments, huge, k, v, 1.0)
    torch.testing.assert_close(out.double().cpu(), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_views_that_are_not_contiguous(backend):
    """Queries within a fused projection and strided in their last dimension, arenas by head and strided too."""
    segments, arena = decode_step(70, [5, 66, 0])
    inputs = make_inputs(segments[0], arena, 4, 2, 32, DTYPE)
    expected = expected_state(segments, *inputs, 0.2)
    q, k, v = inputs
    fused = torch.cat([q, torch.full((3, 4, 32), torch.nan, dtype=DTYPE)], 1)[:, :4]
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    spread = [torch.stack([x, torch.full_like(x, torch.nan)], 3).flatten(2)[:, :, ::2] for x in (q, k, v)]
    for views in ((fused, *by_head), spread, (q.transpose(0, 1).contiguous().transpose(0, 1), k, v)):
        assert_state(*run(segments, views, 0.2, backend), *expected, DTYPE)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != Backend.REFERENCE], ids=str)  # which takes every dtype
def test_a_dtype_that_is_not_supported_is_told(backend):
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run float64 on .*; accepted: reference; use one"):
        AttentionPlan.of(decode_step(3, [1])[0], DEVICE, torch.float64, backend)


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # numpy's, of which the interpreter is made
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(
    ("prefix", "own_lens"),
    [(2048, [0]), (70, [3] * 4), (70, [3] * 40), (2048, [3] * 40)],
    ids=["keys split", "one launch", "a launch that merges", "planes that are merged at the end"],
)
def test_nan_shows_however_states_are_merged(prefix, own_lens, backend):
    """Of a query, in all that it attends to; and of all keys of a part, in all that attend to them."""
    segments, arena = decode_step(prefix, own_lens)
    q, k, v = make_inputs(segments[0], arena, 4, 2, 16, DTYPE)
    row = len(own_lens) // 2
    damaged = q.clone()
    damaged[row, 1, 3] = torch.nan
    out, lse = run(segments, (damaged, k, v), 0.25, backend)
    is_nan = torch.zeros(len(own_lens), 4, dtype=torch.bool)
    is_nan[row, 1] = True
    assert torch.equal(out.isnan().all(-1).cpu(), is_nan) and torch.equal(out.isnan().any(-1).cpu(), is_nan)
    assert torch.equal(lse.isnan().cpu(), is_nan)
    k[: min(prefix, 256)] = torch.nan
    out, _ = run(segments, (q, k, v), 0.25, backend)
    assert out.isnan().all()
