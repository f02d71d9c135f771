from dataclasses import replace

import pytest
import torch
from tensor_memory import TensorMemory

from engine.attention import Keeps
from engine.bench.micro.micro_results import PrefillPart, Sizes
from engine.bench.micro.operation import Memory
from engine.bench.micro.prefill_operations import PrefillOperation, prefill_operations
from engine.bench.micro.prefill_workload import PrefillWorkload
from engine.prefill import parse_prefill
from kernels import Backend
from kernels.sparse import SparseIndex, available_sparse_backends

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
SIZES = Sizes(3, num_shared=70, num_unique=200, unique_seq_len=150, num_heads=4, num_kv_heads=2, head_dim=8)
METHODS = [
    "dense", "a_shape:n_init=3:n_local=20", "tri_shape:n_init=3:n_local=20:n_last=5",
    "vertical_slash:num_vertical=9:num_slash=101", "block_sparse:num_blocks=2",
]  # fmt: skip
SHAPES = [
    SIZES, replace(SIZES, num_shared=0), replace(SIZES, batch_size=1, num_unique=150),
    replace(SIZES, num_unique=1, unique_seq_len=1),
]  # fmt: skip


def operation(text, part=PrefillPart.ATTENTION):
    return PrefillOperation(parse_prefill(text), part)


def test_each_sparse_method_has_an_index():
    found = [(one.method.text, one.name) for one in prefill_operations([parse_prefill(text) for text in METHODS[:2]])]
    assert found == [("dense", "attention"), (METHODS[1], "attention"), (METHODS[1], "index")]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("text", METHODS)
def test_every_operation_runs_with_every_backend_and_again(text, dtype, sizes):
    workload = PrefillWorkload(sizes, CPU, dtype, seed=0)
    # Triton's interpreter is slow: it takes the smallest.
    backends = [b for b in available_sparse_backends(CPU, dtype) if b != Backend.TRITON or sizes is SHAPES[-1]]
    for one in prefill_operations([parse_prefill(text)]):
        for backend in (None, *backends):
            call = one.call(workload, backend)
            for _ in range(2):
                result = call.run()
            if one.part is PrefillPart.INDEX:
                assert isinstance(result, SparseIndex) and not call.backends
            else:
                assert set(call.backends) == {str(backend)} if backend else call.backends
                assert result[0].shape == workload.q_THD.shape if text != "dense" else True
            assert 0 < call.density <= 1


