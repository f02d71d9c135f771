"""Requests through the engine: prompts go in together, results are written one by one as they end."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from engine.batch.endpoint import EncodedPrompt
from engine.batch.refusal import error_body
from engine.batch.request import BatchRequest, Origin
from engine.batch.result import ANSWERED, REFUSED, result_line
from engine.batch.results_file import ResultsFile
from engine.batch.tally import Tally
from engine.batch.token_texts import TokenTexts
from engine.batch.window import Window
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.llm import LLM, RequestOutput

# Called on rank 0 with what there is by now.
OnProgress = Callable[[Tally], None]


@dataclass
class _Pending:
    """A request that is under way."""

    request: BatchRequest
    outputs: list[RequestOutput | None]  # of its prompts
    failed: bool = False


class Runner:
    """Answers windows of requests. Each rank makes the same calls; ``results`` is there on rank 0 alone.

    Whatever becomes of a request is written with the step that it ended in.
    """

    def __init__(
        self,
        llm: LLM,
        model: str,
        group: TPGroup,
        results: ResultsFile | None,
        tally: Tally,
        on_progress: OnProgress,
    ):
        self._llm, self._model, self._group, self._results = llm, model, group, results
        self._tally, self._on_progress = tally, on_progress
        self._texts = TokenTexts(llm.tokenizer) if llm.has_tokenizer else None
        self._now = group.broadcast(datetime.now())
        self._started = time.monotonic()
        # Results to be written; the body is made on rank 0 alone.
        self._ready: list[tuple[Origin, int, Callable[[], dict[str, Any]]]] = []

    def run(self, window: Window) -> None:
        """Answers all of its requests. Raises InputError when the results have no room."""
        for origin, error in window.refused:
            self._refuse(origin, error)
        prompts: list[EncodedPrompt] = []
        places: list[tuple[_Pending, int]] = []  # of each prompt: its request, and its number among that one's
        for request in window.requests:
            try:
                encoded = request.body.encode(self._llm, self._now)
                for prompt in encoded:
                    self._llm.check_prompt(prompt.token_ids, prompt.params)
            except InputError as error:
                self._refuse(request.origin, error)
                continue
            pending = _Pending(request, [None] * len(encoded))
            places += [(pending, index) for index in range(len(encoded))]
            prompts += encoded
        self._write()
        if not prompts:
            return
        self._llm.generate(
            [prompt.token_ids for prompt in prompts],
            [prompt.params for prompt in prompts],
            repeats_differ=False,
            on_output=lambda number, output: self._add(*places[number], output),
            on_failed=lambda number, message: self._fail(places[number][0], message),
            on_tokens=self._step,
        )
        self._write()

    def _add(self, pending: _Pending, index: int, output: RequestOutput) -> None:
        pending.outputs[index] = output
        if pending.failed or None in pending.outputs:
            return
        self._tally.prompt_tokens += sum(len(one.prompt_token_ids) for one in pending.outputs)
        body, request_id = pending.request.body, pending.request.origin.request_id
        model = self._model if body.model is None else body.model
        answer = partial(body.answer, request_id, model, pending.outputs, self._texts)
        self._ready.append((pending.request.origin, ANSWERED, answer))

    def _fail(self, pending: _Pending, message: str) -> None:
        """No result: with more memory, or another dtype, the same request may be answered."""
        if pending.failed:
            return
        pending.failed = True
        self._tally.num_unserved += 1
        if self._tally.num_unserved == 1:
            self._tally.first_unserved = f"line {pending.request.origin.line}: {message}"

    def _refuse(self, origin: Origin, error: InputError) -> None:
        self._tally.num_failed += 1
        self._ready.append((origin, REFUSED, partial(error_body, error)))

    def _step(self, new_tokens: int, ended: int) -> None:
        self._tally.new_tokens += new_tokens
        self._write()

    def _write(self) -> None:
        """What has ended, so that no more than a step's work is lost whatever happens."""
        self._tally.seconds = time.monotonic() - self._started
        if self._ready:
            self._tally.num_finished += len(self._ready)
            ready, self._ready = self._ready, []
            self._group.on_rank_0(lambda: self._results.append([result_line(*at, body()) for *at, body in ready]))
        if self._group.rank == 0:
            self._on_progress(self._tally)
