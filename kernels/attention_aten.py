"""Segments on CPU, through ATen's flash attention.

ATen's operation takes dense batches only: equal numbers of queries and keys, at constant strides. Planning finds runs
of consecutive rows that have this form in the arena as it lies, and makes one call of each. Rows whose lengths differ
a little join a call with an additive mask where that costs less than a call more. Nothing is copied but queries.

Shapes: T queries, S keys of the arena, N rows of one call, Lq and Lk queries and keys of a row, Hq query heads,
Hkv KV heads, G = Hq // Hkv, D head dimension.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.merge import merge_states
from kernels.segment import Segment

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# One call costs as much as reading about this many keys of one row (30 us against some 20 GB/s, 4 KV heads of 64).
_CALL_IN_KEYS = 512

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def has_amx(dtype: torch.dtype) -> bool:
    """Whether ATen's products of ``dtype`` use this CPU's matrix tiles."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class _Call:
    """N rows of ``num_queries`` queries and at most ``num_keys`` keys; row ``n``'s keys start at
    ``k_start + n * k_stride``."""

    q_start: int
    num_rows: int
    num_queries: int
    k_start: int
    k_stride: int
    num_keys: int
    causal: bool  # square: num_queries == num_keys
    mask_NL: torch.Tensor | None = None  # (N, Lk) float32: 0 or -inf, for rows with fewer keys
    first: bool = True  # no call before this one touched these queries

    @property
    def rows(self) -> slice:
        return slice(self.q_start, self.q_start + self.num_rows * self.num_queries)

    def run(self, q_THD, k_SHD, v_SHD, scale):
        """``(out (N * Lq, Hq, D), lse (N * Lq, Hq) float32)``."""
        N, Lq, Lk = self.num_rows, self.num_queries, self.num_keys
        Hq, D = q_THD.shape[1:]
        Hkv = k_SHD.shape[1]
        G = Hq // Hkv
        k_NHLD, v_NHLD = (self._keys(arena) for arena in (k_SHD, v_SHD))
        q = q_THD[self.rows]
        if self.causal:
            out_NHLD, lse_NHL = _flash(
                q.view(N, Lq, Hq, D).transpose(1, 2), k_NHLD, v_NHLD, 0.0, True, scale=scale
            )
            return out_NHLD.transpose(1, 2).reshape(N * Lq, Hq, D), lse_NHL.transpose(1, 2).reshape(N * Lq, Hq)
        # A group's query heads are so many more queries of one KV head: its keys are read once for all of them.
        q_NHMD = q.view(N, Lq, Hkv, G, D).transpose(1, 2).reshape(N, Hkv, Lq * G, D)
        mask = None
        if self.mask_NL is not None:
            mask = self.mask_NL.to(q.dtype)[:, None, None, :].expand(N, 1, Lq * G, Lk)
        out_NHMD, lse_NHM = _flash(q_NHMD, k_NHLD, v_NHLD, 0.0, False, attn_mask=mask, scale=scale)
        out = out_NHMD.view(N, Hkv, Lq, G, D).transpose(1, 2).reshape(N * Lq, Hq, D)
        lse = lse_NHM.view(N, Hkv, Lq, G).transpose(1, 2).reshape(N * Lq, Hq)
        return out, lse

    def _keys(self, arena_SHD: torch.Tensor) -> torch.Tensor:
        """(N, Hkv, Lk, D), a view."""
        S, H, D = arena_SHD.shape
        per_key, per_head, per_element = arena_SHD.stride()
        return arena_SHD.as_strided(
            (self.num_rows, H, self.num_keys, D),
            (self.k_stride * per_key, per_head, per_key, per_element),
            arena_SHD.storage_offset() + self.k_start * per_key,
        )


class AtenSegment:
    """A segment as a list of ATen calls."""

    def __init__(self, segment: Segment):
        self.num_queries = segment.num_queries
        calls = _causal_calls(segment) if segment.causal else _dense_calls(segment)
        self.calls, self.initialise = _mark_first(calls, segment.num_queries)

    def run(self, q_THD, k_SHD, v_SHD, scale):
        if len(self.calls) == 1 and not self.initialise:
            return self.calls[0].run(q_THD, k_SHD, v_SHD, scale)
        T, Hq, D = q_THD.shape
        out = torch.empty(T, Hq, D, dtype=torch.float32)
        lse = torch.empty(T, Hq, dtype=torch.float32)
        if self.initialise:
            out.zero_()
            lse.fill_(float("-inf"))
        for call in self.calls:
            state = call.run(q_THD, k_SHD, v_SHD, scale)
            if not call.first:
                state = merge_states(out[call.rows], lse[call.rows], *state)
            out[call.rows], lse[call.rows] = state
        return out, lse


