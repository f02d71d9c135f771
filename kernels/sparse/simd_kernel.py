"""Sparse attention on CPU: tasks that list the keys that a mask lets them see, and then attend to these.

A task is the queries of one row and head that stand in one tile of positions. It walks the head's ranges of distances,
columns and tiles, and writes down the slots of the keys that they stand for, each piece of the row's history in turn.
Then come the keys of the diagonal's tile, of which each query sees one more than the one before. Where keys lie makes
no difference to what ``attention_simd_tiles.py`` does with them: it reads each from its own address, in any case.

Shapes: T queries, H query heads, D head dimension; those of ``index.py`` and ``rows.py``.
"""

from enum import IntEnum
from functools import cache

import torch

from kernels import simd
from kernels.attention_simd_tiles import TileEmitter
from kernels.simd import Kernel, Pointer, Target, Value
from kernels.sparse.rows import TILE
from kernels.sparse.tasks import Piece, Task

_BLOCK_KEYS = 64
# 64 queries in tiles of this many leave 2 rows empty. Tiles of 4, which would leave none, do more loads for a product.
_TILE_ROWS = 6


class Argument(IntEnum):
    """The kernel's arguments, in order. Strides are in elements; the last dimension's is 1."""

    TASKS = 0  # (tasks, Task.COUNT) int64; every head takes each of them
    PIECES = 1  # (R, P, Piece.COUNT) int64
    NUM_PIECES = 2  # P
    Q = 3
    K = 4
    V = 5
    OUT = 6  # (T, H, D) float32
    LSE = 7  # (T, H) float32
    Q_STRIDE = 8  # from token to token
    Q_HEAD_STRIDE = 9
    K_STRIDE = 10
    V_STRIDE = 11
    K_HEAD_STRIDE = 12
    V_HEAD_STRIDE = 13
    GROUP = 14  # query heads of a KV head
    NUM_HEADS = 15  # H
    DISTANCES = 16
    NUM_DISTANCES = 17  # K
    RANGES = 18
    NUM_RANGES = 19  # W
    COLUMNS = 20
    NUM_COLUMNS = 21  # C
    DENSE_FROM = 22
    TILES = 23
    TILES_OF_HEAD = 24
    NUM_LISTS = 25  # L
    NUM_LISTED_TILES = 26  # N
    NUM_TILES = 27  # B
    LISTS = 28  # (threads, LIST_LENGTH) int32: where a thread writes down a task's keys
    LIST_LENGTH = 29
    SCALE = 30  # the softmax's, times log2(e)


def list_length(num_keys: int) -> int:
    """Room for the keys of a task that sees so many: whole vectors are written."""
    return num_keys + 64


