"""The operations of a decode step, one entry each: how to call one, what it moves and computes, which backends have it.

Keys and values count as often as the method reads them.

Shapes: B sequences, Hq query heads, Hkv KV heads, D head dimension, I hidden size, F features of the MLP, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from engine.attention import Keeps
from engine.attention.crossover import ALWAYS, Crossover
from engine.attention.pass_plan import count_keys
from engine.bench.micro.decode_workload import MODES, DecodeWorkload, choice_of, method_of, plan_of
from engine.bench.micro.micro_results import Sizes
from engine.bench.micro.operation import Call, Needs, Work
from engine.bench.micro.workload import num_slots
from engine.bench.streamed_buffer import StreamedBuffer
from kernels import AttentionPlan, Backend, Segment, available_backends, available_operations_backends
from kernels.logit_blocks import BLOCK, block_masses, block_maxima
from kernels.merge import merge_stacked
from kernels.norm import add_rms_norm_
from kernels.rotary import rotate_into_cache_
from kernels.swiglu import swiglu

VOCAB_SIZE = 32_000
_F32 = 4  # bytes
_MAX_READ = 1 << 30  # bytes of the operation memory_read
# Beside its inputs and outputs an operation may hold copies of them in float32, and states that are yet to be merged.
_TEMPORARIES = 4
_PLAN_BYTES = 64  # of tables on the host, for each sequence and shared key


def hidden_size(sizes: Sizes) -> int:
    return sizes.num_heads * sizes.head_dim


def intermediate_size(sizes: Sizes) -> int:
    """Of the MLP: 8/3 of the hidden size, rounded up to 256, as Llama has it."""
    return -(-8 * hidden_size(sizes) // (3 * 256)) * 256


@dataclass(frozen=True)
class Ready:
    """A call that can be made, before its work is counted."""

    run: Callable[[], Any]
    backends: tuple[str, ...] = ()
    choice: str | None = None  # as from choice_of


def _its_own_choice(device: torch.device, dtype: torch.dtype) -> tuple[Backend | None, ...]:
    return (None,)


def _all_that_run(device: torch.device, dtype: torch.dtype) -> tuple[Backend | None, ...]:
    """The reference only where there is nothing else: it is there to be right."""
    found = available_backends(device, dtype)
    return tuple(backend for backend in found if backend != Backend.REFERENCE) or found


def _all_that_run_rows(device: torch.device, dtype: torch.dtype) -> tuple[Backend | None, ...]:
    return available_operations_backends(device, dtype)


def _all_that_run_logits(device: torch.device, dtype: torch.dtype) -> tuple[Backend | None, ...]:
    """Of vector code there is none for them."""
    return tuple(b for b in available_operations_backends(device, dtype) if b != Backend.SIMD)


@dataclass(frozen=True)
class DecodeOperation:
    """One of a decode step. Its work follows from the sizes."""

    name: str
    prepare: Callable[[DecodeWorkload, Backend | None], Ready]
    work: Callable[[Sizes, torch.dtype], Work]
    backends: Callable[[torch.device, torch.dtype], tuple[Backend | None, ...]] = _its_own_choice
    modes: tuple[str, ...] = ()  # whose keys it reads
    requires: tuple[str, ...] = ()  # sizes that must not be 0
    is_row_operation: bool = False  # works on the hidden states: its sizes follow from the heads

    def runs(self, sizes: Sizes) -> bool:
        return all(getattr(sizes, name) for name in self.requires)

    def workload(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int) -> DecodeWorkload:
        return DecodeWorkload(sizes, device, dtype, seed)

    def call(self, workload: DecodeWorkload, backend: Backend | None) -> Call:
        ready = self.prepare(workload, backend)
        return Call(ready.run, self.work(workload.sizes, workload.dtype), ready.backends, ready.choice)

    def needs(self, sizes: Sizes, dtype: torch.dtype, backend: Backend | None) -> Needs:
        slot = 2 * sizes.num_kv_heads * sizes.head_dim
        slots = {keeps: num_slots(sizes, keeps) for keeps in (method_of(mode).keeps for mode in self.modes)}
        tables = _PLAN_BYTES * (sizes.batch_size + sizes.num_shared)
        tensors = _state_bytes(sizes) + _q_bytes(sizes, dtype) if self.modes else self.work(sizes, dtype).other_bytes
        # The reference computes in float32, in copies of the whole arena.
        copied = sum(slots.values()) * slot * _F32 if backend == Backend.REFERENCE else 0
        arenas = {keeps: number * slot * dtype.itemsize for keeps, number in slots.items()}
        return Needs(arenas, tables + _TEMPORARIES * tensors, copied)


# ---- attention


def whole_attention(mode: str, crossover: Callable[[], Crossover] = lambda: ALWAYS) -> DecodeOperation:
    """All that a mode does in a decode step: its segments, and their merge. A mode that chooses asks for ``crossover``
    when it is made."""

    def segments_of(sizes: Sizes) -> list[Segment]:
        return plan_of(sizes, mode, crossover() if MODES[mode].chooses else ALWAYS).segments

    def make(workload: DecodeWorkload, backend: Backend | None) -> Ready:
        segments = segments_of(workload.sizes)
        choice = choice_of(segments) if MODES[mode].chooses else None
        return _attention_call(workload, mode, segments, backend, choice=choice)

    def work(sizes: Sizes, dtype: torch.dtype) -> Work:
        return _attention_work(sizes, dtype, segments_of(sizes), _q_bytes(sizes, dtype))

    return DecodeOperation(mode, make, work, modes=(mode,))


def _attention_call(
    workload: DecodeWorkload,
    mode: str,
    segments: list[Segment],
    backend: Backend | None,
    *,
    choice: str | None = None,
    state: bool = False,
) -> Ready:
    """The attention over ``segments``, rounded to the queries' dtype; with ``state`` their state, as it is."""
    keys, scale = workload.keys(mode), workload.scale
    plan = AttentionPlan.of(segments, workload.device, workload.dtype, backend)
    run = plan.run_state if state else plan.run
    return Ready(partial(run, workload.q_BHD, keys.k_SHD, keys.v_SHD, scale), tuple(map(str, plan.backends)), choice)


