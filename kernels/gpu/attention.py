"""Attention over a segment by a Triton kernel: FlashAttention-2's loop (arXiv:2307.08691) over tiles of query rows.

A tile is ``BLOCK_M`` rows of one segment row and one KV head: its queries, each with the ``G`` query heads that read
this KV head. So keys and values are read once for a group, and rows of any number of queries and heads fill tiles.
Where there are too few tiles to fill the device, keys are split into parts, as in Flash-Decoding, whose states are
merged. Which keys a row has stands in device tables, so that a launch serves any lengths up to its grid's capacity.

Shapes: T queries, S keys of the arena, R rows, Hq query heads, Hkv KV heads, G = Hq // Hkv, D head dimension, N tiles,
P parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.gpu.launch import on_device
from kernels.gpu.merge import merge_stacked
from kernels.segment import Segment

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Fewer keys than this in a part cost more in its state than they gain. Chosen, not measured.
_MIN_PART_KEYS = 256
# Programs for each multiprocessor that keys are split to have. Chosen, not measured.
_PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _attend(
    q_ptr,  # (T, Hq, D)
    k_ptr,  # (S, Hkv, D)
    v_ptr,
    out_ptr,  # (P, T, Hq, D)
    lse_ptr,  # (P, T, Hq) float32
    q_offsets_ptr,  # (R + 1,) int64
    k_starts_ptr,  # (R,) int64
    k_lens_ptr,  # (R,) int64
    tile_rows_ptr,  # (N,) int32: each tile's row of the segment
    tile_firsts_ptr,  # (N,) int32: its first query row, counted within the segment's row
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    part_stride,  # T * Hq
    num_heads,
    scale,  # times log2(e)
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,  # the head dimension is cut into two powers of two: products take no others
    REST: tl.constexpr,  # 0 where one is enough
    CAUSAL: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Places in a tensor are of 64 bits; places within a row, and within a tile, of 32, which take half the registers.
    row = tl.load(tile_rows_ptr + tl.program_id(0))
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    q_start = tl.load(q_offsets_ptr + row)
    q_len = (tl.load(q_offsets_ptr + row + 1) - q_start).to(tl.int32)
    k_start, k_len = tl.load(k_starts_ptr + row), tl.load(k_lens_ptr + row).to(tl.int32)

    place = tl.load(tile_firsts_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    query = place // GROUP
    q_head = place % GROUP  # of those that read this KV head
    is_query = query < q_len
    end = k_len  # no query of the tile sees a key from here on
    if CAUSAL:
        visible = k_len - (q_len - 1 - query)
        end = tl.max(tl.where(is_query, visible, 0), 0)
    part_len = tl.cdiv(tl.cdiv(end, BLOCK_N), NUM_PARTS) * BLOCK_N
    first = part * part_len
    last = tl.minimum(first + part_len, end)

    main = tl.arange(0, MAIN)
    is_main = main < HEAD_DIM
    q_base = q_ptr + q_start * q_stride + head * GROUP * q_head_stride
    q_rows = q_base + query.to(tl.int64)[:, None] * q_stride + q_head[:, None] * q_head_stride
    q_main = tl.load(q_rows + main[None, :], mask=is_query[:, None] & is_main[None, :], other=0.0)
    out_main = tl.zeros([BLOCK_M, MAIN], tl.float32)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        is_rest = rest < HEAD_DIM
        q_rest = tl.load(q_rows + rest[None, :], mask=is_query[:, None] & is_rest[None, :], other=0.0)
        out_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of the scores so far, in base 2
    total = tl.zeros([BLOCK_M], tl.float32)  # of exp2(score - best)

    k_base = k_ptr + k_start * k_stride + head * k_head_stride
    v_base = v_ptr + k_start * v_stride + head * v_head_stride
    in_block = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        is_key = in_block < last - start
        k_rows = k_base + tl.cast(start, tl.int64) * k_stride + in_block[None, :] * k_stride
        k_main = tl.load(k_rows + main[:, None], mask=is_key[None, :] & is_main[:, None], other=0.0)
        # In float32 by float32's own products, not by TF32's.
        scores = tl.dot(q_main, k_main, input_precision="ieee")
        if REST > 0:
            k_rest = tl.load(k_rows + rest[:, None], mask=is_key[None, :] & is_rest[:, None], other=0.0)
            scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
        if CAUSAL:
            sees = is_key[None, :] & (in_block[None, :] < (visible - start)[:, None])
        else:
            sees = is_key[None, :]
        scores = tl.where(sees, scores * scale, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen no key yet: any finite shift makes its probabilities 0.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        probs = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(best - shift)
        best, total = new_best, total * rescale + tl.sum(probs, 1)
        v_rows = v_base + tl.cast(start, tl.int64) * v_stride + in_block[:, None] * v_stride
        v_main = tl.load(v_rows + main[None, :], mask=is_key[:, None] & is_main[None, :], other=0.0)
        probs = probs.to(v_main.dtype)
        out_main = tl.dot(probs, v_main, out_main * rescale[:, None], input_precision="ieee")
        if REST > 0:
            v_rest = tl.load(v_rows + rest[None, :], mask=is_key[:, None] & is_rest[None, :], other=0.0)
            out_rest = tl.dot(probs, v_rest, out_rest * rescale[:, None], input_precision="ieee")

    is_empty = best == float("-inf")
    safe_total = tl.where(is_empty, 1.0, total)
    lse = tl.where(is_empty, float("-inf"), (best + tl.log2(safe_total)) * 0.6931471805599453)
    base = part.to(tl.int64) * part_stride + q_start * num_heads + head * GROUP
    target = base + query.to(tl.int64) * num_heads + q_head
    tl.store(lse_ptr + target, lse, mask=is_query)
    inverse = (1.0 / safe_total)[:, None]
    out_rows = out_ptr + target[:, None] * HEAD_DIM
    element = out_ptr.dtype.element_ty
    mask = is_query[:, None]
    tl.store(out_rows + main[None, :], (out_main * inverse).to(element), mask=mask & is_main[None, :])
    if REST > 0:
        tl.store(out_rows + rest[None, :], (out_rest * inverse).to(element), mask=mask & is_rest[None, :])


@dataclass(frozen=True)
class Tile:
    """How a launch cuts its work, and what each program has of a multiprocessor."""

    rows: int  # BLOCK_M
    keys: int  # BLOCK_N
    num_warps: int
    num_stages: int  # blocks of keys and values in shared memory at once


def choose_tile(dtype: torch.dtype, head_dim: int, num_rows: int) -> Tile:
    """For rows of a segment with up to ``num_rows`` query rows of one KV head. Chosen, not measured."""
    if dtype == torch.float32:
        rows = 32 if num_rows > 16 and head_dim <= 64 else 16
        return Tile(rows, keys=32 if head_dim <= 128 else 16, num_warps=4 if head_dim <= 64 else 8, num_stages=2)
    rows = next((rows for rows in (16, 32, 64) if num_rows <= rows), 128)
    if head_dim > 128:
        return Tile(min(rows, 64), keys=32, num_warps=8 if rows >= 64 else 4, num_stages=2)
    return Tile(rows, keys=64, num_warps=8 if rows == 128 else 4, num_stages=3 if head_dim > 64 else 4)


def cut_head_dim(head_dim: int) -> tuple[int, int]:
    """Two powers of two, the second possibly 0, that hold a head dimension: 80 is 64 and 16, 128 is 128 and 0."""
    main = 16
    while 2 * main <= head_dim:
        main *= 2
    rest = head_dim - main
    if rest <= 0:
        return main, 0
    rest = max(16, 1 << (rest - 1).bit_length())
    return (main, rest) if rest < main else (2 * main, 0)


class TritonSegment:
    """A segment's tables on the device."""

    def __init__(self, segment: Segment, device: torch.device):
        self.num_queries, self.causal, self._device = segment.num_queries, segment.causal, device
        self._q_lens = np.diff(segment.q_offsets)
        self._max_keys = int(segment.k_lens.max(initial=0))
        tables = torch.from_numpy(np.concatenate([segment.q_offsets, segment.k_starts, segment.k_lens]))
        rows = segment.num_rows
        self._tables = tables.to(device, non_blocking=True).split([rows + 1, rows, rows])
        self._launches: dict[tuple[int, int, torch.dtype, int], _Launch] = {}

    def launch(self, q_THD: torch.Tensor, num_kv_heads: int) -> "_Launch":
        """How the segment runs with such queries: made when the first layer tells, the same in every layer."""
        _, Hq, D = q_THD.shape
        key = (Hq // num_kv_heads, num_kv_heads, q_THD.dtype, D)
        if key not in self._launches:
            self._launches[key] = _Launch.of(self._q_lens, self._max_keys, *key, self._device)
        return self._launches[key]

    def run_into(self, q_THD, k_SHD, v_SHD, scale: float, out_PTHD: torch.Tensor, lse_PTH: torch.Tensor) -> None:
        """Writes the states of the parts: contiguous, ``lse`` in float32."""
        T, Hq, D = q_THD.shape
        Hkv = k_SHD.shape[1]
        launch = self.launch(q_THD, Hkv)
        tile, (main, rest) = launch.tile, cut_head_dim(D)
        with on_device(q_THD):
            _attend[(len(launch.tile_rows), Hkv, launch.num_parts)](
                *(q_THD, k_SHD, v_SHD, out_PTHD, lse_PTH, *self._tables, launch.tile_rows, launch.tile_firsts),
                *(*q_THD.stride()[:2], *k_SHD.stride()[:2], *v_SHD.stride()[:2], T * Hq, Hq, scale * math.log2(math.e)),
                GROUP=Hq // Hkv,
                HEAD_DIM=D,
                MAIN=main,
                REST=rest,
                CAUSAL=self.causal,
                NUM_PARTS=launch.num_parts,
                BLOCK_M=tile.rows,
                BLOCK_N=tile.keys,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )

    def run(self, q_THD, k_SHD, v_SHD, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The state: ``out (T, Hq, D)`` in the queries' dtype, ``lse (T, Hq)``."""
        return run_merged([self], q_THD, k_SHD, v_SHD, scale)


def run_merged(
    segments: Sequence[TritonSegment], q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the keys of all segments: a launch for each, and one that merges them where there are several.

    Raises ValueError for a dtype or head dimension that the kernel was not made for.
    """
    T, Hq, D = q_THD.shape
    _check(q_THD, k_SHD)
    q_THD, k_SHD, v_SHD = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THD, k_SHD, v_SHD))
    if T == 0:
        return q_THD.new_empty(T, Hq, D), q_THD.new_empty(T, Hq, dtype=torch.float32)
    parts = [segment.launch(q_THD, k_SHD.shape[1]).num_parts for segment in segments]
    dtype = q_THD.dtype if sum(parts) == 1 else torch.float32
    out = q_THD.new_empty(sum(parts), T, Hq, D, dtype=dtype)
    lse = q_THD.new_empty(sum(parts), T, Hq, dtype=torch.float32)
    for segment, own_out, own_lse in zip(segments, out.split(parts), lse.split(parts), strict=True):
        assert segment.num_queries == T, f"{T} queries for a segment of {segment.num_queries}: the rest stay unset"
        segment.run_into(q_THD, k_SHD, v_SHD, scale, own_out, own_lse)
    return (out[0], lse[0]) if sum(parts) == 1 else merge_stacked(out, lse, q_THD.dtype)


def _check(q_THD: torch.Tensor, k_SHD: torch.Tensor) -> None:
    if q_THD.dtype not in _DTYPES or q_THD.dtype != k_SHD.dtype:
        raise ValueError(
            f"attention by Triton: queries are {q_THD.dtype}, keys {k_SHD.dtype}; accepted: both the same of "
            f"{', '.join(map(str, _DTYPES))}"
        )
    if q_THD.shape[2] > MAX_HEAD_DIM:
        raise ValueError(
            f"attention by Triton: the head dimension is {q_THD.shape[2]}; accepted: up to {MAX_HEAD_DIM}; use the "
            "reference backend"
        )


@dataclass(frozen=True)
class _Launch:
    """A segment's grid for given heads."""

    tile: Tile
    tile_rows: torch.Tensor  # (N,) int32
    tile_firsts: torch.Tensor  # (N,) int32
    num_parts: int

    @classmethod
    def of(
        cls,
        q_lens: np.ndarray,
        max_keys: int,
        group: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        head_dim: int,
        device: torch.device,
    ) -> "_Launch":
        tile = choose_tile(dtype, head_dim, int(q_lens.max(initial=1)) * group)
        tiles_of_row = -(-q_lens * group // tile.rows)
        rows = np.repeat(np.arange(len(q_lens)), tiles_of_row)
        before = np.cumsum(tiles_of_row) - tiles_of_row
        firsts = (np.arange(len(rows)) - before[rows]) * tile.rows
        tables = torch.from_numpy(np.stack([rows, firsts]).astype(np.int32)).to(device, non_blocking=True)
        wanted = -(-_PROGRAMS_PER_PROCESSOR * _num_processors(device) // max(1, len(rows) * num_kv_heads))
        num_parts = max(1, min(wanted, max_keys // _MIN_PART_KEYS))
        # A power of two: for each number of parts a kernel is compiled.
        return cls(tile, *tables.unbind(), 1 << (num_parts.bit_length() - 1))


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter: a small GPU, so that keys are split in tests too
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
