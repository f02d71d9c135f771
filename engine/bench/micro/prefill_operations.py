"""The attention of one layer where prompts are read: to all keys, and sparse, where making the mask is an operation of
its own.

Shapes: T queries, H query heads, Hkv KV heads, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from engine.attention import Keeps
from engine.bench.micro.micro_results import PrefillPart, Sizes
from engine.bench.micro.operation import Call, Needs, Work
from engine.bench.micro.prefill_workload import PrefillWorkload
from engine.bench.micro.workload import num_slots
from engine.prefill import PrefillMethod
from kernels import AttentionPlan, Backend
from kernels.sparse import (
    LAST_QUERIES,
    TILE,
    BlockSparse,
    SparseIndex,
    SparsePlan,
    VerticalSlash,
    lower,
    num_pairs,
    num_seen,
    predicted_index_bytes,
)

_F32 = 4  # bytes
_STATES = 3  # that dense attention holds when it merges two; sparse attention has fewer
_SOFTMAX_AND_SUMS = 5  # FLOPs for each score: scaled, less the largest, its exponential, and two sums


@dataclass(frozen=True)
class PrefillOperation:
    """Attention with an index that is there already, or the making of that index. The dense method has none."""

    method: PrefillMethod
    part: PrefillPart
    is_row_operation = False

    @property
    def name(self) -> str:
        return str(self.part)

    def workload(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int) -> PrefillWorkload:
        return PrefillWorkload(sizes, device, dtype, seed)

    def call(self, workload: PrefillWorkload, backend: Backend | None) -> Call:
        on = (workload.device, workload.dtype, backend)
        tensors = (workload.q_THD, workload.k_SHD, workload.v_SHD)
        if self.method.is_dense:
            dense = AttentionPlan.of(workload.segments, *on)
            run, backends = partial(dense.run, *tensors, workload.scale), tuple(map(str, dense.backends))
            return Call(run, _attention_work(workload, 1.0), backends, density=1.0)
        make_index = partial(_make_index, self.method, workload)
        index = make_index()
        density = float(num_seen(index, workload.rows).double().mean()) / num_pairs(workload.rows)
        if self.part is PrefillPart.INDEX:
            return Call(make_index, _index_work(self.method, workload, index), density=density)
        plan = SparsePlan(workload.rows, *on)
        run = partial(plan.run, *tensors, index, workload.scale)
        return Call(run, _attention_work(workload, density), (str(plan.backend),), density=density)

    def needs(self, sizes: Sizes, dtype: torch.dtype, backend: Backend | None) -> Needs:
        slot = 2 * sizes.num_kv_heads * sizes.head_dim
        slots, num_queries = num_slots(sizes, Keeps.NODES), sizes.batch_size * sizes.unique_seq_len
        q_size = num_queries * sizes.num_heads * sizes.head_dim
        states = _STATES * (q_size + num_queries * sizes.num_heads) * _F32
        # The reference computes in float32, in copies of the whole arena.
        copied = slots * slot * _F32 if backend == Backend.REFERENCE else 0
        lasting = q_size * dtype.itemsize + _predicted_index_bytes(self.method, sizes)
        return Needs({Keeps.NODES: slots * slot * dtype.itemsize}, lasting, states + copied)


def prefill_operations(methods: Sequence[PrefillMethod]) -> list[PrefillOperation]:
    """As they are shown: of each method attention, and of each but the dense one the index that it takes."""
    parts = [(method, part) for method in methods for part in PrefillPart]
    return [
        PrefillOperation(method, part) for method, part in parts if part is PrefillPart.ATTENTION or not method.is_dense
    ]


def _make_index(method: PrefillMethod, workload: PrefillWorkload) -> SparseIndex:
    patterns = [method.pattern] * workload.sizes.num_heads
    return lower(patterns, workload.q_THD, workload.k_SHD, workload.rows, workload.scale)


def _predicted_index_bytes(method: PrefillMethod, sizes: Sizes) -> int:
    if method.is_dense:
        return 0
    # Rows are alike: one says what each takes, and a table of all of them may be too long to make.
    num_new, num_keys = (np.array([n]) for n in (sizes.unique_seq_len, sizes.num_shared + sizes.unique_seq_len))
    about = (num_new, num_keys, sizes.num_kv_heads, sizes.head_dim, torch.device("cuda"))  # which takes more at a time
    return sizes.batch_size * predicted_index_bytes([method.pattern] * sizes.num_heads, *about)


def _attention_work(workload: PrefillWorkload, density: float) -> Work:
    """Queries and keys are read once, and the output is written."""
    sizes, size = workload.sizes, workload.dtype.itemsize
    num_keys = sizes.num_shared + sizes.batch_size * sizes.unique_seq_len
    pairs = round(num_pairs(workload.rows) * density)
    return Work(
        kv_bytes=2 * sizes.num_kv_heads * sizes.head_dim * size * num_keys,
        other_bytes=2 * workload.q_THD.numel() * size,
        flops=4 * sizes.head_dim * sizes.num_heads * pairs,
    )


def _index_work(method: PrefillMethod, workload: PrefillWorkload, index: SparseIndex) -> Work:
    """What an estimate reads and computes, sequence by sequence, and the tables that are written."""
    sizes, rows, size = workload.sizes, workload.rows, workload.dtype.itemsize
    H, D, num_keys = sizes.num_heads, sizes.head_dim, rows.num_keys
    key_bytes = sizes.num_kv_heads * D * size * int(num_keys.sum())
    match method.pattern:
        case VerticalSlash():
            last = np.minimum(rows.q_lens, LAST_QUERIES)
            flops = (2 * D + _SOFTMAX_AND_SUMS) * H * int((last * num_keys).sum())
            return Work(key_bytes, int(last.sum()) * H * D * size + index.num_bytes, flops)
        case BlockSparse():
            sums = D * int((H * rows.q_lens + sizes.num_kv_heads * num_keys).sum())
            products = 2 * D * H * int((rows.num_tiles * -(-num_keys // TILE)).sum())
            return Work(key_bytes, workload.q_THD.numel() * size + index.num_bytes, sums + products)
    return Work(0, index.num_bytes, 0)
