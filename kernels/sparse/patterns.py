"""The sparse patterns of the literature, one for each head, and what they become for the kernels.

A-shape: LM-Infinite (arXiv:2308.16137) and StreamingLLM (arXiv:2309.17453). The others, and a pattern for each head:
MInference (arXiv:2407.02490). Tri-shape: SCBench (arXiv:2412.10319).

Shapes: T queries, S keys of the arena, H query heads, D head dimension; those of ``index.py`` and ``rows.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.sparse.estimate import estimate_tiles, estimate_vertical_slash
from kernels.sparse.index import NEVER, NOTHING, SparseIndex, num_distances
from kernels.sparse.rows import TILE, SparseRows


@dataclass(frozen=True)
class Dense:
    """All keys."""


@dataclass(frozen=True)
class AShape:
    """The first ``n_init`` keys, and those less than ``n_local`` before the query: in whole tiles."""

    n_init: int
    n_local: int

    def __post_init__(self) -> None:
        _check(self, n_init=0, n_local=1)


@dataclass(frozen=True)
class TriShape:
    """As A-shape, but the last ``n_last`` queries see all keys."""

    n_init: int
    n_local: int
    n_last: int

    def __post_init__(self) -> None:
        _check(self, n_init=0, n_local=1, n_last=0)


@dataclass(frozen=True)
class VerticalSlash:
    """``num_vertical`` keys that all later queries see, and ``num_slash`` distances: those that the last queries give
    most of their attention to, estimated in every forward pass. The first 30 keys and the nearest 100 distances come
    before all others, so budgets up to these estimate nothing."""

    num_vertical: int
    num_slash: int

    def __post_init__(self) -> None:
        _check(self, num_vertical=0, num_slash=1)


@dataclass(frozen=True)
class BlockSparse:
    """For each tile of queries ``num_blocks`` tiles of keys, those whose means are most alike, estimated in every
    forward pass. The first one and the diagonal's are among them."""

    num_blocks: int

    def __post_init__(self) -> None:
        _check(self, num_blocks=1)


Pattern = Dense | AShape | TriShape | VerticalSlash | BlockSparse


def lower(
    patterns: Sequence[Pattern],
    q_THD: torch.Tensor,
    k_SHD: torch.Tensor,
    rows: SparseRows,
    scale: float,
    dense_rows: Sequence[bool] | None = None,
) -> SparseIndex:
    """The index of heads that have a pattern each, for these queries and keys; of ``dense_rows`` all keys are seen."""
    assert len(patterns) == q_THD.shape[1], f"{len(patterns)} patterns for {q_THD.shape[1]} heads"
    longest = int(rows.num_keys.max(initial=0))
    # All rows have the same heads with lists of blocks.
    patterns = [Dense() if isinstance(p, BlockSparse) and _has_all(p, longest) else p for p in patterns]
    with_blocks = [head for head, pattern in enumerate(patterns) if isinstance(pattern, BlockSparse)]
    indices = []
    for row in range(rows.num_rows):
        num_keys, num_tiles = int(rows.num_keys[row]), int(rows.num_tiles[row])
        heads = _Heads(patterns, num_keys, k_SHD.device)
        if num_tiles == 0 or (dense_rows is not None and dense_rows[row]):
            heads.add_dense(range(len(patterns)))
            heads.add_no_blocks(with_blocks, num_tiles)
        else:
            heads.add_dense([head for head, p in enumerate(patterns) if _has_all(p, num_keys)])
            heads.add_a_shape([head for head, p in enumerate(patterns) if isinstance(p, AShape | TriShape)])
            with_lines = [
                head for head, p in enumerate(patterns) if isinstance(p, VerticalSlash) and not _has_all(p, num_keys)
            ]
            queries = q_THD[int(rows.q_offsets[row]) : int(rows.q_offsets[row + 1])]
            if with_lines or with_blocks:
                keys = _keys(k_SHD, rows, row)
            if with_lines:
                heads.add_vertical_slash(with_lines, queries, keys, scale)
            if with_blocks:
                heads.add_blocks(with_blocks, queries, keys)
        indices.append(heads.index())
    return SparseIndex.stack(indices)


def _has_all(pattern: Pattern, num_keys: int) -> bool:
    """Whether a pattern has all of so many keys, whatever the queries: then there is nothing to estimate."""
    match pattern:
        case Dense():
            return True
        case VerticalSlash(num_vertical, num_slash):
            return max(num_vertical, num_slash) >= num_keys
        case BlockSparse(num_blocks):
            return num_blocks * TILE >= num_keys
    return False


