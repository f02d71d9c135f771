import re
import socket

import torch
import yaml

from engine.bench import environment
from engine.bench.environment import describe_environment
from kernels import Backend, available_operations_backends


def test_is_plain_data_that_says_what_it_ran_on():
    found = describe_environment(torch.device("cpu"), torch.bfloat16, 2)
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert found["device"] == "cpu"
    assert found["device_name"]
    assert found["dtype"] == "bfloat16"
    assert found["world_size"] == 2
    assert found["attention_backend"] in list(Backend)
    assert found["operations_backend"] == available_operations_backends(torch.device("cpu"), torch.bfloat16)[0]
    assert found["num_threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"]
    assert None not in found["versions"].values()
    assert socket.gethostname() not in re.findall(r"[\w.-]+", str(found))


def test_without_git(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert describe_environment(torch.device("cpu"), torch.float32, 1)["git_revision"] is None
