from dataclasses import replace

import pytest
from ranks import run_ranks

from engine.bench import memory_model
from engine.bench.memory_model import cache_tokens, footprint
from engine.bench.modes import ModelOptions, make_mode, make_prompt
from engine.bench.results import Cell
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.presets import find_preset

TINY = ModelOptions("tiny", load_format="dummy")
METHODS = ("hydragen", "hydragen_noshared", "noattention")


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2, 4])  # at 4 the two KV heads are on two ranks each
def test_weights_and_cache_take_what_was_predicted(size, dtype):
    cells = [Cell(mode, b, s, u) for mode in METHODS for b, s, u in ((3, 20, 5), (1, 7, 1), (2, 1, 2))]

    def check(group):
        for method in METHODS:
            mode = make_mode(method, replace(TINY, dtype=dtype), group, None, 3)
            config = mode.engine.model.config
            for cell in (cell for cell in cells if cell.mode == method):
                predicted = footprint(config, group.size, cell)
                assert predicted.weights == num_bytes(mode.engine.model.parameters())
                mode.set_up(cell)
                mode.prefill(make_prompt(config.vocab_size, cell.num_shared, 0))
                mode.generate(cell.num_unique)  # it suffices
                cache = mode.engine.arena.cache
                layers = range(config.num_layers) if cache is not None else ()
                assert predicted.cache == num_bytes(part for i in layers for part in cache.layer(i)), cell
                mode.release()

    run_ranks(size, check)


@pytest.mark.parametrize("method", METHODS[:2])
def test_with_a_token_less_it_would_take_two_waves_and_is_refused(method):
    cell = Cell(method, 3, 20, 5)
    mode = make_mode(method, TINY, TPGroup(), None, 3)

    def num_passes(tokens: int) -> int:
        mode.set_up(cell)
        mode.engine.setup_caches(tokens)
        mode.prefill([5] * 20)
        passes = []
        hook = mode.engine.model.register_forward_pre_hook(lambda *args: passes.append(args))
        mode.generate(5)
        hook.remove()
        return len(passes)

    assert num_passes(cache_tokens(cell)) == 4
    with pytest.raises(InputError, match="memory has room for 2 of 3 sequences at once"):
        num_passes(cache_tokens(cell) - 1)


def test_cache_tokens():
    sizes = (8, 100, 11)
    assert cache_tokens(Cell("noattention", *sizes)) == 0
    assert cache_tokens(Cell("hydragen", *sizes)) == 100 + 8 * 10
    assert cache_tokens(Cell("hydragen_noshared", *sizes)) == 100 + 8 * 110
    assert cache_tokens(Cell("hf", *sizes)) == 8 * 110


def test_a_growing_cache_is_copied_tensor_by_tensor():
    config = find_preset("llama-125m")
    cell = Cell("hf", 64, 4096, 16)
    predicted = footprint(config, 1, cell)
    # 12 layers of 4 KV heads of 64: a token's keys and values take 12 KiB in bfloat16.
    assert predicted.cache == 64 * (4096 + 15) * 12 * 2**10
    same = footprint(config, 1, replace(cell, mode="hydragen"))
    assert predicted.activations == same.activations + predicted.cache // 24
    assert predicted.weights == same.weights == config.num_parameters * 2
    assert predicted.total == predicted.weights + predicted.cache + predicted.activations


def test_activations_are_those_that_the_engine_leaves_room_for():
    """By hand, for a chunk: 12 heads of 64, hidden 768, in bfloat16, with float32 states, cos and sin."""
    config = find_preset("llama-125m")
    predicted = footprint(config, 1, Cell("hydragen", 1, 1000, 1))
    layer = (768 + 768) * 2 + 2 * 64 * 4
    mlp = 768 * 2 + (2 * 768 + 3 * config.intermediate_size) * 2
    assert predicted.activations == 1000 * (layer + max(3 * (768 + 12) * 4, mlp))


def test_weights_of_a_large_model_are_divided():
    config = find_preset("codellama/CodeLlama-34b-hf")
    whole, part = (footprint(config, size, Cell("hydragen", 32, 1024, 128)) for size in (1, 8))
    norms = (2 * config.num_layers + 1) * config.hidden_size * 2
    assert part.weights - norms == (whole.weights - norms) / 8
    assert part.cache == whole.cache / 8


def test_nothing_is_known_of_vllm():
    assert footprint(find_preset("tiny"), 1, Cell("vllm", 1, 1, 1)) is None
    assert footprint(find_preset("tiny"), 1, Cell("vllm_notok", 1, 1, 1)) is None


def test_a_world_size_that_cannot_be():
    with pytest.raises(InputError, match="3"):
        footprint(find_preset("tiny"), 3, Cell("hydragen", 1, 1, 1))


def test_a_grid_builds_the_model_once(monkeypatch):
    memory_model._weights.cache_clear()
    built = []
    build = memory_model.Transformer
    monkeypatch.setattr(memory_model, "Transformer", lambda *args: built.append(args) or build(*args))
    for batch_size in range(1, 20):
        footprint(find_preset("tiny"), 2, Cell("hydragen", batch_size, 8, 8))
    assert len(built) == 1
