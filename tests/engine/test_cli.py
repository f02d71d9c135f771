import errno

import pytest

from engine.cli import make_app, run
from engine.errors import InputError


@pytest.fixture
def run_raising(monkeypatch, capsys):
    """``(exit status, stderr)`` of a command that raises ``error``."""
    monkeypatch.setattr("sys.argv", ["program"])

    def run_command(error):
        app = make_app()

        @app.command()
        def command():
            raise error

        with pytest.raises(SystemExit) as ended:
            run(app)
        return ended.value.code, capsys.readouterr().err

    return run_command


def test_a_mistake_is_one_line_and_status_2(run_raising):
    assert run_raising(InputError("give another")) == (2, "error: give another\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "out"), "error: out: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", ".out.partial", None, "out"), "error: out: Is a directory\n"),
    ],
)
def test_so_is_what_the_operating_system_refuses(run_raising, error, line):
    assert run_raising(error) == (2, line)


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EBADF, "Bad file descriptor")])
def test_a_fault_of_the_program_keeps_its_traceback(run_raising, error):
    with pytest.raises(type(error)):
        run_raising(error)
