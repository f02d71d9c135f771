"""Segments on CPU, by a kernel of our own (``attention_simd_kernel.py``): its tasks, and how many rows they have.

Shapes: T queries, S keys of the arena, Hq query heads, Hkv KV heads, G = Hq // Hkv, D head dimension.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from kernels import simd
from kernels.attention_simd_kernel import Task, compiled
from kernels.backend import Backend
from kernels.merge import merge_stacked
from kernels.segment import Segment
from kernels.simd import Target

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Rows that a task holds at a time, their accumulators within reach of the second-level cache.
_MAX_ROWS = 96
# Up to so many rows, the memory's speed decides and the next block is asked for ahead of time.
_MEMORY_BOUND_ROWS = 24
# Keys are split between threads when rows and heads are too few, into parts of at least so many, as parts have to be
# merged; unless the tasks, most work first to whoever is free, end at nearly the same time.
_MIN_PART_KEYS = 512
_TASKS_PER_THREAD = 4
_EVEN = 1.2  # of the time that threads would take if they ended together

_LOG2_E = math.log2(math.e)


class SimdPlan:
    """Segments whose rows hold the same queries, as tables of tasks, made when the first layer tells the head counts.

    A task takes the keys of its row in all of the segments, one after the other.
    """

    def __init__(self, segments: Sequence[Segment], target: Target | None = None):
        self.segments = tuple(segments)
        self.target = target or simd.host()
        self._tables: dict[tuple[int, int, int], _Table] = {}

    def run(self, q_THD, k_SHD, v_SHD, scale, state=None):
        # Once a layer and segment, some 40 times a step of a small model: calls into PyTorch are kept few.
        T, Hq, D = q_THD.shape
        Hkv = k_SHD.shape[1]
        if q_THD.stride()[1:] != (D, 1):
            q_THD = q_THD.contiguous()
        table = self._table(Hkv, Hq // Hkv)
        # Parts of a segment, which run at the same time, cannot be merged as they are written.
        merges = state is not None and table.num_parts == 1 and _is_plain(state[0]) and _is_plain(state[1])
        if merges:
            out, lse = state
        else:
            before = 0 if state is None else 1
            outs = torch.empty(before + table.num_parts, T, Hq, D, dtype=torch.float32)
            lses = torch.empty(before + table.num_parts, T, Hq, dtype=torch.float32)
            out, lse = outs[before:], lses[before:]
        (k_stride, k_head_stride, _), (v_stride, v_head_stride, _) = k_SHD.stride(), v_SHD.stride()
        compiled(self.target, q_THD.dtype, D, table.tile_rows, table.num_tiles, table.max_rows).launch(
            *(table.num_tasks, table.tasks_address, q_THD, k_SHD, v_SHD, out, lse, int(merges)),
            *(q_THD.stride(0), k_stride, v_stride, k_head_stride, v_head_stride, Hq // Hkv, Hq),
            *(len(self.segments), scale * _LOG2_E),
        )
        if merges:
            return state
        if state is not None:
            outs[0], lses[0] = state
        return merge_stacked(outs, lses, Backend.SIMD) if len(outs) > 1 else (outs[0], lses[0])

    def _table(self, num_kv_heads: int, group: int) -> "_Table":
        key = (num_kv_heads, group, torch.get_num_threads())
        if key not in self._tables:
            self._tables[key] = _Table(self.segments, *key)
        return self._tables[key]


def _is_plain(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous()


class _Table:
    """The tasks of segments for given head counts, most work first, and the tile that suits them."""

    def __init__(self, segments: Sequence[Segment], num_kv_heads: int, group: int, num_threads: int):
        q_offsets = segments[0].q_offsets
        q_lens = np.diff(q_offsets)
        queries_per_task = max(1, _MAX_ROWS // group)
        self.max_rows = max(_MAX_ROWS, group)  # a query's heads of one group stay together, however many
        row, first = _cut(q_lens, queries_per_task)
        num_queries = np.minimum(queries_per_task, q_lens[row] - first)
        query = q_offsets[row] + first

        num_keys = sum(segment.k_lens for segment in segments)[row]
        work = np.tile(num_keys * (num_queries * group + _MEMORY_BOUND_ROWS), num_kv_heads)
        self.num_parts = _num_parts(work, int(num_keys.max(initial=0)), num_threads)
        part = np.arange(self.num_parts)[:, None, None]
        tasks = np.empty((self.num_parts, num_kv_heads, len(row), len(segments), Task.COUNT), dtype=np.int64)
        tasks[..., Task.QUERY] = query[:, None]
        tasks[..., Task.NUM_QUERIES] = num_queries[:, None]
        tasks[..., Task.HEAD] = np.arange(num_kv_heads)[:, None, None]
        tasks[..., Task.OUT_ROW] = (part * segments[0].num_queries + query)[..., None]
        for number, segment in enumerate(segments):  # each part takes its share of every range
            own = tasks[..., number, :]
            k_len = segment.k_lens[row]
            # Bottom-right: the row's last query sees all of its keys.
            visible = k_len - (q_lens[row] - 1 - first) if segment.causal else k_len
            part_len = -(-k_len // self.num_parts)
            skipped = np.minimum(part * part_len, k_len)
            own[..., Task.KEY] = segment.k_starts[row] + skipped
            own[..., Task.NUM_KEYS] = np.minimum(part_len, k_len - skipped)
            own[..., Task.VISIBLE] = visible - skipped
            own[..., Task.VISIBLE_STEP] = int(segment.causal)
        work = tasks[..., Task.NUM_KEYS].sum(-1) * (num_queries * group + _MEMORY_BOUND_ROWS)
        by_work = np.argsort(-work.ravel(), kind="stable")
        self.tasks = tasks.reshape(-1, len(segments), Task.COUNT)[by_work]
        self.num_tasks, self.tasks_address = len(self.tasks), self.tasks.ctypes.data

        num_rows = int(num_queries.max(initial=1)) * group
        self.tile_rows = _tile_rows(num_rows)
        self.num_tiles = -(-num_rows // self.tile_rows) if num_rows <= _MEMORY_BOUND_ROWS else 0


def _cut(q_lens: np.ndarray, queries_per_task: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows cut into tasks of so many queries at most: each task's row, and its first query within it."""
    tasks_of_row = -(-q_lens // queries_per_task)
    row = np.repeat(np.arange(len(q_lens)), tasks_of_row)
    before = np.cumsum(tasks_of_row) - tasks_of_row
    return row, (np.arange(len(row)) - before[row]) * queries_per_task


def _tile_rows(num_rows: int) -> int:
    """Rows of a tile: 6 at most, which is what registers hold, and as few as can be left empty in the last tile."""
    return min(num_rows, min((6, 5, 4), key=lambda rows: -num_rows % rows))


def _num_parts(work: np.ndarray, num_keys: int, num_threads: int) -> int:
    """Into how many parts the keys of tasks are split so that all threads have work; ``work`` is that of each task."""
    if _ends_evenly(work, num_threads):
        return 1
    wanted = -(-_TASKS_PER_THREAD * num_threads // max(1, len(work)))
    return max(1, min(wanted, num_keys // _MIN_PART_KEYS))


def _ends_evenly(work: np.ndarray, num_threads: int) -> bool:
    if num_threads == 1 or len(work) >= _TASKS_PER_THREAD * num_threads:
        return True
    busy = [0] * num_threads
    for task in sorted(work.tolist(), reverse=True):
        busy[busy.index(min(busy))] += task
    return max(busy) * num_threads <= _EVEN * sum(busy)