class _Emitter(TileEmitter):
    def __init__(self, target: Target, dtype: torch.dtype, head_dim: int):
        kernel = Kernel("sparse_attention", target)
        scale = kernel.real(Argument.SCALE)
        super().__init__(kernel, dtype, head_dim, _TILE_ROWS, _BLOCK_KEYS, max_rows=TILE, scale=scale)

    def emit(self) -> Kernel:
        k = self.kernel
        keys = k.pointer(Argument.LISTS, simd.I32) + k.thread() * k.integer(Argument.LIST_LENGTH)
        num_heads = k.integer(Argument.NUM_HEADS)
        with k.tasks() as index:
            task = k.pointer(Argument.TASKS, simd.I64) + index // num_heads * int(Task.COUNT)
            self.head = index % num_heads
            num_queries = task[Task.NUM_QUERIES]
            rows_end = self.whole_tiles(num_queries)
            self.start(rows_end)
            self._copy_queries(task)
            num_before, num_keys = self._list_keys(task, keys)
            first_of_tile = task[Task.POSITION] % TILE
            with k.range(0, num_queries) as query:
                self.visible[query] = (num_before + first_of_tile + query + 1).convert(simd.I32)
            head = self.head // k.integer(Argument.GROUP)
            self.attend(
                _Listed(self, Argument.K, head, keys, num_keys), _Listed(self, Argument.V, head, keys, num_keys),
                num_keys, rows_end,
            )  # fmt: skip
            self._finish(task)
        return k

    def _copy_queries(self, task: Pointer) -> None:
        k = self.kernel
        q = k.pointer(Argument.Q, self.element) + self.head * k.integer(Argument.Q_HEAD_STRIDE)
        with k.range(0, task[Task.NUM_QUERIES]) as query:
            self.copy_query(query, q + (task[Task.QUERY] + query) * k.integer(Argument.Q_STRIDE))

    def _finish(self, task: Pointer) -> None:
        k = self.kernel
        out, lse = k.pointer(Argument.OUT, simd.F32), k.pointer(Argument.LSE, simd.F32)
        with k.range(0, task[Task.NUM_QUERIES]) as query:
            place = (task[Task.QUERY] + query) * k.integer(Argument.NUM_HEADS) + self.head
            self.finish(query, out + place * self.D, lse + place)

    def _list_keys(self, task: Pointer, keys: Pointer) -> tuple[Value, Value]:
        """Writes down the slots of the keys that the task's queries see; returns how many all of them see, and all."""
        k = self.kernel
        tile = task[Task.POSITION] // TILE
        listed = _List(self, keys)
        row_and_head = task[Task.ROW] * k.integer(Argument.NUM_HEADS) + self.head
        is_dense = (k.pointer(Argument.DENSE_FROM, simd.I32)[row_and_head].convert(simd.I64) > tile).equals(0)
        num_pieces = k.integer(Argument.NUM_PIECES)
        pieces = k.pointer(Argument.PIECES, simd.I64) + task[Task.ROW] * num_pieces * int(Piece.COUNT)
        zero = k.constant(0, simd.I64)

        def each_piece():
            return k.range(0, num_pieces)

        with each_piece() as number:
            piece = _Piece(pieces + number * int(Piece.COUNT), tile * TILE)
            with k.when(is_dense):
                listed.add(piece, zero, tile * TILE)
            with k.when(is_dense.equals(0)):
                self._list_ranges(listed, piece, row_and_head, tile)
                self._list_columns(listed, piece, row_and_head, tile)
                self._list_tiles(listed, piece, task, row_and_head, tile)
        num_before = listed.length.value
        with each_piece() as number:
            end = task[Task.POSITION] + task[Task.NUM_QUERIES]
            listed.add(_Piece(pieces + number * int(Piece.COUNT), end), tile * TILE, end)
        return num_before, listed.length.value

    def _list_ranges(self, listed: "_List", piece: "_Piece", row_and_head: Value, tile: Value) -> None:
        k = self.kernel
        num_ranges = k.integer(Argument.NUM_RANGES)
        ranges = k.pointer(Argument.RANGES, simd.I32) + row_and_head * num_ranges * 2
        with k.range(0, num_ranges) as number:
            first, last = (ranges[number * 2 + i].convert(simd.I64) for i in range(2))
            # Distance 0, the diagonal, comes in the end.
            listed.add(piece, (tile - last + 1) * TILE, (tile - first.maximum(1) + 1) * TILE)

    def _list_columns(self, listed: "_List", piece: "_Piece", row_and_head: Value, tile: Value) -> None:
        k = self.kernel
        num_columns = k.integer(Argument.NUM_COLUMNS)
        columns = k.pointer(Argument.COLUMNS, simd.I32) + row_and_head * num_columns
        with k.range(0, num_columns) as number:
            column = columns[number].convert(simd.I64)
            is_there = (piece.position > column).equals(0) & (column < piece.end)
            is_new = self._is_far(row_and_head, (tile - column // TILE).maximum(0))
            listed.add_one(column + piece.to_slot, is_there & is_new)

    def _list_tiles(self, listed: "_List", piece: "_Piece", task: Pointer, row_and_head: Value, tile: Value) -> None:
        k = self.kernel
        number = k.pointer(Argument.TILES_OF_HEAD, simd.I32)[self.head]
        with k.when((number < 0).equals(0)):
            size = k.integer(Argument.NUM_TILES)
            list_of_row = task[Task.ROW] * k.integer(Argument.NUM_LISTS) + number.convert(simd.I64)
            place = list_of_row * k.integer(Argument.NUM_LISTED_TILES) + task[Task.LISTED]
            tiles = k.pointer(Argument.TILES, simd.I32) + place * size
            with k.range(0, size) as i:
                other = tiles[i].convert(simd.I64)
                with k.when((other < tile) & self._is_far(row_and_head, (tile - other).maximum(0))):
                    listed.add(piece, other * TILE, (other + 1) * TILE)

    def _is_far(self, row_and_head: Value, distance: Value) -> Value:
        """Whether a head's distances have not this one, whose keys are then not listed yet."""
        k = self.kernel
        num_distances = k.integer(Argument.NUM_DISTANCES)
        distances = k.pointer(Argument.DISTANCES, simd.I8) + row_and_head * num_distances
        is_in = distances[distance.minimum(num_distances - 1)].equals(1) & (distance < num_distances)
        return is_in.equals(0)


class _Piece:
    """The keys of a piece before position ``end``."""

    def __init__(self, piece: Pointer, end: Value):
        self.position = piece[Piece.POSITION]
        self.end = (self.position + piece[Piece.NUM_KEYS]).minimum(end)
        self.to_slot = piece[Piece.SLOT] - self.position


class _List:
    def __init__(self, emitter: _Emitter, keys: Pointer):
        self._kernel, self._keys = emitter.kernel, keys
        self.length = emitter.kernel.variable(emitter.kernel.constant(0, simd.I64))

    def add(self, piece: _Piece, first: Value, end: Value) -> None:
        """The keys of the piece at positions from ``first`` on, before ``end``."""
        k = self._kernel
        first, end = first.maximum(piece.position), end.minimum(piece.end)
        length = self.length.value
        with k.range(first, end, k.lanes) as position:
            slots = k.lane_indices() + (position + piece.to_slot).convert(simd.I32).spread()
            self._keys.store(length + (position - first), slots)
        self.length.value = length + (end - first).maximum(0)

    def add_one(self, slot: Value, condition: Value) -> None:
        length = self.length.value
        self._keys[length] = slot.convert(simd.I32)
        self.length.value = length + condition.convert(simd.I64)


class _Listed:
    """Keys or values of one KV head at the slots of a list."""

    def __init__(self, emitter: _Emitter, argument: Argument, head: Value, keys: Pointer, count: Value):
        k = emitter.kernel
        stride, head_stride = {
            Argument.K: (Argument.K_STRIDE, Argument.K_HEAD_STRIDE),
            Argument.V: (Argument.V_STRIDE, Argument.V_HEAD_STRIDE),
        }[argument]
        self._emitter, self._keys, self._stride, self._last = emitter, keys, k.integer(stride), count - 1
        self._base = k.pointer(argument, emitter.element) + head * k.integer(head_stride)

    def at(self, row: Value) -> Pointer:
        return self._base + self._keys[row.minimum(self._last)].convert(simd.I64) * self._stride

    def prefetch_next(self, row: Value, count: int) -> None:
        e = self._emitter
        per_line = 64 // e.dtype.itemsize
        for i in range(count):
            next_row = self.at(row + (i + e.block_keys))
            for line in range(-(-e.D // per_line)):
                next_row.prefetch(line * per_line, once=False)

    def ahead(self, first_key: Value, first_row: Value, num_steps: int) -> None:
        """Arithmetic decides: a tile of queries is many rows."""
        return None


@cache
def compiled(target: Target, dtype: torch.dtype, head_dim: int) -> simd.CompiledKernel:
    return _Emitter(target, dtype, head_dim).emit().compile()
