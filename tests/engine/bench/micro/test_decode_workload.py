from dataclasses import replace

import pytest
import torch

from engine.attention import Keeps
from engine.attention.crossover import ALWAYS, NEVER
from engine.bench.micro.decode_operations import whole_attention
from engine.bench.micro.decode_workload import MODES, DecodeWorkload, choice_of, plan_of
from engine.bench.micro.micro_results import Sizes
from engine.bench.micro.workload import num_slots
from kernels import Backend
from kernels.reference import segment_attention

CPU = torch.device("cpu")
SIZES = Sizes(3, num_shared=5, num_unique=4, unique_seq_len=2, num_heads=4, num_kv_heads=2, head_dim=8)


def plan_table(sizes, mode):
    return [
        tuple(None if x is None else x.tolist() for x in (s.q_offsets, s.k_starts, s.k_lens, s.k_rooms))
        for s in plan_of(sizes, mode).segments
    ]


def test_hydragen_has_the_prompt_once_and_own_keys_in_rooms():
    assert plan_of(SIZES, "hydragen").num_slots == num_slots(SIZES, Keeps.NODES) == 5 + 3 * 4
    assert plan_table(SIZES, "hydragen") == [
        ([0, 1, 2, 3], [5, 9, 13], [2, 2, 2], [4, 4, 4]),
        ([0, 3], [0], [5], None),
    ]


def test_base_has_each_history_in_one_piece():
    assert plan_of(SIZES, "base").num_slots == num_slots(SIZES, Keeps.HISTORIES) == 3 * (5 + 4)
    assert plan_table(SIZES, "base") == [([0, 1, 2, 3], [0, 9, 18], [7, 7, 7], [9, 9, 9])]


def test_segments_without_keys_are_left_out():
    no_unique, no_shared = replace(SIZES, num_unique=0, unique_seq_len=0), replace(SIZES, num_shared=0)
    assert plan_table(no_unique, "hydragen") == [([0, 3], [0], [5], None)]
    assert plan_table(no_unique, "base") == [([0, 1, 2, 3], [0, 5, 10], [5, 5, 5], [5, 5, 5])]
    assert plan_table(no_shared, "hydragen") == plan_table(no_shared, "base")


@pytest.mark.parametrize(
    "sizes",
    [
        SIZES,
        replace(SIZES, unique_seq_len=4),
        replace(SIZES, num_unique=0, unique_seq_len=0),
        replace(SIZES, unique_seq_len=0),
        replace(SIZES, num_shared=0),
        replace(SIZES, batch_size=1),
    ],
)
@pytest.mark.parametrize("backend", [None, Backend.ATEN])
def test_every_mode_computes_the_same_attention(sizes, backend):
    workload = DecodeWorkload(sizes, CPU, torch.float32, seed=3)
    base = workload.keys("base")
    (segment,) = base.plan.segments
    expected, _ = segment_attention(
        workload.q_BHD.double(), base.k_SHD.double(), base.v_SHD.double(), segment, workload.scale
    )
    assert expected.abs().min() > 0
    for operation in (*map(whole_attention, MODES), whole_attention("auto", lambda: NEVER)):
        found = operation.call(workload, backend).run()
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_every_sequence_has_a_copy_of_its_own():
    keys = DecodeWorkload(SIZES, CPU, torch.bfloat16, seed=0).keys("base")
    assert keys.k_SHD.shape == (28, 2, 8) and keys.k_SHD.stride() == (8, 28 * 8, 1)  # head-major, as the engine has it
    for start in (9, 18):
        assert torch.equal(keys.k_SHD[start : start + 5], keys.k_SHD[:5])
        assert not torch.equal(keys.k_SHD[start + 5 : start + 7], keys.k_SHD[5:7])
        assert not keys.k_SHD[start + 7 : start + 9].any()  # room
    assert not torch.equal(keys.k_SHD, keys.v_SHD)


def test_seeds_make_numbers():
    q = [DecodeWorkload(SIZES, CPU, torch.bfloat16, seed).q_BHD for seed in (0, 0, 1)]
    assert torch.equal(q[0], q[1]) and not torch.equal(q[0], q[2])


@pytest.mark.parametrize(("crossover", "choice", "rows"), [(ALWAYS, "shared", 1), (NEVER, "unshared", 3)])
def test_a_mode_that_chooses_says_what(crossover, choice, rows):
    plan = plan_of(SIZES, "auto", crossover)
    assert choice_of(plan.segments) == choice
    assert [segment.num_rows for segment in plan.shared] == [rows]
    call = whole_attention("auto", lambda: crossover).call(DecodeWorkload(SIZES, CPU, torch.float32, 0), None)
    assert call.choice == choice
    assert whole_attention("hydragen").call(DecodeWorkload(SIZES, CPU, torch.float32, 0), None).choice is None
