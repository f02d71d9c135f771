"""What the tests of the scripts that measure share."""

import pytest
from commands import assert_mistake

from engine.bench.modes import ModelOptions


@pytest.fixture
def out(tmp_path):
    """A folder for results, which does not exist yet."""
    return tmp_path / "out"


@pytest.fixture
def refused(command, out, monkeypatch):
    """Asserts that the module's ``command`` is refused before any model is loaded, and writes nothing."""

    def check(arguments, *parts):
        before = sorted(out.rglob("*"))
        monkeypatch.setattr(ModelOptions, "load", None)
        for extra in ([], ["--dry-run"]):
            assert_mistake(command("--save-dir", out, *arguments, *extra), *parts)
        assert sorted(out.rglob("*")) == before

    return check
