"""The results of questions about a document: a file for each number of questions about each length of document,
``SAVE_DIR/NAME/{characters}c_{n}qs.yaml``.

Beside it, ``{characters}c_{n}qs.answers.jsonl`` has every answer as it was generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.attention.noattention import NoAttention
from engine.attention.streaming import Streaming
from engine.bench.needles.accuracy import Accuracy
from engine.bench.needles.document import NUM_DEPTHS
from engine.bench.result_files import Kind, ResultFiles, Status
from engine.bench.timing import HIGH_SPREAD, Spread, summarize
from engine.prefill import DENSE

SCHEMA_VERSION = 1


@dataclass(frozen=True, order=True)
class Questions:
    """``name`` is that of the run, such as its attention method; ``num_characters`` is what was asked for, around the
    needles."""

    name: str
    num_characters: int
    num_questions: int

    def path(self, outdir: Path) -> Path:
        return outdir / self.name / f"{self.num_characters}c_{self.num_questions}qs.yaml"

    def answers_path(self, outdir: Path) -> Path:
        return self.path(outdir).with_suffix(".answers.jsonl")


@dataclass(frozen=True)
class NeedlesResult:
    """What questions about one document measured. Times are in ms, each that of the slowest rank."""

    questions: Questions
    status: Status
    model_name: str
    model_digest: str  # tells it from others of that name
    attention: str
    seed: int
    environment: dict[str, Any]  # as from describe_environment
    haystack: str
    haystack_digest: str  # likewise; empty where it was generated
    names: str  # which ones the needles have: "seen" or "unseen" by the shipped model in training
    num_document_tokens: int  # with the examples: what all questions share
    num_needles: int
    num_few_shot: int
    num_new_tokens: int  # generated for each question
    message: str = ""  # why a result that is not ok has no times
    num_at_once: int = 0  # questions that ran together; fewer than there are where memory had no room for more
    # By tenth of the document that the needle begins in. Each needle counts once, however often it is asked for.
    right_by_depth: Sequence[int] = ()
    asked_by_depth: Sequence[int] = ()
    # Of attention's pairs of a query and a key in the document, the fraction that was computed, layer by layer.
    density: Sequence[float] = ()  # empty where all were, or where attention is disabled
    prefill_ms: Sequence[float] = ()  # computing the document, from nothing
    answer_ms: Sequence[float] = ()  # reading all questions and generating every token
    first_token_ms: Sequence[float] = ()  # reading all questions and generating one token each; empty if not measured
    prefill_warmup_ms: Sequence[float] = ()  # the rounds before those
    answer_warmup_ms: Sequence[float] = ()
    first_token_warmup_ms: Sequence[float] = ()
    peak_bytes: Sequence[int] = ()  # memory used at most, one a rank
    run: str = ""  # methods of one run took turns: their i-th times are of the same round
    sweep: str = field(default="", compare=False)  # the SAVE_DIR it was read from; not in the file

    @property
    def num_answers(self) -> int:
        return self.questions.num_questions

    @property
    def accuracy(self) -> Accuracy:
        return Accuracy(sum(self.right_by_depth), sum(self.asked_by_depth))

    @property
    def accuracy_by_depth(self) -> list[Accuracy]:
        return [Accuracy(*pair) for pair in zip(self.right_by_depth, self.asked_by_depth, strict=True)]

    @property
    def prefill(self) -> str:
        """How the document was read."""
        return str(self.environment.get("prefill", DENSE))

    @property
    def mean_density(self) -> float | None:
        """None of attention methods that mask by themselves, or have none."""
        if self.density:
            return sum(self.density) / len(self.density)
        return None if self.attention.partition(":")[0] in (NoAttention.name, Streaming.name) else 1.0

    @property
    def decode_rounds_ms(self) -> list[float]:
        """The times of the tokens after the first, round by round; empty where the first one's were not measured."""
        return [every - first for every, first in zip(self.answer_ms, self.first_token_ms, strict=False)]

    @property
    def decode(self) -> Spread | None:
        rounds = self.decode_rounds_ms
        return summarize(rounds) if rounds else None

    @property
    def answer(self) -> Spread | None:
        return summarize(self.answer_ms) if self.answer_ms else None

    @property
    def ms_per_question(self) -> float | None:
        return self.answer.median / self.questions.num_questions if self.answer else None

    @property
    def high_spread(self) -> bool:
        return self.answer is not None and self.answer.relative > HIGH_SPREAD

    @property
    def is_complete(self) -> bool:
        counts = (self.right_by_depth, self.asked_by_depth)
        if not self.answer_ms or [len(count) for count in counts] != [NUM_DEPTHS] * 2:
            return False
        return sum(self.asked_by_depth) > 0 and all(right <= asked for right, asked in zip(*counts, strict=True))

    @property
    def headline(self) -> str:
        outcome = str(self.status)
        if self.answer is not None:
            outcome = f"{self.accuracy.text} right, {self.answer.median:.1f} ms"
        return (
            f"{self.questions.name}: {self.questions.num_questions} questions about {self.num_document_tokens:,} tokens"
            f": {outcome}"
        )


NEEDLE_FILES = ResultFiles(Kind.NEEDLES, SCHEMA_VERSION, NeedlesResult, key="questions")
