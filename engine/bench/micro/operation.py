"""What the microbenchmark times: an operation at some sizes, with what it must move, compute and hold.

Bytes are those that a call must move: each input once and each output once. FLOPs count an addition, a multiplication,
a division, a square root or an exponential as one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from engine.attention import Keeps
from engine.bench.micro.micro_results import Sizes
from kernels import Backend


@dataclass(frozen=True)
class Work:
    """What one call must move, in bytes, and compute."""

    kv_bytes: int  # keys and values read
    other_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.kv_bytes + self.other_bytes


@dataclass(frozen=True)
class Call:
    """An operation with its data, ready to run."""

    run: Callable[[], Any]
    work: Work
    backends: tuple[str, ...] = ()  # what it runs, segment by segment
    choice: str | None = None  # of a mode that chooses: "shared" or "unshared"
    density: float | None = None  # of sparse attention: the fraction of all pairs of a query and a key, over all heads


@dataclass(frozen=True)
class Needs:
    """Bytes of memory that an operation takes, predicted from sizes alone."""

    arenas: Mapping[Keeps, int] = field(default_factory=dict)  # shared by all that read keys kept in this way
    lasting: int = 0  # while its call may be made
    passing: int = 0  # beside that, while it runs


@dataclass(frozen=True)
class Memory:
    """Bytes that operations take together."""

    arenas: int
    others: int

    @property
    def total(self) -> int:
        return self.arenas + self.others

    @classmethod
    def together(cls, needs: Iterable[Needs]) -> "Memory":
        """Of operations that take turns."""
        needs = list(needs)
        arenas: dict[Keeps, int] = {}
        for one in needs:
            arenas |= one.arenas
        passing = max((one.passing for one in needs), default=0)
        return cls(sum(arenas.values()), sum(one.lasting for one in needs) + passing)


class Operation(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def is_row_operation(self) -> bool:
        """Whether it works on hidden states, whose size follows from the heads."""

    def workload(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
        """What operations of its kind work on, at these sizes."""

    def call(self, workload: Any, backend: Backend | None) -> Call:
        """The operation on data of ``workload``."""

    def needs(self, sizes: Sizes, dtype: torch.dtype, backend: Backend | None) -> Needs: ...
