"""Evaluate a list of segments: plan once, run in every layer.

A backend turns segments into calls of its own once, when the plan is made; ``run`` evaluates them with the keys,
values and queries of one layer and merges the segments' states. Segments whose rows hold the same queries are joined
where the backend can: their keys are then so many more ranges of a row's, read in one call, and nothing is merged.

Shapes: T queries, S keys of the arena, Hq query heads, Hkv KV heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from kernels import attention_aten, attention_cuda, attention_simd, reference, simd
from kernels.backend import Backend, triton_runs
from kernels.merge import merge_states
from kernels.segment import Segment

# As many rows as an AMX tile has. Chosen, not measured.
_AMX_QUERIES = 16
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def available_backends(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """The backends that can run on ``device`` in ``dtype``, best first."""
    found: list[Backend] = []
    if device.type == "cpu" and dtype in attention_aten.DTYPES:
        if simd.host() and dtype in attention_simd.DTYPES:
            found.append(Backend.SIMD)
        found.append(Backend.ATEN)
    if device.type == "cuda" and dtype in attention_cuda.DTYPES:
        found.append(Backend.ATEN)
    if triton_runs(device) and dtype in TRITON_DTYPES:
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


State = tuple[torch.Tensor, torch.Tensor]


class Evaluation(Protocol):
    """Segments as a backend has planned them, for as long as their rows and lengths hold."""

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float, state: State | None = None
    ) -> State:
        """The segments' state: ``out (T, Hq, D)``, ``lse (T, Hq)`` float32, natural log.

        The last dimension of ``q``, ``k`` and ``v`` is contiguous; ``AttentionPlan`` sees to that.

        Merged with ``state``, one over other keys, where that is given: its tensors are then used up.
        """


class _ReferenceSegment:
    def __init__(self, segment: Segment):
        self.segment = segment

    def run(self, q_THD, k_SHD, v_SHD, scale):
        return reference.segment_attention(q_THD.float(), k_SHD.float(), v_SHD.float(), self.segment, scale)


class _OneByOne:
    """For backends that know one range of keys a row."""

    def __init__(self, segments: Sequence):
        self.segments = segments

    def run(self, q_THD, k_SHD, v_SHD, scale, state=None):
        for segment in self.segments:
            own = segment.run(q_THD, k_SHD, v_SHD, scale)
            state = own if state is None else merge_states(*state, *own)
        return state


def _evaluation(segments: Sequence[Segment], device: torch.device, backend: Backend) -> Evaluation:
    if backend == Backend.SIMD:
        return attention_simd.SimdPlan(segments)
    if backend == Backend.TRITON:
        from kernels.gpu.attention import TritonPlan  # here, as Triton takes long to import

        return TritonPlan(segments, device)
    if backend == Backend.REFERENCE:
        return _OneByOne([_ReferenceSegment(segment) for segment in segments])
    if device.type == "cuda":
        return _OneByOne([attention_cuda.CudaSegment(segment, device) for segment in segments])
    return _OneByOne([attention_aten.AtenSegment(segment) for segment in segments])


class AttentionPlan:
    """The attention of one forward pass: the segments' states, merged. No segments: the queries pass through."""

    def __init__(self, evaluations: Sequence[tuple[Backend, Evaluation]] = ()):
        self.backends = tuple(backend for backend, _ in evaluations)
        self.evaluations = tuple(evaluation for _, evaluation in evaluations)

    @classmethod
    def of(
        cls, segments: Sequence[Segment], device: torch.device, dtype: torch.dtype, backend: Backend | None = None
    ) -> "AttentionPlan":
        """For one use. ``Planner`` makes plans that follow each other."""
        return Planner(device, dtype, backend).plan(segments)

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float, layer: int = 0
    ) -> torch.Tensor:
        """``(T, Hq, D)`` in the queries' dtype; the same for every ``layer``."""
        if not self.evaluations:
            return q_THD
        return self.run_state(q_THD, k_SHD, v_SHD, scale)[0].to(q_THD.dtype)

    def run_state(self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float) -> State:
        """``out (T, Hq, D)``, in float32 or the queries' dtype, and ``lse (T, Hq)``, of a plan that has segments."""
        # Every backend reads a head's numbers from one piece.
        q_THD, k_SHD, v_SHD = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THD, k_SHD, v_SHD))
        state = None
        for evaluation in self.evaluations:
            state = evaluation.run(q_THD, k_SHD, v_SHD, scale, state)
        return state


class Planner:
    """Plans lists of segments, for a device, a dtype, and a backend where one is wanted.

    Raises ValueError for a backend that cannot run there. Segments that the last plan had too (the same objects) are
    not planned anew.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, backend: Backend | None = None):
        self._device, self._dtype = device, dtype
        self._backend = None if backend is None else check_backend(backend, device, dtype)
        self._last: list[tuple[list[Segment], tuple[Backend, Evaluation]]] = []

    def plan(self, segments: Sequence[Segment]) -> AttentionPlan:
        """All segments cover the same queries. Those of equal rows are joined."""
        assert len({segment.num_queries for segment in segments}) <= 1, "segments of one plan cover the same queries"
        planned = [(group, self._planned(group)) for group in self._groups(segments)]
        self._last = planned
        return AttentionPlan([evaluation for _, evaluation in planned])

    def _planned(self, group: list[Segment]) -> tuple[Backend, Evaluation]:
        for known, evaluation in self._last:
            if len(known) == len(group) and all(a is b for a, b in zip(known, group, strict=True)):
                return evaluation
        backend = self._backend_of(group[0])
        return backend, _evaluation(group, self._device, backend)

    def _groups(self, segments: Sequence[Segment]) -> list[list[Segment]]:
        """One for each set of rows, which decides about the backend; by Triton, one for all: it has tiles, not rows."""
        if segments and self._backend_of(segments[0]) == Backend.TRITON:
            return [list(segments)]
        groups: list[list[Segment]] = []
        for segment in segments:
            alike = (g for g in groups if np.array_equal(g[0].q_offsets, segment.q_offsets))
            if (group := next(alike, None)) is not None:
                group.append(segment)
            else:
                groups.append([segment])
        return groups

    def _backend_of(self, segment: Segment) -> Backend:
        return self._backend or default_backend(segment, self._device, self._dtype)
