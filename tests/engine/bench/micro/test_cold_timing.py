import pytest
import torch
from clock import Clock

from engine.bench.micro import cold_timing
from engine.bench.micro.cache_flush import CacheFlush
from engine.bench.micro.cold_timing import HostCall, make_cold_call, time_in_turns
from engine.bench.micro.micro_results import TimedWith


class SteadyClock(Clock):
    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = SteadyClock()
    monkeypatch.setattr(cold_timing, "time", clock)
    return clock


def test_the_flush_comes_first_and_is_not_timed(clock):
    events = []

    def spend(seconds, name):
        events.append(name)
        clock.now += seconds

    call = HostCall(lambda: spend(0.002, "call"), lambda: spend(5.0, "flush"))
    assert call() == pytest.approx(2.0) and call() == pytest.approx(2.0)
    assert events == ["flush", "call"] * 2
    assert call.timed_with == TimedWith.CLOCK


def calls_of(clock, events, **seconds):
    """Calls that take so long, and report it in ms."""

    def call(name, duration):
        events.append(name)
        clock.now += duration
        return duration * 1e3

    return {name: lambda name=name, duration=duration: call(name, duration) for name, duration in seconds.items()}


def test_calls_take_turns_as_often_as_they_are_told_in_changing_order(clock):
    events = []
    times, num_warmup = time_in_turns(calls_of(clock, events, a=1.0, b=2.0), 20, 2, budget_s=0.001)
    rounds = ["".join(events[i : i + 2]) for i in range(0, len(events), 2)]
    assert num_warmup == 2 and len(rounds) == 22
    assert set(rounds) == {"ab", "ba"} and 5 < rounds.count("ab") < 17
    assert times == {"a": [1000.0] * 20, "b": [2000.0] * 20}
    assert time_in_turns(calls_of(clock, events, a=1.0), 1, 0, budget_s=9)[1] == 0


def test_without_a_number_time_decides(clock):
    times, num_warmup = time_in_turns(calls_of(clock, [], a=0.25, b=0.25), None, None, budget_s=10)
    assert (len(times["a"]), num_warmup) == (40, 4)  # rounds of half a second, 20 s for both and 2 before


def test_no_fewer_than_five_and_no_more_than_a_thousand(clock):
    times, num_warmup = time_in_turns(calls_of(clock, [], a=100.0), None, None, budget_s=1)
    assert (len(times["a"]), num_warmup) == (5, 1)
    times, num_warmup = time_in_turns(calls_of(clock, [], a=1e-6), None, None, budget_s=1)
    assert (len(times["a"]), num_warmup) == (1000, 1000)


def test_on_a_cpu_by_the_clock():
    cold = make_cold_call(lambda: None, torch.device("cpu"), lambda: None, print)
    assert isinstance(cold, HostCall)


class TestOnAGpu:
    @pytest.fixture
    def events(self, monkeypatch):
        """Of a device that is not there, 7 ms apart."""

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("event")

            def synchronize(self):
                log.append("wait")

            def elapsed_time(self, end):
                return 7.0

        log = []
        monkeypatch.setattr(torch.cuda, "Event", Event)
        return log

    def make(self, log, said):
        return make_cold_call(
            lambda: log.append("call"), torch.device("cuda"), lambda: log.append("flush"), said.append
        )

    def test_a_replay_lies_between_the_events_and_the_flush_before_them(self, events, monkeypatch):
        said = []
        monkeypatch.setattr(cold_timing, "capture", lambda call, device: (lambda: events.append("replay"), None, None))
        cold = self.make(events, said)
        assert cold() == 7.0 and cold.timed_with == TimedWith.CUDA_GRAPH and said == []
        assert events == ["flush", "event", "replay", "event", "wait"]

    def test_what_cannot_be_captured_is_launched(self, events, monkeypatch):
        def fails(call, device):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        said = []
        monkeypatch.setattr(cold_timing, "capture", fails)
        cold = self.make(events, said)
        assert cold() == 7.0 and cold.timed_with == TimedWith.EVENTS
        assert said == [
            "no CUDA graph (operation not permitted when stream is capturing): timed as launched from Python"
        ]
        assert events == ["flush", "event", "call", "event", "wait"]

    def test_memory_that_does_not_suffice_is_another_matter(self, events, monkeypatch):
        def fails(call, device):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(cold_timing, "capture", fails)
        with pytest.raises(torch.OutOfMemoryError):
            self.make(events, [])

    @pytest.mark.gpu
    def test_a_graph_is_replayed(self):
        x, said, device = torch.zeros(1 << 20, device="cuda"), [], torch.device("cuda")
        cold = make_cold_call(lambda: x.add_(1), device, CacheFlush(device), said.append)
        assert cold.timed_with == TimedWith.CUDA_GRAPH and said == []
        before = x[0].item()
        assert 0 < cold() < 1000
        assert x[0].item() == before + 1
