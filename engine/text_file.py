"""A file of text, as a person gives one."""

from pathlib import Path

from engine.errors import InputError


def read_text(path: Path) -> str:
    """What a file in UTF-8 says. Raises InputError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # an editor may have put a byte order mark first
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); accepted: a text file; give another") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; accepted: a text file in UTF-8; convert it") from error
