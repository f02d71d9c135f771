"""The engine on a CUDA device against itself in float32 on the CPU, which other tests hold to transformers."""

import pytest
import torch
from models import hf_model, our_model

from engine.attention.crossover import Crossover
from engine.distributed import TPGroup
from engine.engine import Engine, Levels
from engine.errors import InputError
from engine.loader import load_model
from engine.memory import available_bytes
from engine.sampling import SamplingParams
from kernels import Backend

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Of the largest logit. On a CPU in half precision the same models are off by up to 4.2e-2 and 6.3e-3; one key too few
# in every row's attention moves half of the results by more than 0.12.
TOLERANCE = {torch.bfloat16: 8e-2, torch.float16: 1.2e-2, torch.float32: 2e-5}
# Head dimensions that fill the kernel's tile and that do not; norms of queries and keys; biases.
FAMILIES = {"qwen3": {}, "llama, biases, head_dim": {"head_dim": 24}, "llama, multi-head, tied": {"head_dim": 32}}
VOCAB_SIZE = 67


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


# Longer than a tile of the kernel. Uneven fan-out, several roots, a prompt that ends where others go on, equal prompts.
ROOT, LEFT, RIGHT = ids(140, 0), ids(70, 1), ids(3, 2)
PROMPTS = [
    ROOT + LEFT + ids(9, 3), ROOT + LEFT, ROOT + RIGHT + ids(1, 4), ROOT, ROOT, ROOT + LEFT + ids(20, 5), ids(1, 6),
    ids(33, 7), ids(33, 7)[:20] + ids(4, 8),
]  # fmt: skip
FORCED = [ids(count, 100 + i) for i, count in enumerate([6, 4, 6, 1, 5, 6, 2, 6, 3])]
PARAMS = [SamplingParams(temperature=0, max_tokens=len(tokens)) for tokens in FORCED]
PARAMS[7] = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=FORCED[7][3:4])


def engines(family: str = "qwen3", dtype: torch.dtype = torch.bfloat16, **options) -> tuple[Engine, Engine]:
    """The same weights, which ``dtype`` holds exactly: in float32 on the CPU, in ``dtype`` on the device."""
    hf = hf_model(family, **FAMILIES[family])
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(dtype).float()
    on_device = our_model(hf, TPGroup(0, 1, DEVICE), prefill_chunk=64).to(DEVICE, dtype)
    return Engine(our_model(hf)), Engine(on_device, **options)


def assert_same(actual, expected, dtype):
    """Results of generating, by prompt and sample: the same tokens and ends, and logits that are close."""
    for samples, wanted in zip(actual, expected, strict=True):
        for mine, theirs in zip(samples, wanted, strict=True):
            assert (mine.token_ids, mine.finish_reason) == (theirs.token_ids, theirs.finish_reason)
            assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), dtype)


def assert_close(actual, expected, dtype):
    assert actual.device.type == DEVICE and expected.device.type == "cpu" and actual.shape == expected.shape
    difference, largest = (actual.cpu() - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= TOLERANCE[dtype] * largest, f"off by {difference:.2e} of {largest:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_prompts_and_steps(family, dtype):
    cpu, device = engines(family, dtype)
    options = {"forced_tokens": FORCED, "return_logits": True}
    for method in ("hydragen", "hydragen_noshared", "noattention"):
        expected = cpu.generate(PROMPTS, PARAMS, attention=method, **options)
        assert {r.finish_reason for (r,) in expected} == {"stop", "length"}
        assert_same(device.generate(PROMPTS, PARAMS, attention=method, **options), expected, dtype)
        assert device.arena.num_used == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON], ids=str)
