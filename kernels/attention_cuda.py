"""Segments on CUDA through PyTorch's FlashAttention-2, which takes each row's key start and length from device tables.

Shapes: T queries, S keys of the arena, R rows, Hq query heads, Hkv KV heads, G = Hq // Hkv, D head dimension.
"""

import numpy as np
import torch

from kernels.segment import Segment

DTYPES = (torch.float16, torch.bfloat16)

_MAX_HEAD_DIM = 256
_HEAD_DIM_STEP = 8  # elements that one load reads

_flash = torch.ops.aten._flash_attention_forward


class CudaSegment:
    """A segment's tables on the device.

    FlashAttention-2 reads a row's keys from ``cum_seq_k[row]`` on, ``seqused_k[row]`` of them; so the offsets need
    not be cumulative, and rows may name any part of the arena. It steps through the arena by the strides of its first
    two dimensions, in 64 bits; only the last one must be contiguous.
    """

    def __init__(self, segment: Segment, device: torch.device):
        self.num_queries = segment.num_queries
        self.max_q = int(np.diff(segment.q_offsets).max(initial=0))
        self.max_k = int(segment.k_lens.max(initial=0))
        self.causal = segment.causal and self.max_q > 1  # one query sees all keys: no mask
        # One copy to the device for all tables. The kernel loads one key offset more than there are rows, and with
        # seqused_k makes no use of the last.
        tables = np.concatenate([segment.q_offsets, segment.k_starts, [0], segment.k_lens])
        assert tables.max() < 2**31, "FlashAttention-2's tables are 32-bit"
        on_device = torch.from_numpy(tables.astype(np.int32)).to(device, non_blocking=True)
        sizes = [segment.num_rows + 1, segment.num_rows + 1, segment.num_rows]
        self.q_offsets, self.k_starts, self.k_lens = on_device.split(sizes)
        self._folded_offsets: dict[int, torch.Tensor] = {}
        blind = _blind_queries(segment)
        self._blind_T = torch.from_numpy(blind).to(device, non_blocking=True) if blind.any() else None

    def run(self, q_THD, k_SHD, v_SHD, scale):
        """Raises ValueError for a head dimension that the kernel was not made for."""
        T, Hq, D = q_THD.shape
        if T == 0 or self.max_k == 0:
            return q_THD.new_zeros(T, Hq, D), q_THD.new_full((T, Hq), float("-inf"), dtype=torch.float32)
        if D % _HEAD_DIM_STEP or D > _MAX_HEAD_DIM:
            raise ValueError(
                f"attention on CUDA in {q_THD.dtype}: the head dimension is {D}; accepted: multiples of "
                f"{_HEAD_DIM_STEP} up to {_MAX_HEAD_DIM}; use the reference backend, which has no such limit"
            )
        assert T == self.num_queries, f"{T} queries for a segment of {self.num_queries}: the rest would be left unset"
        Hkv = k_SHD.shape[1]
        G = Hq // Hkv
        # Without a mask, a group's query heads are so many more queries of one KV head: K/V are read once per group.
        # It also keeps one query a row with grouped heads, which FlashAttention-2 treats apart, away from it.
        fold = G > 1 and not self.causal
        if fold:
            q_MHD = q_THD.view(T, Hkv, G, D).transpose(1, 2).reshape(T * G, Hkv, D)
            out_MHD, lse_HM = self._flash(q_MHD, k_SHD, v_SHD, self._offsets_of_groups(G), self.max_q * G, scale)
            out_THD = out_MHD.view(T, G, Hkv, D).transpose(1, 2).reshape(T, Hq, D)
            lse_TH = lse_HM.view(Hkv, T, G).transpose(0, 1).reshape(T, Hq)
        else:
            out_THD, lse_HT = self._flash(q_THD, k_SHD, v_SHD, self.q_offsets, self.max_q, scale)
            lse_TH = lse_HT.transpose(0, 1).contiguous()
        if self._blind_T is not None:
            # The kernel leaves lse +inf there. By table, not by value: it does so to a row of NaN too, which must show.
            lse_TH.masked_fill_(self._blind_T[:, None], float("-inf"))
            out_THD.masked_fill_(self._blind_T[:, None, None], 0.0)
        return out_THD, lse_TH

    def _flash(self, q, k_SHD, v_SHD, q_offsets, max_q, scale) -> tuple[torch.Tensor, torch.Tensor]:
        """``(out, of q's shape; lse (heads, queries) float32)``."""
        out, lse, *_ = _flash(
            q, k_SHD, v_SHD, q_offsets, self.k_starts, max_q, self.max_k, 0.0, self.causal, False,
            scale=scale, seqused_k=self.k_lens,
        )  # fmt: skip
        # The operation is private to PyTorch, and the layout of its lse has changed before.
        expected = (q.shape[1], q.shape[0])
        if out.shape != q.shape or lse.shape != expected or not lse.is_contiguous() or lse.dtype != torch.float32:
            raise RuntimeError(
                f"torch {torch.__version__}: flash attention returned out {tuple(out.shape)} and lse "
                f"{tuple(lse.shape)} with strides {lse.stride()} in {lse.dtype}; expected {tuple(q.shape)} and "
                f"contiguous {expected} in torch.float32: this version is not supported"
            )
        return out, lse

    def _offsets_of_groups(self, G: int) -> torch.Tensor:
        """(R + 1,) int32: where each row's queries begin when there are ``G`` for each. The same in every layer."""
        if G not in self._folded_offsets:
            self._folded_offsets[G] = self.q_offsets * G
        return self._folded_offsets[G]


def _blind_queries(segment: Segment) -> np.ndarray:
    """(T,) bool: the queries that see no key. With a causal mask these are the first of a row that has fewer keys."""
    q_lens = np.diff(segment.q_offsets)
    num_blind = (q_lens - segment.k_lens).clip(min=0) if segment.causal else np.where(segment.k_lens == 0, q_lens, 0)
    place_in_row = np.arange(segment.num_queries) - np.repeat(segment.q_offsets[:-1], q_lens)
    return place_in_row < np.repeat(num_blind, q_lens)
