"""Questions about one document, more and more of them: accuracy, and time, of one attention method or several.

Every rank does the same; rank 0 decides what is left to do, writes the files and prints.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.arena import NoRoomError
from engine.bench.environment import describe_environment
from engine.bench.memory_model import footprint
from engine.bench.needles.asking import Asker, timed
from engine.bench.needles.document import NUM_DEPTHS, PlacedNeedle
from engine.bench.needles.needle_results import NEEDLE_FILES, NeedlesResult, Questions
from engine.bench.needles.recording import is_recorded, recorded_when_out_of_memory, write_with_answers
from engine.bench.needles.same_settings import check_equal, check_same
from engine.bench.needles.settings import NUM_NEW_TOKENS, Settings
from engine.bench.peak_memory import PeakMemory
from engine.bench.result_files import Status
from engine.bench.results import Cell
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.tokenizer import Tokenizer

OnStep = Callable[[], None]
# What results of one name have in common, beside what those of passkeys have in common too.
_OF_DOCUMENT = ("names", "num_document_tokens", "num_needles", "num_few_shot")


class NeedleSweep:
    """One document, and what is asked about it."""

    def __init__(
        self,
        settings: Settings,
        num_characters: int,
        tokenizer: Tokenizer,
        config: ModelConfig,
        model_digest: str,
        group: TPGroup,
    ):
        self._settings, self._tokenizer, self._config, self._group = settings, tokenizer, config, group
        self._model_digest = model_digest
        self.num_characters, self.document = num_characters, settings.document(num_characters)
        self._tokens = tokenizer.encode(self.document.prompt)
        distinct = self.document.ask(min(max(settings.question_counts), len(self.document.needles)))
        self._questions = [tokenizer.encode(one.needle.question, add_special_tokens=False) for one in distinct]
        self._longest = len(self._tokens) + max(map(len, self._questions)) + NUM_NEW_TOKENS
        self._environment = describe_environment(group.device, config.dtype, group.size, settings.execution)
        self._run = group.broadcast(uuid.uuid4().hex[:12])
        if self._longest > config.max_positions:
            raise InputError(
                f"the document, its examples and a question with its answer take {self._longest:,} tokens; accepted: "
                f"up to {config.max_positions:,}, the model's positions; use a shorter --base-prompt-string-length"
            )

    @property
    def num_document_tokens(self) -> int:
        return len(self._tokens)

    @property
    def num_sequence_tokens(self) -> int:
        """Of the longest one: document, question and answer."""
        return self._longest

    def unfinished(self, num_questions: int) -> list[str]:
        """The methods that have no result for so many questions.

        Raises InputError when the folder of one holds results of other settings.
        """
        left, settings = [], self._settings
        for method in settings.attention:
            blank = self.blank(method, num_questions)
            if not is_recorded(NEEDLE_FILES, settings.outdir, blank.questions):
                left.append(method)
                continue
            path = blank.questions.path(settings.outdir)
            found = NEEDLE_FILES.read(path)
            check_same(found, blank, _OF_DOCUMENT, str(path))
            if found.status == Status.OK:
                how_timed = {
                    "timed rounds": (len(found.answer_ms), settings.num_iters),
                    "warm-up rounds": (len(found.answer_warmup_ms), settings.num_warmup),
                    "first tokens timed": (bool(found.first_token_ms), settings.measure_first_token),
                }
                for name, (theirs, ours) in how_timed.items():
                    check_equal(name, theirs, ours, str(path))
        return left

    def footprint(self, method: str, num_questions: int) -> int:
        """Bytes that all questions at once need on each rank: more of them than fit run in turns."""
        num_own = self._longest - len(self._tokens)
        cell = Cell(method, num_questions, len(self._tokens), num_own)
        return footprint(self._config, self._group.size, cell).total

    def num_steps(self, num_methods: int) -> int:
        """Calls that one number of questions takes, for a progress bar."""
        return num_methods * (self._settings.num_warmup + self._settings.num_iters)

    def run(self, askers: Sequence[Asker], num_questions: int, on_step: OnStep) -> list[NeedlesResult]:
        """Asks with every one of ``askers``, in turns; on rank 0 results and answers are written.

        A method for which memory has no room is recorded as such, and the others go on: all ranks find that alike.
        """
        settings, group = self._settings, self._group
        measured = {asker.method: _Measured(self.blank(asker.method, num_questions)) for asker in askers}
        order = random.Random(settings.seed)  # the same on every rank
        takes_turns = len(askers) > 1
        try:
            for round_number in range(settings.num_warmup + settings.num_iters):
                left = [asker for asker in askers if not measured[asker.method].refusal]
                order.shuffle(left)  # in a fixed order whatever comes first would always meet the same caches
                for asker in left:
                    makes_room = takes_turns or round_number == 0
                    turn = _Turn(round_number < settings.num_warmup, makes_room, order.random() < 0.5)
                    self._take(turn, asker, measured[asker.method], num_questions)
                    if takes_turns:
                        asker.release()  # each has all memory in its turn
                    on_step()
            for asker in askers:
                if not measured[asker.method].refusal:
                    measured[asker.method].density = asker.density(self._tokens, self._longest)
                    asker.release()
        finally:
            for asker in askers:
                asker.release()
        results = [self._result(one) for one in measured.values()]

        def write() -> None:
            for result in results:
                if result.status == Status.OK:
                    path, answers = result.questions.answers_path(settings.outdir), self._answers(measured, result)
                    write_with_answers(NEEDLE_FILES, settings.outdir, result, path, answers)
                else:
                    NEEDLE_FILES.write(settings.outdir, result)

        group.on_rank_0(write)
        return results

    def _take(self, turn: "_Turn", asker: Asker, measured: "_Measured", num_questions: int) -> None:
        """Reads the document and asks the questions, once. Out of memory is recorded and ends the run."""
        outdir, group = self._settings.outdir, self._group
        questions = [self._questions[i % len(self._questions)] for i in range(num_questions)]
        what = f"{asker.method}, {num_questions} questions about {len(self._tokens):,} tokens"
        remedy = "use a shorter document or more ranks"
        with recorded_when_out_of_memory(NEEDLE_FILES, outdir, measured.blank, group, what, remedy):
            try:
                with PeakMemory(group.device) as peak:
                    _, ms = timed(group, lambda: asker.read(self._tokens, self._longest))
                    measured.add("prefill", ms, turn.is_warmup)
                    if turn.makes_room:
                        asker.ask(questions, NUM_NEW_TOKENS)
                    kinds = ["first_token", "answer"] if self._settings.measure_first_token else ["answer"]
                    for kind in reversed(kinds) if turn.is_reversed else kinds:
                        num_tokens = NUM_NEW_TOKENS if kind == "answer" else 1
                        found, ms = timed(group, lambda n=num_tokens: asker.ask(questions, n))
                        measured.add(kind, ms, turn.is_warmup)
                        if kind == "answer":
                            measured.token_ids, measured.num_at_once = found
                measured.peak_bytes = max(measured.peak_bytes, peak.bytes)
            except NoRoomError as error:
                measured.refusal = str(error)

    def _result(self, measured: "_Measured") -> NeedlesResult:
        if measured.refusal:
            return replace(measured.blank, status=Status.DOES_NOT_FIT, message=measured.refusal)
        asked, is_right = self._judge(measured)
        # What is asked again has the same answer: each needle counts once.
        distinct = slice(len(self.document.needles))
        return replace(
            measured.blank,
            num_at_once=measured.num_at_once,
            right_by_depth=_count_by_depth(asked[distinct], is_right[distinct]),
            asked_by_depth=_count_by_depth(asked[distinct], [True] * len(asked[distinct])),
            density=tuple(measured.density),
            peak_bytes=tuple(self._group.gather_objects(measured.peak_bytes)),
            run=self._run,
            **measured.times(),
        )

    def _judge(self, measured: "_Measured") -> tuple[list[PlacedNeedle], list[bool]]:
        """What was asked, and whether each answer is right."""
        asked = self.document.ask(measured.blank.questions.num_questions)
        texts = map(self._tokenizer.decode, measured.token_ids)
        return asked, [one.needle.is_answered_by(text) for one, text in zip(asked, texts, strict=True)]

    def _answers(self, measured: dict[str, "_Measured"], result: NeedlesResult) -> list[dict[str, Any]]:
        """As ``answers.jsonl`` has them."""
        one = measured[result.attention]
        asked, is_right = self._judge(one)
        return [
            {
                "question": placed.needle.question,
                "expected": placed.needle.answer.strip(),
                "position": round(placed.position, 6),
                "answer": self._tokenizer.decode(ids),
                "token_ids": list(ids),
                "right": right,
            }
            for placed, ids, right in zip(asked, one.token_ids, is_right, strict=True)
        ]

    def blank(self, method: str, num_questions: int) -> NeedlesResult:
        """What is known of a result before it is measured."""
        settings, document = self._settings, self.document
        return NeedlesResult(
            questions=Questions(settings.run_name(method), self.num_characters, num_questions),
            status=Status.OK,
            model_name=settings.model_name,
            model_digest=self._model_digest,
            attention=method,
            seed=settings.seed,
            environment=self._environment,
            haystack=document.haystack,
            haystack_digest=settings.haystack.digest,
            names=settings.names,
            num_document_tokens=len(self._tokens),
            num_needles=len(document.needles),
            num_few_shot=document.num_examples,
            num_new_tokens=NUM_NEW_TOKENS,
        )


@dataclass(frozen=True)
class _Turn:
    """Of one method in one round. ``makes_room``: the arena grows to its size before anything but the reading is timed.
    ``is_reversed``: whole answers are timed before first tokens."""

    is_warmup: bool
    makes_room: bool
    is_reversed: bool


@dataclass
class _Measured:
    """Of one method, turn by turn. Times are in ms."""

    blank: NeedlesResult  # what is known before
    refusal: str = ""  # why memory has no room
    token_ids: Sequence[Sequence[int]] = ()  # of each answer, in the latest turn
    num_at_once: int = 0
    peak_bytes: int = 0  # on this rank
    density: Sequence[float] = ()  # as of the result
    _times: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, ms: float, is_warmup: bool) -> None:
        self._times.setdefault(f"{kind}{'_warmup' * is_warmup}_ms", []).append(ms)

    def times(self) -> dict[str, tuple[float, ...]]:
        """Under the names that a result has them by."""
        return {name: tuple(times) for name, times in self._times.items()}


def _count_by_depth(asked: Sequence[PlacedNeedle], counted: Sequence[bool]) -> tuple[int, ...]:
    counts = [0] * NUM_DEPTHS
    for one, counts_too in zip(asked, counted, strict=True):
        counts[one.depth] += counts_too
    return tuple(counts)
