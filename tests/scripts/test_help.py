import pytest
import typer
from commands import ROOT, Command
from torch.distributed.run import get_args_parser

PATHS = sorted(str(path.relative_to(ROOT)) for folder in ("scripts", "tools") for path in (ROOT / folder).glob("*.py"))
# Of torchrun's own beginnings: an alias that the help calls unfit for it, and what it leaves to the script.
UNFIT = {"--n", "--help"}


@pytest.mark.parametrize("path", PATHS)
def test_says_what_it_does_and_what_every_argument_is(path):
    command = Command(path)
    done = command("--help")
    assert (done.status, done.stderr) == (0, "")
    assert f"python {path} " in done.stdout, "there is no example"
    for parameter in typer.main.get_command(command.module.app).params:
        assert parameter.name == "help" or parameter.help, f"{parameter.name} has no help"


@pytest.mark.parametrize("path", PATHS)
def test_torchrun_leaves_every_option_to_the_script(path):
    """It takes the beginnings of its own options for itself, even after the script's name."""
    own = [option for action in get_args_parser()._actions for option in action.option_strings]
    for parameter in typer.main.get_command(Command(path).module.app).params:
        for option in {*parameter.opts, *parameter.secondary_opts} - UNFIT:
            assert not [o for o in own if o.startswith(option)] or not option.startswith("--"), option
