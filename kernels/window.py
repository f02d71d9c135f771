"""Sliding windows: a segment of which each query sees the last keys only, as segments without a window.

A window's edge moves by one key from query to query, which no kernel's mask needs to know: some neighbouring queries
share the keys that all of them see, in one row, and for the few keys before, which not all see, each has a row of its
own. The states merge exactly.

Shapes: T queries, R rows.
"""

import numpy as np

from kernels.segment import Segment

# Queries that share a row. Each reads at most as many keys in a row of its own; a window has many times as many.
_CHUNK = 64


def within_window(segment: Segment, q_positions: np.ndarray, window: int) -> list[Segment]:
    """Segments that together let each query see its keys at positions less than ``window`` before its own.

    ``q_positions`` is ``(T,)``; the segment must have ``k_positions``. A segment that the window does not touch is
    returned as it is.
    """
    if segment.num_queries == 0:
        return [segment]
    q_lens = np.diff(segment.q_offsets)
    row = np.repeat(np.arange(segment.num_rows), q_lens)
    # For each query the first key that it sees, and one past the last, counted within its row.
    first = q_positions - (window - 1) - segment.k_positions[row]
    last = segment.k_lens[row]
    if segment.causal:
        last = last - (segment.q_offsets[row + 1] - 1 - np.arange(segment.num_queries))
    last = np.maximum(last, 0)
    first = np.clip(first, 0, last)
    if not first.any():
        return [segment]

    chunks = _chunks(segment, first)
    owner = row[chunks]
    shared_first = np.maximum.reduceat(first, chunks)
    # Under a causal mask a chunk's last query sees most; elsewhere all see as much.
    ends = np.append(chunks[1:], segment.num_queries)
    shared_last = np.maximum(last[ends - 1], shared_first)
    shared = Segment(
        np.append(chunks, segment.num_queries),
        segment.k_starts[owner] + shared_first,
        shared_last - shared_first,
        segment.causal,
        None if segment.k_rooms is None else segment.k_rooms[owner] - shared_first,
    )
    before = np.minimum(np.repeat(shared_first, ends - chunks), last)
    single = Segment(np.arange(segment.num_queries + 1), segment.k_starts[row] + first, before - first)
    return [shared, single] if single.k_lens.any() else [shared]


def _chunks(segment: Segment, first: np.ndarray) -> np.ndarray:
    """Where chunks of queries begin: with each row, and within one with every so many queries that see unlike keys."""
    starts = []
    for begin, end in zip(segment.q_offsets[:-1].tolist(), segment.q_offsets[1:].tolist()):
        alike = begin == end or first[begin:end].max() == first[begin:end].min()
        starts.append(np.arange(begin, end, (end - begin or 1) if alike else _CHUNK))
    return np.concatenate(starts)
