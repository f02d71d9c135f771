"""Generation equals a plain loop over transformers: choices, ends, log-probabilities; whatever surrounds a sequence."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import assert_close, hf_model, our_engine, passes, reference
from ranks import World

from engine.distributed import TPGroup
from engine.errors import InputError
from engine.sampling import RowParams, SamplingParams, prompt_hash, row_key, sample, uniforms

METHODS = ["hydragen", "hydragen_noshared"]
VOCAB_SIZE = 67
EOS = (3, 11, 40)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


ROOT = ids(21, 0)
# Every way to choose and to end, on prompts that share in every way; equal prompts have equal parameters.
REQUESTS = [
    (ROOT + ids(4, 1), SamplingParams(temperature=0, max_tokens=9)),
    (ROOT, SamplingParams(n=3, max_tokens=8, logprobs=0)),
    (ROOT + ids(9, 2), SamplingParams(n=2, temperature=0.7, top_k=5, seed=3, max_tokens=6)),
    (ids(5, 3), SamplingParams(n=2, top_p=0.8, max_tokens=10, seed=1)),
    (ROOT, SamplingParams(n=3, max_tokens=8, logprobs=0)),
    (ROOT + ids(9, 2) + ids(2, 4), SamplingParams(temperature=1.5, top_k=9, top_p=0.9, max_tokens=12, ignore_eos=True)),
    (ids(1, 5), SamplingParams(n=5, max_tokens=1, seed=9)),
    (ids(8, 6), SamplingParams(n=4, temperature=2.0, max_tokens=12, ignore_eos=True, stop_token_ids=(2, 5, 8, 30))),
    (ROOT[:10] + ids(3, 7), SamplingParams(temperature=0, max_tokens=5, logprobs=0, ignore_eos=True)),
    (ROOT + ids(4, 1) + ids(2, 8), SamplingParams(n=3, min_p=0.1, max_tokens=7, logprobs=4, seed=5)),
    (ids(5, 9), SamplingParams(n=2, min_p=0.05, top_p=0.9, temperature=1.4, max_tokens=6, logprobs=20)),
]
PROMPTS = [prompt for prompt, _ in REQUESTS]
PARAMS = [params for _, params in REQUESTS]


@pytest.fixture(scope="module")
def hf():
    return hf_model()


@pytest.fixture
def engine(hf):
    return our_engine(hf, eos_token_ids=EOS)


@pytest.fixture(scope="module")
def plain(hf):
    """For each prompt its samples, from a loop that runs transformers over every whole sequence at every step."""
    samples = []
    for number, (prompt, p) in enumerate(REQUESTS):
        occurrence = PROMPTS[:number].count(prompt)
        stop_ids = set(p.stop_token_ids) | (set() if p.ignore_eos else set(EOS))
        for k in range(p.n):
            key = row_key(p.seed, prompt_hash(prompt), occurrence, k)
            state = SimpleNamespace(number=number, prompt=prompt, params=p, stop_ids=stop_ids, key=key)
            state.token_ids, state.logprobs, state.top_logprobs, state.finish_reason = [], [], [], None
            samples.append(state)
    while active := [s for s in samples if s.finish_reason is None]:
        for s, whole in zip(active, reference(hf, [s.prompt + s.token_ids for s in active]), strict=True):
            logits = whole.logits[-1:]
            u = uniforms(torch.tensor([s.key]), torch.tensor([len(s.token_ids)]))
            token = int(sample(logits, RowParams.of([s.params]), u, 0, TPGroup()))
            s.token_ids.append(token)
            logprobs = logits.double().log_softmax(-1)[0]
            s.logprobs.append(float(logprobs[token]))
            likeliest = logprobs.sort(descending=True).indices[: s.params.logprobs or 0].tolist()
            s.top_logprobs.append({i: float(logprobs[i]) for i in dict.fromkeys([*likeliest, token])})
            if token in s.stop_ids:
                s.finish_reason = "stop"
            elif len(s.token_ids) == s.params.max_tokens:
                s.finish_reason = "length"
    return [[s for s in samples if s.number == number] for number in range(len(REQUESTS))]


def outcomes(results):
    """What the samples of each prompt came to."""
    return [[(tuple(r.token_ids), r.finish_reason) for r in samples] for samples in results]


def assert_same_logprobs(mine, theirs, p: SamplingParams):
    """The samples ``mine`` have those log-probabilities of the plain loop's ``theirs`` that ``p`` asks for."""
    if p.logprobs is None:
        assert mine.logprobs is None
    else:
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=2e-5)
    if not p.logprobs:
        assert mine.top_logprobs is None
        return
    for found, expected, token in zip(mine.top_logprobs, theirs.top_logprobs, mine.token_ids, strict=True):
        assert list(found) == list(expected) and token in found
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_generation_is_that_of_a_plain_loop(engine, plain, method):
    results = engine.generate(PROMPTS, PARAMS, attention=method)
    assert outcomes(results) == outcomes(plain)
    for samples, expected, p in zip(results, plain, PARAMS, strict=True):
        for mine, theirs in zip(samples, expected, strict=True):
            assert mine.logits is None
            assert_same_logprobs(mine, theirs, p)
    assert engine.arena.num_used == 0


