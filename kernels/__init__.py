"""Attention over segments of keys, its exact merge, and the operations around it. Knows nothing of models or caches."""

from kernels.attention import AttentionPlan, Planner, available_backends, check_backend
from kernels.backend import Backend
from kernels.merge import merge_states
from kernels.segment import Segment

__all__ = ["AttentionPlan", "Backend", "Planner", "Segment", "available_backends", "check_backend", "merge_states"]
