"""Attention over segments by a Triton kernel: FlashAttention-2's loop (arXiv:2307.08691) over items of work.

What an item is, and how segments are cut into them, is in ``attention_items.py``. Keys and values are read once for the
query heads of a group. All segments whose items have tiles of one kind run in one launch, and a launch of small tiles
takes the states that the others have left into its own as it ends: a decode step of large batches, of any number of
levels above own keys, is two launches.

Shapes: T queries, S keys of the arena, Hq query heads, Hkv KV heads, G = Hq // Hkv, D head dimension, N items,
P planes.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_items import HeadShape, Item, Layout, lay_out
from kernels.gpu.launch import on_device
from kernels.gpu.merge import merge_stacked
from kernels.gpu.softmax_sums import begin_sums, cut_head_dim, store_sums, take_block
from kernels.merge import merge_states
from kernels.segment import Segment

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_COLUMNS = tl.constexpr(int(Item.COUNT))
_LOG2_E = tl.constexpr(math.log2(math.e))
_LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def _take_keys(
    first, last,  # of the keys
    q_main, q_rest, best, total, out_main, out_rest,
    k_base, v_base, k_stride, v_stride, num_keys, visible, scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Takes neighbouring keys into the sums of all rows of a tile, block by block. Without ``MASKED`` every row sees
    all of them."""
    in_block = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        is_key = in_block < num_keys - start
        sees = is_key[None, :]
        if CAUSAL:
            sees = sees & (in_block[None, :] < (visible - start)[:, None])
        # Places in the arena are of 64 bits; places within a block of 32, which take half the registers.
        k_rows = k_base + tl.cast(start, tl.int64) * k_stride + in_block[None, :] * k_stride
        v_rows = v_base + tl.cast(start, tl.int64) * v_stride + in_block[:, None] * v_stride
        best, total, out_main, out_rest = take_block(
            q_main, q_rest, best, total, out_main, out_rest, k_rows, v_rows, is_key, sees, scale,
            HEAD_DIM, MAIN, REST, MASKED,
        )  # fmt: skip
    return best, total, out_main, out_rest


