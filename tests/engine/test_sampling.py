import itertools
import math
import threading

import numpy as np
import pytest
import torch

from engine import sampling
from engine.errors import InputError
from engine.sampling import RowParams, SamplingParams, greedy, logprobs, prompt_hash, row_key, sample, uniforms
from engine.sharding import split_vocab

WORLD_SIZES = [1, 2, 3, 4]


class ThreadRank:
    """One rank of a group whose ranks are threads."""

    def __init__(self, rank, size, slots, barrier):
        self.rank, self.size, self.slots, self.barrier = rank, size, slots, barrier

    def all_gather(self, tensor):
        self.slots[self.rank] = tensor
        self.barrier.wait()
        gathered = torch.stack(self.slots)  # raises when shapes or dtypes differ between ranks
        self.barrier.wait()
        return gathered


def on_ranks(size, logits, work):
    """``work(rank's logits, its vocab_start, its group)`` on every rank; all results must be equal; returns one."""
    slots, barrier = [None] * size, threading.Barrier(size, timeout=60)
    results, errors = [None] * size, []

    def run(rank):
        cut = split_vocab("logits", (logits.shape[1],), rank, size)
        part = torch.nn.functional.pad(
            logits[:, cut.start : cut.start + cut.length], (0, cut.padded_length - cut.length), value=-math.inf
        )
        try:
            results[rank] = work(part, cut.start, ThreadRank(rank, size, slots, barrier))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


def sample_on_ranks(size, logits, params, u):
    rows = RowParams.of(params)
    return on_ranks(size, logits, lambda part, start, group: sample(part, rows, u, start, group))


def reference_order_and_probabilities(logits, p):
    """Token ids in the order of the distribution function, and what each is drawn with: float64, whole vocabulary."""
    x = logits.double().numpy()
    if p.temperature == 0:
        return np.array([x.argmax()]), np.ones(1)
    probabilities = np.exp((x - x.max()) / p.temperature)
    passes_min_p = probabilities >= p.min_p * (1 - 1e-6)  # of the likeliest, which is 1 here; equal to it is enough
    probabilities /= probabilities.sum()
    if p.top_k == 0 and p.top_p == 1:
        kept = np.where(passes_min_p, probabilities, 0)
        return np.arange(len(x)), kept / kept.sum()
    ids = np.lexsort((np.arange(len(x)), -x))[: p.top_k or None]
    kept = probabilities[ids] / probabilities[ids].sum()
    if p.top_p < 1:
        count = 1 + int((np.cumsum(kept) < p.top_p - 1e-9).sum())  # equal to top_p is enough
        ids, kept = ids[:count], kept[:count]
    kept = np.where(passes_min_p[ids], kept, 0)
    return ids, kept / kept.sum()


def assert_draws_match_reference(tokens, logits, params, u):
    """Each token is the reference's for its uniform number, give or take float32 rounding of the probabilities."""
    for row, p in enumerate(params):
        ids, probabilities = reference_order_and_probabilities(logits[row], p)
        upper = np.cumsum(probabilities)
        (place,) = np.nonzero(ids == int(tokens[row]))
        assert len(place) == 1, f"row {row}: token {tokens[row]} has probability 0 ({p})"
        place = place[0]
        assert probabilities[place] > 0, f"row {row}: token {tokens[row]} has probability 0 ({p})"
        assert upper[place] - probabilities[place] - 1e-5 <= float(u[row]) <= upper[place] + 1e-5, f"row {row} ({p})"


KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=5.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7, temperature=2.0),
    SamplingParams(top_k=3, top_p=0.6),
    SamplingParams(top_k=10**9),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.999, temperature=3.0),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=0.02, temperature=2.0),
    SamplingParams(min_p=1.0),
    SamplingParams(min_p=0.2, top_k=7),
    SamplingParams(min_p=0.05, top_p=0.9),
    SamplingParams(min_p=0.01, top_p=0.95, top_k=40, temperature=1.5),
    SamplingParams(min_p=0.5, temperature=0),
]


