"""The results of a microbenchmark: one file a row.

A row is one operation at one size. Its file holds the raw times, what the operation moves and computes, and what the
machine could do at most; speeds, spreads and the roofline are computed when it is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.bench.result_files import Kind, ResultFiles, Status
from engine.bench.timing import HIGH_SPREAD, summarize

SCHEMA_VERSION = 2

OPERATIONS_MODE, PREFILL_MODE = "operations", "prefill"


class PrefillPart(StrEnum):
    """What is timed of a method in mode ``prefill``."""

    ATTENTION = "attention"  # with an index that is there already
    INDEX = "index"  # the making of it


class TimedWith(StrEnum):
    CLOCK = "clock"  # the host's monotonic clock
    CUDA_GRAPH = "cuda_graph"  # a captured graph's replay, between two events of the device
    EVENTS = "events"  # launched from Python, between two events of the device


@dataclass(frozen=True, order=True)
class Sizes:
    """Of the attention of one layer in one decode step, or where prompts are read. Lengths are in keys."""

    batch_size: int  # sequences; of one query token each in a decode step, else of as many as they have unique keys
    num_shared: int  # keys that all sequences share
    num_unique: int  # keys that each sequence has room for besides
    unique_seq_len: int  # of these, those in use
    num_heads: int  # query heads
    num_kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        in_use = "" if self.unique_seq_len == self.num_unique else f"_n{self.unique_seq_len}"
        return (
            f"b{self.batch_size}_s{self.num_shared}_u{self.num_unique}{in_use}_q{self.num_heads}_k{self.num_kv_heads}"
            f"_d{self.head_dim}"
        )

    @property
    def unique(self) -> str:
        """The own keys in words."""
        room = self.num_unique
        return str(room) if self.unique_seq_len == room else f"{self.unique_seq_len} of {room}"

    @property
    def heads(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}"

    @property
    def words(self) -> str:
        return (
            f"batch {self.batch_size}, shared {self.num_shared}, unique {self.unique}, "
            f"{self.heads} heads of {self.head_dim}"
        )


@dataclass(frozen=True, order=True)
class Row(Sizes):
    """What is timed at these sizes: the whole attention as ``mode`` plans it, or one operation of ``operations`` or
    ``prefill``."""

    mode: str
    method: str = ""  # of mode prefill: the prefill method, with its options
    operation: str = ""  # of modes operations and prefill
    backend: str = ""  # the one that was asked for; empty: the best there is, as the engine chooses

    def path(self, outdir: Path) -> Path:
        parts = [self.name, *(part for part in (self.method, self.operation, self.backend) if part)]
        return outdir / self.mode / f"{'_'.join(parts)}.yaml"

    @property
    def sizes(self) -> Sizes:
        return Sizes(**{one.name: getattr(self, one.name) for one in fields(Sizes)})

    @property
    def label(self) -> str:
        """What is timed, in words."""
        parts = (self.method, self.operation) if self.operation else (self.mode,)
        return " ".join(part for part in (*parts, self.backend) if part)


@dataclass(frozen=True)
class RowResult:
    """What one row measured, or why it did not. Times are in ms, one a call, each with cold caches."""

    row: Row
    status: Status
    seed: int
    environment: dict[str, Any]  # as from describe_environment
    num_bytes: int  # that a call must move: what it reads and what it writes, once
    num_flops: int
    predicted_bytes: int  # of memory, for this row alone
    message: str = ""  # why a row that is not ok has no times
    times_ms: Sequence[float] = ()
    num_warmup: int = 0  # calls before those
    timed_with: TimedWith = TimedWith.CLOCK
    backends: Sequence[str] = ()  # what ran, segment by segment
    choice: str | None = None  # of a mode that chooses: "shared" or "unshared"
    density: float | None = None  # of mode prefill: pairs of a query and a key that are looked at, of all that may be
    run: str = ""  # rows of one run and one size took turns: their i-th times are of the same round
    read_gbs: float | None = None  # 10^9 bytes/s that this machine reads at most, as measured in this run
    matmul_tflops: float | None = None  # 10^12 FLOP/s of large matrix products, likewise
    hidden_size: int | None = None  # of a row operation, from the heads
    intermediate_size: int | None = None
    vocab_size: int | None = None
    sweep: str = field(default="", compare=False)  # the OUTDIR it was read from; not in the file

    @property
    def median_ms(self) -> float | None:
        return summarize(self.times_ms).median if self.times_ms else None

    @property
    def spread(self) -> float | None:
        """20th to 80th percentile as a fraction of the median; None without two times."""
        return summarize(self.times_ms).relative if len(self.times_ms) > 1 else None

    @property
    def high_spread(self) -> bool:
        return self.spread is not None and self.spread > HIGH_SPREAD

    @property
    def achieved_gbs(self) -> float | None:
        return self.num_bytes / (self.median_ms * 1e6) if self.median_ms else None

    @property
    def achieved_tflops(self) -> float | None:
        return self.num_flops / (self.median_ms * 1e9) if self.median_ms else None

    @property
    def roofline_ms(self) -> float | None:
        """The least time that the ceilings allow: of the bytes or of the arithmetic, whichever is longer."""
        if not self.read_gbs or not self.matmul_tflops:
            return None
        return max(self.num_bytes / (self.read_gbs * 1e6), self.num_flops / (self.matmul_tflops * 1e9))

    @property
    def roofline_fraction(self) -> float | None:
        """The roofline's time over the measured one: 1 is as fast as the machine allows."""
        return self.roofline_ms / self.median_ms if self.roofline_ms is not None and self.median_ms else None

    @property
    def is_complete(self) -> bool:
        return bool(self.times_ms)

    @property
    def headline(self) -> str:
        outcome = str(self.status) if self.median_ms is None else f"{self.median_ms:.4f} ms"
        if self.spread is not None:
            outcome += f", spread {self.spread:.1%}"
        return f"{self.row.label}: {self.row.words}: {outcome}; times in ms"


FILES = ResultFiles(Kind.MICROBENCHMARK, SCHEMA_VERSION, RowResult, key="row")
