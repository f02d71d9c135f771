"""Decode steps as graphs, on CPU by a stand-in that does the captured work again: whatever it reads beside the tensors
that are written anew is as it was when it was captured. Real ones are in ``test_cuda.py``."""

import numpy as np
import pytest
import torch
from models import hf_model, our_engine

from engine import decode_graphs
from engine.attention.crossover import Crossover
from engine.decode_graphs import DecodeGraphs, bucket_of
from engine.distributed import TPGroup
from engine.engine import Engine
from engine.errors import InputError
from engine.sampling import SamplingParams

pytest.importorskip("triton", reason="Triton is for Linux")

ROOT, LEFT = list(range(3, 12)), list(range(20, 24))
PROMPTS = [[*ROOT, *LEFT, 1], [*ROOT, *LEFT], [*ROOT, 2], ROOT, ROOT, [*ROOT, *LEFT, 5, 6], [1], [2, 2, 3]]
FORCED = [[7 + i] * count for i, count in enumerate([4, 3, 4, 1, 4, 4, 2, 4])]
PARAMS = [SamplingParams(temperature=0, max_tokens=len(tokens), ignore_eos=True) for tokens in FORCED]


def small_model(family="llama", **options):
    """Triton's interpreter takes its time for each layer and head."""
    return hf_model(family, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **options)


class AsCaptured(DecodeGraphs):
    """A step that is replayed reads the memory that it was captured with, even where the model has other by now; and
    its result is lost when the next graph runs."""

    def __init__(self, model):
        super().__init__(model)
        self._read = {}

    def _forward(self, graph, cache):
        model = self._model
        if graph.replay is None:
            layers = None if cache is None else [list(layer) for layer in cache._layers]
            self._read[id(graph)] = model.rotary_table, layers
            return super()._forward(graph, cache)
        now = model.rotary_table, None if cache is None else cache._layers
        try:
            self._use(*self._read[id(graph)], cache)
            return super()._forward(graph, cache)
        finally:
            self._use(*now, cache)

    def _use(self, table, layers, cache):
        self._model._cos_sin_L2P = table
        if cache is not None:
            cache._layers = layers

    def run(self, *args):
        hidden = super().run(*args)
        for graph in self._graphs.values():
            if graph.hidden_BI is not None:
                graph.hidden_BI.fill_(torch.nan)
        return hidden


@pytest.fixture
def captures(monkeypatch):
    """How often something was captured."""
    seen = []

    def capture(work, device, pool):
        seen.append(work)
        result = work().clone()
        return lambda: result.copy_(work()), result, pool

    monkeypatch.setattr(decode_graphs, "capture", capture)
    monkeypatch.setattr(decode_graphs, "_STEPS_BEFORE", 0)
    return seen


def with_graphs(engine: Engine) -> Engine:
    engine._graphs = AsCaptured(engine.model)
    return engine


def generate(engine, method="hydragen", **options):
    results = engine.generate(
        PROMPTS, PARAMS, attention=method, forced_tokens=FORCED, return_logits=True, **options
    )
    return torch.cat([torch.stack(r.logits) for (r,) in results])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("method", ["hydragen", "hydragen_noshared", "noattention", "auto"])
def test_steps_that_are_replayed_compute_what_others_do(captures, method):
    hf = small_model()
    plain, graphed = our_engine(hf), with_graphs(our_engine(hf))
    plain.crossover = graphed.crossover = Crossover((2, 4), (6, 2))
    assert_close(generate(graphed, method), generate(plain, method))
    num_captures = len(captures)
    assert num_captures > 0
    assert_close(generate(graphed, method), generate(plain, method))
    assert len(captures) == num_captures, "every kind of step was there"


@pytest.mark.parametrize("method", ["hydragen", "hydragen_noshared", "noattention"])
def test_rows_that_fill_up_a_bucket_change_nothing(captures, method):
    """9 sequences in a bucket of 10, then 11 in one of 12."""
    model = small_model()
    plain, graphed = our_engine(model), with_graphs(our_engine(model))
    for num_sequences in (9, 11):
        prompts = [[*ROOT, i] for i in range(num_sequences)]
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        expected, found = (
            engine.generate(prompts, params, attention=method, return_logits=True) for engine in (plain, graphed)
        )
        for (theirs,), (mine,) in zip(expected, found, strict=True):
            assert_close(torch.stack(mine.logits), torch.stack(theirs.logits))


