"""Segments on CUDA through PyTorch's FlashAttention-2, which takes each row's key start and length from device tables.

Shapes: T queries, S keys of the arena, Hq query heads, Hkv KV heads, G = Hq // Hkv, D head dimension.
"""

import torch

from kernels.segment import Segment

DTYPES = (torch.float16, torch.bfloat16)


class CudaSegment:
    """A segment's tables on the device.

    FlashAttention-2 reads a row's keys from ``cum_seq_k[row]`` on, ``seqused_k[row]`` of them; so the offsets need
    not be cumulative, and rows may name any part of the arena.
    """

    def __init__(self, segment: Segment, device: torch.device):
        lengths = segment.q_offsets[1:] - segment.q_offsets[:-1]
        self.max_q = int(lengths.max(initial=0))
        self.causal = segment.causal and self.max_q > 1  # one query sees all keys: no mask
        self.max_k = int(segment.k_lens.max(initial=0))
        limit = 2**31 - 1
        assert segment.k_starts.max(initial=0) < limit, "FlashAttention-2's tables are 32-bit"
        as_table = lambda values: torch.from_numpy(values).to(torch.int32).to(device, non_blocking=True)  # noqa: E731
        self.q_offsets = as_table(segment.q_offsets)
        # The kernel wants one offset more than there are rows; with seqused_k it never reads the last one.
        self.k_starts = torch.nn.functional.pad(as_table(segment.k_starts), (0, 1))
        self.k_lens = as_table(segment.k_lens)

    def run(self, q_THD, k_SHD, v_SHD, scale):
        T, Hq, D = q_THD.shape
        Hkv = k_SHD.shape[1]
        if self.max_k == 0 or T == 0:
            return q_THD.new_zeros(T, Hq, D), q_THD.new_full((T, Hq), float("-inf"), dtype=torch.float32)
        G = Hq // Hkv
        # Without a mask, a group's query heads are so many more queries of one KV head: K/V are read once per group.
        fold = not self.causal and G > 1
        q, q_offsets, max_q = q_THD, self.q_offsets, self.max_q
        if fold:
            q = q_THD.view(T, Hkv, G, D).transpose(1, 2).reshape(T * G, Hkv, D)
            q_offsets, max_q = q_offsets * G, max_q * G
        out, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
            q, k_SHD, v_SHD, q_offsets, self.k_starts, max_q, self.max_k, 0.0, self.causal, False,
            scale=scale, seqused_k=self.k_lens,
        )  # fmt: skip
        assert lse_HT.shape == (q.shape[1], q.shape[0]), f"lse of shape {tuple(lse_HT.shape)}: not (heads, queries)"
        lse_TH = lse_HT.transpose(0, 1)
        # A query without keys comes back as lse +inf (-inf when keys were split).
        empty = lse_TH == float("inf")
        lse_TH = lse_TH.masked_fill(empty, float("-inf"))
        if fold:
            out = out.view(T, G, Hkv, D).transpose(1, 2).reshape(T, Hq, D)
            lse_TH = lse_TH.reshape(T, G, Hkv).transpose(1, 2).reshape(T, Hq)
            empty = empty.reshape(T, G, Hkv).transpose(1, 2).reshape(T, Hq)
        return out.masked_fill(empty.unsqueeze(-1), 0.0), lse_TH.contiguous()
