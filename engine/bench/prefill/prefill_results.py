"""The results of ``scripts/prefill.py``: a file for each method and context length, ``SAVE_DIR/NAME/{tokens}.yaml``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from engine.bench.result_files import Kind, ResultFiles, Status
from engine.bench.timing import HIGH_SPREAD, Spread, summarize

SCHEMA_VERSION = 2


@dataclass(frozen=True, order=True)
class PrefillPoint:
    """``name`` is that of the method's folder; ``num_tokens`` are those of the prompt."""

    name: str
    num_tokens: int

    def path(self, outdir: Path) -> Path:
        return outdir / self.name / f"{self.num_tokens}.yaml"


@dataclass(frozen=True)
class PrefillResult:
    """The time to the first token after a prompt. Times are in ms, each that of the slowest rank."""

    point: PrefillPoint
    status: Status
    model_name: str
    model_digest: str  # tells it from others of that name
    load_format: str  # "dummy" for random weights
    prefill: str  # the method as it was named
    attention: str
    prompt: str  # what was read, in words
    prompt_digest: str  # tells a text from others of its name; empty of random tokens
    seed: int  # of random tokens, and of random weights
    environment: dict[str, Any]  # as from describe_environment
    predicted_bytes: int  # of memory on each rank; 0 where the prompt is too long for the model
    message: str = ""  # why a result that is not ok has no times
    first_token_ms: Sequence[float] = ()  # reading the prompt, from an empty cache, and choosing a token
    first_token_warmup_ms: Sequence[float] = ()  # the rounds before those
    first_token: int | None = None  # the token's id
    # Of each layer the pairs of a query and a key that were looked at, over all that causality allows, in the mean over
    # the heads of all ranks.
    density_by_layer: Sequence[float] = ()
    peak_bytes: Sequence[int] = ()  # memory used at most, one a rank
    run: str = ""  # methods of one run took turns: their i-th times are of the same round
    sweep: str = field(default="", compare=False)  # the SAVE_DIR it was read from; not in the file

    @property
    def times(self) -> Spread | None:
        return summarize(self.first_token_ms) if self.first_token_ms else None

    @property
    def spread(self) -> float | None:
        """None for a single time, which has none."""
        return self.times.relative if len(self.first_token_ms) > 1 else None

    @property
    def high_spread(self) -> bool:
        return self.spread is not None and self.spread > HIGH_SPREAD

    @property
    def density(self) -> float | None:
        """In the mean over the layers."""
        return fmean(self.density_by_layer) if self.density_by_layer else None

    @property
    def is_complete(self) -> bool:
        has_all = self.first_token_ms and self.density_by_layer and self.first_token is not None
        return bool(has_all) and max(self.density_by_layer) <= 1

    @property
    def headline(self) -> str:
        outcome = str(self.status).replace("_", " ")
        if self.times is not None:
            outcome = f"{self.times.median:,.1f} ms, density {self.density:.1%}"
        return f"{self.prefill}: {self.point.num_tokens:,} tokens: {outcome}"


PREFILL_FILES = ResultFiles(Kind.PREFILL, SCHEMA_VERSION, PrefillResult, key="point")