def test_a_kind_of_step_runs_some_times_before_it_is_captured(captures, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_STEPS_BEFORE", 2)
    engine = with_graphs(our_engine(small_model()))
    engine.setup_caches(100)
    engine.model.prepare(100)
    for num_tokens, num_captures in ((3, 0), (2, 1), (5, 1)):  # the first token takes no step
        engine.generate([ROOT], SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
        assert len(captures) == num_captures


def test_one_capture_outlasts_any_change_of_lengths(captures):
    hf = small_model()
    plain, graphed = our_engine(hf), with_graphs(our_engine(hf))
    for engine in (plain, graphed):
        engine.setup_caches(400)  # which stay where they are
    lengths = ((30, 1), (12, 7), (20, 1))
    prompts = [[[5] * shared + [i] * own for i in range(3)] for shared, own in lengths]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for call in prompts:
        expected, found = (
            [torch.stack(r.logits) for (r,) in engine.generate(call, params, return_logits=True)]
            for engine in (plain, graphed)
        )
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    assert len(captures) == 1


def test_arenas_that_move_are_captured_anew(captures):
    hf = small_model()
    plain, graphed = our_engine(hf), with_graphs(our_engine(hf))
    generate(graphed)
    before = len(captures)
    graphed.setup_caches(300)
    assert_close(generate(graphed), generate(plain))
    assert_close(generate(graphed), generate(plain))
    assert len(captures) > before


def test_a_longer_rotary_table_is_read(captures):
    hf = small_model()
    plain, graphed = our_engine(hf), with_graphs(our_engine(hf))
    graphed.setup_caches(300)  # the arenas stay where they are
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for prompt in (ROOT, ROOT * 3):
        expected, found = (engine.generate([prompt], params, return_logits=True)[0][0] for engine in (plain, graphed))
        assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_sliding_window(captures):
    hf = small_model("mistral", sliding_window=7)
    plain, graphed = our_engine(hf), with_graphs(our_engine(hf))
    assert_close(generate(graphed), generate(plain))
    assert captures


def test_the_least_recently_used_graph_is_dropped(captures, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_MAX_GRAPHS", 1)
    hf = small_model()
    plain, graphed = our_engine(hf), with_graphs(our_engine(hf))
    assert_close(generate(graphed), generate(plain))
    assert len(graphed._graphs._graphs) == 1


def test_auto_goes_by_what_the_graphs_run(monkeypatch):
    """Triton, which reads what is not shared in the same launch, whatever evaluates a prefill."""
    asked = []
    monkeypatch.setattr("engine.engine.find_crossover", lambda group, setting, dtype: asked.append(setting.backend))
    for engine in (our_engine(small_model()), with_graphs(our_engine(small_model()))):
        assert engine.crossover is None
    assert asked == [None, "triton"]


def test_buckets():
    sizes = np.array([bucket_of(n) for n in range(1, 5000)])
    assert (sizes >= np.arange(1, 5000)).all() and (sizes <= 1.25 * np.arange(1, 5000)).all()
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 7, 8, 9, 11, 17, 64, 65, 257)] == [
        1, 2, 3, 4, 5, 7, 8, 10, 12, 20, 64, 80, 320,
    ]  # fmt: skip
    assert len({bucket_of(n) for n in range(1, 257)}) == 28


class TestWhereTheyCannotBe:
    def test_on_a_cpu(self):
        with pytest.raises(InputError, match="CUDA graphs were asked for on cpu; accepted: on CUDA; leave them out"):
            our_engine(small_model(), cuda_graphs=True)

    def test_between_ranks_of_gloo(self, monkeypatch):
        model = our_engine(small_model()).model
        monkeypatch.setattr(model, "group", TPGroup(0, 2, "cuda"))
        monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
        with pytest.raises(InputError, match="2 ranks that gloo connects, .*; accepted: one rank, or a GPU for each"):
            Engine(model, cuda_graphs=True)

    def test_with_another_attention_backend(self, monkeypatch):
        model = our_engine(small_model()).model
        monkeypatch.setattr(model, "group", TPGroup(0, 1, "cuda"))
        with pytest.raises(InputError, match="with attention backend 'aten'; accepted: none, or 'triton'"):
            Engine(model, attention_backend="aten", cuda_graphs=True)
