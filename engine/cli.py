"""How every command of this project starts, prints and fails: a mistake is one line on stderr and exit status 2."""

import errno
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from engine.distributed import launched_rank, launched_size
from engine.errors import InputError
from engine.memory import is_out_of_memory
from engine.peers import RankLostError

# Of output that is no terminal: a table keeps its columns, whatever width a terminal is assumed to have.
_FILE_WIDTH = 140
# Seconds that ranks other than 0 keep an error to themselves. When all fail alike torchrun ends them meanwhile.
_PATIENCE_S = 2.0
# Those of a rank that knows another to report the cause, which may itself be patient.
_PATIENCE_OF_OTHERS_S = 3 * _PATIENCE_S
# What the user can put right: the path given, its permissions, the space left. Any other OSError is a fault of ours.
_USER_ERRNOS = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
_UsageError = typer.BadParameter.__base__  # click's, or that of the copy of click which newer versions of typer bring


def make_app() -> typer.Typer:
    """A command-line program with plain help and plain tracebacks."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for a table where there is none. A quiet one prints nothing.

    Text is printed as it is: a path may hold brackets.
    """
    console = Console(stderr=stderr, quiet=quiet, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def run(app: typer.Typer) -> None:
    """Runs ``app`` on the process's arguments and ends the process.

    An InputError, an error in the arguments, an operating-system error about the user's files, or memory that does not
    suffice, is printed as ``error: ...`` and exits with status 2. Of ranks that fail together only rank 0 prints it. A
    rank that was lost is told by one of the others, with status 1. SIGTERM ends the program as SIGINT does: what it was
    writing is cleaned up.
    """
    try:
        with _sigterm_raises():
            status = app(standalone_mode=False)
    except RankLostError as error:
        status = _fail(str(error), status=1, patience_s=_PATIENCE_OF_OTHERS_S if error.told_elsewhere else 0)
    except (KeyboardInterrupt, typer.Abort):
        status = 128 + signal.SIGINT  # as a shell reports a program that it ended
    except Exception as error:
        message = _message_of_a_mistake(error)
        if message is None:
            if launched_size() > 1:  # tracebacks of several ranks follow: the cause comes before them
                said = "".join(str(error).splitlines()[:1])
                print(f"error (rank {launched_rank()}): {type(error).__name__}: {said}", file=sys.stderr, flush=True)
            raise
        status = _fail(message, status=2, patience_s=_PATIENCE_S if launched_rank() else 0)
    sys.exit(status)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit. Ranks have a handler of their own, which ``init_group`` sets: before it a rank
    may wait for others where Python cannot act on a signal, and SIGTERM is to end it all the same.
    """

    def end(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one is not to disturb the cleaning up
        raise SystemExit(128 + signal.SIGTERM)

    if launched_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _message_of_a_mistake(error: Exception) -> str | None:
    """What to tell the user; None for a fault of the program."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, _UsageError):
        return _usage_message(error)
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        # A rename that fails names both files; the second is the one that the user asked for.
        where = error.filename2 or error.filename
        return f"{'' if where is None else f'{where}: '}{error.strerror}"
    if is_out_of_memory(error):
        first_line = str(error).splitlines()[:1]
        return ": ".join(["out of memory", *first_line]) + "; use a smaller batch or model, or more ranks"
    return None


def _usage_message(error: Exception) -> str:
    message = " ".join(error.format_message().split()).removesuffix(".")
    if re.fullmatch(r"-\d.*", getattr(error, "option_name", "")):
        message += " (a number cannot be negative here)"
    return f"{message}; see python {sys.argv[0]} --help"


def _fail(message: str, status: int, patience_s: float) -> int:
    """Prints the error, unless the launcher ends this process within ``patience_s`` seconds. Returns ``status``."""
    if patience_s:
        time.sleep(patience_s)
    rank = launched_rank()
    message = " ".join(message.splitlines())  # some quote what another library said
    if rank == 0:
        line = f"error: {message}"
    else:
        line = f"error (rank {rank}): {message}"
        if sys.stderr.isatty():
            line = f"\n{line}"  # rank 0 may have left its progress bar there
    print(line, file=sys.stderr, flush=True)
    return status
