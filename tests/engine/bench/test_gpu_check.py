import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from asked import needles_result, write_needles
from rich.console import Console
from rows import row_result

import engine.bench.gpu_check
from engine.bench.gpu_check import (
    REPORT,
    GpuTests,
    Machine,
    Microbenchmark,
    Needles,
    Ranks,
    Section,
    Throughput,
    make_sections,
    print_outcomes,
    run_sections,
)  # fmt: skip
from engine.bench.gpu_work import NEEDLE_DTYPES, SIZES, Grid, MicroGrid
from engine.bench.micro.micro_results import FILES
from engine.bench.result_files import Status

QUIET = Console(quiet=True)
ROOT = Path(__file__).parents[3]


class Script(Section):
    """A section whose program is a line of Python that may write ``numbers.json``."""

    weight = 1.0

    def __init__(self, name, code, complaint=None):
        self.name, self._code, self._complaint = name, code, complaint

    def command(self, folder):
        return [sys.executable, "-S", "-c", self._code, str(folder)]

    def read(self, folder):
        path = folder / "numbers.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def complaint(self, numbers):
        return self._complaint

    def summary(self, numbers):
        return f"x is {numbers['x']}" if numbers else ""


WRITE = "import sys; open(sys.argv[1] + '/numbers.json', 'w').write('{\"x\": 7}')"


def test_what_fails_is_told_and_the_rest_runs(tmp_path):
    sections = [
        Script("dies", "import sys; print('words'); sys.exit('the last [1] words')"),
        Script("slow", f"{WRITE}; import time; print('so far'); sys.stdout.flush(); time.sleep(60)"),
        Script("silent", "pass"),
        Script("wrong", WRITE, complaint="x is odd"),
        Script("good", WRITE),
    ]
    outcomes = run_sections(sections, tmp_path / "out", "cuda", 5.0 + 4.0, QUIET)
    assert [o.passed for o in outcomes] == [False] * 4 + [True]
    dies, slow, silent, wrong, good = outcomes
    assert dies.error == "exit status 1: the last [1] words; there are no results"
    assert dies.log_tail == "words\nthe last [1] words\n"
    assert slow.error == "it took longer than 1 s" and slow.numbers == {"x": 7} and slow.log_tail == "so far\n"
    assert silent.error == "there are no results"
    assert (wrong.error, wrong.summary) == ("x is odd", "x is 7")
    assert (good.error, good.log_tail, good.numbers) == (None, None, {"x": 7})
    # Each may take its share of what is left: the later ones have what the first did not need.
    assert dies.limit_s == pytest.approx(4 / 5, abs=0.1) and 0.9 < slow.limit_s < 1.1 and good.limit_s > 1.5

    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["complete"] and list(report["sections"]) == [s.name for s in sections]
    assert report["sections"]["slow"]["numbers"] == {"x": 7} and not report["sections"]["slow"]["passed"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {REPORT, *(f"{s.name}.log" for s in sections)}

    with open(tmp_path / "table", "w") as file:
        print_outcomes(outcomes, Console(file=file, width=120))
    assert "the last [1] words" in (tmp_path / "table").read_text()
    rows = [[cell.strip() for cell in line.split("│")] for line in (tmp_path / "table").read_text().splitlines()]
    assert [row[1:3] for row in rows if len(row) > 2 and row[1]] == [[o.name, "FAILED"] for o in outcomes[:4]] + [
        ["good", "passed"]
    ]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("Traceback (most recent call last):\n  File x\nValueError: one\n", "ValueError: one"),
        ("[rank1]: Traceback:\n[rank1]: torch.AcceleratorError: CUDA error\nx.ChildFailedError:\n====\n",
         "torch.AcceleratorError: CUDA error"),
        ("E   AssertionError: x\nFAILED a.py::b - AssertionError: x\n1 failed in 2s\n\n", "1 failed in 2s"),
        (" \n", "it said nothing"),
    ],
)  # fmt: skip
def test_an_exit_status_comes_with_what_was_said(tmp_path, log, words):
    code = f"import sys; print({log!r}); sys.exit(3)"
    (outcome,) = run_sections([Script("one", code)], tmp_path, "cuda", 30, QUIET)
    assert outcome.error == f"exit status 3: {words}; there are no results"


def test_the_report_is_there_after_every_section(tmp_path):
    class Check(Script):
        def command(self, folder):
            report = json.loads((tmp_path / REPORT).read_text())
            assert not report["complete"] and list(report["sections"]) == ["first"]
            return super().command(folder)

    run_sections([Script("first", WRITE), Check("second", WRITE)], tmp_path, "cuda", 30, QUIET)
    assert json.loads((tmp_path / REPORT).read_text())["complete"]