def _mark_first(calls: list[_Call], num_queries: int) -> tuple[tuple[_Call, ...], bool]:
    """Sets ``first`` on each call, and tells whether any query needs the empty state before the calls run."""
    touched = np.zeros(num_queries, dtype=bool)
    marked, initialise = [], False
    for call in calls:
        seen = touched[call.rows]
        marked.append(replace(call, first=not seen.any()))
        initialise |= bool(seen.any() and not seen.all())
        touched[call.rows] = True
    return tuple(marked), initialise or not touched.all()


def _causal_calls(segment: Segment) -> list[_Call]:
    """ATen aligns causal masks top-left. Bottom-right, the keys before a row's last Lq are seen by all its queries:
    a dense part, and a square causal part whose two alignments agree."""
    q_lens = np.diff(segment.q_offsets)
    if q_lens.max(initial=0) <= 1:
        return _dense_calls(segment)
    # With more queries than keys the first queries see nothing: they stay out of both parts.
    square = np.minimum(q_lens, segment.k_lens)
    before = segment.k_lens - square
    q_starts = segment.q_offsets[1:] - square
    calls = _group(q_starts, square, segment.k_starts, before, before, causal=False)
    return calls + _group(q_starts, square, segment.k_starts + before, square, square, causal=True)


def _dense_calls(segment: Segment) -> list[_Call]:
    rooms = segment.k_lens if segment.k_rooms is None else segment.k_rooms
    q_lens = np.diff(segment.q_offsets)
    return _group(segment.q_offsets[:-1], q_lens, segment.k_starts, segment.k_lens, rooms, causal=False)


def _group(
    q_starts: np.ndarray,
    q_lens: np.ndarray,
    k_starts: np.ndarray,
    k_lens: np.ndarray,
    k_rooms: np.ndarray,
    causal: bool,
) -> list[_Call]:
    """One call for each run of rows at constant strides. Rows without queries or keys are left out: ATen dies of
    zero-length keys."""
    keep = np.flatnonzero((q_lens > 0) & (k_lens > 0))
    tables = [table[keep].tolist() for table in (q_starts, q_lens, k_starts, k_lens, k_rooms)]
    q_starts, q_lens, k_starts, k_lens, _ = tables
    calls, first = [], 0
    while first < len(keep):
        last = _end_of_run(first, *tables)
        lens = k_lens[first:last]
        num_keys = max(lens)
        calls.append(
            _Call(
                q_start=q_starts[first],
                num_rows=last - first,
                num_queries=q_lens[first],
                k_start=k_starts[first],
                k_stride=k_starts[first + 1] - k_starts[first] if last - first > 1 else 0,
                num_keys=num_keys,
                causal=causal,
                mask_NL=_length_mask(lens, num_keys) if min(lens) < num_keys else None,
            )
        )
        first = last
    return calls


def _end_of_run(first: int, q_starts: list, q_lens: list, k_starts: list, k_lens: list, k_rooms: list) -> int:
    """One past the last row that joins the call which row ``first`` begins."""
    longest, total, room = k_lens[first], k_lens[first], k_rooms[first]
    last = first + 1
    while last < len(q_starts):
        stride = k_starts[first + 1] - k_starts[first]
        consecutive = q_lens[last] == q_lens[first] and q_starts[last] == q_starts[last - 1] + q_lens[first]
        if not consecutive or k_starts[last] - k_starts[last - 1] != stride or stride < 0:
            break
        longest, total, room = max(longest, k_lens[last]), total + k_lens[last], min(room, k_rooms[last])
        num_rows = last + 1 - first
        padding = longest * num_rows - total
        # Each row that joins saves a call; what it makes the rows read in vain must cost less.
        if padding and (longest > room or padding > _CALL_IN_KEYS * (num_rows - 1)):
            break
        last += 1
    return last


def _length_mask(lens: list[int], num_keys: int) -> torch.Tensor:
    """(N, Lk) float32: 0 for a row's keys, -inf past them."""
    past = torch.arange(num_keys) >= torch.tensor(lens).unsqueeze(1)
    return torch.zeros(len(lens), num_keys).masked_fill_(past, float("-inf"))
