"""Evaluate a list of segments: plan once, run in every layer.

A backend turns a ``Segment`` into calls of its own once, when the plan is made; ``run`` evaluates them with the
keys, values and queries of one layer and merges the segments' states.

Shapes: T queries, S keys of the arena, Hq query heads, Hkv KV heads, D head dimension.
"""

import os
from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from importlib.util import find_spec

import torch

from kernels import attention_aten, attention_cuda, attention_simd, reference, simd
from kernels.merge import merge_states
from kernels.segment import Segment

# As many rows as an AMX tile has. Chosen, not measured.
_AMX_QUERIES = 16
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Backend(StrEnum):
    """What evaluates a segment."""

    SIMD_CPU = "simd_cpu"  # vector code compiled for the CPU at hand
    ATEN_CPU = "aten_cpu"  # torch's flash attention for CPU
    ATEN_CUDA = "aten_cuda"  # torch's FlashAttention-2 with sequence tables
    TRITON = "triton"  # our own on CUDA; not measured yet
    REFERENCE = "reference"  # plain PyTorch, any device and dtype; slow


def available_backends(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """The backends that can run on ``device`` in ``dtype``, best first."""
    found: list[Backend] = []
    if device.type == "cpu" and dtype in attention_aten.DTYPES:
        if simd.host() and dtype in attention_simd.DTYPES:
            found.append(Backend.SIMD_CPU)
        found.append(Backend.ATEN_CPU)
    if device.type == "cuda" and dtype in attention_cuda.DTYPES:
        found.append(Backend.ATEN_CUDA)
    if _has_triton(device.type) and dtype in _TRITON_DTYPES:
        found.append(Backend.TRITON)
    return (*found, Backend.REFERENCE)


@cache
def _has_triton(device_type: str) -> bool:
    """Whether its kernels run there: on CUDA, and by its interpreter, which is for tests, anywhere."""
    runs = device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and find_spec("triton") is not None


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of this name. Raises ValueError for one that is not known, or cannot run there."""
    available = available_backends(device, dtype)
    if backend not in available:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"attention backend {str(backend)!r} cannot run {name} on {device.type}; accepted: {', '.join(available)}; "
            "use one of these, or none, for the best of them"
        )
    return Backend(backend)


def default_backend(segment: Segment, device: torch.device, dtype: torch.dtype) -> Backend:
    """The first that is available; but where ATen multiplies with AMX, which ours do not use, it has the segments of
    many queries a row."""
    first = available_backends(device, dtype)[0]
    if first == Backend.SIMD_CPU and attention_aten.has_amx(dtype):
        if segment.num_queries >= _AMX_QUERIES * max(1, segment.num_rows):
            return Backend.ATEN_CPU
    return first


class _ReferenceSegment:
    """The reference, behind the interface of the planned segments."""

    def __init__(self, segment: Segment):
        self.segment = segment

    def run(self, q_THD, k_SHD, v_SHD, scale):
        out, lse = reference.segment_attention(q_THD.float(), k_SHD.float(), v_SHD.float(), self.segment, scale)
        return out, lse


def _triton_segment(segment: Segment, device: torch.device):
    from kernels.gpu.attention import TritonSegment  # here, as Triton takes long to import

    return TritonSegment(segment, device)


class PlannedSegment:
    """One segment, planned for a backend. Immutable: keep it as long as its rows and lengths hold."""

    def __init__(self, segment: Segment, device: torch.device, dtype: torch.dtype, backend: Backend | None = None):
        if backend is None:
            self.backend = default_backend(segment, device, dtype)
        else:
            self.backend = check_backend(backend, device, dtype)
        self.num_queries = segment.num_queries
        make = {
            Backend.SIMD_CPU: attention_simd.SimdSegment,
            Backend.ATEN_CPU: attention_aten.AtenSegment,
            Backend.ATEN_CUDA: lambda s: attention_cuda.CudaSegment(s, device),
            Backend.TRITON: lambda s: _triton_segment(s, device),
            Backend.REFERENCE: _ReferenceSegment,
        }
        self.impl = make[self.backend](segment)

    def run(
        self,
        q_THD: torch.Tensor,
        k_SHD: torch.Tensor,
        v_SHD: torch.Tensor,
        scale: float,
        state: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The segment's state: ``out (T, Hq, D)``, ``lse (T, Hq)`` float32, natural log.

        Merged with ``state``, one over other keys, where that is given: its tensors are then used up.
        """
        if state is not None and self.backend == Backend.SIMD_CPU:
            return self.impl.run(q_THD, k_SHD, v_SHD, scale, state)
        own = self.impl.run(q_THD, k_SHD, v_SHD, scale)
        return own if state is None else merge_states(*state, *own)


class AttentionPlan:
    """The attention of one forward pass: the segments' states, merged. No segments: the queries pass through."""

    def __init__(self, segments: Sequence[PlannedSegment]):
        self.segments = tuple(segments)
        assert len({s.num_queries for s in self.segments}) <= 1, "segments of one plan cover the same queries"

    def run(self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float) -> torch.Tensor:
        """``(T, Hq, D)`` in the queries' dtype."""
        if not self.segments:
            return q_THD
        if all(segment.backend == Backend.TRITON for segment in self.segments):
            from kernels.gpu.attention import run_merged

            return run_merged([segment.impl for segment in self.segments], q_THD, k_SHD, v_SHD, scale)[0]
        state = None
        for segment in self.segments:
            state = segment.run(q_THD, k_SHD, v_SHD, scale, state)
        return state[0].to(q_THD.dtype)
