"""Attention over segments of keys, its exact merge, and the operations around it. Knows nothing of models or caches."""

from kernels.attention import AttentionPlan, Planner, available_backends, check_backend
from kernels.backend import Backend
from kernels.dispatch import OPERATIONS_BACKENDS, available_operations_backends, check_operations_backend
from kernels.merge import merge_stacked, merge_states
from kernels.segment import Segment
from kernels.sparse.api import block_sparse_attention, streaming_forward, vertical_slash_sparse_attention

__all__ = [
    "OPERATIONS_BACKENDS", "AttentionPlan", "Backend", "Planner", "Segment", "available_backends",
    "available_operations_backends", "block_sparse_attention", "check_backend", "check_operations_backend",
    "merge_stacked", "merge_states", "streaming_forward", "vertical_slash_sparse_attention",
]  # fmt: skip
