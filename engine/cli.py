"""How every command of this project starts and fails: a mistake is one line on stderr and exit status 2."""

import errno
import sys

import typer

from engine.errors import InputError

# What the user can put right: the path given, its permissions, the space left. Any other OSError is a fault of ours.
_USER_ERRNOS = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


def make_app() -> typer.Typer:
    """A command-line program with plain help and plain tracebacks."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def run(app: typer.Typer) -> None:
    """Runs ``app`` on the process's arguments and ends the process.

    An InputError, or an operating-system error about the user's files, is printed as ``error: ...`` and exits with
    status 2. Errors in the arguments themselves are click's, with its message and status.
    """
    try:
        app()
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        # A rename that fails names both files; the second is the one that the user asked for.
        where = error.filename2 or error.filename
        where = "" if where is None else f"{where}: "
        sys.exit(_fail(f"{where}{error.strerror}"))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
