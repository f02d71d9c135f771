import runpy
import sys
from pathlib import Path

import pytest
from sweeps import result

from engine.bench.results import write_cell

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``(exit status, stdout, stderr)`` of the script, in a folder with a sweep ``out`` of two cells."""
    for mode, tokens_per_second in (("hydragen", 400), ("noattention", 800)):
        write_cell(tmp_path / "out", result(mode, tokens_per_second))
    monkeypatch.chdir(tmp_path)

    def run_script(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return (ended.value.code or 0, *capsys.readouterr())

    return run_script


def test_prints_and_writes(run):
    pytest.importorskip("matplotlib")
    damaged = Path("out", "hydragen", "b64_s1024_u9.yaml")
    damaged.write_text("schema_version: 0\n")
    status, stdout, stderr = run("out")
    assert status == 0
    assert ["hydragen", "400", "0.50", "0.0%"] in [line.split() for line in stdout.splitlines()]
    assert f"warning: {damaged}: has schema version 0" in stderr
    assert Path("out", "report.csv").read_text().count("\n") == 3
    assert Path("out", "report.png").read_bytes().startswith(b"\x89PNG")


def test_writes_where_it_is_told(run):
    assert run("out", "--csv", "all.csv", "--no-png")[0] == 0
    assert Path("all.csv").exists()
    assert not list(Path("out").glob("report.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere is not a directory"),
        (["."], "error: no results in ."),
        (["out", "--no-csv", "--csv", "x"], "error: --csv x and --no-csv were both given"),
        (["out", "--no-png", "--csv", "out"], "error: out: Is a directory"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    status, _, stderr = run(*arguments)
    assert status == 2
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1
