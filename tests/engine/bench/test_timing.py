import time

import pytest
import torch

from engine.bench.timing import Spread, Timer, best_of, summarize

CPU = torch.device("cpu")


def test_summarize():
    spread = summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert spread == Spread(median=3.5, p20=2.0, p80=5.0, minimum=1.0)
    assert spread.relative == pytest.approx(3 / 3.5)
    # Between two times the percentiles are interpolated, as numpy's default does.
    assert summarize([10.0, 20.0]) == Spread(median=15.0, p20=12.0, p80=18.0, minimum=10.0)


def test_summarize_of_one_time_has_no_spread():
    assert summarize([7]) == Spread(7.0, 7.0, 7.0, 7.0)
    assert summarize([7]).relative == 0


def test_summarize_of_nothing():
    with pytest.raises(ValueError, match="no times"):
        summarize([])


def test_timer_measures_milliseconds():
    with Timer(CPU) as timer:
        time.sleep(0.02)
    assert 20 <= timer.ms < 2000


def test_work_that_raises_has_no_time():
    timer = Timer(CPU)
    with pytest.raises(RuntimeError), timer:
        raise RuntimeError
    assert not hasattr(timer, "ms")


def test_best_of_returns_every_time_but_the_warmup(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 1e3)
    calls = []
    assert best_of(lambda: calls.append(0), repeats=3, warmup=2, device=CPU) == pytest.approx([1.0, 1.0, 1.0])
    assert len(calls) == 5


@pytest.mark.gpu
def test_timer_waits_for_the_device():
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    a @ a
    with Timer(device) as timer:
        a @ a
    with Timer(device) as idle:
        pass
    assert timer.ms > 10 * idle.ms
