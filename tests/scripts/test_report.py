import runpy
import sys
from pathlib import Path

import pytest
from rows import row_result
from sweeps import result

from engine.bench.micro.micro_results import FILES
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


class TestMicrobenchmarks:
    @pytest.fixture
    def micro(self, run, tmp_path):
        for mode, ms in (("base", 4.0), ("hydragen", 1.0)):
            FILES.write(tmp_path / "micro", row_result(mode, (ms,) * 3))
        return tmp_path / "micro"

    def test_prints_and_writes(self, run, micro):
        pytest.importorskip("matplotlib")
        status, stdout, stderr = run("micro")
        assert (status, stderr) == (0, "")
        assert ["hydragen", "1", "0.0%", "10.0", "1.000", "0.5", "50%", "4.00"] in [
            line.split() for line in stdout.splitlines()
        ]
        assert Path("micro", "microbenchmark.csv").read_text().count("\n") == 3
        assert Path("micro", "microbenchmark.png").read_bytes().startswith(b"\x89PNG")
        assert not list(Path("micro").glob("report.*"))

    def test_of_operations_there_is_no_plot(self, run, tmp_path):
        FILES.write(tmp_path / "operations", row_result("operations", operation="swiglu"))
        status, stdout, _ = run("operations")
        assert status == 0 and "no plot: there are no times to draw" in stdout

    def test_both_kinds_in_one_folder(self, run, micro, tmp_path):
        FILES.write(tmp_path / "out", row_result("base"))
        damaged = Path("out", "hydragen", "b64.yaml")
        damaged.write_text("[1, 2]")
        status, stdout, stderr = run("out", "--no-png")
        assert status == 0
        assert "tokens/s" in stdout and "GB/s" in stdout
        assert Path("out", "report.csv").exists() and Path("out", "microbenchmark.csv").exists()
        assert stderr.count(str(damaged)) == 1  # both readers find it

    def test_one_file_for_two_kinds_is_a_mistake(self, run, micro):
        status, stdout, stderr = run("out", "micro", "--csv", "all.csv")
        assert (status, stdout) == (2, "")
        assert "error: all.csv was given for one file, but there are results of synth.py and of" in stderr