# --- choosing tokens ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 128, 131, 2600])
def test_draws_match_the_whole_vocabulary_reference_on_any_number_of_ranks(vocab_size, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    params = KINDS * 6
    logits = (3 * torch.randn(len(params), vocab_size, generator=generator)).to(dtype)
    u = torch.rand(len(params), dtype=torch.float64, generator=generator)
    u[: len(KINDS)] = 0.0
    u[len(KINDS) : 2 * len(KINDS)] = 1 - 2.0**-53
    tokens = [sample_on_ranks(size, logits, params, u) for size in WORLD_SIZES]
    # The very last number is within rounding of more than one of the last tokens, where these have next to no weight.
    inside = u < 1 - 2.0**-53
    assert all(torch.equal(t[inside], tokens[0][inside]) for t in tokens)
    for t in tokens:
        assert_draws_match_reference(t, logits, params, u)


@pytest.mark.parametrize("p", [p for p in KINDS if p.temperature > 0], ids=str)
def test_frequencies_follow_the_distribution(p):
    """Chi-square over 20,000 draws from one distribution; the seed is fixed, so this cannot fail by chance."""
    num_draws, vocab_size = 20_000, 40
    logits = 1.5 * torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(3))
    u = uniforms(torch.arange(num_draws) * 7919, torch.zeros(num_draws, dtype=torch.int64))
    tokens = sample_on_ranks(2, logits.expand(num_draws, -1), [p] * num_draws, u)
    ids, probabilities = reference_order_and_probabilities(logits[0], p)
    counts = np.bincount(tokens.numpy(), minlength=vocab_size)
    assert counts[ids].sum() == num_draws
    assert (counts[ids][probabilities == 0] == 0).all()
    ids, probabilities = ids[probabilities > 0], probabilities[probabilities > 0]
    expected = probabilities * num_draws
    statistic = float(((counts[ids] - expected) ** 2 / expected).sum())
    assert statistic < len(ids) + 4 * math.sqrt(2 * len(ids))


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_ties_go_to_the_lowest_id(size, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (64, 1001), generator=generator).to(dtype)  # hundreds of equal maxima in each row
    logits[0] = 0.0
    logits[1] = torch.tensor([-0.0, 0.0]).repeat(501)[:1001]
    logits[2] = -3.0
    logits[2, [900, 500, 700]] = -2.0
    logits[3, 256:] = 9.0  # ties that begin with a block, and with a rank's part
    logits[4] = torch.finfo(dtype).min
    tokens = on_ranks(size, logits, greedy)
    assert tokens.tolist() == logits.double().numpy().argmax(-1).tolist()


def test_top_k_keeps_exactly_k_and_of_tied_tokens_the_lowest_ids():
    logits = torch.zeros(1, 600)
    logits[0, 599] = 1.0
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    for size in WORLD_SIZES:
        tokens = sample_on_ranks(size, logits.expand(64, -1), [SamplingParams(top_k=4)] * 64, u)
        assert set(tokens.tolist()) == {599, 0, 1, 2}