def test_other_backends(dtype, backend):
    """Which read the same tables."""
    cpu, device = engines(dtype=dtype, attention_backend=backend)
    for method in ("hydragen", "hydragen_noshared"):
        options = {"attention": method, "forced_tokens": FORCED[5:], "return_logits": True}
        expected = cpu.generate(PROMPTS[5:], PARAMS[5:], **options)
        assert_same(device.generate(PROMPTS[5:], PARAMS[5:], **options), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_operations_by_triton(dtype):
    cpu, device = engines(dtype=dtype, operations_backend="triton")
    for method in ("hydragen", "noattention"):
        options = {"attention": method, "forced_tokens": FORCED, "return_logits": True}
        expected = cpu.generate(PROMPTS, PARAMS, **options)
        assert_same(device.generate(PROMPTS, PARAMS, **options), expected, dtype)


@pytest.mark.parametrize("method", ["hydragen", "hydragen_noshared"])
def test_kept_levels_and_starting_logits(method):
    cpu, device = engines(dtype=torch.float16)
    start = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0, max_tokens=4)
    made = []
    for engine in (cpu, device):
        kept = [engine.append_shared([ROOT], attention=method), engine.append_shared([LEFT, RIGHT], attention=method)]
        options = {"attention": method, "forced_tokens": [FORCED[0][:4]] * 4, "return_logits": True}
        ends = [ids(4, 9), (), ids(1, 10), ids(7, 11)]
        below = [engine.generate(ends, params, shared_cache_op=op, **options) for op in ("preserve", "extend")]
        started = engine.generate(PROMPTS[:4], params, starting_logits=start, **options)
        made.append((kept, below, started))
    (kept, below, started), (kept_there, below_there, started_there) = made
    for mine, theirs in zip(kept_there, kept, strict=True):
        assert_close(mine, theirs, torch.float16)
    for mine, theirs in zip([*below_there, started_there], [*below, started], strict=True):
        assert_same(mine, theirs, torch.float16)
    assert all(torch.equal(r.logits[0].cpu(), row) for (r,), row in zip(started_there, start, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["hydragen", "hydragen_noshared", "noattention", "auto"])
def test_steps_as_graphs(method, dtype):
    """Captured and replayed, for batches that fill no bucket too, and again in a call of other lengths."""
    cpu, device = engines(dtype=dtype, cuda_graphs=True)
    cpu.crossover = device.crossover = Crossover((2, 4), (100, 2))
    for prompts in (PROMPTS, [prompt + (5, 6) for prompt in PROMPTS[::-1]]):
        params = [SamplingParams(n=3, temperature=0, max_tokens=9, ignore_eos=True)] * len(prompts)
        forced = [ids(9, 200 + i) for i in range(len(prompts))]
        options = {"attention": method, "forced_tokens": forced, "return_logits": True}
        assert_same(device.generate(prompts, params, **options), cpu.generate(prompts, params, **options), dtype)
    assert any(graph.replay is not None for graph in device._graphs._graphs.values())


@pytest.mark.parametrize("method", ["hydragen", "hydragen_noshared"])
@pytest.mark.parametrize(("max_batch_size", "cache_tokens"), [(2, None), (1024, 400), (1, 260)])
def test_waves(method, max_batch_size, cache_tokens):
    cpu, device = engines(dtype=torch.float16, max_batch_size=max_batch_size)
    if cache_tokens is not None:
        device.setup_caches(cache_tokens)
    options = {"attention": method, "forced_tokens": FORCED, "return_logits": True}
    assert_same(device.generate(PROMPTS, PARAMS, **options), cpu.generate(PROMPTS, PARAMS, **options), torch.float16)


@pytest.mark.parametrize("operations_backend", [None, "triton"])
def test_draws_are_those_of_the_cpu(operations_backend):
    """In float32, where logits differ by too little to change a draw."""
    cpu, device = engines(dtype=torch.float32, operations_backend=operations_backend)
    prompts = [ids(12, 12), ids(12, 12)[:8], ids(12, 12), ids(5, 13)]
    params = [
        SamplingParams(n=3, logprobs=0),
        SamplingParams(n=2, top_k=5, temperature=0.7),
        SamplingParams(n=2, top_p=0.8, max_tokens=7),
        SamplingParams(temperature=0, logprobs=0, stop_token_ids=tuple(range(0, VOCAB_SIZE, 9))),
    ]
    expected = cpu.generate(prompts, params)
    assert len({r.token_ids[0] for samples in expected for r in samples}) > 3
    for engine_prompts in (prompts, Levels([prompts])):
        actual = device.generate(engine_prompts, params)
        for samples, wanted in zip(actual, expected, strict=True):
            assert [r.token_ids for r in samples] == [r.token_ids for r in wanted]
            assert [r.finish_reason for r in samples] == [r.finish_reason for r in wanted]
            for mine, theirs in zip(samples, wanted, strict=True):
                assert mine.logprobs == (None if theirs.logprobs is None else pytest.approx(theirs.logprobs, abs=1e-4))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_preset_is_loaded_to_the_device(dtype):
    """Random weights, which every dtype holds exactly, so that the CPU's are the same."""
    made = []
    for group, its_dtype in ((TPGroup(), "float32"), (TPGroup(0, 1, DEVICE), dtype)):
        model = load_model("tiny", group, load_format="dummy", dtype=its_dtype).model
        assert {parameter.device.type for parameter in model.parameters()} == {group.device.type}
        made.append(Engine(model).generate(PROMPTS, PARAMS, forced_tokens=FORCED, return_logits=True))
    assert_same(made[1], made[0], getattr(torch, dtype))


# --- memory ---


def test_memory_that_pytorch_keeps_counts_as_free():
    group = TPGroup(0, 1, DEVICE)
    before = available_bytes(group)
    block = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    taken = available_bytes(group)
    del block
    assert before - taken >= 2**31 - 2**28
    assert available_bytes(group) - taken >= 2**31 - 2**28


def test_a_cache_of_most_of_the_memory_is_taken_twice():
    """What the first one gave back is there for the second, though PyTorch may still hold it."""
    _, device = engines()
    limit = device.arena.max_tokens
    with pytest.raises(InputError, match="accepted: at most [0-9]+ tokens, which memory has room for"):
        device.setup_caches(2 * limit)
    device.release_caches()
    for _ in range(2):
        device.setup_caches(int(0.6 * limit))
        assert device.arena.capacity == int(0.6 * limit)
    results = device.generate([PROMPTS[7]], SamplingParams(temperature=0, max_tokens=2), return_logits=True)
    assert torch.stack(results[0][0].logits).isfinite().all()
    device.release_caches()
    assert device.arena.max_tokens >= 0.9 * limit
