"""What counts as attention's time in a step, by a clock that only the parts of a step move."""

import pytest
import torch
from clock import Clock

from engine.bench import attention_spans
from engine.bench.attention_spans import AttentionSpans
from engine.bench.engine_mode import EngineMode
from engine.bench.results import Cell
from engine.decoding import _Chooser
from engine.distributed import TPGroup
from engine.loader import load_model
from engine.model import MLP
from engine.sampling import SamplingParams
from kernels import AttentionPlan, Planner

CPU = torch.device("cpu")
NUM_LAYERS = 2


@pytest.fixture
def clock(monkeypatch):
    """Moved by attention 3 ms a layer, planning 5 ms a step, choosing 20 ms, and 1000 ms by the rest."""
    clock = Clock()
    monkeypatch.setattr(attention_spans, "time", clock)

    def slow_down(owner, name, ms):
        original = getattr(owner, name)

        def slowed(*args):
            clock.now += ms / 1e3
            return original(*args)

        monkeypatch.setattr(owner, name, slowed)

    slow_down(AttentionPlan, "run", 3)
    slow_down(Planner, "plan", 5)
    slow_down(_Chooser, "choose", 20)
    slow_down(MLP, "forward", 1000)
    return clock


@pytest.fixture
def mode():
    mode = EngineMode("hydragen", load_model("tiny", TPGroup(), load_format="dummy").model)
    mode.set_up(Cell("hydragen", 2, 8, 4))
    mode.prefill(list(range(8)))
    return mode


def test_a_step_is_attention_planning_and_choice(clock, mode):
    with AttentionSpans(mode.engine.model, CPU) as spans:
        mode.generate(4)
    assert spans.median_ms() == pytest.approx(NUM_LAYERS * 3 + 5 + 20)
    assert [len(step) for step in spans._steps] == [1 + NUM_LAYERS] * 3


def test_a_prefill_is_no_step(clock, mode):
    with AttentionSpans(mode.engine.model, CPU) as spans:
        mode.prefill(list(range(8)))
        mode.generate(1)
    assert spans.median_ms() == 0


def test_what_is_computed_stays_the_same(mode):
    """And after the block, nothing is listened to any more, however it ended."""
    engine = mode.engine

    def logits():
        ((generated,),) = engine.generate(
            [()], SamplingParams(max_tokens=4), return_logits=True, shared_cache_op="preserve"
        )
        return torch.stack(generated.logits)

    expected = logits()
    with AttentionSpans(engine.model, CPU):
        assert torch.equal(logits(), expected)
    with pytest.raises(KeyError), AttentionSpans(engine.model, CPU):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.model.modules())
