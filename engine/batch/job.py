"""A batch from its file to that of its results: rank 0 reads and writes, every rank runs every request."""

from dataclasses import replace
from pathlib import Path
from typing import Self

from engine.batch.batch_files import BatchFiles
from engine.batch.request import Defaults
from engine.batch.runner import OnProgress, Runner
from engine.batch.tally import Tally
from engine.batch.window import WindowSize
from engine.distributed import TPGroup
from engine.llm import LLM


class BatchJob:
    """The files of a batch, checked, opened and locked before a model is loaded. To be closed on every rank.

    Raises InputError on every rank when they cannot be used: INPUT holds no requests, OUTPUT is no file of its results,
    or another run writes it.

    Args:
        input_path: one request a line.
        output_path: their results. Requests that have one there do not run again.
        group: the ranks. Each makes the same calls.
        overwrite: drop what ``output_path`` holds.
        defaults: what requests get that do not say.
        window: how much of the file is in memory.
    """

    def __init__(
        self,
        input_path: Path,
        output_path: Path,
        group: TPGroup,
        *,
        overwrite: bool = False,
        defaults: Defaults | None = None,
        window: WindowSize | None = None,
    ):
        self._group, self._defaults, self._window = group, defaults or Defaults(), window or WindowSize()
        self._files: BatchFiles | None = None  # on rank 0

        def open_files() -> Tally:
            self._files = BatchFiles(input_path, output_path, overwrite)
            return self._files.tally

        self.tally = replace(group.on_rank_0(open_files))  # each rank counts on a copy of its own

    @property
    def is_done(self) -> bool:
        """Every request has a result."""
        return self.tally.num_finished == self.tally.num_requests

    def run(self, llm: LLM, model: str, on_progress: OnProgress = lambda tally: None) -> None:
        """Answers every request that has no result yet. Each rank makes the same call.

        ``model`` stands in the answers to requests that name none. Raises InputError when the results have no room.
        """
        group, files = self._group, self._files
        runner = Runner(llm, model, group, None if files is None else files.results, self.tally, on_progress)
        todo = None if files is None else files.windows(self._defaults, self._window, llm.config.max_positions)
        while window := group.on_rank_0(lambda: next(todo, None)):
            runner.run(window)
        group.on_rank_0(lambda: files.results.sync())

    def close(self) -> None:
        if self._files is not None:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
