"""What a run of ``scripts/prefill.py`` is to do."""

from dataclasses import dataclass
from pathlib import Path

from engine.bench.environment import Execution
from engine.bench.modes import ModelOptions
from engine.bench.needles.settings import portable_name
from engine.bench.prefill.column import Column

# Context lengths of the MInference paper's end-to-end benchmark.
BENCHMARK_CONTEXTS = (1_000, 10_000, 50_000, 100_000, 200_000, 300_000, 500_000, 1_000_000)


@dataclass(frozen=True)
class Settings:
    """At each of ``contexts``, lengths in tokens, the methods of ``columns`` take turns."""

    outdir: Path
    model: ModelOptions
    columns: tuple[Column, ...]
    contexts: tuple[int, ...]
    num_iters: int
    num_warmup: int
    prompt_file: Path | None = None  # whose beginning is read; None: random tokens
    attention_backend: str | None = None
    operations_backend: str | None = None

    @property
    def model_name(self) -> str:
        """Of the shipped model a path that is the same on every machine."""
        return portable_name(self.model.name)

    def execution(self, column: Column) -> Execution:
        """How the engine of a column is to run."""
        return Execution(self.attention_backend, self.operations_backend, prefill=column.prefill)