def test_nothing_is_left_running(tmp_path):
    """A section that is stopped takes its own processes along, one that does not listen too."""
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']);"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}'); time.sleep(60)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.bench.gpu_check, "_PATIENCE_S", 0.2)
        (outcome,) = run_sections([Script("deaf", code)], tmp_path, "cuda", 1.2, QUIET)
    assert outcome.error.startswith("it took longer than 1 s")
    for pid in (tmp_path / "pids").read_text().split():
        for _ in range(50):  # until init, or whoever stands in for it, has taken notice
            if not _is_running(int(pid)):
                break
            time.sleep(0.1)
        assert not _is_running(int(pid))


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_sections_have_this_engine_and_only_the_devices_that_are_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path / "mine"))
    code = "import json, os, sys; json.dump(dict(os.environ, x=1), open(sys.argv[1] + '/numbers.json', 'w'))"
    for device in ("cpu", "cuda"):
        (outcome,) = run_sections([Script("env", code)], tmp_path, device, 30, QUIET)
        paths = outcome.numbers["PYTHONPATH"].split(os.pathsep)
        assert Path(paths[0], "engine", "bench", "gpu_check.py").is_file() and paths[1:] == [str(tmp_path / "mine")]
        assert (outcome.numbers.get("CUDA_VISIBLE_DEVICES") == "") == (device == "cpu")


# --- what the sections make of their numbers ---

TESTS = """
import pytest

def test_fine(): pass
def test_no(): pytest.skip("because")
@pytest.mark.parametrize("x", [1])
def test_off(x): assert x == 2, "a reason"
@pytest.fixture
def broken():
    yield
    raise OSError("at the end")
def test_also_fine(broken): pass
"""


def test_tests_are_counted_as_they_end(tmp_path):
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text("import nowhere_to_be_found")
    folder = tmp_path / "folder"
    folder.mkdir()
    section = GpuTests([str(tmp_path)], required=True)
    assert section.read(folder) == {} and section.summary({}) == ""
    command = [*section.command(folder), "--rootdir", str(tmp_path), "-o", "addopts=", "-o", "markers=gpu"]
    command[command.index("-m", 3) + 1] = "not gpu"  # these tests are marked as nothing
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    found = section.read(folder)
    failed = found.pop("failed_tests")
    assert found == {"passed": 1, "failed": 3, "skipped": 1}
    names = [test.rpartition("/")[2] for test in failed]
    assert names == ["test_b.py", "test_a.py::test_off[1]", "test_a.py::test_also_fine"]
    lines = (folder / "tests.jsonl").read_text()
    assert "a reason" in lines or "assert 1 == 2" in lines
    # A run that was stopped while it wrote has said what came before.
    (folder / "tests.jsonl").write_text(lines[: lines.rindex('"outcome"')])
    assert sum(section.read(folder)[kind] for kind in ("passed", "failed", "skipped")) >= 4


def test_what_tests_say():
    section = GpuTests(["tests"], required=True)
    found = {"passed": 2, "failed": 2, "skipped": 1, "failed_tests": ["a.py::b", "c"]}
    assert section.complaint(found) == "2 failed, a.py::b first"
    assert section.summary(found) == "2 passed, 2 failed, 1 skipped"
    skipped = {"passed": 0, "failed": 0, "skipped": 9, "failed_tests": []}
    assert section.complaint(skipped) == "no test ran"
    assert GpuTests(["tests"], required=False).complaint(skipped) is None


def comparison(**changes):
    fine = {"model": "tiny", "dtype": "float32", "method": "hydragen", "ranks_agree": True}
    return fine | {"largest_difference": 1e-6, "num_tokens": 9, "num_tokens_differ": 0} | changes


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ({}, None),
        ({"largest_difference": 1e-3}, "tiny in float32, hydragen: logits off by 1.0e-03 of the largest"),
        ({"largest_difference": float("nan")}, "tiny in float32, hydragen: logits off by nan of the largest"),
        ({"largest_difference": 1e-2, "dtype": "bfloat16", "num_tokens_differ": 1}, None),
        ({"ranks_agree": False}, "tiny in float32, hydragen: the ranks return different tokens"),
    ],
)
def test_ranks_are_held_to_one_rank(found, complaint):
    numbers = {"comparisons": [comparison(), comparison(**found)]}
    section = Ranks("cuda", "full")
    assert section.complaint(numbers) == complaint
    assert section.summary(numbers).count("tokens differ") == 2 and section.summary({}) == ""


