"""What a sparse index means, written out: the mask that every sparse kernel is compared with.

Shapes: T queries, S keys of the arena, H query heads, D head dimension, Q queries and N keys of a row.
"""

import torch

from kernels.sparse.index import NOTHING, SparseIndex
from kernels.sparse.rows import TILE, SparseRows


def expanded_mask(index: SparseIndex, rows: SparseRows, row: int) -> torch.Tensor:
    """``(H, Q, N)`` bool, on the CPU: whether a query, counted from the row's first, sees the key at a position."""
    first, num_keys = int(rows.q_positions[row]), int(rows.num_keys[row])
    query = torch.arange(first, first + int(rows.q_lens[row]))[:, None]
    key = torch.arange(num_keys)
    distance = query // TILE - key // TILE
    in_reach = (distance >= 0) & (distance < index.distances.shape[2])
    masks = []
    for head in range(index.num_heads):
        sees = index.distances[row, head].cpu()[distance.clamp(0, index.distances.shape[2] - 1)] & in_reach
        columns = index.columns[row, head].cpu()
        sees[:, columns[columns < num_keys].long()] = True
        if (number := int(index.tiles_of_head[head])) >= 0:
            tiles = index.tiles[row, number].cpu()
            for place in range(int(rows.num_tiles[row])):
                listed = tiles[place][tiles[place] != NOTHING]
                of_tile = (query // TILE).squeeze(1) == int(rows.first_tile[row]) + place
                sees |= of_tile[:, None] & torch.isin(key // TILE, listed)
        sees |= query // TILE >= int(index.dense_from[row, head])
        masks.append(sees & (key <= query))
    return torch.stack(masks)


def sparse_attention(
    q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, rows: SparseRows, index: SparseIndex, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out (T, H, D), lse (T, H))`` in the inputs' dtype; use float64 (or float32) inputs."""
    T, H, D = q_THD.shape
    group = H // k_SHD.shape[1]
    out, lse = q_THD.new_zeros(T, H, D), q_THD.new_full((T, H), float("-inf"))
    for row in range(rows.num_rows):
        mask = expanded_mask(index, rows, row).to(q_THD.device)
        queries = slice(int(rows.q_offsets[row]), int(rows.q_offsets[row + 1]))
        slots = torch.from_numpy(rows.slots(row)).to(q_THD.device)
        for head in range(H):
            seen = mask[head].any(0)  # a key that no query sees may be anything
            k, v = k_SHD[slots[seen], head // group], v_SHD[slots[seen], head // group]
            scores = (q_THD[queries, head] @ k.T * scale).masked_fill(~mask[head][:, seen], float("-inf"))
            out[queries, head] = scores.softmax(-1) @ v
            lse[queries, head] = scores.logsumexp(-1)
    return out, lse
