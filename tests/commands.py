"""The project's commands, run inside this process: a fresh one takes seconds to import torch."""

import importlib.util
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from engine.cli import run

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


class Command:
    """``Command("scripts/x.py")("argument", ...)`` is ``python scripts/x.py argument ...``, without the process."""

    def __init__(self, path: str):
        self.path = path
        self.module = load(path)

    def __call__(self, *arguments: object) -> Done:
        stdout, stderr = io.StringIO(), io.StringIO()
        argv = [self.path, *map(str, arguments)]
        with (
            mock.patch.object(sys, "argv", argv),
            redirect_stdout(stdout),
            redirect_stderr(stderr),
            pytest.raises(SystemExit) as ended,
        ):
            run(self.module.app)
        return Done(ended.value.code or 0, stdout.getvalue(), stderr.getvalue())


def torchrun(*arguments: object, num_ranks: int = 2) -> subprocess.CompletedProcess:
    """``torchrun`` with real processes, for what only they can show."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def load(path: str) -> ModuleType:
    """The module of a file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_mistake(done: Done, *parts: str) -> None:
    """One line on stderr, with these parts, and nothing else: no output, no usage, no traceback."""
    assert done.status == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
