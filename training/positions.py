"""Positions for documents that stand for longer ones."""

import numpy as np

_MOST_JUMPS = 4


def draw_positions(length: int, max_positions: int, rng: np.random.Generator) -> np.ndarray:
    """``(length,)`` ascending positions below ``max_positions``: every second time, on average, 0, 1, 2, ...

    Otherwise they jump ahead at a few random places, so that a token is as far from others as in a document of any
    length up to ``max_positions``, at the cost of a short one (after PoSE, Zhu et al., arXiv:2309.10400, who skip at
    one place).
    """
    positions = np.arange(length)
    if max_positions > length and rng.random() < 0.5:
        num_skipped = int(rng.integers(1, max_positions - length + 1))
        num_jumps = int(rng.integers(1, _MOST_JUMPS + 1))
        places = rng.integers(1, length, size=num_jumps)
        bounds = np.sort(rng.integers(num_skipped + 1, size=num_jumps - 1))
        sizes = np.diff([0, *bounds.tolist(), num_skipped])
        jumps = np.zeros(length, dtype=np.int64)
        np.add.at(jumps, places, sizes)
        positions += jumps.cumsum()
    return positions
