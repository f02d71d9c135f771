"""The lines of a batch file, of whatever length, one at a time."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.errors import InputError

MAX_LINE_BYTES = 1 << 23  # the token ids of a prompt of a million, and more than its text
_PIECE = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line that is not blank."""

    number: int  # counted from 1, blank lines included
    request_id: str  # stands for what the line holds
    data: bytes | None  # without the line break; None when it is longer than MAX_LINE_BYTES


class InputFile:
    """A batch file. Raises InputError when it is not there, or is no file that can be read more than once."""

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise InputError(f"{path} does not exist; accepted: a file with one request a line, in JSON")
        if not path.is_file():
            raise InputError(f"{path} is no regular file; accepted: one that can be read twice; write it to a file")

    def lines(self) -> Iterator[Line]:
        """From the first line on. No more than one is held in memory, and a longer one than that is passed over."""
        with self.path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
                    yield Line(number, _request_id(data, _rest(file)), None)
                    continue
                if number == 1:
                    data = data.removeprefix(_BYTE_ORDER_MARK)
                if data := data.strip():
                    yield Line(number, _request_id(data), data)


def _rest(file: BinaryIO) -> Iterator[bytes]:
    """Of the line, in pieces."""
    while piece := file.readline(_PIECE):
        yield piece
        if piece.endswith(b"\n"):
            return


def _request_id(data: bytes, rest: Iterable[bytes] = ()) -> str:
    digest = hashlib.blake2b(data, digest_size=12)
    for piece in rest:
        digest.update(piece)
    return f"req_{digest.hexdigest()}"
