"""The results of a throughput sweep: one file a cell, ``OUTDIR/MODE/b{batch}_s{shared}_u{unique}.yaml``.

A cell is one mode at one batch size, shared length and unique length. Its file holds the raw times and what makes them
comparable; whatever can be computed from those (throughput, spread, ratios) is computed when it is read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bench.result_files import Kind, ResultFiles, Status
from engine.bench.timing import HIGH_SPREAD, summarize

SCHEMA_VERSION = 2


@dataclass(frozen=True, order=True)
class Cell:
    """One point of a sweep. Lengths are in tokens, and are those of one sequence."""

    mode: str
    batch_size: int
    num_shared: int
    num_unique: int

    def path(self, outdir: Path) -> Path:
        return outdir / self.mode / f"b{self.batch_size}_s{self.num_shared}_u{self.num_unique}.yaml"


@dataclass(frozen=True)
class CellResult:
    """What one cell measured, or why it did not. Times are in ms, one an iteration, each that of the slowest rank."""

    cell: Cell
    status: Status
    model_name: str
    seed: int
    num_iters: int
    num_warmup: int
    environment: dict[str, Any]  # as from describe_environment
    message: str = ""  # why a cell that is not ok has no times
    decode_ms: Sequence[float] = ()  # generating num_unique tokens for the whole batch
    first_token_ms: Sequence[float] = ()  # generating one token: what decode_ms holds besides decode steps
    prefill_ms: Sequence[float] = ()  # prefilling the shared prefix; empty when that was not timed
    predicted_bytes: Sequence[int] = ()  # memory needed as computed beforehand, one a rank
    peak_bytes: Sequence[int] = ()  # memory used at most, one a rank
    achieved_gbs: float | None = None  # per rank: what a decode step must read over the time that it took
    achieved_tflops: float | None = None  # per rank: what a decode step must compute over the time that it took
    roofline_ms: float | None = None  # the least time of a decode step that the machine's ceilings allow
    choice: str | None = None  # how auto reads the prompt: "shared" or "unshared"
    sweep: str = field(default="", compare=False)  # the OUTDIR it was read from; not in the file

    @property
    def decode_step_ms(self) -> float | None:
        """Median time of one decode step; None without a second token, or where noise exceeds the time of the steps."""
        if self.status != Status.OK or self.cell.num_unique < 2:
            return None
        steps_ms = summarize(self.decode_ms).median - summarize(self.first_token_ms).median
        return steps_ms / (self.cell.num_unique - 1) if steps_ms > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decode throughput as the Hydragen paper has it: tokens after the first over (time for all - time for one)."""
        step_ms = self.decode_step_ms
        return None if step_ms is None else self.cell.batch_size * 1e3 / step_ms

    @property
    def spread(self) -> float | None:
        """20th to 80th percentile of the decode time as a fraction of it; None where there is no such time.

        The decode time is a difference of two measured times, so the widths of both count, as those of independent
        errors do: the root of the sum of their squares, over the difference of the medians. With one token only,
        the spread is that of ``decode_ms``.
        """
        if self.status != Status.OK:
            return None
        every = summarize(self.decode_ms)
        if self.cell.num_unique < 2:
            return every.relative
        first = summarize(self.first_token_ms)
        if every.median <= first.median:
            return None
        return math.hypot(every.p80 - every.p20, first.p80 - first.p20) / (every.median - first.median)

    @property
    def high_spread(self) -> bool:
        """True when the times vary so much that the throughput says little, or says nothing."""
        return self.status == Status.OK and (self.spread is None or self.spread > HIGH_SPREAD)

    @property
    def roofline_fraction(self) -> float | None:
        """The roofline's time of a decode step over the measured one: 1 is as fast as the machine allows."""
        step_ms = self.decode_step_ms
        return None if self.roofline_ms is None or step_ms is None else self.roofline_ms / step_ms

    @property
    def is_complete(self) -> bool:
        return bool(self.decode_ms) and (self.cell.num_unique < 2 or bool(self.first_token_ms))

    @property
    def headline(self) -> str:
        """The cell in words, for a person who opens the file."""
        cell, speed = self.cell, self.tokens_per_second
        outcome = self.status if speed is None else f"{speed:.1f} tokens/s"
        if speed is not None and len(self.decode_ms) > 1:  # a single time has no spread
            outcome += f", spread {self.spread:.1%}"
        return (
            f"{cell.mode}: {cell.batch_size} sequences of {cell.num_shared} shared + {cell.num_unique} generated "
            f"tokens: {outcome}; times in ms"
        )


_FILES = ResultFiles(Kind.THROUGHPUT, SCHEMA_VERSION, CellResult, key="cell")
write_cell, read_cell, is_finished, read_results = _FILES.write, _FILES.read, _FILES.is_finished, _FILES.read_all