def _attention_work(sizes: Sizes, dtype: torch.dtype, segments: list[Segment], out_bytes: int) -> Work:
    keys_read, pairs = count_keys(segments)
    return Work(
        kv_bytes=2 * sizes.num_kv_heads * sizes.head_dim * dtype.itemsize * keys_read,
        other_bytes=_q_bytes(sizes, dtype) + out_bytes,
        flops=4 * sizes.head_dim * sizes.num_heads * pairs,
    )


def _q_bytes(sizes: Sizes, dtype: torch.dtype) -> int:
    return sizes.batch_size * sizes.num_heads * sizes.head_dim * dtype.itemsize


def _state_bytes(sizes: Sizes) -> int:
    """Of an output and its log-sum-exp in float32."""
    return sizes.batch_size * sizes.num_heads * (sizes.head_dim + 1) * _F32


def _one_segment(name: str, part: str, requires: str) -> DecodeOperation:
    """The state over ``part`` of the keys, as hydragen plans it."""

    def segment_of(sizes: Sizes) -> list[Segment]:
        return getattr(plan_of(sizes, "hydragen"), part)

    def make(workload: DecodeWorkload, backend: Backend | None) -> Ready:
        return _attention_call(workload, "hydragen", segment_of(workload.sizes), backend, state=True)

    def work(sizes: Sizes, dtype: torch.dtype) -> Work:
        return _attention_work(sizes, dtype, segment_of(sizes), _state_bytes(sizes))

    return DecodeOperation(name, make, work, _all_that_run, modes=("hydragen",), requires=(requires,))


def _make_merge(workload: DecodeWorkload, backend: Backend | None) -> Ready:
    outs, lses = (workload.random(2, *shape, dtype=torch.float32) for shape in _state_shapes(workload.sizes))
    return Ready(partial(merge_stacked, outs, lses, backend))


