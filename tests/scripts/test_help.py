import pytest
import typer
from commands import Command

PATHS = ["scripts/run.py", "scripts/synth.py", "scripts/report.py", "tools/make_tp_files.py"]


@pytest.mark.parametrize("path", PATHS)
def test_says_what_it_does_and_what_every_argument_is(path):
    command = Command(path)
    done = command("--help")
    assert (done.status, done.stderr) == (0, "")
    assert f"python {path} " in done.stdout, "there is no example"
    for parameter in typer.main.get_command(command.module.app).params:
        assert parameter.name == "help" or parameter.help, f"{parameter.name} has no help"
