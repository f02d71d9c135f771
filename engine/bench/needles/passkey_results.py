"""The results of a passkey grid: one file a length, ``SAVE_DIR/NAME/passkey_w{words}.yaml``.

Beside it, ``passkey_w{words}.answers.jsonl`` has every prompt and the answer as it was generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bench.needles.accuracy import Accuracy
from engine.bench.result_files import Kind, ResultFiles, Status

SCHEMA_VERSION = 1


@dataclass(frozen=True, order=True)
class PasskeyLength:
    """``name`` is that of the run, such as its attention method."""

    name: str
    num_words: int

    def path(self, outdir: Path) -> Path:
        return outdir / self.name / f"passkey_w{self.num_words}.yaml"

    def answers_path(self, outdir: Path) -> Path:
        return self.path(outdir).with_suffix(".answers.jsonl")


@dataclass(frozen=True)
class PasskeyResult:
    """What the prompts of one length came to, depth by depth. A depth is a fraction of the text."""

    length: PasskeyLength
    status: Status
    model_name: str
    model_digest: str  # tells it from others of that name
    attention: str
    seed: int
    environment: dict[str, Any]  # as from describe_environment
    haystack: str
    haystack_digest: str  # likewise; empty where it was generated
    num_digits: int
    num_repeats: int
    depths: Sequence[float]
    num_tokens: int  # of the longest prompt
    message: str = ""  # why a result that is not ok has no answers
    exact_by_depth: Sequence[int] = ()  # answers that have the whole key
    partial_by_depth: Sequence[float] = ()  # the longest run of the key's digits in each answer, added up over repeats
    total_ms: float = 0.0  # all prompts of the length, read and answered, once
    sweep: str = field(default="", compare=False)  # the SAVE_DIR it was read from; not in the file

    @property
    def num_depths(self) -> int:
        return len(self.depths)

    @property
    def num_answers(self) -> int:
        return self.num_repeats * len(self.depths)

    @property
    def exact(self) -> Accuracy:
        return Accuracy(sum(self.exact_by_depth), self.num_repeats * len(self.exact_by_depth))

    @property
    def partial(self) -> Accuracy:
        return Accuracy(sum(self.partial_by_depth), self.num_repeats * len(self.partial_by_depth))

    @property
    def is_complete(self) -> bool:
        sums = (*self.exact_by_depth, *self.partial_by_depth)
        return (
            len(self.exact_by_depth) == len(self.partial_by_depth) == len(self.depths) > 0
            and self.num_repeats > 0
            and all(matches <= self.num_repeats for matches in sums)
        )

    @property
    def headline(self) -> str:
        outcome = f"{self.exact.text} exact" if self.exact_by_depth else str(self.status)
        return f"{self.length.name}: passkeys in {self.length.num_words} words ({self.num_tokens} tokens): {outcome}"


PASSKEY_FILES = ResultFiles(Kind.PASSKEY, SCHEMA_VERSION, PasskeyResult, key="length")
