"""How every command of this project starts, prints and fails: a mistake is one line on stderr and exit status 2."""

import errno
import re
import sys
import time

import typer
from rich.console import Console

from engine.distributed import launched_rank
from engine.errors import InputError
from engine.memory import is_out_of_memory

# Of output that is no terminal: a table keeps its columns, whatever width a terminal is assumed to have.
_FILE_WIDTH = 140
# Seconds that ranks other than 0 keep an error to themselves. When all fail alike torchrun ends them meanwhile.
_PATIENCE_S = 2.0
# What the user can put right: the path given, its permissions, the space left. Any other OSError is a fault of ours.
_USER_ERRNOS = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
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
    suffice, is printed as ``error: ...`` and exits with status 2. Of ranks that fail together only rank 0 prints it.
    """
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        status = _fail(str(error))
    except _UsageError as error:
        status = _fail(_usage_message(error))
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        # A rename that fails names both files; the second is the one that the user asked for.
        where = error.filename2 or error.filename
        where = "" if where is None else f"{where}: "
        status = _fail(f"{where}{error.strerror}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).splitlines()[:1]
        status = _fail(": ".join(["out of memory", *first_line]) + "; use a smaller batch or model, or more ranks")
    except (KeyboardInterrupt, typer.Abort):
        status = 128 + 2  # as a shell reports a program that SIGINT ended
    sys.exit(status)


def _usage_message(error: Exception) -> str:
    message = " ".join(error.format_message().split()).removesuffix(".")
    if re.fullmatch(r"-\d.*", getattr(error, "option_name", "")):
        message += " (a number cannot be negative here)"
    return f"{message}; see python {sys.argv[0]} --help"


def _fail(message: str) -> int:
    message = " ".join(message.splitlines())  # some quote what another library said
    rank = launched_rank()
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    else:
        time.sleep(_PATIENCE_S)
        print(f"error (rank {rank}): {message}", file=sys.stderr)
    return 2
