import gc

import pytest
import torch

from engine.mapped_weights import as_one

GRID = torch.arange(24.0).view(4, 6)


def test_neighbours_become_one_tensor_in_their_memory():
    memory = GRID.clone()
    one = as_one([memory[:1], memory[1:3], memory[3]])
    assert torch.equal(one, GRID.flatten())
    assert one.data_ptr() == memory.data_ptr()
    assert torch.equal(as_one([memory[1:3]]), GRID[1:3].flatten())


def test_what_it_is_a_view_of_stays_valid():
    one = as_one([GRID.clone()]).view(4, 6)
    gc.collect()
    taken = [torch.full_like(GRID, -1.0) for _ in range(100)]  # which would get the memory, were it free
    assert torch.equal(one, GRID), taken


@pytest.mark.parametrize(
    "parts",
    [
        lambda memory: [memory[1:2], memory[:1]],  # the other way round
        lambda memory: [memory[:1], memory[2:]],  # a gap
        lambda memory: [memory[:2], memory[1:]],  # overlap
        lambda memory: [memory[:, :3]],
        lambda memory: [memory[:2], memory[2:].view(torch.int32)],
        lambda memory: [memory[:0]],
    ],
)
def test_what_lies_otherwise(parts):
    assert as_one(parts(GRID.clone())) is None


def test_what_is_not_aligned_to_its_elements():
    unaligned = torch.frombuffer(bytearray(16), dtype=torch.float32, offset=1, count=2)
    assert unaligned.data_ptr() % 4
    assert as_one([unaligned]) is None


def test_a_negative_view_is_not_what_lies_there():
    tensor = torch.arange(4.0)
    assert as_one([tensor]) is not None and as_one([torch._neg_view(tensor)]) is None
