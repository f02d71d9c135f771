"""The form that every sparse pattern takes before a kernel sees it: which keys the queries of each head look at.

Masks are made of tiles of 64 x 64, aligned to absolute positions, and of single columns. A *slash* of a head, its pairs
of a query and a key that are some distance apart, becomes the tiles that it runs through, which all are as many tiles
from the diagonal: a distance between tiles, the same for every tile of queries, and so no table of tiles. A *vertical*
is a column, seen by all later queries. Only what depends on the tile of queries, as in block-sparse attention, takes a
list for each of them, and only in the heads that have it.

Causality comes on top, and the diagonal's tiles are always in.

Shapes: R rows, H query heads, K distances, W ranges, C columns, L heads with tiles, N tiles of queries, B of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.sparse.rows import TILE

NEVER = 2**31 - 1  # no tile of queries is so far
NOTHING = 2**31 - 1  # no column, no tile


@dataclass(frozen=True)
class SparseIndex:
    """A query in tile ``i`` sees a key in tile ``j`` that is not behind it if ``distances`` has ``i - j``, or
    ``columns`` has the key, or ``tiles`` has ``j`` for ``i``, or ``dense_from`` is ``i`` or less.

    All tensors are on one device, and all but ``distances`` are int32. A head has columns or tiles, not both.
    """

    distances: torch.Tensor  # (R, H, K) bool; 0 is always in, K and more never
    ranges: torch.Tensor  # (R, H, W, 2): the same as [first, last), rising, of no length where a head has fewer
    columns: torch.Tensor  # (R, H, C): positions, rising, then NOTHING
    dense_from: torch.Tensor  # (R, H): a tile of queries, 0 or more
    tiles: torch.Tensor  # (R, L, N, B): for each tile of queries from the row's first on, none twice, or NOTHING
    tiles_of_head: torch.Tensor  # (H,): which of the L lists is a head's, -1 for none

    def __post_init__(self) -> None:
        (R, H, K), (_, L, N, B) = self.distances.shape, self.tiles.shape
        W, C = self.ranges.shape[2], self.columns.shape[2]
        shapes = {
            "ranges": (R, H, W, 2),
            "columns": (R, H, C),
            "dense_from": (R, H),
            "tiles": (R, L, N, B),
            "tiles_of_head": (H,),
        }
        assert self.distances.dtype == torch.bool and K > 0, "distance 0 is always in"
        for name, shape in shapes.items():
            found = getattr(self, name)
            assert found.shape == shape and found.dtype == torch.int32, f"{name}: {tuple(found.shape)} {found.dtype}"
            assert found.device == self.distances.device, f"{name} is on {found.device}"

    @classmethod
    def of(
        cls,
        distances: torch.Tensor,
        columns: torch.Tensor | None = None,
        dense_from: torch.Tensor | None = None,
        tiles: torch.Tensor | None = None,
        tiles_of_head: torch.Tensor | None = None,
    ) -> "SparseIndex":
        """With what there is of these; columns in any order, none twice. Distance 0 is put in."""
        R, H, _ = distances.shape
        distances = distances.clone()
        distances[..., 0] = True

        def or_filled(tensor: torch.Tensor | None, shape: tuple[int, ...], value: int) -> torch.Tensor:
            if tensor is None:
                return torch.full(shape, value, dtype=torch.int32, device=distances.device)
            return tensor.int()

        columns = or_filled(columns, (R, H, 0), NOTHING).sort(-1).values
        dense_from = or_filled(dense_from, (R, H), NEVER)
        tiles = or_filled(tiles, (R, 0, 0, 0), NOTHING)
        tiles_of_head = or_filled(tiles_of_head, (H,), -1)
        return cls(distances, _ranges(distances), columns, dense_from, tiles, tiles_of_head)

    @classmethod
    def stack(cls, indices: Sequence["SparseIndex"]) -> "SparseIndex":
        """The rows of all of them, which have the same heads, lists of tiles among them."""
        if len(indices) == 1:
            return indices[0]
        K = max(index.distances.shape[2] for index in indices)
        return cls(
            torch.cat([F.pad(index.distances, (0, K - index.distances.shape[2])) for index in indices]),
            _cat([index.ranges for index in indices], K),
            _cat([index.columns for index in indices], NOTHING),
            torch.cat([index.dense_from for index in indices]),
            _cat([index.tiles for index in indices], NOTHING),
            indices[0].tiles_of_head,
        )

    def check(self) -> None:
        """Raises ValueError for tables that kernels would misread. It waits for the device, so it is for those who make
        an index by hand, and for tests; ``lower`` makes none that are wrong."""
        has_columns = (self.columns < NOTHING).any(-1).any(0)
        problems = {
            "distance 0 is not in": ~self.distances[..., 0],
            "ranges are not those of the distances": _in_ranges(self.ranges, self.distances.shape[2]) != self.distances,
            "ranges do not rise from 0 to the last distance": (self.ranges.flatten(2).diff(dim=-1) < 0)
            | (self.ranges[:, :, :, 0] < 0).any(-1, keepdim=True)
            | (self.ranges[:, :, :, 1] > self.distances.shape[2]).any(-1, keepdim=True),
            "columns do not rise, or one is negative": _do_not_rise(self.columns),
            "tiles do not rise, or one is negative": _do_not_rise(self.tiles),
            "dense_from is negative": self.dense_from < 0,
            "tiles_of_head names lists that there are not": (self.tiles_of_head < -1)
            | (self.tiles_of_head >= self.tiles.shape[1]),
            "a head has columns and tiles": has_columns & (self.tiles_of_head >= 0),
        }
        for problem, where in problems.items():
            if where.any():
                raise ValueError(f"a sparse index cannot be used: {problem}")

    @property
    def num_heads(self) -> int:
        return self.distances.shape[1]

    @property
    def num_bytes(self) -> int:
        tensors = (self.distances, self.ranges, self.columns, self.dense_from, self.tiles, self.tiles_of_head)
        return sum(tensor.nbytes for tensor in tensors)


def _in_ranges(ranges: torch.Tensor, num_distances: int) -> torch.Tensor:
    """``(R, H, K)`` bool: which distances are in any of ``ranges (R, H, W, 2)``."""
    edges = torch.zeros(*ranges.shape[:2], num_distances + 1, dtype=torch.int32, device=ranges.device)
    for side, step in ((0, 1), (1, -1)):
        places = ranges[..., side].long().clamp(0, num_distances)
        edges.scatter_add_(-1, places, torch.full_like(places, step, dtype=torch.int32))
    return edges.cumsum(-1)[..., :-1] > 0


def _do_not_rise(places: torch.Tensor) -> torch.Tensor:
    """Where ``(..., C)`` has no place above the one before it, or above -1; after the last there is NOTHING."""
    before = F.pad(places[..., :-1], (1, 0), value=-1)
    return (places <= before) & ~((places == NOTHING) & (before == NOTHING))


def num_distances(num_keys: int) -> int:
    """How many there are between tiles of so many positions, at least one."""
    return max(1, -(-num_keys // TILE))


def _ranges(distances: torch.Tensor) -> torch.Tensor:
    """``(R, H, W, 2)`` of ``(R, H, K)``, with nothing asked of the device: W is as many as there can be."""
    R, H, K = distances.shape
    W = (K + 1) // 2
    before, after = F.pad(distances, (1, 0))[..., :-1], F.pad(distances, (0, 1))[..., 1:]
    begins, ends = distances & ~before, distances & ~after
    number = begins.cumsum(-1) - 1  # of the range that a distance is in
    positions = torch.arange(K, dtype=torch.int32, device=distances.device).expand(R, H, K)
    ranges = torch.full((R, H, W + 1, 2), K, dtype=torch.int32, device=distances.device)
    # What neither begins nor ends a range goes where nobody looks.
    ranges[..., 0].scatter_(-1, torch.where(begins, number, W), positions)
    ranges[..., 1].scatter_(-1, torch.where(ends, number, W), positions + 1)
    return ranges[:, :, :W]


def _cat(tensors: Sequence[torch.Tensor], filler: int) -> torch.Tensor:
    """Along the first dimension, the others as long as the longest."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(F.pad(tensor, [side for more in reversed(missing) for side in (0, more)], value=filler))
    return torch.cat(padded)
