"""How much memory the index of a layer takes while it is made, predicted from lengths alone.

Shapes: R rows.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.sparse.estimate import LAST_QUERIES, max_bytes
from kernels.sparse.patterns import AShape, BlockSparse, Pattern, TriShape, VerticalSlash
from kernels.sparse.rows import TILE

_FLOAT32, _INT32, _INT64 = 4, 4, 8
# For each distance of a head: the table and its ranges, which stay; beside them copies of the table, the number of each
# range and where it goes, while they are made.
_KEPT_OF_DISTANCE = 1 + _INT32
_MADE_OF_DISTANCE = 7 + 2 * _INT64 + _INT32
# For each column or listed tile likewise: a sort makes a copy, and indices.
_KEPT_OF_ENTRY = _INT32
_MADE_OF_ENTRY = _INT32 + 2 * _INT64
# Of a head's keys: sums by position and by distance, and copies of both on the way.
_SUMS = 6
_SMALL = 64  # of each head and row, whatever its pattern
# For each line of a head: what is chosen, its place, and the tiles that a slash runs through.
_MADE_OF_LINE = _FLOAT32 + 8 * _INT64


def predicted_index_bytes(
    patterns: Sequence[Pattern],
    num_new: np.ndarray,
    num_keys: np.ndarray,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
) -> int:
    """The most that ``lower`` holds at a time for heads that have a pattern each, with what it returns.

    Row ``r`` of R has ``num_new[r]`` queries, the last of ``num_keys[r]`` positions.
    """
    if not len(num_new):
        return 0
    distances = -(-int(num_keys.max()) // TILE)
    columns = min(max((_num_columns(pattern) for pattern in patterns), default=0), int(num_keys.max()))
    blocks = [pattern.num_blocks for pattern in patterns if isinstance(pattern, BlockSparse)]
    listed = len(blocks) * (-(-int(num_new.max()) // TILE) + 1) * min(max(blocks, default=0), distances)
    of_row = [len(patterns) * distances, len(patterns) * columns + listed]
    kept, made = (
        sum(number * size for number, size in zip(of_row, sizes, strict=True))
        for sizes in ((_KEPT_OF_DISTANCE, _KEPT_OF_ENTRY), (_MADE_OF_DISTANCE, _MADE_OF_ENTRY))
    )
    copies = 1 if len(num_new) == 1 else 2  # rows are made one by one, and then put together
    estimates = [
        _vertical_slash_bytes(patterns, num_new, num_keys, num_kv_heads, head_dim, device),
        _block_bytes(patterns, num_new, num_keys, num_kv_heads, head_dim, device),
    ]
    small = _SMALL * len(patterns) * len(num_new)
    return copies * len(num_new) * kept + made + max(int(of_row.max()) for of_row in estimates) + small


def _num_columns(pattern: Pattern) -> int:
    match pattern:
        case AShape(n_init=number) | TriShape(n_init=number) | VerticalSlash(num_vertical=number):
            return number
    return 0


def _vertical_slash_bytes(
    patterns: Sequence[Pattern], Q: np.ndarray, N: np.ndarray, num_kv_heads: int, D: int, device: torch.device
) -> np.ndarray:
    """(R,): what the estimate takes that each row makes by itself."""
    lines = [p.num_vertical + p.num_slash for p in patterns if isinstance(p, VerticalSlash)]
    if not lines:
        return np.zeros_like(N)
    num_heads, group = len(lines), min(len(lines), len(patterns) // num_kv_heads)
    of_head = _FLOAT32 * np.minimum(Q, LAST_QUERIES) * N
    probabilities = np.minimum(num_heads * of_head, np.maximum(of_head, max_bytes(device)))
    at_once = np.maximum(max_bytes(device) // np.maximum(of_head, 1), 1)
    scores = 2 * np.minimum(group, at_once) * of_head  # of a group: in pieces, and in one
    keys, sums = N * D * _FLOAT32, _SUMS * _FLOAT32 * num_heads * N
    return probabilities + scores + keys + sums + num_heads * np.minimum(max(lines), 2 * N) * _MADE_OF_LINE


def _block_bytes(
    patterns: Sequence[Pattern], Q: np.ndarray, N: np.ndarray, num_kv_heads: int, D: int, device: torch.device
) -> np.ndarray:
    """(R,): likewise."""
    if not any(isinstance(pattern, BlockSparse) for pattern in patterns):
        return np.zeros_like(N)
    query_tiles, key_tiles = -(-Q // TILE) + 1, -(-N // TILE)
    means = 2 * _FLOAT32 * D * (query_tiles * len(patterns) + key_tiles * num_kv_heads)
    at_once = np.minimum(query_tiles, np.maximum(1, max_bytes(device) // (_FLOAT32 * key_tiles)))
    # Scores of some tiles of queries, which of them are behind, and the best of them.
    return means + at_once * key_tiles * (2 * _FLOAT32 + 2 * _INT64)
