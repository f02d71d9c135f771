"""What every attention kernel must compute, written to be obviously right. Tests compare with this in float64.

Shapes: T queries, S keys, Hq query heads, Hkv KV heads, D head dimension.
"""

import torch

from kernels.segment import Segment


def segment_attention(
    q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, segment: Segment, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out (T, Hq, D), lse (T, Hq))`` in the inputs' dtype; use float64 (or float32) inputs.

    Query head ``h`` reads KV head ``h // (Hq // Hkv)``. A query without keys gives ``out = 0``, ``lse = -inf``.
    """
    T, Hq, D = q_THD.shape
    group = Hq // k_SHD.shape[1]
    out = q_THD.new_zeros(T, Hq, D)
    lse = q_THD.new_full((T, Hq), float("-inf"))
    for row in range(segment.num_rows):
        first, last = int(segment.q_offsets[row]), int(segment.q_offsets[row + 1])
        start, length = int(segment.k_starts[row]), int(segment.k_lens[row])
        k = k_SHD[start : start + length].repeat_interleave(group, dim=1)
        v = v_SHD[start : start + length].repeat_interleave(group, dim=1)
        for t in range(first, last):
            visible = length - (last - 1 - t) if segment.causal else length
            if visible <= 0:
                continue
            scores = torch.einsum("hd,shd->hs", q_THD[t], k[:visible]) * scale
            out[t] = torch.einsum("hs,shd->hd", scores.softmax(dim=-1), v[:visible])
            lse[t] = scores.logsumexp(dim=-1)
    return out, lse


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the union of two disjoint key sets: outs (T, Hq, D), lses (T, Hq)."""
    lse = torch.logaddexp(lse_a, lse_b)
    empty = lse == float("-inf")
    weight_a = torch.where(empty, 0.0, (lse_a - lse).exp())
    weight_b = torch.where(empty, 0.0, (lse_b - lse).exp())
    return out_a * weight_a[..., None] + out_b * weight_b[..., None], lse
