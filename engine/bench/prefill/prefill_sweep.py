"""Time to the first token of one prompt, longer and longer, by each of several prefill methods.

Every rank does the same; rank 0 decides what is left to do, writes the files and prints.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from engine.arena import NoRoomError
from engine.attention.hydragen import Hydragen
from engine.bench.environment import describe_environment, describe_execution
from engine.bench.memory_model import footprint
from engine.bench.needles.asking import timed
from engine.bench.needles.recording import recorded_when_out_of_memory
from engine.bench.peak_memory import PeakMemory
from engine.bench.prefill.column import Column
from engine.bench.prefill.prefill_results import PREFILL_FILES, PrefillPoint, PrefillResult
from engine.bench.prefill.prompt import Prompt
from engine.bench.prefill.reader import Reader
from engine.bench.prefill.same_settings import check_point
from engine.bench.prefill.settings import Settings
from engine.bench.result_files import Status
from engine.bench.results import Cell
from engine.config import ModelConfig
from engine.distributed import TPGroup

OnStep = Callable[[], None]


class PrefillSweep:
    """The methods of the settings, at one context length after another."""

    def __init__(self, settings: Settings, config: ModelConfig, model_digest: str, prompt: Prompt, group: TPGroup):
        """Raises InputError where ``prompt`` has fewer tokens than are to be read."""
        self._settings, self._config, self._group = settings, config, group
        self._prompt = prompt
        prompt.take(max((n for n in settings.contexts if self.too_long(n) is None), default=1))
        self._model_digest = model_digest
        self._environment = describe_environment(group.device, config.dtype, group.size)
        self._run = group.broadcast(uuid.uuid4().hex[:12])

    def too_long(self, num_tokens: int) -> str | None:
        """Why the model cannot read so many tokens; None where it can."""
        positions = self._config.max_positions
        return f"too long: the model has {positions:,} positions" if num_tokens > positions else None

    def unfinished(self, num_tokens: int) -> list[Column]:
        """The methods that have no result for so many tokens.

        Raises InputError when one has a result that was measured in another way.
        """
        left, outdir = [], self._settings.outdir
        for column in self._settings.columns:
            blank = self.blank(column, num_tokens)
            if PREFILL_FILES.is_finished(outdir, blank.point):
                check_point(self._settings, PREFILL_FILES.read(blank.point.path(outdir)), blank)
            else:
                left.append(column)
        return left

    def footprint(self, num_tokens: int) -> int:
        """Bytes that each rank needs for a prompt, beside the tables of a sparse method: a level by itself is laid out
        the same by every attention method."""
        return footprint(self._config, self._group.size, Cell(Hydragen.name, 1, num_tokens, 1)).total

    def num_steps(self, num_columns: int) -> int:
        """Readings that one context length takes, for a progress bar."""
        return num_columns * (1 + self._settings.num_warmup + self._settings.num_iters)

    def record_too_long(self, columns: Sequence[Column], num_tokens: int, reason: str) -> list[PrefillResult]:
        """Writes, on rank 0, that the model cannot read so many tokens; nothing is run."""
        blanks = [self.blank(column, num_tokens) for column in columns]
        results = [replace(blank, status=Status.DOES_NOT_FIT, message=reason) for blank in blanks]
        self._write(results)
        return results

    def run(self, readers: Sequence[Reader], num_tokens: int, on_step: OnStep) -> list[PrefillResult]:
        """Reads a prompt with every one of ``readers``, in turns; on rank 0 results are written.

        A method for which memory has no room is recorded as such, and the others go on: all ranks find that alike.
        """
        settings = self._settings
        measured = {reader.column: _Measured(self.blank(reader.column, num_tokens)) for reader in readers}
        prompt = self._prompt.take(num_tokens)
        order = random.Random(settings.model.seed)  # the same on every rank
        for reader in readers:
            self._take(reader, measured[reader.column], num_tokens, lambda m, r=reader: self._count(r, m, prompt))
            on_step()
        for round_number in range(settings.num_warmup + settings.num_iters):
            turns = list(readers)
            order.shuffle(turns)  # in a fixed order whatever comes first would always meet the same caches
            is_warmup = round_number < settings.num_warmup
            for reader in turns:
                self._take(
                    reader, measured[reader.column], num_tokens, lambda m, r=reader: self._time(r, m, prompt, is_warmup)
                )
                on_step()
        results = [self._result(one) for one in measured.values()]
        self._write(results)
        return results

    def _take(
        self, reader: Reader, measured: "_Measured", num_tokens: int, read: Callable[["_Measured"], None]
    ) -> None:
        """One turn, with all memory to itself. Out of memory is recorded and ends the run."""
        if measured.refusal:
            return
        outdir, group = self._settings.outdir, self._group
        what, remedy = f"{reader.column.text}, {num_tokens:,} tokens", "use a shorter prompt or more ranks"
        try:
            with recorded_when_out_of_memory(PREFILL_FILES, outdir, measured.blank, group, what, remedy):
                read(measured)
        except NoRoomError as error:
            measured.refusal = str(error)
        finally:
            reader.release()

    def _count(self, reader: Reader, measured: "_Measured", prompt: Sequence[int]) -> None:
        reader.set_up(len(prompt))
        measured.density_by_layer = reader.density(prompt)

    def _time(self, reader: Reader, measured: "_Measured", prompt: Sequence[int], is_warmup: bool) -> None:
        """The cache's memory is taken before the clock starts, as that of a server would have been."""
        with PeakMemory(self._group.device) as peak:
            reader.set_up(len(prompt))
            measured.first_token, ms = timed(self._group, lambda: reader.first_token(prompt))
        (measured.warmup_ms if is_warmup else measured.ms).append(ms)
        measured.peak_bytes = max(measured.peak_bytes, peak.bytes)

    def _result(self, measured: "_Measured") -> PrefillResult:
        if measured.refusal:
            return replace(measured.blank, status=Status.DOES_NOT_FIT, message=measured.refusal)
        return replace(
            measured.blank,
            first_token_ms=tuple(measured.ms),
            first_token_warmup_ms=tuple(measured.warmup_ms),
            first_token=measured.first_token,
            density_by_layer=measured.density_by_layer,
            peak_bytes=tuple(self._group.gather_objects(measured.peak_bytes)),
            run=self._run,
        )

    def _write(self, results: Sequence[PrefillResult]) -> None:
        def write() -> None:
            for result in results:
                PREFILL_FILES.write(self._settings.outdir, result)

        self._group.on_rank_0(write)

    def blank(self, column: Column, num_tokens: int) -> PrefillResult:
        """What is known of a result before it is measured."""
        settings, config, device = self._settings, self._config, self._group.device
        return PrefillResult(
            point=PrefillPoint(column.folder, num_tokens),
            status=Status.OK,
            model_name=settings.model_name,
            model_digest=self._model_digest,
            load_format=settings.model.load_format,
            prefill=column.text,
            attention=column.attention,
            prompt=self._prompt.name,
            prompt_digest=self._prompt.digest,
            seed=settings.model.seed,
            environment=self._environment | describe_execution(settings.execution(column), device, config.dtype),
            predicted_bytes=0 if self.too_long(num_tokens) else self.footprint(num_tokens),
        )


@dataclass
class _Measured:
    """Of one method at one length, turn by turn. Times are in ms."""

    blank: PrefillResult  # what is known before
    refusal: str = ""  # why memory has no room
    density_by_layer: tuple[float, ...] = ()
    first_token: int | None = None
    ms: list[float] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0  # on this rank
