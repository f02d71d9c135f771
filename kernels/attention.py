"""Evaluate a list of segments: plan once, run in every layer.

A backend turns a ``Segment`` into calls of its own once, when the plan is made; ``run`` evaluates them with the
keys, values and queries of one layer and merges the segments' states.

Shapes: T queries, S keys of the arena, Hq query heads, Hkv KV heads, D head dimension.
"""

from collections.abc import Sequence

import torch

from kernels import attention_aten, attention_cuda, attention_simd, reference, simd
from kernels.backend import Backend, triton_runs
from kernels.merge import merge_states
from kernels.segment import Segment

# As many rows as an AMX tile has. Chosen, not measured.
_AMX_QUERIES = 16
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def available_backends(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """The backends that can run on ``device`` in ``dtype``, best first."""
    found: list[Backend] = []
    if device.type == "cpu" and dtype in attention_aten.DTYPES:
        if simd.host() and dtype in attention_simd.DTYPES:
            found.append(Backend.SIMD)
        found.append(Backend.ATEN)
    if device.type == "cuda" and dtype in attention_cuda.DTYPES:
        found.append(Backend.ATEN)
    if triton_runs(device) and dtype in _TRITON_DTYPES:
        found.append(Backend.TRITON)
    return (*found, Backend.REFERENCE)


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
    if first == Backend.SIMD and attention_aten.has_amx(dtype):
        if segment.num_queries >= _AMX_QUERIES * max(1, segment.num_rows):
            return Backend.ATEN
    return first


class _ReferenceSegment:
    """The reference, behind the interface of the planned segments."""

    def __init__(self, segment: Segment):
        self.segment = segment

    def run(self, q_THD, k_SHD, v_SHD, scale):
        out, lse = reference.segment_attention(q_THD.float(), k_SHD.float(), v_SHD.float(), self.segment, scale)
        return out, lse


def _aten_segment(segment: Segment, device: torch.device):
    return attention_aten.AtenSegment(segment) if device.type == "cpu" else attention_cuda.CudaSegment(segment, device)


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
            Backend.SIMD: attention_simd.SimdSegment,
            Backend.ATEN: lambda s: _aten_segment(s, device),
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
        if state is not None and self.backend == Backend.SIMD:
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
