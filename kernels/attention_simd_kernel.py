"""The kernel of our own CPU attention, over a table of tasks whose keys lie in ranges.

A task is some queries of one row and one KV head, with the head's whole group, against the row's keys, which may lie in
several ranges. What it does with them is in ``attention_simd_tiles.py``.

Few queries a key leave a task bound by memory: it asks for keys and values to come while it works on those that are
there.

Shapes: T queries, Hq query heads, G of them for each KV head, D head dimension.
"""

from enum import IntEnum
from functools import cache

import torch

from kernels import simd
from kernels.attention_simd_tiles import TileEmitter
from kernels.simd import Kernel, Pointer, Target, Value

_BLOCK_KEYS = 64
# Where memory decides, small blocks: keys and values that are on their way must not drive each other, or what is being
# worked on, out of the nearest cache. Of 16, 32, 48 and 64 keys, and 1 to 4 blocks ahead, these read fastest (Zen 5).
_MEMORY_BOUND_BLOCK_KEYS = 16
_BLOCKS_AHEAD = 2


class Argument(IntEnum):
    """The kernel's arguments, in order. Strides are in elements; the last dimension's is 1."""

    TASKS = 0
    Q = 1
    K = 2
    V = 3
    OUT = 4  # (parts, T, Hq, D) float32
    LSE = 5  # (parts, T, Hq) float32
    MERGE = 6  # whether OUT and LSE hold a state, over other keys, that the new one is merged with
    Q_STRIDE = 7  # from token to token
    K_STRIDE = 8
    V_STRIDE = 9
    K_HEAD_STRIDE = 10
    V_HEAD_STRIDE = 11
    GROUP = 12  # G
    NUM_HEADS = 13  # Hq
    NUM_RANGES = 14  # of keys, that each task has
    SCALE = 15  # the softmax's, times log2(e)


class Task(IntEnum):
    """Columns of the task table, whose rows are the ranges of keys: a task's ranges follow each other."""

    QUERY = 0  # first query
    NUM_QUERIES = 1
    HEAD = 2  # KV head
    KEY = 3  # first key
    NUM_KEYS = 4
    VISIBLE = 5  # of these keys, how many the first query sees
    VISIBLE_STEP = 6  # how many more each further query sees: 1 under a causal mask
    OUT_ROW = 7  # row of OUT and LSE for the first query: T times the part, and the query
    COUNT = 8


class _Emitter(TileEmitter):
    """``num_tiles``: of how many tiles a memory-bound task consists; 0 when tasks are bound by arithmetic."""

    def __init__(
        self, target: Target, dtype: torch.dtype, head_dim: int, tile_rows: int, num_tiles: int, max_rows: int
    ):
        kernel = Kernel("attention", target)
        block_keys = _MEMORY_BOUND_BLOCK_KEYS if num_tiles else _BLOCK_KEYS
        super().__init__(kernel, dtype, head_dim, tile_rows, block_keys, max_rows, kernel.real(Argument.SCALE))
        self.num_tiles, self.group = num_tiles, kernel.integer(Argument.GROUP)

    def emit(self) -> Kernel:
        k = self.kernel
        tasks, num_ranges = k.pointer(Argument.TASKS, simd.I64), k.integer(Argument.NUM_RANGES)
        with k.tasks() as index:
            task = tasks + index * num_ranges * int(Task.COUNT)
            rows_end = self.whole_tiles(task[Task.NUM_QUERIES] * self.group)
            self.start(rows_end)
            self._copy_queries(task)
            with k.range(0, num_ranges) as number:
                self._attend(task + number * int(Task.COUNT), rows_end)
            # Most often the next task is this thread's, too: its first keys come while this one's results are written.
            following = tasks + (index + 1).minimum(k.num_tasks - 1) * num_ranges * int(Task.COUNT)
            for argument in (Argument.K, Argument.V):
                _Rows(self, argument, following, following[Task.NUM_KEYS]).prefetch_first()
            self._finish(task)
        return k

    def _copy_queries(self, task: Pointer) -> None:
        k = self.kernel
        q = k.pointer(Argument.Q, self.element) + task[Task.HEAD] * self.group * self.D
        with k.range(0, task[Task.NUM_QUERIES]) as query:
            token = q + (task[Task.QUERY] + query) * k.integer(Argument.Q_STRIDE)
            with k.range(0, self.group) as head:
                self.copy_query(query * self.group + head, token + head * self.D)

    def _attend(self, keys: Pointer, rows_end: Value) -> None:
        """Takes the keys of one range, a row of the task table, into the task's sums."""
        last_visible = keys[Task.VISIBLE] + keys[Task.VISIBLE_STEP] * (keys[Task.NUM_QUERIES] - 1)
        num_keys = keys[Task.NUM_KEYS].minimum(last_visible)
        k_rows, v_rows = (_Rows(self, argument, keys, num_keys) for argument in (Argument.K, Argument.V))
        k_rows.prefetch_first()
        v_rows.prefetch_first()
        self._see(keys)
        self.attend(k_rows, v_rows, num_keys, rows_end)

    def _see(self, keys: Pointer) -> None:
        """Notes how many keys of a range each row sees."""
        k = self.kernel
        with k.range(0, keys[Task.NUM_QUERIES]) as query:
            visible = keys[Task.VISIBLE] + keys[Task.VISIBLE_STEP] * query
            visible = visible.maximum(0).minimum(keys[Task.NUM_KEYS])
            with k.range(0, self.group) as head:
                self.visible[query * self.group + head] = visible.convert(simd.I32)

    def _finish(self, task: Pointer) -> None:
        k = self.kernel
        out, lse = k.pointer(Argument.OUT, simd.F32), k.pointer(Argument.LSE, simd.F32)
        with k.range(0, task[Task.NUM_QUERIES]) as query, k.range(0, self.group) as head:
            place = (task[Task.OUT_ROW] + query) * k.integer(Argument.NUM_HEADS) + task[Task.HEAD] * self.group + head
            self.finish(query * self.group + head, out + place * self.D, lse + place, k.integer(Argument.MERGE) > 0)


