import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.processes import Running


@pytest.fixture
def start(tmp_path_factory) -> Iterator[Callable[..., Running]]:
    """Starts commands, and kills what is left of them."""
    folder, started = tmp_path_factory.mktemp("processes"), []

    def begin(*arguments: object, **options) -> Running:
        started.append(Running(folder, *arguments, **options))
        return started[-1]

    try:
        yield begin
    finally:
        for running in started:
            running.kill()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def make_room() -> Callable[[Path], None]:
    """Makes a ``small_disk`` large."""
    return lambda folder: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