def test_a_microbenchmark_needs_its_first_sizes(tmp_path):
    grid = MicroGrid.of(("base", "hydragen"), [(2, 8, 4), (3, 8, 4)], (8, 1, 128), 1, 9.0, 2)
    section = Microbenchmark("attention", 1.0, grid, "cuda", "full")
    assert section.complaint(section.read(tmp_path)) == "1 of 1 sizes were not timed"
    assert section.summary({}) == "0 of 2 sizes"
    for mode, times in (("base", (4.0, 4.0)), ("hydragen", (1.0, 2.0))):
        result = row_result(mode, times)
        FILES.write(tmp_path, replace(result, row=replace(result.row, **asdict(grid.sizes[0]))))
    numbers = json.loads(json.dumps(section.read(tmp_path)))
    assert section.complaint(numbers) is None
    assert section.summary(numbers) == "1 of 2 sizes\nhydragen is 3.00 to 3.00 times as fast as base"
    assert [row["vs_base"]["value"] for row in numbers["rows"]] == [1.0, 3.0]
    failed = replace(row_result("base", (), status=Status.OUT_OF_MEMORY), message="no room")
    FILES.write(tmp_path, failed)
    assert "no room" in section.complaint(section.read(tmp_path))
    FILES.write(tmp_path, replace(failed, status=Status.DOES_NOT_FIT))
    assert section.complaint(section.read(tmp_path)) is None, "what does not fit is no fault"


def test_needles_are_held_to_the_baseline_and_to_chance(tmp_path):
    section = Needles("cpu", "tiny")
    assert section.complaint({"rows": []}) == "6 of 6 are missing"

    def complaint(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for dtype in NEEDLE_DTYPES:
            for method, num_right in (("hydragen", 20), ("hydragen_noshared", 20), ("noattention", 1)):
                name, env = f"{dtype}_{method}", {"dtype": dtype}
                result = needles_result(method, name=name, env=env, **{"num_right": num_right} | changes.get(name, {}))
                write_needles(folder, result, changes.get("token_ids") if method == "hydragen" else None)
        return section.complaint(section.read(folder))

    assert complaint() is None
    assert complaint(float32_hydragen={"num_right": 17}) == (
        "float32_hydragen, 20 questions about 1000 tokens: only 85.0% right"
    )
    assert "25.0% right without attention" in complaint(bfloat16_noattention={"num_right": 5})
    other = [[1, 2]] * 19 + [[3]]
    assert complaint(token_ids=other).endswith("19 answers are those of hydragen_noshared")
    failed = {"status": Status.OUT_OF_MEMORY, "message": "memory ran out"}
    assert complaint(bfloat16_hydragen=failed).endswith(": memory ran out")


def test_a_sweep_is_complete_or_says_what_is_missing():
    section = Throughput("sweep", 1.0, Grid("tiny", ("noattention", "hydragen"), (1, 2), (8,), (4,)), "cuda", "full")

    def cell(mode, batch_size, status="ok", message=""):
        where = {"mode": mode, "batch_size": batch_size, "num_shared": 8, "num_unique": 4}
        return where | {"status": status, "message": message, "tokens_per_second": None if message else 1234.5}

    cells = [cell("hydragen", 1), cell("hydragen", 2), cell("noattention", 1), cell("noattention", 2)]
    assert section.complaint({"cells": cells}) is None
    summary = section.summary({"cells": cells})
    assert summary == "batch 2, shared 8, unique 4, tokens/s: hydragen 1,234, noattention 1,234"
    assert section.complaint({"cells": cells[:3]}) == "1 of 4 cells were not timed"
    cells[1] = cell("hydragen", 2, "out_of_memory", "no room")
    assert section.complaint({"cells": cells}) == "1 of 4 cells were not timed: no room"
    assert section.summary({"cells": cells[:2]}).endswith("tokens/s: hydragen -")


def test_the_full_check_is_what_it_says():
    """Nothing here runs it."""
    sections = make_sections("cuda", tiny=False)
    assert [section.name for section in sections] == [
        "tests", "machine", "ranks", "needles", "attention", "operations", "crossover", "sparse",
        "sweep-125m", "graphs-125m", "sweep-8b", "graphs-8b",
    ]  # fmt: skip
    assert Machine("cuda", "full").summary({}) == ""
    for section in sections[1:]:
        command = section.command(Path("folder"))
        assert command[-4:] == [section.name, "folder", "cuda", "full"]
    full = SIZES["full"]
    assert sum(len(g.cells(mode)) for g in full.sweeps.values() for mode in g.modes) == (5 + 4) * 4 + 2 * 4 * 2
    seed = {(b, s, u) for b, s in ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)) for u in range(0, 513, 16)}
    sizes = full.micro["attention"].sizes
    assert len(sizes) == len(seed) and {(x.batch_size, x.num_shared, x.num_unique) for x in sizes} == seed
    assert {x.num_unique for x in sizes[: full.micro["attention"].num_needed]} == {0, 128, 256, 384, 512}
    # What each may take at the default of nine minutes: the timed part of it is less.
    for section in sections:
        assert section.name not in full.micro or full.micro[section.name].seconds < section.weight
    assert sum(section.weight for section in sections) < 9.5 * 60