class _Rows:
    """The rows of the arena that a task reads, of one KV head."""

    def __init__(self, emitter: _Emitter, argument: Argument, task: Pointer, count: Value):
        k = emitter.kernel
        stride, head_stride = {
            Argument.K: (Argument.K_STRIDE, Argument.K_HEAD_STRIDE),
            Argument.V: (Argument.V_STRIDE, Argument.V_HEAD_STRIDE),
        }[argument]
        self._emitter, self._stride = emitter, k.integer(stride)
        start = task[Task.HEAD] * k.integer(head_stride) + task[Task.KEY] * self._stride
        self._base = k.pointer(argument, emitter.element) + start
        self._last = count - 1

    def at(self, row: Value) -> Pointer:
        """Row ``row``; the last one in place of those past it, which may not be read, and whose scores are masked."""
        return self._base + row.minimum(self._last) * self._stride

    def prefetch_first(self) -> None:
        """Asks for the task's first blocks."""
        e = self._emitter
        if e.num_tiles:
            with e.kernel.range(0, (self._last + 1).minimum(_BLOCKS_AHEAD * e.block_keys)) as row:
                for line in range(self._lines):
                    (self._base + row * self._stride).prefetch(line * self._line, once=True)

    def prefetch_next(self, row: Value, count: int) -> None:
        """Where arithmetic decides: asks for the same rows of the next block. Many tiles' work lies before it."""
        e = self._emitter
        if not e.num_tiles:
            for i in range(count):
                next_row = self._base + (row + (i + e.block_keys)) * self._stride
                for line in range(self._lines):
                    next_row.prefetch(line * self._line, once=False)

    def ahead(self, first_key: Value, first_row: Value, num_steps: int) -> "_Ahead | None":
        """Requests for a later block, made in a tile's ``num_steps`` steps; None where memory does not decide."""
        return _Ahead(self, first_key, first_row, num_steps) if self._emitter.num_tiles else None

    @property
    def _line(self) -> int:
        """Elements of a cache line."""
        return 64 // self._emitter.dtype.itemsize

    @property
    def _lines(self) -> int:
        """Cache lines of a row."""
        return -(-self._emitter.D // self._line)


class _Ahead:
    """Requests for the rows of the block after the next, spread evenly over the steps of a task's tiles."""

    def __init__(self, rows: _Rows, first_key: Value, first_row: Value, num_steps: int):
        e = rows._emitter
        self._rows = rows
        all_steps = num_steps * e.num_tiles
        # A step asks for some rows, or for some of a row's lines.
        self._rows_per_step = -(-e.block_keys // all_steps)
        self._steps_per_row = max(1, all_steps // e.block_keys)
        self._first_step = first_row // e.R * num_steps
        self._base = rows._base + (first_key + _BLOCKS_AHEAD * e.block_keys) * rows._stride

    def prefetch(self, step: Value) -> None:
        rows, step = self._rows, self._first_step + step
        if self._steps_per_row == 1:
            for i in range(self._rows_per_step):
                row = self._base + (step * self._rows_per_step + i) * rows._stride
                for line in range(rows._lines):
                    row.prefetch(line * rows._line, once=True)
            return
        lines = -(-rows._lines // self._steps_per_row)
        part = self._base + step // self._steps_per_row * rows._stride
        part = part + step % self._steps_per_row * (lines * rows._line)
        for line in range(lines):
            part.prefetch(line * rows._line, once=True)


@cache
def compiled(
    target: Target, dtype: torch.dtype, head_dim: int, tile_rows: int, num_tiles: int, max_rows: int
) -> simd.CompiledKernel:
    return _Emitter(target, dtype, head_dim, tile_rows, num_tiles, max_rows).emit().compile()
