import errno
import sys

import pytest
import torch
import typer

import engine.cli
from engine.cli import make_app, make_console, run
from engine.errors import InputError


@pytest.fixture
def run_command(monkeypatch, capsys):
    """``(exit status, stderr)`` of a command with a number as its argument, that raises ``error``."""

    def with_arguments(*arguments, error=None):
        monkeypatch.setattr("sys.argv", ["scripts/program.py", *arguments])
        app = make_app()

        @app.command()
        def command(number: int, option: int = typer.Option(1, min=1)):
            if error is not None:
                raise error

        with pytest.raises(SystemExit) as ended:
            run(app)
        return ended.value.code or 0, capsys.readouterr().err

    return with_arguments


@pytest.fixture
def run_raising(run_command):
    return lambda error: run_command("1", error=error)


def test_success_is_silent(run_command):
    assert run_command("1") == (0, "")
    assert run_command("--help") == (0, "")


def test_a_mistake_is_one_line_and_status_2(run_raising):
    assert run_raising(InputError("give another")) == (2, "error: give another\n")
    assert run_raising(InputError("it said:\nno")) == (2, "error: it said: no\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "NUMBER"),
        (["x"], "NUMBER"),
        (["1", "2"], "unexpected extra argument"),
        (["1", "--opt"], "No such option: --opt"),
        (["1", "--option", "0"], "--option"),
        (["-5"], "No such option: -5 (a number cannot be negative here)"),
    ],
)
def test_so_is_one_in_the_arguments(run_command, arguments, part):
    status, stderr = run_command(*arguments)  # the words are typer's, and differ between its versions
    assert status == 2
    assert stderr.startswith("error: ") and stderr.endswith("; see python scripts/program.py --help\n")
    assert part.lower() in stderr.lower()
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "out"), "error: out: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", ".o.partial", None, "out"), "error: out: Is a directory\n"),
    ],
)
def test_so_is_what_the_operating_system_refuses(run_raising, error, line):
    assert run_raising(error) == (2, line)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nIt says much more."), "out of memory: CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "can't allocate memory: 9"),
    ],
)
def test_so_is_memory_that_does_not_suffice(run_raising, error, what):
    status, stderr = run_raising(error)
    assert status == 2 and stderr.startswith("error: out of memory") and stderr.count("\n") == 1
    assert f"{what}; use a smaller batch or model, or more ranks" in stderr


@pytest.mark.parametrize("error", [ValueError(), RuntimeError(), OSError(errno.EBADF, "Bad file descriptor")])
def test_a_fault_of_the_program_keeps_its_traceback(run_raising, error):
    with pytest.raises(type(error)):
        run_raising(error)


def test_an_interrupt_is_no_traceback(run_raising):
    assert run_raising(KeyboardInterrupt()) == (130, "")


class TestRanks:
    def test_others_wait_to_be_ended_before_they_speak(self, run_raising, monkeypatch):
        slept = []
        monkeypatch.setattr(engine.cli.time, "sleep", slept.append)
        monkeypatch.setenv("RANK", "3")
        assert run_raising(InputError("give another")) == (2, "error (rank 3): give another\n")
        assert slept == [2.0]

    def test_the_first_does_not(self, run_raising, monkeypatch):
        monkeypatch.setattr(engine.cli.time, "sleep", lambda seconds: pytest.fail("it waited"))
        monkeypatch.setenv("RANK", "0")
        assert run_raising(InputError("give another")) == (2, "error: give another\n")


class TestConsole:
    def test_a_file_is_wide(self, capsys):
        make_console().print("x" * 139)
        assert capsys.readouterr().out == "x" * 139 + "\n"

    def test_a_terminal_is_as_wide_as_it_is(self, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "61")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        assert make_console().width == 61

    def test_stderr_and_silence(self, capsys):
        make_console(stderr=True).print("here")
        make_console(quiet=True).print("nowhere")
        assert capsys.readouterr() == ("", "here\n")