@pytest.mark.parametrize("sizes", SHAPES)
def test_dense_attention_and_budgets_that_cover_all_are_the_same(sizes):
    workload = PrefillWorkload(sizes, CPU, F32, seed=1)
    dense = operation("dense").call(workload, Backend.ATEN)
    # In float64, sequence by sequence: the shared keys, then its own.
    found = dense.run().double()
    for row, (start, end) in enumerate(zip(workload.rows.q_offsets, workload.rows.q_offsets[1:], strict=False)):
        slots = workload.rows.slots(row)
        k, v = workload.k_SHD[slots].double(), workload.v_SHD[slots].double()
        scores = torch.einsum("qhd,khd->hqk", workload.q_THD[start:end].double(), k.repeat_interleave(2, 1))
        behind = torch.ones(end - start, len(slots), dtype=torch.bool).triu(len(slots) - int(end - start) + 1)
        probabilities = (scores * workload.scale).masked_fill(behind, float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", probabilities, v.repeat_interleave(2, 1))
        torch.testing.assert_close(found[start:end], expected, atol=1e-5, rtol=1e-5)
    for text in ("vertical_slash:num_vertical=0:num_slash=1000", "a_shape:n_local=1000", "block_sparse:num_blocks=9"):
        call = operation(text).call(workload, None)
        assert call.density == 1
        torch.testing.assert_close(call.run()[0].double(), found, atol=1e-5, rtol=1e-5)


def test_work_by_hand():
    """Two sequences of 100 new tokens behind 64 cached ones; 4 query heads and 2 KV heads of 8 in bfloat16."""
    sizes = Sizes(2, num_shared=64, num_unique=100, unique_seq_len=100, num_heads=4, num_kv_heads=2, head_dim=8)
    workload = PrefillWorkload(sizes, CPU, BF16, seed=0)
    pairs = 2 * sum(range(65, 165))
    keys, queries = 2 * 2 * 8 * 2 * (64 + 200), 200 * 4 * 8 * 2
    dense = operation("dense").call(workload, None)
    assert (dense.work.kv_bytes, dense.work.other_bytes, dense.work.flops) == (keys, 2 * queries, 4 * 8 * 4 * pairs)
    # A window of one key is the diagonal's tiles: of positions 64 to 127 and 128 to 163.
    seen = 2 * (sum(range(1, 65)) + sum(range(1, 37)))
    narrow = operation("a_shape:n_init=0:n_local=1").call(workload, None)
    assert narrow.density == seen / pairs
    assert (narrow.work.kv_bytes, narrow.work.other_bytes) == (keys, 2 * queries)
    assert narrow.work.flops == 4 * 8 * 4 * seen

    def index(text):
        call = operation(text, PrefillPart.INDEX).call(workload, None)
        return call.work, call.run().num_bytes

    work, tables = index("a_shape:n_init=0:n_local=1")
    assert (work.kv_bytes, work.other_bytes, work.flops) == (0, tables, 0)
    # Each sequence reads its 164 keys, without their values, and its last 64 queries.
    work, tables = index("vertical_slash:num_vertical=5:num_slash=101")
    assert work.kv_bytes == 2 * 164 * 2 * 8 * 2
    assert work.other_bytes == 2 * 64 * 4 * 8 * 2 + tables
    assert work.flops == 2 * 4 * 64 * 164 * (2 * 8 + 5)
    # Two tiles of queries and three of keys; means of all queries and keys.
    work, tables = index("block_sparse:num_blocks=2")
    assert (work.kv_bytes, work.other_bytes) == (2 * 164 * 2 * 8 * 2, queries + tables)
    assert work.flops == 2 * 8 * (4 * 100 + 2 * 164) + 2 * 8 * 4 * 2 * 2 * 3


class TestMemory:
    def test_all_share_one_arena(self):
        needs = [one.needs(SIZES, BF16, None) for one in prefill_operations(list(map(parse_prefill, METHODS)))]
        assert Memory.together(needs).arenas == needs[0].arenas[Keeps.NODES] == 2 * 2 * 8 * 2 * (70 + 3 * 200)

    def test_the_reference_copies_the_arena(self):
        plain, copied = (operation("dense").needs(SIZES, BF16, backend) for backend in (None, Backend.REFERENCE))
        assert copied.passing - plain.passing == 2 * 2 * 8 * 4 * (70 + 3 * 200)

    def test_sizes_without_bound_are_counted_without_being_made(self):
        huge = replace(SIZES, batch_size=2**31 - 1, num_shared=2**31 - 1)
        for one in prefill_operations(list(map(parse_prefill, METHODS))):
            assert one.needs(huge, BF16, None).lasting > 2**30

    @pytest.mark.parametrize("text", METHODS)
    @pytest.mark.parametrize("sizes", SHAPES)
    def test_no_more_is_taken_than_is_predicted(self, text, sizes):
        for one in prefill_operations([parse_prefill(text)]):
            need = one.needs(sizes, F32, None)
            with TensorMemory() as memory:
                workload = PrefillWorkload(sizes, CPU, F32, seed=0)
                one.call(workload, None).run()
            # Beside it the normal numbers that one arena is filled with.
            filled = 2 * 8 * 4 * max(sizes.num_shared, sizes.unique_seq_len)
            assert memory.peak <= sum(need.arenas.values()) + need.lasting + need.passing + filled + 2**16


def test_a_workload_is_drawn_by_its_seed():
    one, same, other = (PrefillWorkload(SIZES, CPU, BF16, seed) for seed in (0, 0, 1))
    assert torch.equal(one.q_THD, same.q_THD) and torch.equal(one.k_SHD, same.k_SHD)
    assert not torch.equal(one.q_THD, other.q_THD)
    assert not torch.equal(one.k_SHD, one.v_SHD)
