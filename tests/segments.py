"""Segments over an arena with gaps, their inputs, and what a state may differ from the reference by."""

import numpy as np
import torch

from kernels import Segment

# One rounding of the output in the dtype, and for half precision one of the probabilities before they meet V.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_segment(q_lens, k_lens, causal, rooms=None, shuffle=False) -> tuple[Segment, int]:
    """Rows in an arena with a gap before each; returns the segment and the arena's size."""
    k_lens = np.asarray(k_lens, dtype=np.int64)
    rooms = k_lens if rooms is None else np.asarray(rooms, dtype=np.int64)
    order = np.arange(len(k_lens))[::-1] if shuffle else np.arange(len(k_lens))
    k_starts = np.zeros_like(k_lens)
    position = 3
    for row in order:
        k_starts[row] = position
        position += int(rooms[row])
    q_offsets = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int64)
    return Segment(q_offsets, k_starts, k_lens, causal, rooms), position + 2


def make_inputs(segment, arena, Hq, Hkv, D, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(segment.num_queries, Hq, D, generator=generator).to(dtype)
    k = torch.randn(arena, Hkv, D, generator=generator).to(dtype)
    v = torch.randn(arena, Hkv, D, generator=generator).to(dtype)
    return q, k, v


def assert_state(out, lse, expected_out, expected_lse, dtype):
    assert out.shape == expected_out.shape and lse.shape == expected_lse.shape and lse.dtype == torch.float32
    torch.testing.assert_close(out.double().cpu(), expected_out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=max(TOLERANCE[dtype] / 4, 5e-6), rtol=1e-5)
