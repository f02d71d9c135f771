"""The file of results: one process writes it, line by line, and after any end it holds whole lines."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.batch.result import BEGINNING, Result, parse_result
from engine.errors import InputError

_SYNC_EVERY_S = 5.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ResultsFile:
    """``path``, made if it is not there, and locked against other processes until ``close``.

    Read what it holds, ``recover``, before anything is added. With ``overwrite`` that is nothing, and what there is
    stays until the first result takes its place. Raises InputError when the path cannot be used or another process
    writes the file.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self._path = path
        if not path.absolute().parent.is_dir() or (path.exists() and not path.is_file()):
            raise InputError(f"{path}: accepted: a file in a directory that exists; make it, or use another path")
        self._file, self._is_new = _open_locked(path)
        self._overwrite = overwrite
        self._size = os.fstat(self._file.fileno()).st_size  # of its whole lines
        self._synced_at = time.monotonic()

    def recover(self) -> Iterator[Result]:
        """The results that there are. What a run that was killed left of a line at the end, or a machine of zeros, is
        then cut off.

        Raises InputError for a file that holds anything else, and leaves it as it was.
        """
        if self._overwrite:
            return
        self._file.seek(0)
        whole, number = 0, 0
        while beginning := self._file.readline(len(BEGINNING)):
            number += 1
            if whole and not beginning.strip(b"\0") and self._is_zero():
                break
            if beginning != BEGINNING[: len(beginning)]:  # before a line is read whose end may be far
                raise self._foreign(number)
            line = beginning + self._file.readline()
            if not line.endswith(b"\n"):
                break
            try:
                yield parse_result(line)
            except ValueError:
                raise self._foreign(number) from None
            whole += len(line)
        self._cut(whole)

    def append(self, lines: Sequence[bytes]) -> None:
        """Adds the lines. Raises InputError where there is no room for all; then those are added that have it.

        They outlive the process at once, and the machine after a few seconds or ``sync``.
        """
        if self._overwrite:
            self._overwrite = False
            self._cut(0)
        with self._errors_named():
            try:
                for line in lines:
                    left = memoryview(line)
                    while left:
                        left = left[os.write(self._file.fileno(), left) :]
                    self._size += len(line)
                if time.monotonic() - self._synced_at > _SYNC_EVERY_S:
                    self.sync()
            except BaseException:
                self._cut(self._size)
                raise

    def sync(self) -> None:
        """What was added outlives the machine."""
        with self._errors_named():
            os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Gives the file up. One that was made here and got nothing is removed.

        Raises InputError when the path does not lead to it any more.
        """
        try:
            is_there = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            is_there = False
        if is_there and self._is_new and self._size == 0:
            self._path.unlink()
        self._file.close()
        if not is_there:
            raise InputError(f"{self._path} was removed, or replaced, while its results were written; they are lost")

    def _is_zero(self) -> bool:
        """Whether the file ends in nothing but zeros, as a machine that loses its power may leave it."""
        return not any(piece.strip(b"\0") for piece in iter(lambda: self._file.read(2**20), b""))

    def _cut(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)
        self._size = size

    def _foreign(self, line: int) -> InputError:
        return InputError(
            f"{self._path}, line {line} is not the result of a batch; accepted: a file that this command has written, "
            "or a new one; use another path, or --overwrite to lose what it holds"
        )

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise InputError(
                    f"{self._path}: {error.strerror}; the results in it are whole: make room, and run the same again"
                ) from error
            error.filename = str(self._path)
            raise


def _open_locked(path: Path) -> tuple[BinaryIO, bool]:
    """The file, and whether it was made here."""
    while True:
        is_new = not path.exists()
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file, is_new
        except BlockingIOError:
            file.close()
            raise InputError(f"{path} is being written by another run; wait for its end, or use another path") from None
        except FileNotFoundError:  # the run that had made it has removed it before the lock was ours
            pass
        file.close()
