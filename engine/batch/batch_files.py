"""The files of a batch, which rank 0 alone opens: they are checked against each other before anything runs."""

import os
from collections.abc import Iterator
from pathlib import Path

from engine.batch.input_file import InputFile
from engine.batch.ledger import Ledger
from engine.batch.request import Defaults
from engine.batch.results_file import ResultsFile
from engine.batch.tally import Tally
from engine.batch.window import Window, WindowSize, windows
from engine.errors import InputError


class BatchFiles:
    """INPUT, OUTPUT and what is remembered of both. With ``overwrite`` what OUTPUT holds is dropped.

    Raises InputError when INPUT holds no requests, and when OUTPUT cannot be written or holds anything but its results.
    """

    def __init__(self, input_path: Path, output_path: Path, overwrite: bool = False):
        self.input = InputFile(input_path)
        if output_path.exists() and os.path.samefile(input_path, output_path):
            raise InputError(f"{output_path} is the file of requests, too; accepted: another file for the results")
        self.tally = Tally(sum(1 for _ in self.input.lines()))
        if not self.tally.num_requests:
            raise InputError(f"{input_path} holds no requests; accepted: a file with one request a line, in JSON")
        self.ledger = Ledger()
        self.results = ResultsFile(output_path, overwrite)
        try:
            self._recover(output_path)
        except BaseException:
            self.close()
            raise

    def windows(self, defaults: Defaults, size: WindowSize, max_positions: int) -> Iterator[Window]:
        """The requests without results, see ``engine.batch.window.windows``."""
        return windows(self.input, self.ledger, defaults, size, max_positions)

    def close(self) -> None:
        self.results.close()
        self.ledger.close()

    def _recover(self, output_path: Path) -> None:
        """Counts the results that there are. Raises InputError for those of another file."""
        remedy = "give the requests that it was begun with, another file for the results, or --overwrite to drop them"
        for result in self.results.recover():
            if not self.ledger.add_answered(result.origin):
                raise InputError(f"{output_path} holds line {result.origin.line}'s result twice; remove one of the two")
            self.tally.num_resumed += 1
            self.tally.num_finished += 1
            self.tally.num_failed += result.failed
        if not self.tally.num_resumed:
            return
        num_found = 0
        for line in self.input.lines():
            answered = self.ledger.request_id(line.number)
            if answered not in (None, line.request_id):
                raise InputError(f"{output_path} answers another line {line.number} than {self.input.path}'s; {remedy}")
            num_found += answered is not None
        if num_found < self.tally.num_resumed:
            raise InputError(f"{output_path} answers lines that {self.input.path} does not have; {remedy}")
