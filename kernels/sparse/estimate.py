"""Which keys matter, estimated from a few of the scores: as MInference does (arXiv:2407.02490, section 3.2).

They are plain PyTorch, for any device, and ask nothing of the device on the way. Scores are computed for a few heads at
a time, so that they take little room.

Shapes: Q queries and N keys of one row, H query heads, Hkv KV heads, D head dimension, L last queries, B tiles.
"""

from collections.abc import Sequence

import torch

from kernels import simd
from kernels.sparse.index import NOTHING
from kernels.sparse.rows import TILE

# So many of the last queries stand for all, so many first keys and nearest distances are always in: MInference's own.
LAST_QUERIES = 64
FIRST_KEYS = 30
NEAREST = 100


def estimate_vertical_slash(
    q_QHD: torch.Tensor,
    k_pieces: Sequence[torch.Tensor],
    heads: Sequence[int],
    num_vertical: Sequence[int],
    num_slash: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(columns (heads, C), distances (heads, A))``, int64: for each of ``heads`` as many positions and distances as
    it is to have, those with the largest sums of attention probabilities of the last queries, then -1.

    ``q`` are the queries of the row's last positions; its N keys, ``(any, Hkv, D)``, may come in pieces.
    """
    N, group = sum(map(len, k_pieces)), q_QHD.shape[1] // k_pieces[0].shape[1]
    q_HLD = q_QHD[-LAST_QUERIES:][:, heads].transpose(0, 1)
    L, columns, distances = q_HLD.shape[1], [], []
    at_once = min(len(heads), max(1, max_bytes(q_HLD.device) // (4 * L * N)))
    # Above any sum; where a budget is smaller, the first and the nearest come first.
    always = 1e6 - torch.arange(min(N, max(FIRST_KEYS, NEAREST)), dtype=torch.float32, device=q_HLD.device)
    room = torch.empty(at_once, L, N, dtype=torch.float32, device=q_HLD.device)
    for first in range(0, len(heads), at_once):
        part = slice(first, first + at_once)
        kv_heads = [head // group for head in heads[part]]
        by_column, by_distance = _sums(q_HLD[part], k_pieces, kv_heads, scale, room[: len(kv_heads)])
        for sums, number in ((by_column, FIRST_KEYS), (by_distance, NEAREST)):
            sums[:, :number] = always[:number]
        columns.append(_best(by_column, max(num_vertical), num_vertical[part]))
        distances.append(_best(by_distance, max(num_slash), num_slash[part]))
    return torch.cat(columns), torch.cat(distances)


def _sums(
    q_HLD: torch.Tensor,
    k_pieces: Sequence[torch.Tensor],
    kv_heads: Sequence[int],
    scale: float,
    room_HLN: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities of the last queries added up by key, ``(H, N)``, and by distance from the query,
    ``(H, N)``, float32. ``room`` is for the probabilities: memory that is new for every head costs more than they."""
    (H, L, _), N = q_HLD.shape, room_HLN.shape[2]
    first = 0
    while first < H:  # heads of one group are one product
        end = first + 1
        while end < H and kv_heads[end] == kv_heads[first]:
            end += 1
        scores = _scores(q_HLD[first:end], [piece[:, kv_heads[first]] for piece in k_pieces], scale)
        torch.softmax(scores, -1, dtype=torch.float32, out=room_HLN[first:end])
        del scores  # before the next ones are made
        first = end
    # One key further along for each query: what stands in column j of this view is at the distance N - L - j.
    along = room_HLN.as_strided((H, L, N - L + 1), (L * N, N + 1, 1))
    # Distances that not all of the queries have are those of the first keys.
    by_distance = torch.cat([along.sum(1).flip(-1), _below_diagonal(room_HLN[..., :L])], -1)
    return room_HLN.sum(1), by_distance


def _scores(q_HLD: torch.Tensor, k_pieces_ND: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """``(H, L, N)`` of the heads of one group, causal."""
    L, dtype = q_HLD.shape[1], _product_dtype(q_HLD)
    queries = q_HLD.to(dtype).flatten(0, 1)
    parts = [queries @ piece.to(dtype).T for piece in k_pieces_ND]
    scores = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).unflatten(0, (-1, L)).mul_(scale)
    scores[..., -L:].masked_fill_(_behind(L, scores.device), float("-inf"))
    return scores


def _behind(L: int, device: torch.device) -> torch.Tensor:
    """``(L, L)`` bool: of the last queries and keys, those that are behind each query."""
    return torch.ones(L, L, dtype=torch.bool, device=device).triu(1)


def _product_dtype(q: torch.Tensor) -> torch.dtype:
    """Scores are rounded to the model's dtype, as in MInference, where that is fast."""
    host = simd.host()
    is_slow = q.device.type == "cpu" and not (q.dtype == torch.bfloat16 and host and host.has_bf16_pairs)
    return torch.float32 if is_slow else q.dtype


def max_bytes(device: torch.device) -> int:
    """Of probabilities at a time: on a CPU what its caches hold."""
    return 16 * 2**20 if device.type == "cpu" else 256 * 2**20


def _below_diagonal(x_HLL: torch.Tensor) -> torch.Tensor:
    """``(H, L - 1)``: the sums of the first to the last diagonal below the main one."""
    L = x_HLL.shape[1]
    if L == 1:
        return x_HLL.new_empty(len(x_HLL), 0)
    return torch.stack([x_HLL.diagonal(-number, 1, 2).sum(-1) for number in range(1, L)], -1)


def _best(sums: torch.Tensor, num: int, budgets: Sequence[int]) -> torch.Tensor:
    """Where each row's largest values are, ``num`` of them at most; those beyond its own budget are -1."""
    num = min(num, sums.shape[-1])
    are_equal = min(budgets) >= num
    chosen = sums.topk(num, dim=-1, sorted=not are_equal).indices
    if are_equal:
        return chosen
    limits = torch.tensor(budgets, device=sums.device)[:, None]
    return chosen.masked_fill(torch.arange(num, device=sums.device) >= limits, -1)


def estimate_tiles(
    q_QHD: torch.Tensor, k_pieces: Sequence[torch.Tensor], heads: Sequence[int], num_blocks: Sequence[int]
) -> torch.Tensor:
    """``(heads, tiles of queries, B)`` int32: for each tile of queries the tiles of keys before it whose mean has the
    largest product with its own mean. With the diagonal's, which is not listed, they are as many as the head is to
    have, or all; the first one is always among them. Rising, then NOTHING. The queries are those of the last positions;
    keys may come in pieces.
    """
    Q, N, group = q_QHD.shape[0], sum(map(len, k_pieces)), q_QHD.shape[1] // k_pieces[0].shape[1]
    first_tile, num_keys = (N - Q) // TILE, -(-N // TILE)
    sizes = [min(max(1, budget - 1), num_keys) for budget in num_blocks]
    tiles = torch.full((len(heads), num_keys - first_tile, max(sizes)), NOTHING, dtype=torch.int32, device=q_QHD.device)
    queries_MHD, keys_MHD = _means([q_QHD], N - Q), _means(k_pieces, 0)
    key_tile = torch.arange(num_keys, device=q_QHD.device)
    at_once = max(1, max_bytes(q_QHD.device) // (4 * num_keys))
    for number, (head, size) in enumerate(zip(heads, sizes, strict=True)):
        queries, keys = queries_MHD[:, head], keys_MHD[:, head // group]
        for first in range(0, len(queries), at_once):
            scores = queries[first : first + at_once] @ keys.T
            query_tile = first_tile + first + torch.arange(len(scores), device=scores.device)[:, None]
            scores[:, 0] = float("inf")
            scores.masked_fill_(key_tile >= query_tile, float("-inf"))
            best = scores.topk(size, dim=-1, sorted=False)
            found = best.indices.int().masked_fill(best.values == float("-inf"), NOTHING)
            tiles[number, first : first + len(found), :size] = found
    return tiles.sort(-1).values


def _means(pieces: Sequence[torch.Tensor], position: int) -> torch.Tensor:
    """``(tiles, H, D)`` float32: the mean of each tile of positions, of what begins at ``position`` and comes in pieces
    ``(any, H, D)``."""
    end, first = position + sum(map(len, pieces)), position // TILE
    sums = torch.zeros(-(-end // TILE) - first, *pieces[0].shape[1:], dtype=torch.float32, device=pieces[0].device)
    at = position
    for piece in pieces:
        head = min(-at % TILE, len(piece))  # what ends a tile that the piece does not begin
        whole = (len(piece) - head) // TILE
        tile = at // TILE - first
        if head:
            sums[tile] += piece[:head].sum(0, dtype=torch.float32)
            tile += 1
        middle = piece[head : head + whole * TILE].unflatten(0, (whole, TILE))
        sums[tile : tile + whole] = middle.sum(1, dtype=torch.float32)
        if tail := len(piece) - head - whole * TILE:
            sums[tile + whole] += piece[-tail:].sum(0, dtype=torch.float32)
        at += len(piece)
    counts = sums.new_full((len(sums), 1, 1), TILE)
    counts[0] -= position % TILE
    counts[-1] -= -end % TILE
    return sums / counts