def _state_shapes(sizes: Sizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of an output and its log-sum-exp."""
    rows = (sizes.batch_size, sizes.num_heads)
    return (*rows, sizes.head_dim), rows


def _merge_work(sizes: Sizes, dtype: torch.dtype) -> Work:
    return Work(0, 3 * _state_bytes(sizes), 3 * sizes.batch_size * hidden_size(sizes))


# ---- the rest of a layer, and the choice of a token


def _make_norm(workload: DecodeWorkload, backend: Backend | None) -> Ready:
    B, I = workload.sizes.batch_size, hidden_size(workload.sizes)  # noqa: E741
    x_BI, weight_I = workload.random(B, I), workload.random(I)
    y_BI = torch.zeros_like(x_BI)  # so that x stays as it is, however often y is added to it
    return Ready(partial(add_rms_norm_, x_BI, y_BI, weight_I, 1e-5, backend=backend))


def _norm_work(sizes: Sizes, dtype: torch.dtype) -> Work:
    elements = sizes.batch_size * hidden_size(sizes)
    # Reads x and y, writes both sums; adds, squares, sums, scales and weights.
    return Work(0, (4 * elements + hidden_size(sizes)) * dtype.itemsize, 5 * elements)


def _make_rotary(workload: DecodeWorkload, backend: Backend | None) -> Ready:
    sizes, keys = workload.sizes, workload.keys("hydragen")
    B, D = sizes.batch_size, sizes.head_dim
    qkv_BHD = workload.random(B, sizes.num_heads + 2 * sizes.num_kv_heads, D)
    angles_B1D = workload.random(B, 1, D // 2, dtype=torch.float32).repeat(1, 1, 2)
    sin_B1D = angles_B1D.sin()
    sin_B1D[..., : D // 2].neg_()
    (own,) = keys.plan.own
    slots_B = torch.from_numpy(own.k_starts + own.k_lens - 1).to(workload.device)  # each sequence's newest key
    arguments = (qkv_BHD, angles_B1D.cos(), sin_B1D, keys.k_SHD, keys.v_SHD, slots_B)
    return Ready(partial(rotate_into_cache_, *arguments, backend=backend))


def _rotary_work(sizes: Sizes, dtype: torch.dtype) -> Work:
    B, D = sizes.batch_size, sizes.head_dim
    heads = sizes.num_heads + 2 * sizes.num_kv_heads
    tables = B * (2 * D * _F32 + 8)  # cos, sin, and the slot
    return Work(0, 2 * B * heads * D * dtype.itemsize + tables, 3 * B * (sizes.num_heads + sizes.num_kv_heads) * D)


def _make_swiglu(workload: DecodeWorkload, backend: Backend | None) -> Ready:
    gate_up_BF = workload.random(workload.sizes.batch_size, 2 * intermediate_size(workload.sizes))
    return Ready(partial(swiglu, gate_up_BF, backend=backend))


def _swiglu_work(sizes: Sizes, dtype: torch.dtype) -> Work:
    elements = sizes.batch_size * intermediate_size(sizes)
    return Work(0, 3 * elements * dtype.itemsize, 4 * elements)  # exponential, addition, division, product


def _make_maxima(workload: DecodeWorkload, backend: Backend | None) -> Ready:
    logits_BV = workload.random(workload.sizes.batch_size, VOCAB_SIZE)
    return Ready(partial(block_maxima, logits_BV, backend))


def _maxima_work(sizes: Sizes, dtype: torch.dtype) -> Work:
    # It compares, and computes nothing.
    return Work(0, sizes.batch_size * (VOCAB_SIZE * dtype.itemsize + VOCAB_SIZE // BLOCK * _F32), 0)


def _make_masses(workload: DecodeWorkload, backend: Backend | None) -> Ready:
    logits_BV = workload.random(workload.sizes.batch_size, VOCAB_SIZE)
    peak_B = logits_BV.amax(-1).float()
    return Ready(partial(block_masses, logits_BV, None, peak_B, torch.ones_like(peak_B), backend=backend))


def _masses_work(sizes: Sizes, dtype: torch.dtype) -> Work:
    elements = sizes.batch_size * VOCAB_SIZE
    # Sums in float64; a difference, a division, an exponential and an addition for each entry.
    return Work(0, elements * dtype.itemsize + elements // BLOCK * 2 * _F32, 4 * elements)


# ---- what the machine gives in the same rounds


def _read_bytes(sizes: Sizes, dtype: torch.dtype) -> int:
    slots = num_slots(sizes, Keeps.HISTORIES)
    return min(2 * sizes.num_kv_heads * sizes.head_dim * slots * dtype.itemsize, _MAX_READ)


def _make_read(workload: DecodeWorkload, backend: Backend | None) -> Ready:
    return Ready(StreamedBuffer(_read_bytes(workload.sizes, workload.dtype), workload.device).read)


def _read_work(sizes: Sizes, dtype: torch.dtype) -> Work:
    num_bytes = _read_bytes(sizes, dtype) // 8 * 8
    return Work(0, num_bytes, num_bytes // _F32)  # a product and an addition for every two numbers


_ROW = {"is_row_operation": True, "backends": _all_that_run_rows}

PARTS = (
    _one_segment("attention_shared", "shared", requires="num_shared"),
    _one_segment("attention_own", "own", requires="unique_seq_len"),
    DecodeOperation("merge", _make_merge, _merge_work, _all_that_run_rows, requires=("num_shared", "unique_seq_len")),
)

ROW_OPERATIONS = (
    DecodeOperation("add_rms_norm", _make_norm, _norm_work, **_ROW),
    DecodeOperation(
        "rotary_into_cache", _make_rotary, _rotary_work, modes=("hydragen",), requires=("unique_seq_len",), **_ROW
    ),
    DecodeOperation("swiglu", _make_swiglu, _swiglu_work, **_ROW),
    DecodeOperation("block_maxima", _make_maxima, _maxima_work, _all_that_run_logits, is_row_operation=True),
    DecodeOperation("block_masses", _make_masses, _masses_work, _all_that_run_logits, is_row_operation=True),
)

MEMORY_READ = DecodeOperation("memory_read", _make_read, _read_work)


def all_operations(crossover: Callable[[], Crossover] = lambda: ALWAYS) -> tuple[DecodeOperation, ...]:
    """As they are shown; whole attention in every mode first, and beside it what reading as many bytes takes."""
    return (*(whole_attention(mode, crossover) for mode in MODES), MEMORY_READ, *PARTS, *ROW_OPERATIONS)
