"""What a batch must remember over the whole file: which lines are answered, and who had a custom_id first.

It lies in a database of its own in a temporary file, which SQLite keeps in memory while it is small and deletes at the
end, so a file of any length takes no more memory than a short one.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from engine.batch.request import Origin
from engine.errors import InputError


class Ledger:
    """Of one batch. Raises InputError when there is no room for its file."""

    def __init__(self) -> None:
        with _clear_errors():
            self._database = sqlite3.connect("", isolation_level=None)
            self._database.execute("CREATE TABLE answered (line INTEGER PRIMARY KEY, request_id TEXT, custom_id BLOB)")
            self._database.execute("CREATE TABLE claimed (custom_id BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def add_answered(self, origin: Origin) -> bool:
        """The line has a result. False when it had one before."""
        custom_id = None if origin.custom_id is None else _digest(origin.custom_id)
        row = (origin.line, origin.request_id, custom_id)
        with _clear_errors():
            return self._database.execute("INSERT OR IGNORE INTO answered VALUES (?, ?, ?)", row).rowcount == 1

    def request_id(self, line: int) -> str | None:
        """That the result of a line states; None for a line without one."""
        found = self._fetch("SELECT request_id FROM answered WHERE line = ?", line)
        return None if found is None else found[0]

    def claim(self, custom_id: str, line: int) -> int:
        """The line that had ``custom_id`` first. Lines ask in the file's order."""
        return self._claim(_digest(custom_id), line)

    def claim_again(self, line: int) -> bool:
        """Whether the line is answered. It then claims what it claimed when it was."""
        found = self._fetch("SELECT custom_id FROM answered WHERE line = ?", line)
        if found is not None and found[0] is not None:
            self._claim(found[0], line)
        return found is not None

    def close(self) -> None:
        self._database.close()

    def _claim(self, digest: bytes, line: int) -> int:
        with _clear_errors():
            self._database.execute("INSERT OR IGNORE INTO claimed VALUES (?, ?)", (digest, line))
        return self._fetch("SELECT line FROM claimed WHERE custom_id = ?", digest)[0]

    def _fetch(self, query: str, *values: object) -> tuple | None:
        with _clear_errors():
            return self._database.execute(query, values).fetchone()


def _digest(custom_id: str) -> bytes:
    """Of a fixed length, whatever the text's."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise InputError(
            f"the list of requests has no room in the folder of temporary files ({error}); make room there, or set "
            "SQLITE_TMPDIR to another folder"
        ) from error