@pytest.mark.parametrize(
    "top_p, kept", [(0.25, {3}), (0.5, {3}), (0.51, {3, 1}), (0.75, {3, 1}), (0.76, {3, 1, 0}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_token_that_reaches_it(top_p, kept):
    logits = torch.tensor([[0.125, 0.25, 0.125, 0.5]]).log2() * math.log(2.0)
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    for top_k in (0, 4):
        tokens = sample_on_ranks(2, logits.expand(64, -1), [SamplingParams(top_p=top_p, top_k=top_k)] * 64, u)
        assert set(tokens.tolist()) == kept


def test_top_p_renormalises_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    # Of {0, 1}, token 0 has 0.4 / 0.7 = 0.57: enough for 0.55, though 0.4 alone is not.
    tokens = sample_on_ranks(1, logits.expand(64, -1), [SamplingParams(top_k=2, top_p=0.55)] * 64, u)
    assert set(tokens.tolist()) == {0}


def test_top_p_takes_more_candidates_for_the_rows_that_need_them(monkeypatch):
    vocab_size = 3000
    logits = torch.linspace(0, 1, vocab_size).repeat(3, 1)
    logits[0, 17] = 50.0  # one candidate is enough
    logits[1, 100:300] = 8.0  # some hundreds are
    u = torch.tensor([0.7, 0.7, 0.7], dtype=torch.float64)
    seen = []
    candidates = sampling._candidates

    def spy(shard, count):
        seen.append((len(shard.rows), count))
        return candidates(shard, count)

    monkeypatch.setattr(sampling, "_candidates", spy)
    params = [SamplingParams(top_p=0.9)] * 3
    tokens = sample_on_ranks(1, logits, params, u)
    assert seen == [(3, 64), (2, 512), (1, vocab_size)]
    assert_draws_match_reference(tokens, logits, params, u)


@pytest.mark.parametrize("min_p, kept", [(0.19, {0, 1, 2, 3}), (0.21, {0, 1, 3}), (0.59, {1, 3}), (1.0, {3})])
@pytest.mark.parametrize("others", [{}, {"top_k": 4}, {"top_p": 0.9999}, {"top_k": 4, "top_p": 0.9999}], ids=str)
def test_min_p_keeps_what_reaches_its_part_of_the_likeliest(min_p, kept, others):
    logits = torch.tensor([[0.3, 0.6, 0.2, 1.0]]).log()
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    # At half the temperature, ratios of probabilities are the squares.
    for temperature, its_min_p in ((1.0, min_p), (0.5, min_p**2)):
        params = SamplingParams(min_p=its_min_p, temperature=temperature, **others)
        tokens = sample_on_ranks(2, logits.expand(64, -1), [params] * 64, u)
        assert set(tokens.tolist()) == kept


def test_min_p_comes_after_top_p():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    # Before it, token 0 would have 0.67 of what min-p leaves, {0, 1}: enough for 0.6.
    for top_k in (0, 4):
        tokens = sample_on_ranks(2, logits.expand(64, -1), [SamplingParams(top_p=0.6, top_k=top_k, min_p=0.4)] * 64, u)
        assert set(tokens.tolist()) == {0, 1}


def test_min_p_gathers_nothing(monkeypatch):
    """By itself it costs no candidates, and beside top-p it saves those that it drops."""
    seen = []
    candidates = sampling._candidates

    def spy(shard, count):
        seen.append((len(shard.rows), count))
        return candidates(shard, count)

    monkeypatch.setattr(sampling, "_candidates", spy)
    logits = torch.linspace(0, 1, 3000).repeat(3, 1)
    logits[:, 17] = 5.0
    u = torch.tensor([0.001, 0.5, 0.7], dtype=torch.float64)
    params = [SamplingParams(min_p=0.9), SamplingParams(min_p=0.9, top_p=0.99), SamplingParams(top_p=0.99)]
    tokens = sample_on_ranks(1, logits, params, u)
    assert tokens[:2].tolist() == [17, 17]
    assert seen == [(2, 64), (1, 512), (1, 3000)]
    assert_draws_match_reference(tokens, logits, params, u)


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_tokens_at_minus_infinity_are_never_drawn(size):
    """At the ends of the unit interval too, where whole blocks and whole ranks hold nothing else."""
    allowed = torch.arange(300, 310)
    logits = torch.full((len(KINDS) * 2, 800), -math.inf)
    logits[:, allowed] = torch.randn(len(logits), 10, generator=torch.Generator().manual_seed(1))
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64).repeat_interleave(len(KINDS))
    assert torch.isin(sample_on_ranks(size, logits, KINDS * 2, u), allowed).all()


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_a_row_draws_the_same_alone_and_in_any_batch(size):
    generator = torch.Generator().manual_seed(11)
    params = KINDS * 3
    logits = 2 * torch.randn(len(params), 1030, generator=generator)
    keys = torch.tensor([row_key(5, prompt_hash([row]), 0, 0) for row in range(len(params))])
    u = uniforms(keys, torch.full((len(params),), 9))
    together = sample_on_ranks(size, logits, params, u)
    backwards = sample_on_ranks(size, logits.flip(0), params[::-1], u.flip(0))
    assert torch.equal(backwards.flip(0), together)
    for row in range(0, len(params), 4):
        alone = sample_on_ranks(size, logits[row : row + 1], params[row : row + 1], u[row : row + 1])
        assert alone[0] == together[row]


def test_chunks_of_rows_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(len(KINDS) * 3, 300, generator=generator)
    u = torch.rand(len(logits), dtype=torch.float64, generator=generator)
    whole = sample_on_ranks(1, logits, KINDS * 3, u)
    monkeypatch.setitem(sampling.CHUNK, "cpu", 1000)
    assert torch.equal(sample_on_ranks(1, logits, KINDS * 3, u), whole)


def test_the_caller_s_logits_are_left_as_they_were():
    logits = torch.randn(len(KINDS), 256)
    before = logits.clone()
    sample_on_ranks(1, logits, KINDS, torch.full((len(KINDS),), 0.5, dtype=torch.float64))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("p", [KINDS[0], KINDS[1], KINDS[5], KINDS[8]], ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_unusable_logits_name_their_row(size, p, bad):
    logits = torch.randn(4, 300)
    if bad == -math.inf:
        logits[2] = bad
    else:
        logits[2, 299] = bad
    with pytest.raises(RuntimeError, match="^row 2: no token can be chosen"):
        sample_on_ranks(size, logits, [p] * 4, torch.full((4,), 0.5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="^row 2: "):
        on_ranks(size, logits, greedy)


def logprobs_on_ranks(size, logits, tokens, count):
    """``(chosen, ids of the likeliest, theirs)``, of which every rank has the same."""
    pick = lambda name: on_ranks(  # noqa: E731
        size, logits, lambda part, start, group: getattr(logprobs(part, tokens, count, start, group), name)
    )
    return pick("chosen"), pick("top_ids"), pick("top")


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_the_log_softmax_and_its_largest(size, dtype, count):
    generator = torch.Generator().manual_seed(4)
    logits = (4 * torch.randn(50, 333, generator=generator)).to(dtype)  # bfloat16 has ties
    tokens = torch.randint(0, 333, (50,), generator=generator)
    expected = logits.double().log_softmax(-1)
    chosen, top_ids, top = logprobs_on_ranks(size, logits, tokens, count)
    assert chosen.dtype == top.dtype == torch.float32
    torch.testing.assert_close(chosen.double(), expected.gather(1, tokens[:, None])[:, 0], rtol=0, atol=2e-6)
    assert torch.equal(top_ids, logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :count])
    torch.testing.assert_close(top.double(), expected.gather(1, top_ids), rtol=0, atol=2e-6)
    # A chosen token that is among the likeliest has the very same number there.
    for row, column in (top_ids == tokens[:, None]).nonzero().tolist():
        assert top[row, column] == chosen[row]


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_more_logprobs_than_there_are_tokens(size):
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    _, top_ids, top = logprobs_on_ranks(size, logits, torch.tensor([0, 0]), 20)
    for row, expected in enumerate(([1, 2, 0], [0, 1, 2])):
        assert top_ids[row][top[row] > -math.inf].tolist() == expected


# --- the uniform numbers ---


def splitmix64(key, step):
    mask = 2**64 - 1
    z = (key + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64_bit_for_bit():
    assert [splitmix64(1234567, step) for step in range(3)] == [  # the generator's published outputs
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    keys = [0, 1, -1, 1234567, 2**63 - 1, -(2**63), *(row_key(0, prompt_hash([i]), 0, 0) for i in range(200))]
    for step in (0, 1, 1000, 2**40):
        found = uniforms(torch.tensor(keys), torch.full((len(keys),), step))
        assert found.dtype == torch.float64
        assert found.tolist() == [(splitmix64(key % 2**64, step) >> 11) / 2**53 for key in keys]
        assert 0 <= found.min() and found.max() < 1


def test_uniforms_are_uniform_and_unrelated_between_steps_samples_and_prompts():
    hashes = [prompt_hash([1, 2, prompt]) for prompt in range(16)]
    keys = torch.tensor([[row_key(0, h, 0, sample) for sample in range(32)] for h in hashes])
    steps = torch.arange(64)
    u = uniforms(keys.repeat_interleave(64), steps.repeat(keys.numel())).view(16, 32, 64)
    counts = torch.histc(u.float(), bins=64, min=0, max=1)
    expected = u.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * math.sqrt(2 * 63)
    for dim in range(3):
        first, second = u.narrow(dim, 0, u.shape[dim] - 1), u.narrow(dim, 1, u.shape[dim] - 1)
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.numel())


def test_keys_depend_on_each_of_their_parts_and_nothing_else():
    parts = itertools.product((0, 1), ([1], [1, 0]), (0, 1), (0, 1))
    keys = [row_key(seed, prompt_hash(prompt), occurrence, number) for seed, prompt, occurrence, number in parts]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert prompt_hash([1, 2]) == prompt_hash(np.array([1, 2], dtype=np.int32)) == prompt_hash((1, 2))
    assert row_key(7, prompt_hash([1, 2, 3]), 4, 5) == -2234597329030689635  # recorded: released draws do not change
    with pytest.raises(AssertionError):
        row_key(0, [1, 2], 0, 0)


@pytest.mark.gpu
def test_cuda_gives_the_tokens_of_the_cpu():
    keys = torch.tensor([row_key(0, prompt_hash([i]), 0, 0) for i in range(len(KINDS) * 4)])
    u = uniforms(keys, torch.arange(len(keys)))
    assert torch.equal(uniforms(keys.cuda(), torch.arange(len(keys)).cuda()).cpu(), u)
    logits = 3 * torch.randn(len(keys), 32001, generator=torch.Generator().manual_seed(0))
    group = ThreadRank(0, 1, [None], threading.Barrier(1))
    on_cpu = sample(logits, RowParams.of(KINDS * 4), u, 0, group)
    on_cuda = sample(logits.cuda(), RowParams.of(KINDS * 4, "cuda"), u.cuda(), 0, group)
    assert torch.equal(on_cuda.cpu(), on_cpu)


# --- SamplingParams ---


def test_defaults_and_normal_forms():
    p = SamplingParams(top_k=-1, stop_token_ids=[7, 8], temperature=np.float32(0.5), n=np.int64(2))
    assert (p.top_k, p.stop_token_ids, p.temperature, p.n) == (0, (7, 8), 0.5, 2)
    assert SamplingParams() == SamplingParams(1, 1.0, 1.0, 0, 16, (), False, 0, None, 0.0, (), False)


@pytest.mark.parametrize(
    "name, values",
    {
        "n": [0, -1, 1.0, True, "2", None],
        "max_tokens": [0, -5, 2.5, True],
        "temperature": [-0.1, 1e-6, 1e6, math.nan, math.inf, "hot", False, None],
        "top_p": [0, 0.0, -0.5, 1.01, math.nan, True, "0.9"],
        "top_k": [-2, 1.5, True, None],
        "seed": [-1, 2**63, 0.5, True, None],
        "logprobs": [21, -1, 1.0, False, True],
        "min_p": [-0.1, 1.01, math.nan, True, "0.1", None],
        "include_stop_str_in_output": [1, "yes", None],
        "ignore_eos": [1, "yes", None],
        "stop_token_ids": [5, "</s>", [1.5], [-1], [True], None],
    }.items(),
)
def test_values_that_are_not_accepted(name, values):
    for value in values:
        with pytest.raises(InputError) as error:
            SamplingParams(**{name: value})
        assert str(error.value).startswith(f"{name}: got {value!r}; accepted: ")
        assert "\n" not in str(error.value)
