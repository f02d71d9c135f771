import json

import pytest
import torch
from commands import Command, assert_mistake

from engine.bench.gpu_check import REPORT, Machine, make_sections

gpu_check = Command("scripts/gpu_check.py")


def test_every_section_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = gpu_check(tmp_path / "out", "--device", "cpu", "--tiny")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert done.status == 0, report
    assert report["complete"] and report["device"] == "cpu"
    numbers = {name: section["numbers"] for name, section in report["sections"].items()}
    assert list(numbers) == [section.name for section in make_sections("cpu", tiny=True)]
    assert numbers["tests"]["skipped"] > 0 and numbers["tests"]["passed"] == 0  # without a GPU each is skipped
    assert numbers["machine"]["environment"]["versions"]["torch"] == torch.__version__
    assert numbers["machine"]["ceilings"][0]["read_gbs"] > 0
    assert {(c["dtype"], c["method"], c["num_ranks"]) for c in numbers["ranks"]["comparisons"]} == {
        (dtype, method, 2) for dtype in ("float32", "bfloat16") for method in ("hydragen", "hydragen_noshared")
    }
    assert {(row["name"], row["same_answers"]) for row in numbers["needles"]["rows"]} >= {("float32_hydragen", 16)}
    sweeps = [name for name in numbers if "cells" in numbers[name]]
    assert sweeps == ["sweep-125m", "graphs-125m", "sweep-8b", "graphs-8b"]
    assert all(cell["decode_ms"] for name in sweeps for cell in numbers[name]["cells"])
    assert [cell["mode"] for cell in numbers["sweep-125m"]["cells"]] == ["auto", "hydragen", "noattention"]
    assert numbers["graphs-125m"]["cells"][0]["environment"]["operations_backend"] == "aten"
    assert {row["mode"] for row in numbers["attention"]["rows"]} == {"base", "hydragen", "auto"}
    assert {row["choice"] for row in numbers["crossover"]["rows"]} <= {"shared", "unshared", None}
    parts = [(row["method"], row["operation"]) for row in numbers["sparse"]["rows"]]
    assert parts[0] == ("dense", "attention") and [name for _, name in parts[1:]] == ["attention", "index"]
    assert " of dense attention's work in " in numbers["sparse"]["found"][0]
    assert any(row["operation"] == "swiglu" and row["times_ms"] for row in numbers["operations"]["rows"])
    assert all(name in done.stdout for name in numbers) and "FAILED" not in done.stdout


def test_a_failure_is_the_exit_status(tmp_path, monkeypatch):
    class Broken(Machine):
        def command(self, folder):
            return ["false"]

    monkeypatch.setattr(gpu_check.module, "make_sections", lambda device, tiny: [Broken(device, "tiny")])
    done = gpu_check(tmp_path, "--device", "cpu", "--tiny")
    assert done.status == 1 and "FAILED" in done.stdout and "exit status 1: it said nothing" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "PyTorch sees no CUDA device"),
        (["--device", "cpu"], "the full sizes are for a GPU: add --tiny"),
        (["--device", "tpu", "--tiny"], "device 'tpu' is not"),
        (["--minutes", "0"], "--minutes"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert_mistake(gpu_check(tmp_path / "out", *arguments), message)
    assert not (tmp_path / "out").exists()
