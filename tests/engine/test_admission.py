"""More sequences than run at once: those that end make room, sharing stays on, and nobody's tokens change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import hf_model, our_engine, passes
from ranks import World
from strategies import SETTINGS, prompt_sets

from engine.errors import InputError
from engine.generation import Gathering
from engine.sampling import SamplingParams

METHODS = ["hydragen", "hydragen_noshared", "noattention"]
VOCAB_SIZE = 67
ROOT = [5, 9, 2, 7] * 5


@pytest.fixture(scope="module")
def hf():
    return hf_model()


@pytest.fixture
def engine(hf):
    return our_engine(hf)


def outcomes(results):
    return [[None if r is None else (tuple(r.token_ids), r.finish_reason) for r in samples] for samples in results]


def of_lengths(*lengths):
    return [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]


# --- when ---


def asked(gathering, *running):
    """Answers before steps with so many sequences running, up to the first yes."""
    answers = []
    for num_running in running:
        answers.append(gathering.is_over(num_running))
        if answers[-1]:
            break
    return answers


def test_rows_gather_until_they_have_stood_empty_for_as_much_as_half_a_step_of_all():
    gathering = Gathering()
    assert gathering.is_over(0), "at the beginning nothing is to be waited for"
    gathering.begin(8)
    assert asked(gathering, 8, 8, 7, 7, 7, 7, 7) == [False] * 5 + [True]
    gathering.begin(8)
    assert asked(gathering, 7, 6, 6) == [False, False, True]  # 1 + 2 + 2
    gathering.begin(8)
    assert asked(gathering, 0) == [True]


def test_where_no_row_is_empty_nothing_is_let_in():
    gathering = Gathering()
    gathering.begin(3)
    assert not any(gathering.is_over(3) for _ in range(100))
    gathering.begin(0)  # the next one had no room, and was skipped
    assert gathering.is_over(0)


# --- what runs ---


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_that_ends_makes_room_for_one_that_waits(engine, method):
    """One runs long; beside it the others come one by one, and the root is computed once."""
    engine.max_batch_size = 2
    prompts = [[*ROOT, i, i + 1] for i in range(5)]
    with passes(engine.model) as seen:
        engine.generate(prompts, of_lengths(13, 2, 2, 2, 2), attention=method)
    assert [p.num_tokens for p in seen if p.is_prefill] == [20, 4, 2, 2, 2]
    # The long one takes 12 steps; each short one runs in one of them.
    assert [p.num_tokens for p in seen if not p.is_prefill] == [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_kept_busy(engine, method):
    """Lengths from 1 to 16 in rows of 4: less than a fifth more steps than if no row ever stood empty; 16 waves of the
    longest of four would take 1.7 times as many."""
    engine.max_batch_size = 4
    lengths = torch.randint(2, 17, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    with passes(engine.model) as seen:
        engine.generate([[*ROOT, i % 7, i] for i in range(64)], of_lengths(*lengths), attention=method)
    steps = [p.num_tokens for p in seen if not p.is_prefill]
    assert sum(steps) == sum(lengths) - 64 and max(steps) == 4
    least = (sum(lengths) - 64) / 4
    in_waves = sum(max(lengths[i : i + 4]) - 1 for i in range(0, 64, 4))
    assert len(steps) < 1.2 * least and in_waves > 1.5 * least
    # A copy of the baseline's is gone when all that held it have ended.
    computed_again = sum(p.num_tokens for p in seen if p.is_prefill) - (20 + 7 + 64)
    assert 0 <= computed_again <= (2 if method == "hydragen_noshared" else 0)
    assert engine.arena.num_used == 0


@pytest.mark.parametrize("family", ["llama", "mistral, window"])
def test_company_that_comes_and_goes_changes_nothing(family):
    engine = our_engine(hf_model(family))

    @given(prompt_sets(VOCAB_SIZE), st.integers(1, 4), st.integers(1, 2), st.sampled_from(METHODS[:2]), st.data())
    @settings(SETTINGS, max_examples=40)
    def check(prompts, max_batch_size, n, method, data):
        lengths = data.draw(st.lists(st.integers(1, 7), min_size=len(prompts), max_size=len(prompts)))
        params = [SamplingParams(n=n, max_tokens=length, seed=3) for length in lengths]
        engine.max_batch_size = 1024
        engine.release_caches()
        expected = engine.generate(prompts, params, return_logits=True)
        engine.max_batch_size = max_batch_size
        if data.draw(st.booleans()):
            longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
            engine.setup_caches(longest + data.draw(st.integers(0, 40)))
        results = engine.generate(prompts, params, attention=method, return_logits=True)
        assert outcomes(results) == outcomes(expected)
        for samples, others in zip(results, expected, strict=True):
            for one, other in zip(samples, others, strict=True):
                torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=1e-4, rtol=1e-4)
        assert engine.arena.num_used == 0

    check()


def test_starting_logits_and_forced_tokens_go_with_their_prompts(engine):
    prompts = [[*ROOT, i] for i in range(6)]
    params = [SamplingParams(n=2, max_tokens=length, seed=1) for length in (6, 2, 5, 3, 2, 4)]
    options = {
        "starting_logits": torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 4,
        "forced_tokens": [[], [8], [], [1, 2, 3], [], []],
    }
    expected = engine.generate(prompts, params, **options)
    engine.max_batch_size = 3
    assert outcomes(engine.generate(prompts, params, **options)) == outcomes(expected)


@pytest.mark.parametrize("method", METHODS[:2])
def test_ranks_let_the_same_ones_in(hf, method):
    prompts = [[*ROOT[: 3 + i % 4], i, i] for i in range(14)]
    params = [SamplingParams(max_tokens=1 + i * 5 % 8) for i in range(14)]
    expected = outcomes(our_engine(hf).generate(prompts, params))

    def work(group):
        engine = our_engine(hf, group, max_batch_size=5)
        engine.setup_caches(60)
        return outcomes(engine.generate(prompts, params, attention=method))

    assert World(2).run(work) == [expected, expected]


# --- failures of one ---


@pytest.mark.parametrize("max_batch_size", [2, 1024])
@pytest.mark.parametrize("method", METHODS[:2])
def test_one_whose_logits_are_not_finite_is_told_and_the_others_go_on(engine, method, max_batch_size):
    prompts = [[*ROOT, 1], [*ROOT, 60, 4], [60, 2, 3], [7], [*ROOT, 2, 2]]
    params = SamplingParams(n=2, max_tokens=5, seed=6)
    expected = outcomes(engine.generate(prompts, params))
    assert not any(60 in tokens for samples in expected for tokens, _ in samples)
    engine.model.embedding.weight[60] = float("nan")
    engine.max_batch_size = max_batch_size
    told, steps = [], []
    results = engine.generate(
        prompts,
        params,
        attention=method,
        on_failed=lambda *failure: told.append(failure),
        on_tokens=lambda *step: steps.append(step),
    )
    assert outcomes(results) == [[None, None] if 60 in prompt else e for prompt, e in zip(prompts, expected)]
    assert sorted(number for number, _ in told) == [1, 2]
    assert all("after 0 new tokens: no token can" in why and "the embedding is" in why for _, why in told)
    assert sum(ended for _, ended in steps) == 10 and engine.arena.num_used == 0
    for keys, values in (engine.arena.cache.layer(i) for i in range(2)):
        assert keys.isfinite().all() and values.isfinite().all()
    with pytest.raises(InputError, match="^prompt 1, after 0 new tokens"):
        engine.generate(prompts, params, attention=method)


@pytest.mark.parametrize("method", METHODS[:2])
def test_one_that_alone_has_no_room_is_told_and_the_others_go_on(engine, method):
    prompts = [[1, 2, 3], [4] * 50, [1, 2, 5], [6] * 60]
    params = SamplingParams(max_tokens=4)
    expected = outcomes(engine.generate(prompts, params))
    engine.setup_caches(20)
    told = []
    results = engine.generate(prompts, params, attention=method, on_failed=lambda *failure: told.append(failure))
    assert outcomes(results) == [expected[0], [None], expected[2], [None]]
    assert [number for number, _ in told] == [1, 3]
    assert told[0][1].startswith("the prompt needs room for 53 tokens in the KV cache; there is room for 20; set up")
    with pytest.raises(InputError, match="^prompt 1 needs room for 53 tokens"):
        engine.generate(prompts, params, attention=method)


def test_a_call_of_which_nothing_can_be_served(engine):
    engine.setup_caches(2)
    told = []
    params = SamplingParams(n=2)
    assert engine.generate([[4] * 50], params, on_failed=lambda *failure: told.append(failure)) == [[None, None]]
    assert [number for number, _ in told] == [0]


# --- repeats ---


def test_repeats_draw_alike_where_they_are_not_to_differ(engine):
    prompts, params = [[3, 4], [5], [3, 4]], SamplingParams(max_tokens=12)
    first, _, again = outcomes(engine.generate(prompts, params))
    assert first != again
    alike = outcomes(engine.generate(prompts, params, repeats_differ=False))
    assert alike[0] == alike[2] == first


def test_equal_prompts_with_other_parameters_draw_as_if_alone(engine):
    many = [SamplingParams(max_tokens=12, seed=seed, temperature=t) for seed in (1, 2) for t in (0.7, 1.0)]
    alone = [outcomes(engine.generate([[3, 4]], p))[0] for p in many]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        assert outcomes(engine.generate([[3, 4]] * 4, [many[i] for i in order])) == [alone[i] for i in order]
    assert len({tokens for ((tokens, _),) in alone}) == 4


def test_a_prompt_is_checked_without_running_it(engine):
    engine.check_prompt([1, 2], SamplingParams())
    for tokens, params, message in (
        ([], SamplingParams(), "got no tokens"),
        ([67], SamplingParams(), "the prompt holds token id 67; accepted: 0 to 66"),
        ([1] * 500, SamplingParams(max_tokens=60), "the prompt has 500 tokens and is to get 60 more; accepted: "),
        ([1], SamplingParams(stop_token_ids=[70]), "stop_token_ids holds token id 70"),
        ([1], SamplingParams(stop="x"), "there is no tokenizer"),
        ([1.5], SamplingParams(), "no token ids"),
    ):
        with pytest.raises(InputError, match=message):
            engine.check_prompt(tokens, params)
