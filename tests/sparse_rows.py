"""Rows whose history lies in pieces over an arena with gaps, their inputs, and random indices."""

import numpy as np
import torch

from kernels.sparse.index import NEVER, NOTHING, SparseIndex, num_distances
from kernels.sparse.rows import SparseRows


def make_rows(*histories: tuple[int, list[int]]) -> tuple[SparseRows, int]:
    """Of each row how many queries, and the lengths of its pieces. The last lie first; returns the arena's size."""
    depth = max(len(pieces) for _, pieces in histories)
    lens = np.array([[*pieces, *[0] * (depth - len(pieces))] for _, pieces in histories], dtype=np.int64)
    starts, slot = np.zeros_like(lens), 3
    for place in range(lens.size)[::-1]:
        starts.flat[place] = slot
        slot += int(lens.flat[place]) + 2
    q_lens = np.array([num_queries for num_queries, _ in histories])
    return SparseRows(np.append(0, np.cumsum(q_lens)), lens.sum(1) - q_lens, starts, lens), slot


def make_sparse_inputs(rows, arena, H, Hkv, D, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows.num_queries, H, D), (arena, Hkv, D), (arena, Hkv, D)
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)


def random_index(rows: SparseRows, H: int, seed=0, density=0.3) -> SparseIndex:
    """Heads with distances and columns, with tiles, with all, and with nothing but the diagonal, in turns."""
    generator = torch.Generator().manual_seed(seed)
    R, N = rows.num_rows, int(rows.num_keys.max())
    K, kinds = num_distances(N), torch.arange(H) % 4
    distances = torch.rand(R, H, K, generator=generator) < density
    distances[:, kinds != 0] = False
    columns = torch.rand(R, H, N, generator=generator).argsort(-1)[..., : max(1, N // 8)].int()
    columns[:, kinds != 0] = NOTHING
    dense_from = torch.full((R, H), NEVER)
    dense_from[:, kinds == 2] = max(0, N - 70) // 64
    listed = kinds == 1
    size = max(1, K // 3)
    tiles = torch.rand(R, int(listed.sum()), int(rows.num_tiles.max()), K, generator=generator).argsort(-1)[..., :size]
    tiles_of_head = torch.where(listed, listed.cumsum(0) - 1, -1)
    index = SparseIndex.of(distances, columns, dense_from, tiles.int().sort(-1).values, tiles_of_head)
    index.check()
    return index
