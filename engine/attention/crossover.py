"""From which length on reading a shared node once for all queries below it beats each of them reading it.

Shapes: N nodes.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Crossover:
    """``lengths[i]`` tokens or more are better shared by ``num_queries[i]`` queries, or more up to the next number.

    A length of None: at no length that was measured. Fewer queries than the first number share nothing.
    """

    num_queries: tuple[int, ...]  # rising
    lengths: tuple[int | None, ...]

    def __post_init__(self) -> None:
        assert len(self.num_queries) == len(self.lengths) and list(self.num_queries) == sorted(set(self.num_queries))

    def pays(self, num_queries: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(N,) bool: whether nodes of ``lengths`` (N,) with ``num_queries`` (N,) queries below them are shared."""
        never = np.iinfo(np.int64).max
        least = np.array([never, *(never if length is None else length for length in self.lengths)])
        return lengths >= least[np.searchsorted(self.num_queries, num_queries, side="right")]


ALWAYS = Crossover((2,), (1,))
NEVER = Crossover((), ())
