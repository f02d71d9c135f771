from dataclasses import replace

import numpy as np
import pytest
import torch
from tensor_memory import TensorMemory

from kernels.sparse import (
    AShape,
    BlockSparse,
    Dense,
    SparseRows,
    TriShape,
    VerticalSlash,
    estimate,
    lower,
    memory,
    predicted_index_bytes,
)

CPU, HKV, D = torch.device("cpu"), 2, 16
MIX = [VerticalSlash(300, 700), BlockSparse(9), AShape(70, 500), Dense(), TriShape(4, 200, 64), BlockSparse(3)]


def peak_and_prediction(patterns, q_lens, k_lens, dtype=torch.float32, pieces=1):
    rows = SparseRows.contiguous(q_lens, np.cumsum([0, *k_lens[:-1]]), k_lens)
    if pieces == 2:
        firsts = rows.k_lens // 3
        rows = replace(
            rows,
            k_starts=np.hstack([rows.k_starts, rows.k_starts + firsts]),
            k_lens=np.hstack([firsts, rows.k_lens - firsts]),
        )
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(q_lens), len(patterns), D, generator=generator).to(dtype)
    k = torch.randn(sum(k_lens), HKV, D, generator=generator).to(dtype)
    with TensorMemory() as taken:
        lower(patterns, q, k, rows, 0.25)
    return taken.peak, predicted_index_bytes(patterns, rows.q_lens, rows.num_keys, HKV, D, CPU)


@pytest.mark.parametrize(
    "patterns",
    [
        [VerticalSlash(1000, 3000)] * 8, [BlockSparse(50)] * 4, [AShape(128, 2048)] * 6, [Dense()] * 2,
        [VerticalSlash(10, 10)] * 4, MIX,
    ],
    ids=["vertical_slash", "block_sparse", "a_shape", "dense", "small budgets", "mixed"],
)  # fmt: skip
@pytest.mark.parametrize(("q_lens", "k_lens"), [([6000], [6000]), ([100], [20_000]), ([500, 64, 1], [3000, 64, 9000])])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [1 << 16, 1 << 28], ids=["little room", "much room"])
def test_predictions_are_upper_bounds_and_not_far_off(monkeypatch, patterns, q_lens, k_lens, pieces, dtype, room):
    for module in (estimate, memory):
        monkeypatch.setattr(module, "max_bytes", lambda device: room)
    peak, predicted = peak_and_prediction(patterns, q_lens, k_lens, dtype, pieces)
    assert peak <= predicted
    # Budgets that cover a row are not estimated, and rows of one pass may have little in common.
    assert predicted < 12 * peak