def test_the_plain_loop_covers_what_it_should(plain):
    reasons = {(r.finish_reason, len(r.token_ids) == r.params.max_tokens) for s in plain for r in s}
    assert reasons >= {("stop", False), ("length", True)}
    assert any(len(set(map(tuple, (r.token_ids for r in s)))) == len(s) > 1 for s in plain)
    assert outcomes(plain)[1] != outcomes(plain)[4]  # equal prompts draw differently


@pytest.mark.parametrize("size", [2, 4])
def test_draws_do_not_depend_on_the_number_of_ranks(hf, plain, size):
    def work(group):
        return our_engine(hf, group, eos_token_ids=EOS).generate(PROMPTS, PARAMS)

    for results in World(size).run(work):
        assert outcomes(results) == outcomes(plain)
        for samples, expected, p in zip(results, plain, PARAMS, strict=True):
            for mine, theirs in zip(samples, expected, strict=True):
                assert_same_logprobs(mine, theirs, p)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_batch_size", [1, 3, 7, 1024])
def test_draws_do_not_depend_on_order_or_waves(engine, plain, method, max_batch_size):
    engine.max_batch_size = max_batch_size
    # Equal prompts are interchangeable: the first one that is given draws as the first.
    for order in ([10, 8, 7, 9, 6, 5, 3, 2, 1, 4, 0], [5, 1, 8, 0, 9, 4, 7, 2, 10, 6, 3]):
        results = engine.generate([PROMPTS[i] for i in order], [PARAMS[i] for i in order], attention=method)
        assert outcomes(results) == [outcomes(plain)[i] for i in order]


def test_draws_do_not_depend_on_the_company(engine, plain):
    for i in (0, 1, 2, 3, 5, 6, 7, 8, 9, 10):
        assert outcomes(engine.generate([PROMPTS[i]], PARAMS[i])) == outcomes(plain)[i : i + 1]
    few = replace(PARAMS[7], n=2)
    assert outcomes(engine.generate([PROMPTS[7]], few))[0] == outcomes(plain)[7][:2]


def test_a_seed_gives_other_draws(engine, plain):
    results = engine.generate([PROMPTS[1]], replace(PARAMS[1], seed=12))
    assert outcomes(results)[0] != outcomes(plain)[1]


def test_returned_logits_are_what_the_tokens_were_chosen_from(hf, engine):
    results = engine.generate(PROMPTS, PARAMS, return_logits=True)
    for prompt, samples in zip(PROMPTS, results, strict=True):
        whole = reference(hf, [prompt + r.token_ids for r in samples])
        for r, expected in zip(samples, whole, strict=True):
            assert_close(torch.stack(r.logits), expected.logits[len(prompt) - 1 : -1])


# --- ends ---


@pytest.mark.parametrize("method", [*METHODS, "noattention"])
def test_finished_sequences_leave_the_batch(engine, method):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (5, 2, 1, 3, 5)]
    calls = []
    with passes(engine.model) as seen:
        engine.generate(
            [ids(4, seed) for seed in range(5)], params, attention=method, on_tokens=lambda *call: calls.append(call)
        )
    assert [p.num_tokens for p in seen] == [20, 4, 3, 2, 2]
    assert calls == [(5, 1), (4, 1), (3, 1), (2, 0), (2, 2)]


def test_a_stop_token_ends_a_sequence_and_is_returned(hf, engine):
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    ((whole,),) = engine.generate([PROMPTS[0]], params)
    stop = whole.token_ids[2]
    end = whole.token_ids.index(stop) + 1
    ((stopped,),) = engine.generate([PROMPTS[0]], replace(params, stop_token_ids=(66, stop)))
    assert (stopped.token_ids, stopped.finish_reason) == (whole.token_ids[:end], "stop")
    assert (len(whole.token_ids), whole.finish_reason) == (6, "length")
    engine = our_engine(hf, eos_token_ids=[stop])
    assert outcomes(engine.generate([PROMPTS[0]], params)) == outcomes([[whole]])
    assert outcomes(engine.generate([PROMPTS[0]], replace(params, ignore_eos=False))) == outcomes([[stopped]])


def test_a_stop_token_at_the_last_step_counts_as_stop(engine):
    ((free,),) = engine.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=1))
    params = SamplingParams(temperature=0, max_tokens=1, stop_token_ids=free.token_ids)
    ((stopped,),) = engine.generate([PROMPTS[0]], params)
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids, "stop")


# --- forced tokens ---


