"""A machine for tests of the microbenchmark: measuring its ceilings, and flushing its caches, takes longer than a tiny
row."""

import pytest

from engine.attention.crossover import ALWAYS
from engine.bench.micro import micro_sweep, subjects
from engine.bench.micro.cache_flush import CacheFlush
from engine.bench.roofline import Ceilings


def set_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_sweep, "measure_ceilings", lambda device, dtype: Ceilings(10.0, 1.0, 0.5, 64))
    monkeypatch.setattr(micro_sweep, "CacheFlush", lambda device: CacheFlush(device, cache_bytes=1 << 10))
    monkeypatch.setattr(subjects, "_crossover", lambda *setting: ALWAYS)
