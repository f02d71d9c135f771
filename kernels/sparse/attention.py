"""Evaluate sparse attention: rows are planned once, the index is made in every layer.

Shapes: T queries, S keys of the arena, H query heads, Hkv KV heads, D head dimension.
"""

from typing import Protocol

import torch

from kernels import attention_simd, simd
from kernels.attention import TRITON_DTYPES, State
from kernels.backend import Backend, triton_runs
from kernels.sparse.aten import AtenTasks
from kernels.sparse.index import SparseIndex
from kernels.sparse.reference import sparse_attention
from kernels.sparse.rows import SparseRows
from kernels.sparse.simd import SimdTasks


class Tasks(Protocol):
    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, index: SparseIndex, scale: float
    ) -> State: ...


def available_sparse_backends(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """The backends that can run on ``device`` in ``dtype``, best first."""
    found = []
    if device.type == "cpu" and simd.host() and dtype in attention_simd.DTYPES:
        found.append(Backend.SIMD)
    if triton_runs(device) and dtype in TRITON_DTYPES:
        found.append(Backend.TRITON)
    return (*found, Backend.ATEN, Backend.REFERENCE)


class SparsePlan:
    """The sparse attention of some rows, by the backend that is named, or by the best.

    Raises ValueError for a backend that cannot run there.
    """

    def __init__(
        self, rows: SparseRows, device: torch.device, dtype: torch.dtype, backend: Backend | str | None = None
    ):
        available = available_sparse_backends(device, dtype)
        if backend is not None and backend not in available:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"sparse attention backend {str(backend)!r} cannot run {name} on {device.type}; accepted: "
                f"{', '.join(available)}; use one of these, or none, for the best of them"
            )
        self.rows, self.backend = rows, Backend(backend or available[0])
        self._tasks = self._make_tasks(device)

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, index: SparseIndex, scale: float
    ) -> State:
        """``out (T, H, D)``, float32 or in the queries' dtype, and ``lse (T, H)``, float32, natural log."""
        q_THD, k_SHD, v_SHD = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THD, k_SHD, v_SHD))
        return self._tasks.run(q_THD, k_SHD, v_SHD, index, scale)

    def _make_tasks(self, device: torch.device) -> Tasks:
        if self.backend == Backend.SIMD:
            return SimdTasks(self.rows)
        if self.backend == Backend.TRITON:
            from kernels.gpu.sparse import TritonTasks  # here, as Triton takes long to import

            return TritonTasks(self.rows, device)
        return AtenTasks(self.rows, device) if self.backend == Backend.ATEN else _Reference(self.rows)


class _Reference:
    def __init__(self, rows: SparseRows):
        self._rows = rows

    def run(self, q_THD, k_SHD, v_SHD, index, scale):
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        return sparse_attention(q_THD.to(wide), k_SHD.to(wide), v_SHD.to(wide), self._rows, index, scale)