@pytest.mark.parametrize("method", METHODS)
def test_forced_tokens_are_taken_and_then_generation_goes_on(hf, engine, method):
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, logprobs=0)
    forced = [ids(4, 20), [], ids(7, 21)]
    prompts = [ROOT, ROOT, ROOT + ids(2, 22)]
    results = engine.generate(prompts, params, attention=method, forced_tokens=forced)
    for prompt, tokens, (r,) in zip(prompts, forced, results, strict=True):
        assert r.token_ids[: len(tokens)] == tokens and len(r.token_ids) == 7
        logits = reference(hf, [prompt + r.token_ids])[0].logits[len(prompt) - 1 : -1]
        assert r.token_ids[len(tokens) :] == logits.argmax(-1).tolist()[len(tokens) :]
        expected = logits.log_softmax(-1)[torch.arange(7), r.token_ids]
        assert r.logprobs == pytest.approx(expected.tolist(), abs=2e-5)


def test_a_forced_end_of_sequence_ends_it(engine):
    params = SamplingParams(temperature=0, max_tokens=7)
    ((r,),) = engine.generate([ROOT], params, forced_tokens=[[1, EOS[1], 2]])
    assert (r.token_ids, r.finish_reason) == ([1, EOS[1]], "stop")


# --- attention disabled ---


def test_noattention_keeps_no_cache_and_sees_no_history(engine):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompts = [[5, 6, 7], [60, 61, 7], [5, 6, 7], [5, 6, 8]]
    results = engine.generate(prompts, params, attention="noattention", return_logits=True)
    assert engine.arena.cache is None and engine.arena.num_used == 0
    first, second, third, fourth = (torch.stack(r.logits) for (r,) in results)
    assert_close(second, first)
    assert_close(third, first)
    assert not torch.allclose(fourth, first)
    assert first.isfinite().all() and all(len(r.token_ids) == 4 for (r,) in results)


def test_noattention_on_ranks_gives_what_one_rank_gives(hf):
    params = SamplingParams(temperature=0, max_tokens=4)
    runs = [
        World(size).run(lambda group: our_engine(hf, group).generate(PROMPTS, params, attention="noattention"))[0]
        for size in (1, 2)
    ]
    assert outcomes(runs[0]) == outcomes(runs[1])


# --- mistakes ---

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def test_stop_strings_need_a_tokenizer(engine):
    with pytest.raises(InputError) as error:
        engine.generate([[1]], replace(GREEDY, stop="\n"))
    assert str(error.value).startswith("stop: got ('\\n',), but there is no tokenizer to tell the text; accepted: () ")
    assert "\n" not in str(error.value)
    assert engine.arena.num_used == 0


@pytest.mark.parametrize(
    "prompts, params, options, message",
    [
        ([[1, 67]], GREEDY, {}, "holds token id 67; accepted: 0 to 66"),
        ([[1, 2], [1, -3]], GREEDY, {}, "prompt 1: got tokens that are no token ids"),
        ([[1], []], GREEDY, {}, "prompt 1: got no tokens"),
        ([], GREEDY, {}, "prompts: got none"),
        ([[1]], [GREEDY, GREEDY], {}, "2 SamplingParams for 1 prompts"),
        ([[1], [2]], [], {}, "0 SamplingParams for 2 prompts"),
        ([[1], [2] * 253], GREEDY, {}, "prompt 1 has 253 tokens and is to get 4 more; accepted: at most 256"),
        # The number is that of the prompt, not of the sample.
        ([[1], [2] * 253], replace(GREEDY, n=5), {}, "prompt 1 has 253 tokens and is to get 4 more"),
        ([[1]], GREEDY, {"attention": "flash"}, "attention method 'flash' is not known; accepted: hydragen, "),
        ([[1]], GREEDY, {"shared_cache_op": "keep"}, "shared_cache_op 'keep' is not known; accepted: wipe, "),
        ([[1]], GREEDY, {"min_shared": 0}, "min_shared: got 0"),
        ([[1]], GREEDY, {"starting_logits": torch.zeros(2, 67)}, "have shape (2, 67); accepted: (1, 67)"),
        ([[1]], GREEDY, {"starting_logits": torch.zeros(1, 66)}, "have shape (1, 66); accepted: (1, 67)"),
        ([[1]], GREEDY, {"forced_tokens": [[1], [2]]}, "forced_tokens for 2 of 1 prompts"),
        ([[1]], GREEDY, {"forced_tokens": [[67]]}, "forced_tokens of prompt 0 holds token id 67"),
        ([[1]], GREEDY, {"forced_tokens": [[0.5]]}, "forced_tokens of prompt 0: got float64 values"),
        ([[1]], GREEDY, {"forced_tokens": [[1, 2, 3, 4, 5]]}, "forced_tokens of prompt 0: got 5 for 4 new tokens"),
    ],
)
def test_mistakes_are_named_in_one_line(engine, prompts, params, options, message):
    with pytest.raises(InputError) as error:
        engine.generate(prompts, params, **options)
    assert message in str(error.value) and "accepted: " in str(error.value) and "\n" not in str(error.value)
    assert engine.arena.num_used == 0


def test_the_longest_prompt_is_accepted(engine):
    ((r,),) = engine.generate([[2] * 252], GREEDY)
    assert len(r.token_ids) == 4


def test_a_batch_of_no_sequences_is_refused(hf):
    with pytest.raises(InputError, match="max_batch_size is 0; accepted: 1"):
        our_engine(hf, max_batch_size=0)
