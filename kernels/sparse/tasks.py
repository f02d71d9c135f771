"""Rows as tables of tasks, which both of our sparse kernels work through: the queries of a row that stand in one tile.

Shapes: R rows, P pieces of a row's history.
"""

from enum import IntEnum

import numpy as np

from kernels.sparse.rows import TILE, SparseRows


class Task(IntEnum):
    """Columns of the table of tasks, int64."""

    QUERY = 0  # first query
    NUM_QUERIES = 1
    ROW = 2
    POSITION = 3  # of the first query
    LISTED = 4  # which of the row's tiles of queries it is
    COUNT = 5


class Piece(IntEnum):
    """Columns of the table of pieces, int64."""

    SLOT = 0  # of the first key
    POSITION = 1
    NUM_KEYS = 2
    COUNT = 3


def make_tasks(rows: SparseRows) -> np.ndarray:
    """``(tasks, Task.COUNT)``, those of the latest queries first, which have most keys."""
    row = np.repeat(np.arange(rows.num_rows), rows.num_tiles)
    listed = np.arange(len(row)) - np.repeat(np.cumsum(rows.num_tiles) - rows.num_tiles, rows.num_tiles)
    tile, q_positions = rows.first_tile[row] + listed, rows.q_positions[row]
    begin = np.maximum(tile * TILE, q_positions)
    end = np.minimum((tile + 1) * TILE, q_positions + rows.q_lens[row])
    tasks = np.empty((len(row), Task.COUNT), dtype=np.int64)
    tasks[:, Task.QUERY] = rows.q_offsets[row] + begin - q_positions
    tasks[:, Task.NUM_QUERIES] = end - begin
    tasks[:, Task.ROW] = row
    tasks[:, Task.POSITION] = begin
    tasks[:, Task.LISTED] = listed
    return tasks[np.argsort(-begin, kind="stable")]


def make_pieces(rows: SparseRows) -> np.ndarray:
    """``(R, P, Piece.COUNT)``"""
    pieces = np.empty((*rows.k_starts.shape, Piece.COUNT), dtype=np.int64)
    pieces[..., Piece.SLOT] = rows.k_starts
    pieces[..., Piece.POSITION] = rows.k_positions
    pieces[..., Piece.NUM_KEYS] = rows.k_lens
    return pieces
