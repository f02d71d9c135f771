import sys

import pytest
import torch

from engine.bench import peak_memory
from engine.bench.peak_memory import PeakMemory

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_taken_shows_though_it_was_given_back():
    with PeakMemory(CPU) as before:
        pass
    with PeakMemory(CPU) as during:
        torch.ones(64 * MIB, dtype=torch.uint8)
    assert 60 * MIB < during.bytes - before.bytes < 80 * MIB


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "Path", lambda name: tmp_path / name.replace("/", "_"))
    with PeakMemory(CPU) as peak:
        pass
    assert peak.bytes == 0
