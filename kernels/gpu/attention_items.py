"""Segments cut into items of work for the attention kernel, on the host.

An item is one tile of query rows (queries of one segment row, each with the ``G`` query heads that read one KV head)
against a part of the row's keys; it writes the state of these to a *plane*, a state of all queries. Where there are too
few tiles to fill the device, a segment's keys are split into parts, as in Flash-Decoding, each with a plane of its own.

Which kernels are launched, and for how many items at most, is the *layout*. It holds for any lengths within the
capacity it was made for, so a CUDA graph that was captured with it serves any table that has the same layout.

Shapes: T queries, R rows of a segment, N items, P planes, G query heads of a KV head, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from kernels.segment import Segment

# Fewer keys than this in a part cost more in its state than they gain. Chosen, not measured.
_MIN_PART_KEYS = 256
# Programs for each multiprocessor that keys are split to have. Chosen, not measured.
_PROGRAMS_PER_PROCESSOR = 2
# Up to so many query rows a tile can hold another state beside its own, to merge them.
_MAX_MERGING_ROWS = 16
# So many planes at most: they are taken one after the other. A launch of their own takes many at once. Chosen, not
# measured.
_MAX_MERGED_PLANES = 8


class Item(IntEnum):
    """Columns of the table of items."""

    QUERY = 0  # first query of the segment's row
    NUM_QUERIES = 1  # of the row
    PLACE = 2  # first query row of the tile, counted within the segment's row
    KEY = 3  # first key, as a slot of the arena
    NUM_KEYS = 4
    VISIBLE = 5  # under a causal mask: how many of these keys the row's first query sees; may be negative
    PLANE = 6
    COUNT = 7


@dataclass(frozen=True)
class HeadShape:
    """The heads of one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Tile:
    """How a launch cuts its work, and what each program has of a multiprocessor."""

    rows: int  # BLOCK_M
    keys: int  # BLOCK_N
    num_warps: int
    num_stages: int  # blocks of keys and values in shared memory at once


def choose_tile(dtype: torch.dtype, head_dim: int, num_rows: int) -> Tile:
    """For rows of a segment with up to ``num_rows`` query rows of one KV head. Chosen, not measured."""
    if dtype == torch.float32:
        rows = 32 if num_rows > 16 and head_dim <= 64 else 16
        return Tile(rows, keys=32 if head_dim <= 64 else 16, num_warps=8, num_stages=2)
    rows = next((rows for rows in (16, 32, 64) if num_rows <= rows), 128)
    if head_dim > 128:
        return Tile(min(rows, 64), keys=32, num_warps=8 if rows >= 64 else 4, num_stages=2)
    return Tile(rows, keys=64, num_warps=8 if rows == 128 else 4, num_stages=3 if head_dim > 64 else 4)


@dataclass(frozen=True)
class Launch:
    """One launch of the attention kernel."""

    tile: Tile
    causal: bool
    num_items: int
    merges: bool  # takes the planes that are there into its own states, which are then final


@dataclass(frozen=True)
class Layout:
    """What a table of items is launched as. Tables of equal layouts can take each other's place."""

    launches: tuple[Launch, ...]  # in this order; their items follow each other in the table
    num_planes: int  # 0 where the only launch writes final states
    num_queries: int

    @property
    def merges_last(self) -> bool:
        """Whether planes are left that a launch of their own has to merge."""
        return self.num_planes > 0 and not self.launches[-1].merges


@dataclass(frozen=True)
class _Cut:
    """A segment cut into tiles and parts: its items but for their planes, which begin at 0."""

    tile: Tile
    causal: bool
    num_parts: int
    capacity: int  # items it may have without another layout
    items: np.ndarray  # (N, Item.COUNT) int32


