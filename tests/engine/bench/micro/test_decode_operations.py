from dataclasses import replace

import pytest
import torch

from engine.attention import Keeps
from engine.bench.micro.decode_operations import (
    PARTS,
    all_operations,
    hidden_size,
    intermediate_size,
    whole_attention,
)
from engine.bench.micro.decode_workload import DecodeWorkload
from engine.bench.micro.micro_results import Sizes
from engine.bench.micro.operation import Memory, Work
from engine.bench.micro.workload import num_slots
from kernels import Backend, available_backends, merge_states

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32
SIZES = Sizes(64, num_shared=4096, num_unique=64, unique_seq_len=64, num_heads=12, num_kv_heads=4, head_dim=64)
TINY = Sizes(3, num_shared=5, num_unique=4, unique_seq_len=2, num_heads=4, num_kv_heads=2, head_dim=8)


def memory_of(operations, sizes, dtype):
    return Memory.together([operation.needs(sizes, dtype, backend) for operation, backend in operations])


def operations():
    return {operation.name: operation for operation in all_operations()}


class TestWorkByHand:
    """64 queries of 12 heads of 64 in bfloat16: 98304 bytes. A key and its value: 2 x 4 x 64 x 2 = 1024 bytes."""

    def test_base_reads_every_copy(self):
        keys = 64 * (4096 + 64)
        expected = Work(1024 * keys, 2 * 98304, 4 * 64 * 12 * keys)
        assert operations()["base"].work(SIZES, BF16) == expected
        assert expected.bytes == 1024 * keys + 196608

    def test_hydragen_reads_the_shared_keys_once_and_computes_as_much(self):
        work = operations()["hydragen"].work(SIZES, BF16)
        assert work == Work(1024 * (4096 + 64 * 64), 2 * 98304, operations()["base"].work(SIZES, BF16).flops)

    def test_parts_write_states(self):
        state = 64 * 12 * (64 + 1) * 4
        shared, own, merge = (part.work(SIZES, BF16) for part in PARTS)
        assert shared == Work(1024 * 4096, 98304 + state, 4 * 64 * 12 * 64 * 4096)
        assert own == Work(1024 * 64 * 64, 98304 + state, 4 * 64 * 12 * 64 * 64)
        assert merge == Work(0, 3 * state, 3 * 64 * 12 * 64)

    def test_keys_in_use_count_and_room_does_not(self):
        work = operations()["hydragen"].work(replace(SIZES, unique_seq_len=16), BF16)
        assert work.kv_bytes == 1024 * (4096 + 64 * 16)
        assert operations()["base"].work(replace(SIZES, num_shared=0), F32).kv_bytes == 2048 * 64 * 64

    def test_rows(self):
        rows = {name: operation.work(SIZES, BF16) for name, operation in operations().items()}
        assert (hidden_size(SIZES), intermediate_size(SIZES)) == (768, 2048)
        assert rows["add_rms_norm"] == Work(0, (4 * 64 * 768 + 768) * 2, 5 * 64 * 768)
        assert rows["rotary_into_cache"] == Work(0, 2 * 64 * 20 * 64 * 2 + 64 * (2 * 64 * 4 + 8), 3 * 64 * 16 * 64)
        assert rows["swiglu"] == Work(0, 3 * 64 * 2048 * 2, 4 * 64 * 2048)
        assert rows["block_maxima"] == Work(0, 64 * (32000 * 2 + 250 * 4), 0)
        assert rows["block_masses"] == Work(0, 64 * (32000 * 2 + 250 * 8), 4 * 64 * 32000)
        assert rows["memory_read"] == Work(0, 1024 * 64 * 4160, 1024 * 64 * 4160 // 4)

    def test_memory_read_has_a_limit(self):
        assert operations()["memory_read"].work(replace(SIZES, batch_size=4096), BF16).bytes == 2**30

    @pytest.mark.parametrize(("num_heads", "head_dim", "size"), [(32, 128, 11008), (1, 2, 256), (3, 32, 256)])
    def test_the_mlp_is_llamas(self, num_heads, head_dim, size):
        assert intermediate_size(replace(SIZES, num_heads=num_heads, head_dim=head_dim)) == size


class TestMemory:
    def test_arenas(self):
        base, hydragen = ((whole_attention(mode), None) for mode in ("base", "hydragen"))
        assert memory_of([base], SIZES, BF16).arenas == 1024 * 64 * 4160
        assert memory_of([hydragen], SIZES, BF16).arenas == 1024 * (4096 + 64 * 64)
        assert memory_of([base, hydragen], SIZES, BF16).arenas == 1024 * (64 * 4160 + 4096 + 64 * 64)

    def test_operations_on_the_same_keys_share_an_arena(self):
        parts = [(part, None) for part in PARTS]
        assert memory_of(parts, SIZES, BF16).arenas == memory_of(parts[:1], SIZES, BF16).arenas
        assert memory_of(parts, SIZES, BF16).others > memory_of(parts[:1], SIZES, BF16).others

    def test_the_reference_copies_the_arena_in_float32(self):
        plain, copied = (memory_of([(whole_attention("base"), b)], SIZES, BF16) for b in (None, Backend.REFERENCE))
        assert copied.others - plain.others == 2 * plain.arenas

    def test_sizes_without_bound_are_counted_without_being_made(self):
        huge = replace(SIZES, batch_size=2**31 - 1, num_shared=2**31 - 1)
        for operation in all_operations():
            assert memory_of([(operation, None)], huge, BF16).total > 2**30
        assert num_slots(huge, Keeps.HISTORIES) > 2**60


@pytest.mark.parametrize("operation", all_operations(), ids=lambda operation: operation.name)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_operation_runs_with_every_backend_and_again(operation, dtype):
    workload = DecodeWorkload(TINY, CPU, dtype, seed=0)
    backends = operation.backends(CPU, dtype)
    assert backends
    for backend in backends:
        call = operation.call(workload, backend)
        for _ in range(3):
            call.run()
        if operation.modes and not operation.is_row_operation:
            assert call.backends and (backend is None or set(call.backends) == {str(backend)})


def test_calls_leave_the_data_finite_however_often_they_are_made():
    workload = DecodeWorkload(TINY, CPU, BF16, seed=0)
    for name in ("add_rms_norm", "rotary_into_cache"):
        call = operations()[name].call(workload, None)
        for _ in range(300):
            call.run()
        assert all(x.isfinite().all() and x.abs().max() < 100 for x in call.run.args if isinstance(x, torch.Tensor))


def test_the_parts_are_tried_with_all_backends_but_the_reference():
    found = available_backends(CPU, BF16)
    assert PARTS[0].backends(CPU, BF16) == tuple(b for b in found if b != Backend.REFERENCE)
    assert PARTS[0].backends(CPU, torch.float64) == (Backend.REFERENCE,)


def test_the_parts_make_up_the_whole():
    workload = DecodeWorkload(TINY, CPU, F32, seed=0)
    shared, own, _ = PARTS
    states = [part.call(workload, Backend.ATEN).run() for part in (own, shared)]
    merged, _ = merge_states(*states[0], *states[1])
    whole = whole_attention("hydragen").call(workload, Backend.ATEN).run()
    torch.testing.assert_close(merged, whole)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"num_shared": 0}, {"attention_shared", "merge"}),
        ({"num_unique": 0, "unique_seq_len": 0}, {"attention_own", "merge", "rotary_into_cache"}),
        ({}, set()),
    ],
)
def test_what_there_is_nothing_to_do_for_is_left_out(changes, missing):
    sizes = replace(TINY, **changes)
    runs = {name for name, operation in operations().items() if operation.runs(sizes)}
    assert operations().keys() - runs == missing
    workload = DecodeWorkload(sizes, CPU, F32, seed=0)
    for name in runs:
        operations()[name].call(workload, None).run()
