"""Questions about one document, more and more of them: accuracy, and time, of one attention method or several.

Every rank does the same; rank 0 decides what is left to do, writes the files and prints.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engine.bench.environment import describe_environment
from engine.bench.needles.asking import Asker, timed
from engine.bench.needles.document import NUM_DEPTHS, PlacedNeedle
from engine.bench.needles.needle_results import NEEDLE_FILES, NeedlesResult, Questions
from engine.bench.needles.recording import recorded_when_out_of_memory, write_with_answers
from engine.bench.needles.same_settings import check_same
from engine.bench.needles.settings import NUM_NEW_TOKENS, Settings
from engine.bench.peak_memory import PeakMemory
from engine.bench.result_files import Status
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
        self, settings: Settings, num_characters: int, tokenizer: Tokenizer, config: ModelConfig, group: TPGroup
    ):
        self._settings, self._tokenizer, self._group = settings, tokenizer, group
        self.num_characters, self.document = num_characters, settings.document(num_characters)
        self._tokens = tokenizer.encode(self.document.prompt)
        most = self.document.ask(max(settings.question_counts))
        self._questions = [tokenizer.encode(one.needle.question, add_special_tokens=False) for one in most]
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
        left = []
        for method in self._settings.attention:
            blank = self._blank(method, num_questions)
            path = blank.questions.path(self._settings.outdir)
            if NEEDLE_FILES.is_finished(self._settings.outdir, blank.questions):
                check_same(NEEDLE_FILES.read(path), blank, _OF_DOCUMENT, str(path))
            else:
                left.append(method)
        return left

    def num_steps(self, num_methods: int) -> int:
        """Calls that one number of questions takes, for a progress bar."""
        rounds = self._settings.num_warmup + self._settings.num_iters
        return num_methods * (1 + rounds * (1 + self._settings.measure_first_token))

    def run(self, askers: Sequence[Asker], num_questions: int, on_step: OnStep) -> list[NeedlesResult]:
        """Asks with every one of ``askers``, in turns; on rank 0 results and answers are written."""
        outdir, group = self._settings.outdir, self._group
        blanks = {asker.method: self._blank(asker.method, num_questions) for asker in askers}
        what = f"{num_questions} questions about {len(self._tokens):,} tokens"
        remedy = "use a shorter document or more ranks"
        try:
            with recorded_when_out_of_memory(NEEDLE_FILES, outdir, list(blanks.values()), group, what, remedy):
                results, answers = self._measure(askers, blanks, num_questions, on_step)
        finally:
            for asker in askers:
                asker.release()

        def write() -> None:
            for result in results:
                path = result.questions.answers_path(outdir)
                write_with_answers(NEEDLE_FILES, outdir, result, path, answers[result.attention])

        group.on_rank_0(write)
        return results

    def _measure(
        self, askers: Sequence[Asker], blanks: dict[str, NeedlesResult], num_questions: int, on_step: OnStep
    ) -> tuple[list[NeedlesResult], dict[str, list[dict[str, Any]]]]:
        settings, group = self._settings, self._group
        questions, asked = self._questions[:num_questions], self.document.ask(num_questions)
        times: dict[str, _Times] = {asker.method: _Times() for asker in askers}
        found: dict[str, tuple[list[tuple[int, ...]], int]] = {}
        with PeakMemory(group.device) as peak:
            for asker in askers:
                _, ms = timed(group, lambda asker=asker: asker.read(self._tokens, self._longest))
                times[asker.method].prefill.append(ms)
                on_step()
            order = random.Random(settings.seed)  # the same on every rank
            for round_number in range(settings.num_warmup + settings.num_iters):
                turns = [
                    (asker, one) for asker in askers for one in (True, False) if one or settings.measure_first_token
                ]
                order.shuffle(turns)  # in a fixed order whatever comes first would always meet the same caches
                for asker, whole in turns:
                    num_tokens = NUM_NEW_TOKENS if whole else 1
                    result, ms = timed(group, lambda asker=asker, n=num_tokens: asker.ask(questions, n))
                    times[asker.method].add(ms, whole, round_number < settings.num_warmup)
                    if whole:
                        found[asker.method] = result
                    on_step()
        peak_bytes = tuple(group.gather_objects(peak.bytes))
        results, answers = [], {}
        for method, blank in blanks.items():
            token_ids, at_once = found[method]
            texts = [self._tokenizer.decode(ids) for ids in token_ids]
            is_right = [one.needle.is_answered_by(text) for one, text in zip(asked, texts, strict=True)]
            answers[method] = _answers(asked, texts, token_ids, is_right)
            results.append(
                replace(
                    blank,
                    num_at_once=at_once,
                    right_by_depth=_count_by_depth(asked, is_right),
                    asked_by_depth=_count_by_depth(asked, [True] * len(asked)),
                    peak_bytes=peak_bytes,
                    run=self._run,
                    **times[method].fields(),
                )
            )
        return results, answers

    def _blank(self, method: str, num_questions: int) -> NeedlesResult:
        """What is known of a result before it is measured."""
        settings, document = self._settings, self.document
        return NeedlesResult(
            questions=Questions(settings.run_name(method), self.num_characters, num_questions),
            status=Status.OK,
            model_name=settings.model_name,
            attention=method,
            seed=settings.seed,
            environment=self._environment,
            haystack=document.haystack,
            names=settings.names,
            num_document_tokens=len(self._tokens),
            num_needles=len(document.needles),
            num_few_shot=document.num_examples,
            num_new_tokens=NUM_NEW_TOKENS,
        )


class _Times:
    """Of one method, in ms."""

    def __init__(self) -> None:
        self.prefill: list[float] = []
        self._by_kind: dict[tuple[bool, bool], list[float]] = {}

    def add(self, ms: float, whole: bool, is_warmup: bool) -> None:
        self._by_kind.setdefault((whole, is_warmup), []).append(ms)

    def fields(self) -> dict[str, tuple[float, ...]]:
        """Under the names that a result has them by."""
        names = {
            (True, False): "answer_ms", (True, True): "warmup_ms",
            (False, False): "first_token_ms", (False, True): "first_token_warmup_ms",
        }  # fmt: skip
        by_name = {name: tuple(self._by_kind.get(kind, ())) for kind, name in names.items()}
        return {"prefill_ms": tuple(self.prefill), **by_name}


def _count_by_depth(asked: Sequence[PlacedNeedle], counted: Sequence[bool]) -> tuple[int, ...]:
    counts = [0] * NUM_DEPTHS
    for one, counts_too in zip(asked, counted, strict=True):
        counts[one.depth] += counts_too
    return tuple(counts)


def _answers(
    asked: Sequence[PlacedNeedle], texts: Sequence[str], token_ids: Sequence[Sequence[int]], is_right: Sequence[bool]
) -> list[dict[str, Any]]:
    return [
        {
            "question": one.needle.question,
            "expected": one.needle.answer.strip(),
            "position": round(one.position, 6),
            "answer": text,
            "token_ids": list(ids),
            "right": right,
        }
        for one, text, ids, right in zip(asked, texts, token_ids, is_right, strict=True)
    ]
