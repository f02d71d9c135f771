"""How many pairs of a query and a key an index lets through, counted without writing the mask out.

Shapes: R rows, H query heads, N tiles of queries, K distances, C columns, B listed tiles.
"""

import torch

from kernels.sparse.index import SparseIndex
from kernels.sparse.rows import TILE, SparseRows


def num_pairs(rows: SparseRows) -> int:
    """Those of one head without a mask but causality."""
    first, last = rows.q_positions + 1, rows.q_positions + rows.q_lens
    return int(((first + last) * rows.q_lens // 2).sum())


def num_seen(index: SparseIndex, rows: SparseRows) -> torch.Tensor:
    """``(H,)`` int64: those of every head that its queries see, of all rows."""
    return sum((_of_row(index, rows, row) for row in range(rows.num_rows)), torch.zeros(1, dtype=torch.int64)[0])


def _of_row(index: SparseIndex, rows: SparseRows, row: int) -> torch.Tensor:
    device = index.distances.device
    position, num_queries = int(rows.q_positions[row]), int(rows.q_lens[row])
    if num_queries == 0:
        return torch.zeros(index.num_heads, dtype=torch.int64, device=device)
    first, num_tiles = int(rows.first_tile[row]), int(rows.num_tiles[row])
    tile = torch.arange(first, first + num_tiles, device=device)
    begin = (tile * TILE).clamp(min=position)
    end = ((tile + 1) * TILE).clamp(max=position + num_queries)
    num_rows = end - begin  # queries of each tile, (N,)
    on_diagonal = num_rows * (begin - tile * TILE) + num_rows * (num_rows + 1) // 2
    is_dense = index.dense_from[row][:, None] <= tile  # (H, N)

    # Of distances 1 to d, how many a head has: d goes from 0 to that of the first key and the last query.
    last = first + num_tiles - 1
    near = torch.nn.functional.pad(index.distances[row], (0, max(0, last + 1 - index.distances.shape[2])))[
        :, : last + 1
    ]
    near = near.long()
    near[:, 0] = 0
    num_near = near.cumsum(-1)
    keys_before = num_near[:, tile] * TILE + _listed(index, row, tile, near) * TILE  # (H, N), all but columns
    keys_before += _columns(index, row, tile, near)
    keys_before = torch.where(is_dense, tile * TILE, keys_before)
    return (keys_before * num_rows + on_diagonal).sum(-1)


def _listed(index: SparseIndex, row: int, tile: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """``(H, N)``: listed tiles of keys before each tile of queries that the head's distances have not."""
    found = torch.zeros(index.num_heads, len(tile), dtype=torch.int64, device=tile.device)
    for head, number in enumerate(index.tiles_of_head.tolist()):
        if number >= 0:
            distance = tile[:, None] - index.tiles[row, number, : len(tile)].long()
            found[head] = ((distance > 0) & (near[head][distance.clamp(min=0)] == 0)).sum(-1)
    return found


def _columns(index: SparseIndex, row: int, tile: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """``(H, N)``: columns before each tile of queries that the head's distances have not."""
    num_keys = int(tile[-1]) + 1
    columns = index.columns[row].long() // TILE
    per_tile = torch.zeros(index.num_heads, num_keys + 1, dtype=torch.int64, device=tile.device)
    per_tile.scatter_add_(-1, columns.clamp(max=num_keys), torch.ones_like(columns))
    found = torch.empty(index.num_heads, len(tile), dtype=torch.int64, device=tile.device)
    for number, i in enumerate(tile.tolist()):  # tile j of keys is i - j away
        far = 1 - near[:, 1 : i + 1].flip(-1)
        found[:, number] = (per_tile[:, :i] * far).sum(-1)
    return found
