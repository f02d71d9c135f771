"""Sparse attention by a Triton kernel: a program takes the queries of one row and head that stand in one tile of
positions, and walks the head's ranges of distances, tiles and columns.

Which those are is data, of every head its own: all heads of a layer, whatever their patterns, run in one launch.

Shapes: T queries, S keys of the arena, H query heads, D head dimension; those of ``kernels/sparse/index.py``.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.attention import check
from kernels.gpu.launch import on_device
from kernels.gpu.softmax_sums import begin_sums, cut_head_dim, store_sums, take_block
from kernels.sparse.index import SparseIndex
from kernels.sparse.rows import TILE, SparseRows
from kernels.sparse.tasks import Piece, Task, make_pieces, make_tasks

_TASK_COLUMNS = tl.constexpr(int(Task.COUNT))
_PIECE_COLUMNS = tl.constexpr(int(Piece.COUNT))
_TILE = tl.constexpr(TILE)
_LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def _attend_sparse(
    q_ptr,  # (T, H, D)
    k_ptr,  # (S, Hkv, D)
    v_ptr,
    out_ptr,  # (T, H, D)
    lse_ptr,  # (T, H) float32
    tasks_ptr,  # (tasks, Task.COUNT) int64
    pieces_ptr,  # (R, P, Piece.COUNT) int64
    distances_ptr,  # (R, H, K) bool
    ranges_ptr,  # (R, H, W, 2) int32
    columns_ptr,  # (R, H, C) int32
    dense_from_ptr,  # (R, H) int32
    tiles_ptr,  # (R, L, N, B) int32
    tiles_of_head_ptr,  # (H,) int32
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    num_heads,
    num_pieces,
    num_distances,
    num_ranges,
    num_columns,
    num_lists,
    num_listed,
    num_tiles,
    scale,  # times log2(e); above 0
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,  # the head dimension is cut into two powers of two: products take no others
    REST: tl.constexpr,  # 0 where one is enough
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    parts: tl.constexpr = _TILE // BLOCK_M  # of a task, with a program each
    task = tasks_ptr + tl.program_id(0) // parts * _TASK_COLUMNS
    skipped = tl.program_id(0) % parts * BLOCK_M
    first_query, num_queries = tl.load(task) + skipped, tl.load(task + 1).to(tl.int32) - skipped
    row, position = tl.load(task + 2), tl.load(task + 3).to(tl.int32) + skipped
    if num_queries <= 0:
        return
    num_queries = tl.minimum(num_queries, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    tile = position // _TILE
    begin, end = tile * _TILE, position + num_queries  # of the diagonal's tile, and of what the queries see

    query = tl.arange(0, BLOCK_M)
    is_query = query < num_queries
    q_rows = q_ptr + (first_query + query)[:, None] * q_stride + head * q_head_stride
    q_main, q_rest, best, total, out_main, out_rest = begin_sums(q_rows, is_query, HEAD_DIM, MAIN, REST, BLOCK_M)

    of_head = row * num_heads + head
    is_dense = tl.load(dense_from_ptr + of_head) <= tile
    distances = distances_ptr + of_head * num_distances
    ranges = ranges_ptr + of_head * num_ranges * 2
    columns = columns_ptr + of_head * num_columns
    list_number = tl.load(tiles_of_head_ptr + head)
    tiles = tiles_ptr + ((row * num_lists + list_number) * num_listed + tl.load(task + 4)) * num_tiles
    # What there is to take, by place: ranges, of which a dense tile of queries has one, of all distances; listed tiles;
    # blocks of columns; and the diagonal.
    last_range = tl.where(is_dense, 1, num_ranges)
    last_listed = last_range + tl.where(is_dense | (list_number < 0), 0, num_tiles)
    last_columns = last_listed + tl.where(is_dense, 0, tl.cdiv(num_columns, BLOCK_N))

    in_block = tl.arange(0, BLOCK_N)
    q_position = position + query
    k_head = k_ptr + (head // GROUP) * k_head_stride
    v_head = v_ptr + (head // GROUP) * v_head_stride
    for number in range(num_pieces):
        piece = pieces_ptr + (row * num_pieces + number) * _PIECE_COLUMNS
        # Positions and slots are of 32 bits, which take half the registers; places in the arena are not.
        piece_begin = tl.load(piece + 1).to(tl.int32)
        piece_end, to_slot = piece_begin + tl.load(piece + 2).to(tl.int32), tl.load(piece).to(tl.int32) - piece_begin
        place = tl.program_id(1) * 0 - 1
        at, until = position * 0, position * 0  # the part of a place that is left, as positions
        while (place < last_columns) | (at < until):
            # One loop and one copy of the products, whatever the place: with more of them registers would not do.
            while (at >= until) & (place < last_columns):
                place += 1
                is_range, is_columns = place < last_range, (place >= last_listed) & (place < last_columns)
                is_listed = (place >= last_range) & (place < last_listed)
                from_distance = tl.load(ranges + 2 * place, mask=is_range & ~is_dense, other=0)
                to_distance = tl.load(ranges + 2 * place + 1, mask=is_range & ~is_dense, other=0)
                listed = tl.load(tiles + place - last_range, mask=is_listed, other=0)
                distance = tile - listed
                is_listed = is_listed & (distance > 0)
                is_near = tl.load(distances + distance, mask=is_listed & (distance < num_distances), other=0) != 0
                # Distance 0, the diagonal, comes in the end.
                at = tl.where(is_range, tl.where(is_dense, 0, (tile - to_distance + 1) * _TILE), begin)
                until = tl.where(is_range, (tile - tl.maximum(from_distance, 1) + 1) * _TILE, end)
                at = tl.where(is_listed & ~is_near, listed * _TILE, at)
                until = tl.where(is_listed & ~is_near, (listed + 1) * _TILE, until)
                at, until = tl.maximum(at, piece_begin), tl.minimum(until, piece_end)
                until = tl.where((place >= last_range) & (place < last_listed) & (~is_listed | is_near), at, until)
                # Ranges rise: once past the first tile of all, none that follow has keys. Nor have columns.
                first_column = tl.load(columns + (place - last_listed) * BLOCK_N, mask=is_columns, other=0)
                has_columns = is_columns & (first_column < tl.minimum(begin, piece_end))
                at, until = tl.where(is_columns, 0, at), tl.where(is_columns, has_columns.to(tl.int32), until)
                place = tl.where(is_range & (from_distance > tile), last_range - 1, place)
            is_columns = (place >= last_listed) & (place < last_columns)
            column_place = tl.maximum(place - last_listed, 0) * BLOCK_N + in_block
            num_left = tl.where(is_columns, num_columns, 0)
            column = tl.load(columns + column_place, mask=column_place < num_left, other=2**31 - 1)
            distance = tile - column // _TILE
            is_key = (column >= piece_begin) & (column < piece_end) & (column < begin)
            is_near = tl.load(distances + distance, mask=is_key & (distance < num_distances), other=0) != 0
            key = tl.where(is_columns, column, at + in_block)
            is_key = tl.where(is_columns, is_key & ~is_near, key < until)
            slots = (key + to_slot).to(tl.int64)
            sees = is_key[None, :] & (key[None, :] <= q_position[:, None])
            best, total, out_main, out_rest = take_block(
                q_main, q_rest, best, total, out_main, out_rest,
                k_head + slots[None, :] * k_stride, v_head + slots[:, None] * v_stride, is_key, sees, scale,
                HEAD_DIM, MAIN, REST, True,
            )  # fmt: skip
            at += BLOCK_N

    # Every query sees itself at least: no total is 0.
    target = (first_query + query) * num_heads + head
    tl.store(lse_ptr + target, (best + tl.log2(total)) * _LOG_2, mask=is_query)
    out_rows = out_ptr + target[:, None] * HEAD_DIM
    store_sums(out_rows, out_main, out_rest, total, is_query[:, None], HEAD_DIM, MAIN, REST)


class TritonTasks:
    """Rows as tables on the device; the same for every layer."""

    def __init__(self, rows: SparseRows, device: torch.device):
        tables = make_tasks(rows), make_pieces(rows)
        self._tasks, self._pieces = (torch.from_numpy(table).to(device, non_blocking=True) for table in tables)

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, index: SparseIndex, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``out (T, H, D)`` in the queries' dtype, ``lse (T, H)`` float32. The last dimension is contiguous.

        Raises ValueError for a dtype, head dimension or scale that the kernel was not made for.
        """
        check(q_THD, k_SHD, scale)
        T, H, D = q_THD.shape
        out, lse = q_THD.new_empty(T, H, D), q_THD.new_empty(T, H, dtype=torch.float32)
        if len(self._tasks) == 0:
            return out, lse
        main, rest = cut_head_dim(D)
        tensors = (index.distances, index.ranges, index.columns, index.dense_from, index.tiles, index.tiles_of_head)
        with on_device(q_THD):
            block = _choose_block(q_THD.dtype, D)
            _attend_sparse[(len(self._tasks) * (TILE // block.queries), H)](
                *(q_THD, k_SHD, v_SHD, out, lse, self._tasks, self._pieces, *(x.contiguous() for x in tensors)),
                *(*q_THD.stride()[:2], *k_SHD.stride()[:2], *v_SHD.stride()[:2]),
                *(H, self._pieces.shape[1], index.distances.shape[2], index.ranges.shape[2], index.columns.shape[2]),
                *(*index.tiles.shape[1:], scale * math.log2(math.e)),
                GROUP=H // k_SHD.shape[1],
                HEAD_DIM=D,
                MAIN=main,
                REST=rest,
                BLOCK_M=block.queries,
                BLOCK_N=block.keys,
                num_warps=block.num_warps,
            )
        return out, lse


@dataclass(frozen=True)
class _Block:
    """What a program takes at a time."""

    queries: int  # BLOCK_M
    keys: int  # BLOCK_N
    num_warps: int


def _choose_block(dtype: torch.dtype, head_dim: int) -> _Block:
    """Chosen for registers to do, not measured."""
    if dtype == torch.float32:
        return _Block(32 if head_dim <= 64 else 16, 32 if head_dim <= 64 else 16, num_warps=8)
    return _Block(TILE if head_dim <= 128 else 32, 64 if head_dim <= 64 else 32, num_warps=8)
