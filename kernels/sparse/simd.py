"""Sparse attention on CPU: the tasks of our own kernel (``simd_kernel.py``) and its launch.

Shapes: T queries, S keys of the arena, H query heads, D head dimension.
"""

import math

import torch

from kernels import simd
from kernels.simd import Target
from kernels.sparse.index import SparseIndex
from kernels.sparse.rows import SparseRows
from kernels.sparse.simd_kernel import compiled, list_length
from kernels.sparse.tasks import make_pieces, make_tasks


class SimdTasks:
    """Rows as tables; the same for every layer."""

    def __init__(self, rows: SparseRows, target: Target | None = None):
        self._target = target or simd.host()
        self._tasks, self._pieces = make_tasks(rows), make_pieces(rows)
        self._list_length = list_length(int(rows.num_keys.max(initial=0)))

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, index: SparseIndex, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``out (T, H, D)`` and ``lse (T, H)``, float32. Of all tensors the last dimension is contiguous."""
        T, H, D = q_THD.shape
        out, lse = torch.empty(T, H, D), torch.empty(T, H)
        lists = torch.empty(torch.get_num_threads(), self._list_length, dtype=torch.int32)
        tiles = index.tiles
        tensors = [tensor.contiguous() for tensor in (index.distances, index.ranges, index.columns, index.dense_from)]
        distances, ranges, columns, dense_from = tensors
        compiled(self._target, q_THD.dtype, D).launch(
            *(len(self._tasks) * H, self._tasks, self._pieces, self._pieces.shape[1], q_THD, k_SHD, v_SHD, out, lse),
            *(*q_THD.stride()[:2], k_SHD.stride(0), v_SHD.stride(0), k_SHD.stride(1), v_SHD.stride(1)),
            *(H // k_SHD.shape[1], H, distances, distances.shape[2], ranges, ranges.shape[2]),
            *(columns, columns.shape[2], dense_from, tiles.contiguous(), index.tiles_of_head, *tiles.shape[1:]),
            *(lists, self._list_length, scale * math.log2(math.e)),
        )
        return out, lse
