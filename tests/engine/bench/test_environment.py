import socket

import pytest
import torch
import yaml

from engine.bench import environment
from engine.bench.environment import describe_environment


def test_is_plain_data_that_says_what_it_ran_on():
    found = describe_environment(torch.device("cpu"), torch.bfloat16, 2)
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert found["device"] == "cpu"
    assert found["device_name"]
    assert found["dtype"] == "bfloat16"
    assert found["world_size"] == 2
    assert found["num_threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"]
    assert None not in found["versions"].values()
    assert socket.gethostname() not in str(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Xeon 8480\nflags\t\t: fpu amx_bf16\nmodel name\t: other\nflags\t: fpu\n", ("Xeon 8480", True)),
        ("model name\t: EPYC 9654\nflags\t: fpu avx512_bf16\n", ("EPYC 9654", True)),
        ("model name\t: EPYC 7763\nflags\t: fpu avx2\n", ("EPYC 7763", False)),
        ("Features\t: fp asimd bf16 i8mm\n", ("its name", True)),  # Arm: no model name, another word for flags
        ("", ("its name", None)),
        (None, ("its name", None)),  # not Linux: no such file
    ],
)
def test_cpuinfo(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(environment.platform, "processor", lambda: "its name")
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert environment._read_cpuinfo(path) == expected


def test_without_git(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert describe_environment(torch.device("cpu"), torch.float32, 1)["git_revision"] is None
