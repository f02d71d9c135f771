"""Segments on CPU, by a kernel of our own (``attention_simd_kernel.py``): its tasks, and how many rows they have.

Shapes: T queries, S keys of the arena, Hq query heads, Hkv KV heads, G = Hq // Hkv, D head dimension.
"""

import math

import numpy as np
import torch

from kernels import simd
from kernels.attention_simd_kernel import Task, compiled
from kernels.merge import merge_states
from kernels.segment import Segment
from kernels.simd import Target

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Rows that a task holds at a time, their accumulators within reach of the second-level cache.
_MAX_ROWS = 96
# Up to so many rows, the memory's speed decides and the next block is asked for ahead of time.
_MEMORY_BOUND_ROWS = 24
# Keys are split between threads when rows and heads are too few, into parts of at least so many.
_MIN_PART_KEYS = 512
_TASKS_PER_THREAD = 4


class SimdSegment:
    """A segment as tables of tasks, made when the first layer tells the head counts."""

    def __init__(self, segment: Segment, target: Target | None = None):
        self.segment = segment
        self.target = target or simd.host()
        self._tables: dict[tuple[int, int, int], _Table] = {}

    def run(self, q_THD, k_SHD, v_SHD, scale, state=None):
        T, Hq, D = q_THD.shape
        Hkv = k_SHD.shape[1]
        table = self._table(Hkv, Hq // Hkv)
        # Parts of a segment, which run at the same time, cannot be merged as they are written.
        merges = state is not None and table.num_parts == 1 and _is_plain(state[0]) and _is_plain(state[1])
        if merges:
            out, lse = (x.unsqueeze(0) for x in state)
        else:
            out = torch.empty(table.num_parts, T, Hq, D, dtype=torch.float32)
            lse = torch.empty(table.num_parts, T, Hq, dtype=torch.float32)
        q = q_THD if q_THD.stride()[1:] == (D, 1) else q_THD.contiguous()
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k_SHD, v_SHD))
        compiled(self.target, q.dtype, D, table.tile_rows, table.num_tiles, table.max_rows).launch(
            *(len(table.tasks), table.tasks, q, k, v, out, lse, int(merges)),
            *(q.stride(0), k.stride(0), v.stride(0), k.stride(1), v.stride(1), Hq // Hkv, Hq),
            scale * math.log2(math.e),
        )
        if merges:
            return state
        state = (out[0], lse[0]) if state is None else merge_states(*state, out[0], lse[0])
        for part in range(1, table.num_parts):
            state = merge_states(*state, out[part], lse[part])
        return state

    def _table(self, num_kv_heads: int, group: int) -> "_Table":
        key = (num_kv_heads, group, torch.get_num_threads())
        if key not in self._tables:
            self._tables[key] = _Table(self.segment, *key)
        return self._tables[key]


def _is_plain(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous()


class _Table:
    """The tasks of a segment for given head counts, most work first, and the tile that suits them."""

    def __init__(self, segment: Segment, num_kv_heads: int, group: int, num_threads: int):
        q_lens = np.diff(segment.q_offsets)
        queries_per_task = max(1, _MAX_ROWS // group)
        self.max_rows = max(_MAX_ROWS, group)  # a query's heads of one group stay together, however many
        tasks_of_row = -(-q_lens // queries_per_task)
        row = np.repeat(np.arange(segment.num_rows), tasks_of_row)
        within = np.arange(len(row)) - np.repeat(np.cumsum(tasks_of_row) - tasks_of_row, tasks_of_row)
        first = within * queries_per_task
        num_queries = np.minimum(queries_per_task, q_lens[row] - first)
        num_keys = segment.k_lens[row]
        # Bottom-right: the row's last query sees all of its keys.
        visible = num_keys - (q_lens[row] - 1 - first) if segment.causal else num_keys

        self.num_parts = _num_parts(len(row) * num_kv_heads, int(num_keys.max(initial=0)), num_threads)
        shape = (self.num_parts, num_kv_heads, len(row))
        part, head, task = (index.ravel() for index in np.indices(shape))
        part_lens = -(-num_keys // self.num_parts)
        skipped = np.minimum(part * part_lens[task], num_keys[task])
        tasks = np.empty((len(task), Task.COUNT), dtype=np.int64)
        tasks[:, Task.QUERY] = segment.q_offsets[row[task]] + first[task]
        tasks[:, Task.NUM_QUERIES] = num_queries[task]
        tasks[:, Task.HEAD] = head
        tasks[:, Task.KEY] = segment.k_starts[row[task]] + skipped
        tasks[:, Task.NUM_KEYS] = np.minimum(part_lens[task], num_keys[task] - skipped)
        tasks[:, Task.VISIBLE] = visible[task] - skipped
        tasks[:, Task.VISIBLE_STEP] = int(segment.causal)
        tasks[:, Task.OUT_ROW] = part * segment.num_queries + tasks[:, Task.QUERY]
        work = tasks[:, Task.NUM_KEYS] * (tasks[:, Task.NUM_QUERIES] * group + _MEMORY_BOUND_ROWS)
        self.tasks = np.ascontiguousarray(tasks[np.argsort(-work, kind="stable")])

        num_rows = int(num_queries.max(initial=1)) * group
        self.tile_rows = _tile_rows(num_rows)
        self.num_tiles = -(-num_rows // self.tile_rows) if num_rows <= _MEMORY_BOUND_ROWS else 0


def _tile_rows(num_rows: int) -> int:
    """Rows of a tile: 6 at most, which is what registers hold, and as few as can be left empty in the last tile."""
    return min(num_rows, min((6, 5, 4), key=lambda rows: -num_rows % rows))


def _num_parts(num_tasks: int, num_keys: int, num_threads: int) -> int:
    """Into how many parts the keys are split so that all threads have work."""
    wanted = -(-_TASKS_PER_THREAD * num_threads // max(1, num_tasks)) if num_threads > 1 else 1
    return max(1, min(wanted, num_keys // _MIN_PART_KEYS))
