from dataclasses import replace

import pytest
import torch

from engine.attention import METHODS, Auto
from engine.attention.crossover import ALWAYS, NEVER
from engine.attention.hydragen import Hydragen
from engine.attention.pass_plan import one_prompt
from engine.bench.roofline import Ceilings, Cost, decode_step_cost, measure_ceilings, predict_ms
from engine.prefix_tree import build_from_levels
from engine.presets import find_preset
from engine.sharding import local_kv_heads

LLAMA_125M = find_preset("llama-125m")


def cost(method, batch=64, shared_len=4096, unique_len=8, world_size=1, **changes):
    method = METHODS[method] if isinstance(method, str) else method
    return decode_step_cost(
        method, one_prompt(shared_len, batch), unique_len, replace(LLAMA_125M, **changes), world_size
    )


def num_linear_weights():
    """Counted from real layers, independently of the formula."""
    nn = torch.nn
    with torch.device("meta"):
        layer = nn.ModuleList(
            nn.Linear(i, o, bias=False)
            for i, o in [(768, 768), (768, 256), (768, 256), (768, 768), (768, 2048), (768, 2048), (2048, 768)]
        )
        head = nn.Linear(768, 32000, bias=False)
    return 12 * sum(p.numel() for p in layer.parameters()) + head.weight.numel()


def test_weights_are_read_once_and_multiply_every_row():
    found = cost("noattention")
    assert found == Cost(bytes=2 * num_linear_weights(), linear_flops=2 * 64 * num_linear_weights(), attention_flops=0)
    assert cost("noattention", batch=1).bytes == found.bytes


def test_hydragen_reads_the_shared_keys_once():
    weights = 2 * num_linear_weights()
    bytes_per_key = 12 * 2 * 4 * 64 * 2  # layers, K and V, KV heads, head dimension, bytes
    assert cost("hydragen").bytes - weights == bytes_per_key * (4096 + 64 * 8)
    assert cost("hydragen_noshared").bytes - weights == bytes_per_key * 64 * (4096 + 8)


def test_sharing_changes_what_is_read_and_not_what_is_computed():
    shared, unshared = cost("hydragen"), cost("hydragen_noshared")
    assert shared.flops == unshared.flops
    assert shared.attention_flops == 12 * 4 * 12 * 64 * 64 * (4096 + 8)
    assert cost("hydragen", shared_len=0).bytes == cost("hydragen_noshared", shared_len=0).bytes


@pytest.mark.parametrize("world_size", [2, 4, 12])
@pytest.mark.parametrize("method", METHODS)
def test_a_rank_has_its_share(method, world_size):
    changes = {"num_heads": 12, "intermediate_size": 3072, "vocab_size": 36000}
    whole, part = cost(method, **changes), cost(method, world_size=world_size, **changes)
    if local_kv_heads(4, 0, world_size)[1] * world_size == 4:
        assert part.bytes * world_size == whole.bytes
        assert part.flops * world_size == whole.flops
    else:  # KV heads are replicated
        assert part.bytes * world_size > whole.bytes
        assert part.attention_flops * world_size == whole.attention_flops


class OwnTokensOnly(Hydragen):
    name = "own_tokens_only"

    def shared_segments(self, tree, placement, runs):
        return []


def test_a_method_of_ones_own_costs_what_it_plans():
    assert cost(OwnTokensOnly()) == cost("hydragen", shared_len=0)


def test_auto_reads_a_prompt_as_often_as_it_chose():
    assert cost(Auto(ALWAYS)) == cost("hydragen")
    assert cost(Auto(NEVER)) == cost("hydragen_noshared")


def test_a_fraction_of_a_key_counts_as_one():
    low, between, high = (cost("hydragen", unique_len=length).bytes for length in (8, 8.5, 9))
    assert low < between < high and between - low == high - between


def test_every_level_of_a_hierarchy_is_read_once_for_those_below_it():
    """A root of 100 tokens, two nodes of 50 below it, four sequences below each."""
    tree = build_from_levels([[[0] * 100], [[1] * 50, [2] * 50], [[0]] * 8])
    bytes_per_key = 12 * 2 * 4 * 64 * 2
    found = decode_step_cost(METHODS["hydragen"], tree, 3, LLAMA_125M)
    assert found.bytes - 2 * num_linear_weights() == bytes_per_key * (100 + 2 * 50 + 8 * 3)
    assert found.attention_flops == 12 * 4 * 12 * 64 * 8 * (100 + 50 + 3)
    unshared = decode_step_cost(METHODS["hydragen_noshared"], tree, 3, LLAMA_125M)
    assert unshared.bytes - 2 * num_linear_weights() == bytes_per_key * 8 * (100 + 50 + 3)
    assert unshared.flops == found.flops


def test_the_longer_of_moving_and_computing():
    ceilings = Ceilings(read_gbs=10, matmul_tflops=2, rows_tflops=0.5, rows=64)
    assert predict_ms(Cost(bytes=10**9, linear_flops=0, attention_flops=0), ceilings) == pytest.approx(100)
    assert predict_ms(Cost(bytes=0, linear_flops=10**9, attention_flops=4 * 10**9), ceilings) == pytest.approx(2 + 2)
    assert predict_ms(Cost(bytes=10**9, linear_flops=10**9, attention_flops=0), ceilings) == pytest.approx(100)


def test_measured_ceilings_are_of_a_machine():
    found = measure_ceilings(torch.device("cpu"), torch.float32, rows=8, seconds=0.2)
    assert found.rows == 8
    assert 0.5 < found.read_gbs < 5000
    assert 0.001 < found.matmul_tflops < 100
    assert 0.0001 < found.rows_tflops < 100