def lay_out(
    segments: Sequence[Segment], heads: HeadShape, num_processors: int, fixed: bool = False
) -> tuple[Layout, np.ndarray]:
    """The launches for segments over the same queries, and the table ``(N, Item.COUNT)`` int32 of their items.

    With ``fixed`` the layout depends on powers of two that the numbers of rows and the rooms for keys round up to, not
    on lengths; items that are left over have no query.
    """
    tiles = _choose_tiles(segments, heads)
    cuts = [_cut(s, heads, tile, num_processors, fixed) for s, tile in zip(segments, tiles, strict=True)]
    num_queries = segments[0].num_queries
    kinds = list(dict.fromkeys((cut.tile, cut.causal) for cut in cuts))
    if len(cuts) == 1 and cuts[0].num_parts == 1:
        merging, num_planes = None, 0
    else:
        merging = _merging_kind(cuts, kinds)
        num_planes = sum(cut.num_parts for cut in cuts if (cut.tile, cut.causal) != merging)
    kinds.sort(key=lambda kind: kind == merging)  # it comes last
    launches, tables, plane = [], [], 0
    for tile, causal in kinds:
        members = [cut for cut in cuts if (cut.tile, cut.causal) == (tile, causal)]
        for cut in members:
            cut.items[:, Item.PLANE] += plane
            plane += cut.num_parts
        items = np.concatenate([cut.items for cut in members])
        # Most work first, so that the last programs to end are short ones.
        items = items[np.argsort(-items[:, Item.NUM_KEYS], kind="stable")]
        capacity = sum(cut.capacity for cut in members)
        tables.append(np.concatenate([items, np.zeros((capacity - len(items), Item.COUNT), dtype=np.int32)]))
        launches.append(Launch(tile, causal, capacity, (tile, causal) == merging))
    return Layout(tuple(launches), num_planes, num_queries), np.concatenate(tables)


def _choose_tiles(segments: Sequence[Segment], heads: HeadShape) -> list[Tile]:
    """Of all segments whose tiles are not small the largest, so that levels of a tree share a launch."""
    most_rows = [int(np.diff(segment.q_offsets).max(initial=1)) * heads.group for segment in segments]
    tiles = [choose_tile(heads.dtype, heads.head_dim, rows) for rows in most_rows]
    largest = max(tiles, key=lambda tile: tile.rows)
    return [largest if tile.rows > _MAX_MERGING_ROWS else tile for tile in tiles]


def _merging_kind(cuts: Sequence[_Cut], kinds: Sequence[tuple[Tile, bool]]) -> tuple[Tile, bool] | None:
    """The launch that can merge all others' planes as it ends: one of small tiles, with one state for each query."""
    num_planes = sum(cut.num_parts for cut in cuts)
    for kind in kinds if 1 < len(kinds) and num_planes <= 1 + _MAX_MERGED_PLANES else ():
        members = [cut for cut in cuts if (cut.tile, cut.causal) == kind]
        if kind[0].rows <= _MAX_MERGING_ROWS and len(members) == 1 and members[0].num_parts == 1:
            return kind
    return None


def _cut(segment: Segment, heads: HeadShape, tile: Tile, num_processors: int, fixed: bool) -> _Cut:
    def room(number: int) -> int:
        return 1 << (number - 1).bit_length() if fixed and number > 0 else number

    q_lens, k_lens = np.diff(segment.q_offsets), segment.k_lens
    assert segment.num_rows == 0 or (segment.k_starts + k_lens).max() < 2**31, "items have 32-bit slots"
    tiles_of_row = -(-q_lens * heads.group // tile.rows)
    row = np.repeat(np.arange(len(q_lens)), tiles_of_row)
    before = np.cumsum(tiles_of_row) - tiles_of_row
    place = (np.arange(len(row)) - before[row]) * tile.rows

    rooms = k_lens if segment.k_rooms is None or not fixed else np.maximum(segment.k_rooms, k_lens)
    most_tiles = room(len(row))
    wanted = -(-_PROGRAMS_PER_PROCESSOR * num_processors // max(1, most_tiles * heads.num_kv_heads))
    num_parts = max(1, min(wanted, room(int(rooms.max(initial=0))) // _MIN_PART_KEYS))
    part_len = max(_MIN_PART_KEYS, -(-int(k_lens.max(initial=0)) // num_parts)) if num_parts > 1 else 2**31 - 1

    part = np.arange(num_parts)[:, None]
    skipped = np.minimum(part * part_len, k_lens[row])
    items = np.empty((num_parts, len(row), Item.COUNT), dtype=np.int32)
    items[..., Item.QUERY] = segment.q_offsets[row]
    items[..., Item.NUM_QUERIES] = q_lens[row]
    items[..., Item.PLACE] = place
    items[..., Item.KEY] = segment.k_starts[row] + skipped
    items[..., Item.NUM_KEYS] = np.minimum(part_len, k_lens[row] - skipped)
    # Bottom-right: the row's last query sees all of its keys.
    items[..., Item.VISIBLE] = k_lens[row] - (q_lens[row] - 1) - skipped
    items[..., Item.PLANE] = part
    # One query sees all keys: no mask.
    causal = segment.causal and int(q_lens.max(initial=0)) > 1
    return _Cut(tile, causal, num_parts, most_tiles * num_parts, items.reshape(-1, Item.COUNT))