@triton.jit
def _attend(
    q_ptr,  # (T, Hq, D)
    k_ptr,  # (S, Hkv, D)
    v_ptr,
    out_ptr,  # (T, Hq, D) where states are final, else (P, T, Hq, D) float32
    lse_ptr,  # (T, Hq) or (P, T, Hq), float32
    planes_out_ptr,  # (P, T, Hq, D) float32: what is merged
    planes_lse_ptr,  # (P, T, Hq) float32
    items_ptr,  # (N, Item.COUNT) int32
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    plane_stride,  # T * Hq
    num_heads,
    num_planes,
    scale,  # times log2(e); above 0
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,  # the head dimension is cut into two powers of two: products take no others
    REST: tl.constexpr,  # 0 where one is enough
    CAUSAL: tl.constexpr,
    FINAL: tl.constexpr,
    MERGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    item = items_ptr + tl.program_id(0) * _COLUMNS
    q_start, q_len, first_place = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    k_start, num_keys, plane = tl.load(item + 3).to(tl.int64), tl.load(item + 4), tl.load(item + 6).to(tl.int64)
    if q_len == 0:
        return
    head = tl.program_id(1).to(tl.int64)

    place = first_place + tl.arange(0, BLOCK_M)
    query = place // GROUP
    q_head = place % GROUP  # of those that read this KV head
    is_query = query < q_len
    visible = tl.load(item + 5) + query
    if CAUSAL:  # one loop for all blocks: with another for those before the diagonal registers would not do
        end = tl.minimum(num_keys, tl.max(tl.where(is_query, visible, 0), 0))
        whole_end = 0
    else:
        end = num_keys
        whole_end = num_keys // BLOCK_N * BLOCK_N

    q_base = q_ptr + q_start * q_stride + head * GROUP * q_head_stride
    q_rows = q_base + query.to(tl.int64)[:, None] * q_stride + q_head[:, None] * q_head_stride
    q_main, q_rest, best, total, out_main, out_rest = begin_sums(q_rows, is_query, HEAD_DIM, MAIN, REST, BLOCK_M)

    k_base = k_ptr + k_start * k_stride + head * k_head_stride
    v_base = v_ptr + k_start * v_stride + head * v_head_stride
    if not CAUSAL:
        best, total, out_main, out_rest = _take_keys(
            0, whole_end, q_main, q_rest, best, total, out_main, out_rest,
            k_base, v_base, k_stride, v_stride, num_keys, visible, scale,
            HEAD_DIM, MAIN, REST, CAUSAL, False, BLOCK_N,
        )  # fmt: skip
    best, total, out_main, out_rest = _take_keys(
        whole_end, end, q_main, q_rest, best, total, out_main, out_rest,
        k_base, v_base, k_stride, v_stride, num_keys, visible, scale,
        HEAD_DIM, MAIN, REST, CAUSAL, True, BLOCK_N,
    )  # fmt: skip

    mask = is_query[:, None]
    target = (q_start + query) * num_heads + head * GROUP + q_head
    if MERGES:
        main = tl.arange(0, MAIN)
        is_main = main < HEAD_DIM
        if REST > 0:
            rest = MAIN + tl.arange(0, REST)
            is_rest = rest < HEAD_DIM
        # A plane's state is one key more, of score ``lse`` and value ``out``.
        for other in range(num_planes):
            places = target + tl.cast(other, tl.int64) * plane_stride
            score = tl.load(planes_lse_ptr + places, mask=is_query, other=float("-inf")) * _LOG2_E
            is_there = (score != float("-inf"))[:, None]
            new_best = tl.maximum(best, score, propagate_nan=tl.PropagateNan.ALL)
            shift = tl.where(new_best == float("-inf"), 0.0, new_best)
            weight, rescale = tl.exp2(score - shift), tl.exp2(best - shift)
            best, total = new_best, total * rescale + weight
            rows = planes_out_ptr + places[:, None] * HEAD_DIM
            value = tl.load(rows + main[None, :], mask=is_there & is_main[None, :], other=0.0)
            out_main = out_main * rescale[:, None] + value * weight[:, None]
            if REST > 0:
                value = tl.load(rows + rest[None, :], mask=is_there & is_rest[None, :], other=0.0)
                out_rest = out_rest * rescale[:, None] + value * weight[:, None]

    is_empty = total == 0.0  # NaN is not: it shows in the total, which a maximum may have passed over
    safe_total = tl.where(is_empty, 1.0, total)
    lse = tl.where(is_empty, float("-inf"), (best + tl.log2(safe_total)) * _LOG_2)
    if not FINAL:
        target += plane * plane_stride
        mask &= ~is_empty[:, None]  # an empty state's lse says that it has no output
    tl.store(lse_ptr + target, lse, mask=is_query)
    store_sums(out_ptr + target[:, None] * HEAD_DIM, out_main, out_rest, safe_total, mask, HEAD_DIM, MAIN, REST)


class TritonPlan:
    """Segments over the same queries. Their items are made when the first layer tells the head counts."""

    def __init__(self, segments: Sequence[Segment], device: torch.device):
        self._segments, self._device = segments, device
        self._heads: HeadShape | None = None
        self._laid_out: LaidOut | None = None

    def run(self, q_THD, k_SHD, v_SHD, scale, state=None):
        """As ``kernels.attention.Evaluation`` has it; ``out`` is in the queries' dtype without a ``state``.

        Raises ValueError for a dtype, head dimension or scale that the kernel was not made for.
        """
        heads = HeadShape(q_THD.shape[1], k_SHD.shape[1], q_THD.shape[2], q_THD.dtype)
        if heads != self._heads:
            layout, items = lay_out(self._segments, heads, num_processors(self._device))
            self._laid_out = LaidOut(layout, torch.from_numpy(items).to(self._device, non_blocking=True))
            self._heads = heads
        return self._laid_out.run(q_THD, k_SHD, v_SHD, scale, state)


class LaidOut:
    """A layout, and on the device the table of its items, which may be overwritten by those of an equal layout."""

    def __init__(self, layout: Layout, items: torch.Tensor):
        self.layout, self.items = layout, items

    def run(self, q_THD, k_SHD, v_SHD, scale, state=None):
        """As ``TritonPlan.run``."""
        own = self._run(q_THD, k_SHD, v_SHD, scale)
        return own if state is None else merge_states(*state, *own)

    def _run(self, q_THD, k_SHD, v_SHD, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        check(q_THD, k_SHD, scale)
        layout, (T, Hq, D), Hkv = self.layout, q_THD.shape, k_SHD.shape[1]
        assert layout.num_queries == T, f"{T} queries for items of {layout.num_queries}: the rest stay unset"
        out, lse = q_THD.new_empty(T, Hq, D), q_THD.new_empty(T, Hq, dtype=torch.float32)
        if T == 0:
            return out, lse
        planes = planes_out, planes_lse = out, lse
        if layout.num_planes:
            planes_out = q_THD.new_empty(layout.num_planes, T, Hq, D, dtype=torch.float32)
            planes = planes_out, planes_lse = planes_out, lse.new_empty(layout.num_planes, T, Hq)
        main, rest = cut_head_dim(D)
        first_item = 0
        with on_device(q_THD):
            for launch in layout.launches:
                final = launch.merges or not layout.num_planes
                items = self.items[first_item : first_item + launch.num_items]
                first_item += launch.num_items
                _attend[(launch.num_items, Hkv)](
                    *(q_THD, k_SHD, v_SHD, *((out, lse) if final else planes), planes_out, planes_lse, items),
                    *(*q_THD.stride()[:2], *k_SHD.stride()[:2], *v_SHD.stride()[:2]),
                    *(T * Hq, Hq, layout.num_planes, scale * math.log2(math.e)),
                    GROUP=Hq // Hkv,
                    HEAD_DIM=D,
                    MAIN=main,
                    REST=rest,
                    CAUSAL=launch.causal,
                    FINAL=final,
                    MERGES=launch.merges,
                    BLOCK_M=launch.tile.rows,
                    BLOCK_N=launch.tile.keys,
                    num_warps=launch.tile.num_warps,
                    num_stages=launch.tile.num_stages,
                )
        return merge_stacked(planes_out, planes_lse, q_THD.dtype) if layout.merges_last else (out, lse)


def check(q_THD: torch.Tensor, k_SHD: torch.Tensor, scale: float) -> None:
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
    if scale <= 0:
        raise ValueError(f"attention by Triton: the scale is {scale}; accepted: above 0; use the reference backend")


@cache
def num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter: a small GPU, so that keys are split in tests too
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