def distances_of_slashes(distances: torch.Tensor, slashes: torch.Tensor) -> torch.Tensor:
    """``distances (..., K)`` bool, between tiles, with those of ``slashes (..., A)``, int64, between keys and queries.

    A slash whose distance is no multiple of 64 runs through two tiles of each tile of queries.
    """
    through = torch.cat([slashes // TILE, (slashes + TILE - 1) // TILE], -1)
    return distances.scatter(-1, through.clamp(max=distances.shape[-1] - 1), True)


class _Heads:
    """The index of one row, head by head."""

    def __init__(self, patterns: Sequence[Pattern], num_keys: int, device: torch.device):
        self._patterns, self._num_keys, self._device = patterns, num_keys, device
        self._distances = torch.zeros(1, len(patterns), num_distances(num_keys), dtype=torch.bool, device=device)
        self._columns: list[tuple[list[int], torch.Tensor]] = []  # of some heads, (heads, C)
        self._dense_from = [NEVER] * len(patterns)
        self._tiles: torch.Tensor | None = None
        self._tiles_of_head = [-1] * len(patterns)

    def add_dense(self, heads: Sequence[int]) -> None:
        for head in heads:
            self._dense_from[head] = 0

    def add_a_shape(self, heads: Sequence[int]) -> None:
        """Or tri-shape."""
        for head in heads:
            pattern = self._patterns[head]
            # Between tiles that are d > 0 apart the least distance is 64 d - 63.
            self._distances[0, head, : (pattern.n_local + TILE - 2) // TILE + 1] = True
            columns = torch.arange(min(pattern.n_init, self._num_keys), dtype=torch.int32, device=self._device)
            self._columns.append(([head], columns[None]))
            if isinstance(pattern, TriShape) and pattern.n_last:
                self._dense_from[head] = max(0, self._num_keys - pattern.n_last) // TILE

    def add_vertical_slash(
        self, heads: Sequence[int], q_QHD: torch.Tensor, k_pieces: Sequence[torch.Tensor], scale: float
    ) -> None:
        budgets = [self._patterns[head] for head in heads]
        columns, distances = estimate_vertical_slash(
            q_QHD, k_pieces, heads, [b.num_vertical for b in budgets], [b.num_slash for b in budgets], scale
        )
        self._columns.append((list(heads), columns.int().masked_fill(columns < 0, NOTHING)))
        # Those that a head has not become distance 0, which is in anyway.
        self._distances[0, heads] = distances_of_slashes(self._distances[0, heads], distances.clamp(min=0))

    def add_blocks(self, heads: Sequence[int], q_QHD: torch.Tensor, k_pieces: Sequence[torch.Tensor]) -> None:
        tiles = estimate_tiles(q_QHD, k_pieces, heads, [self._patterns[head].num_blocks for head in heads])
        self._list(heads, tiles)

    def add_no_blocks(self, heads: Sequence[int], num_tiles: int) -> None:
        """Of heads that list blocks in other rows."""
        self._list(heads, torch.empty(len(heads), num_tiles, 0, dtype=torch.int32, device=self._device))

    def _list(self, heads: Sequence[int], tiles: torch.Tensor) -> None:
        self._tiles = tiles[None]
        for number, head in enumerate(heads):
            self._tiles_of_head[head] = number

    def index(self) -> SparseIndex:
        size = max((columns.shape[1] for _, columns in self._columns), default=0)
        new = dict(dtype=torch.int32, device=self._device)
        columns = torch.full((1, len(self._patterns), size), NOTHING, **new)
        for heads, own in self._columns:
            columns[0, heads, : own.shape[1]] = own
        dense_from, tiles_of_head = (torch.tensor(x, **new) for x in (self._dense_from, self._tiles_of_head))
        return SparseIndex.of(self._distances, columns, dense_from[None], self._tiles, tiles_of_head)


def _keys(k_SHD: torch.Tensor, rows: SparseRows, row: int) -> list[torch.Tensor]:
    """``(any, Hkv, D)`` each: the row's keys by position, as they lie."""
    pieces = zip(rows.k_starts[row].tolist(), rows.k_lens[row].tolist(), strict=True)
    return [k_SHD[start : start + length] for start, length in pieces if length]


def _check(pattern: Pattern, **least: int) -> None:
    for name, minimum in least.items():
        value = getattr(pattern, name)
        if not isinstance(value, int) or value < minimum:
            raise ValueError(f"{type(pattern).__name__}: {name} is {value!r}; accepted: an integer from {minimum} up")
