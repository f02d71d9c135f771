"""Files that are written whole or not at all, and the folders that they go to."""

import os
from pathlib import Path

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
    """Writes ``data`` to ``path``; a reader, or a restart after a crash, sees all of it or what was there before."""
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_whole(path)
    finally:
        partial.unlink(missing_ok=True)


def check_outdir(outdir: Path) -> None:
    """Raises InputError when results could not be written there: after hours of measuring it would be too late."""
    existing = next(path for path in (outdir, *outdir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file; accepted: an OUTDIR that is a directory, or is to be one; use another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} cannot be written to; accepted: an OUTDIR that can; use another")
