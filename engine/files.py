"""Files that are written whole or not at all, and the folders that they go to."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.errors import InputError


def partial_path(path: Path) -> Path:
    """Where ``path`` grows until it is complete: hidden, beside it, so that a rename is atomic."""
    return path.with_name(f".{path.name}.partial")


def replace_whole(path: Path) -> None:
    """Puts the complete, synced ``partial_path(path)`` in the place of ``path``, and makes the rename durable."""
    os.replace(partial_path(path), path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``; a reader, or a restart after a crash, sees all of it or what was there before.

    Several processes may write one path at a time: each waits for its turn, and the last one's data stays. What a
    killed process left behind is written over. An OSError names ``path``.
    """
    partial = partial_path(path)
    try:
        with _open_alone(partial) as file:
            try:
                file.truncate(0)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                replace_whole(path)
            finally:
                if _is_at(file, partial):  # after the rename another process may be writing a file of that name
                    partial.unlink()
    except OSError as error:
        if error.filename is None:  # as when the disk is full
            error.filename = str(path)
        raise


def _open_alone(path: Path) -> BinaryIO:
    """The file at ``path``, made if there is none, locked against other processes until it is closed."""
    while True:
        file = path.open("ab")  # which leaves what another process is writing as it is
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, path):
            return file
        file.close()  # while this process waited, the other one has renamed or removed it


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Alone in a directory, which is there: raises InputError while another process is. Nothing is left in it."""
    directory = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path} is being written by another run; wait for its end, or use another directory"
            ) from None
        yield
    finally:
        os.close(directory)


def check_outdir(outdir: Path) -> None:
    """Raises InputError when results could not be written there: after hours of measuring it would be too late."""
    existing = next(path for path in (outdir, *outdir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file; accepted: an OUTDIR that is a directory, or is to be one; use another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} cannot be written to; accepted: an OUTDIR that can; use another")
