"""Kept levels, cache sizes, waves and failures: what surrounds a generation changes its cost, never its tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_close, hf_model, our_engine, passes, reference
from ranks import World, run_ranks
from strategies import SETTINGS, prompt_sets

from engine.attention import METHODS as REGISTRY
from engine.attention.hydragen import Hydragen
from engine.engine import Engine, Levels
from engine.errors import InputError
from engine.prefix_tree import build_from_prompts
from engine.sampling import SamplingParams
from kernels import available_backends, available_operations_backends, logit_blocks, norm, rotary, swiglu
from kernels.dispatch import choose_backend

METHODS = ["hydragen", "hydragen_noshared"]
VOCAB_SIZE = 67
GREEDY = SamplingParams(temperature=0, max_tokens=5)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


ROOT, LEFT, RIGHT = ids(20, 0), ids(6, 1), ids(3, 2)
ENDS = [ids(4, 3), [], ids(1, 4), ids(7, 5)]
WHOLE = [ROOT + LEFT + ENDS[0], ROOT + LEFT + ENDS[1], ROOT + RIGHT + ENDS[2], ROOT + RIGHT + ENDS[3]]
LEVELS = Levels([[ROOT], [LEFT, RIGHT], ENDS])


@pytest.fixture(scope="module")
def hf():
    return hf_model("qwen3")


@pytest.fixture
def engine(hf) -> Engine:
    return our_engine(hf)


def tokens(results):
    return [[r.token_ids for r in samples] for samples in results]


def check(hf, prompts, results):
    """Logits of every step, and so the greedy tokens, are those of transformers on the whole sequences."""
    expected = reference(hf, [p + r.token_ids for p, (r,) in zip(prompts, results, strict=True)])
    for prompt, (r,), whole in zip(prompts, results, expected, strict=True):
        logits = whole.logits[len(prompt) - 1 : -1]
        assert_close(torch.stack(r.logits), logits)
        assert r.token_ids == logits.argmax(-1).tolist()


# --- attention backends ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", available_backends(torch.device("cpu"), torch.float32), ids=str)
def test_every_backend_gives_the_same_logits(hf, method, backend):
    engine = our_engine(hf, attention_backend=backend)
    check(hf, WHOLE, engine.generate(LEVELS, GREEDY, attention=method, return_logits=True))
    assert engine.model.attention_backend == backend


def test_a_backend_that_is_not_known(hf):
    with pytest.raises(InputError, match="'flash' cannot run float32 on cpu; accepted: .*aten.*; use one of"):
        our_engine(hf, attention_backend="flash")


def test_engines_of_one_model_have_backends_of_their_own(hf):
    first = our_engine(hf, attention_backend="reference", operations_backend="aten")
    second = Engine(first.model)
    for engine, backends in ((second, (None, None)), (first, ("reference", "aten")), (second, (None, None))):
        for run in (lambda: engine.generate(WHOLE, GREEDY), lambda: engine.append_shared([WHOLE[0]])):  # noqa: B023
            run()
            assert (engine.model.attention_backend, engine.model.operations_backend) == backends
            engine.empty_shared()


# --- operations backends ---


@pytest.mark.parametrize("backend", available_operations_backends(torch.device("cpu"), torch.float32), ids=str)
def test_every_operations_backend_gives_the_same_logits(hf, monkeypatch, backend):
    """And all operations, the choice of tokens included, are given it."""
    drawn = SamplingParams(temperature=0.8, logprobs=2, prompt_logprobs=1, max_tokens=3)
    expected = tokens(our_engine(hf).generate(WHOLE, drawn))
    seen = {}

    def recording(module):
        def choose(given, *tensors, **options):
            seen.setdefault(module, set()).add(given)
            return choose_backend(given, *tensors, **options)

        return choose

    for module in (logit_blocks, norm, rotary, swiglu):
        monkeypatch.setattr(module, "choose_backend", recording(module.__name__))
    engine = our_engine(hf, operations_backend=str(backend))
    check(hf, WHOLE, engine.generate(LEVELS, GREEDY, return_logits=True))
    assert tokens(engine.generate(WHOLE, drawn)) == expected
    engine.generate(WHOLE, drawn, attention="noattention")  # which rotates queries alone
    assert seen == {f"kernels.{name}": {backend} for name in ("logit_blocks", "norm", "rotary", "swiglu")}


@pytest.mark.parametrize("backend", ["reference", "flash"])
def test_an_operations_backend_that_is_not_known(hf, backend):
    with pytest.raises(InputError, match=f"'{backend}' cannot run float32 on cpu; accepted: .*aten.*; use one of"):
        our_engine(hf, operations_backend=backend)


# --- kept levels ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("append_with", METHODS)
def test_kept_levels_are_not_computed_again(hf, engine, append_with, method):
    logits = engine.append_shared([ROOT], attention=append_with)
    assert_close(logits, reference(hf, [ROOT])[0].logits[-1:])
    logits = engine.append_shared([LEFT, RIGHT], attention=append_with)
    assert_close(logits, torch.stack([r.logits[-1] for r in reference(hf, [ROOT + LEFT, ROOT + RIGHT])]))
    assert (engine.num_shared_levels, engine.arena.num_used) == (2, 29)
    for _ in range(2):
        with passes(engine.model) as seen:
            results = engine.generate(ENDS, GREEDY, attention=method, shared_cache_op="preserve", return_logits=True)
        check(hf, WHOLE, results)
        assert [p.num_tokens for p in seen] == [12, 4, 4, 4, 4]
        assert (engine.num_shared_levels, engine.arena.num_used) == (2, 29)


def test_levels_given_at_once_equal_levels_kept_and_prompts(hf, engine):
    for method in METHODS:
        for given in (LEVELS, Levels(LEVELS.levels, [[0, 0], [0, 0, 1, 1]]), WHOLE):
            check(hf, WHOLE, engine.generate(given, GREEDY, attention=method, return_logits=True))


def test_prompts_below_kept_levels_can_have_levels_of_their_own(hf, engine):
    engine.append_shared([ROOT])
    below = Levels([[LEFT, RIGHT], [ENDS[3], ENDS[0], ENDS[2]]], [[1, 0, 1]])
    results = engine.generate(below, GREEDY, shared_cache_op="preserve", return_logits=True)
    check(hf, [ROOT + RIGHT + ENDS[3], ROOT + LEFT + ENDS[0], ROOT + RIGHT + ENDS[2]], results)
    assert engine.arena.num_used == len(ROOT)


def test_appended_entries_name_their_parents_in_any_order(hf, engine):
    engine.append_shared([ROOT, LEFT])
    logits = engine.append_shared([RIGHT, ENDS[0], LEFT], parents=[1, 0, 1])
    above = [LEFT + RIGHT, ROOT + ENDS[0], LEFT + LEFT]
    assert_close(logits, torch.stack([r.logits[-1] for r in reference(hf, above)]))
    results = engine.generate([[1], [2], [3]], GREEDY, shared_cache_op="preserve", return_logits=True)
    check(hf, [above[0] + [1], above[1] + [2], above[2] + [3]], results)


def test_equal_entries_are_kept_once(hf, engine):
    logits = engine.append_shared([ROOT, LEFT, ROOT])
    assert engine.arena.num_used == len(ROOT) + len(LEFT)
    assert torch.equal(logits[0], logits[2])
    results = engine.generate(
        [[1], [2], [3]], GREEDY, shared_cache_op="preserve", return_logits=True, attention="hydragen"
    )
    check(hf, [ROOT + [1], LEFT + [2], ROOT + [3]], results)


def test_truncate_and_empty(hf, engine):
    for level in ([ROOT], [LEFT, RIGHT], [[1], [2], [3], [4]]):
        engine.append_shared(level)
    assert engine.arena.num_used == 33
    engine.truncate_shared(2)
    assert (engine.num_shared_levels, engine.arena.num_used) == (2, 29)
    check(hf, WHOLE, engine.generate(ENDS, GREEDY, shared_cache_op="preserve", return_logits=True))
    engine.truncate_shared(1)
    results = engine.generate([LEFT + [9]], GREEDY, shared_cache_op="preserve", return_logits=True)
    check(hf, [ROOT + LEFT + [9]], results)
    engine.empty_shared()
    assert (engine.num_shared_levels, engine.arena.num_used) == (0, 0)
    results = engine.generate([LEFT], GREEDY, shared_cache_op="preserve", return_logits=True)
    check(hf, [LEFT], results)


def test_wipe_is_the_default_and_forgets(hf, engine):
    engine.append_shared([ROOT])
    check(hf, [LEFT], engine.generate([LEFT], GREEDY, return_logits=True))
    assert (engine.num_shared_levels, engine.arena.num_used) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_extend_keeps_the_prompts(hf, engine, method):
    engine.append_shared([ROOT], attention=method)
    options = {"attention": method, "return_logits": True}
    results = engine.generate([LEFT, RIGHT], GREEDY, shared_cache_op="extend", **options)
    check(hf, [ROOT + LEFT, ROOT + RIGHT], results)
    assert (engine.num_shared_levels, engine.arena.num_used) == (2, 29)
    with passes(engine.model) as seen:
        results = engine.generate(ENDS, GREEDY, shared_cache_op="preserve", **options)
    check(hf, WHOLE, results)
    assert seen[0].num_tokens == 12
    results = engine.generate(Levels([[[1], [2]], [[3]] * 4]), GREEDY, shared_cache_op="extend", **options)
    check(hf, [ROOT + LEFT + [1, 3]] * 2 + [ROOT + RIGHT + [2, 3]] * 2, results)
    assert (engine.num_shared_levels, engine.arena.num_used) == (4, 33)


def test_extend_with_nothing_kept_starts_the_levels(hf, engine):
    results = engine.generate([ROOT, LEFT], GREEDY, shared_cache_op="extend", return_logits=True)
    check(hf, [ROOT, LEFT], results)
    assert engine.num_shared_levels == 1


@pytest.mark.parametrize("method", METHODS)
def test_samples_below_kept_levels(engine, method):
    params = SamplingParams(n=3, max_tokens=4)
    expected = engine.generate(WHOLE, params)
    engine.append_shared([ROOT])
    engine.append_shared([LEFT, RIGHT])
    results = engine.generate(ENDS, params, attention=method, shared_cache_op="preserve")
    assert tokens(results) == tokens(expected)


def test_noattention_levels_hold_nothing_that_others_could_read(engine):
    engine.append_shared([ROOT], attention="noattention")
    assert engine.arena.num_used == 0
    engine.generate([[1]], GREEDY, attention="noattention", shared_cache_op="preserve")
    with pytest.raises(InputError, match="'noattention', which keeps no keys for 'hydragen' to read; empty or truncate"):
        engine.generate([[1]], GREEDY, shared_cache_op="preserve")
    assert engine.num_shared_levels == 1
    engine.empty_shared()
    engine.append_shared([ROOT])
    engine.append_shared([LEFT, RIGHT], attention="noattention")
    engine.truncate_shared(1)  # what is left, hydragen can read
    engine.generate([[1]], GREEDY, shared_cache_op="preserve")
    engine.generate([[1]], GREEDY)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: e.append_shared([[1], [2], [3]]), "3 prompts do not divide evenly over the 2"),
        (lambda e: e.append_shared([]), "0 prompts do not divide evenly over the 2"),
        (lambda e: e.append_shared([[1], [67]]), "holds token id 67"),
        (lambda e: e.append_shared([[1], [2] * 250]), "has 270 tokens"),
        (lambda e: e.append_shared([[1]], parents=[2]), "parents: got 2 for prompt 0; accepted: 0 to 1"),
        (lambda e: e.append_shared([[1]], parents=[-1]), "parents: got -1 for prompt 0; accepted: 0 to 1"),
        (lambda e: e.append_shared([[1]], parents=[0, 1]), "parents: got 2 for 1 prompts; accepted: one each"),
        (lambda e: e.append_shared([[1], [2]], attention="none"), "attention method 'none' is not known"),
        (lambda e: e.truncate_shared(2), "cannot keep 2 shared levels; accepted: 0 to 1"),
        (lambda e: e.truncate_shared(-1), "cannot keep -1 shared levels"),
        (lambda e: e.generate([[1]], GREEDY, shared_cache_op="preserve"), "1 prompts do not divide evenly over the 2"),
        (lambda e: e.generate([], GREEDY, shared_cache_op="preserve"), "level 0: got no prompts"),
        (lambda e: e.generate([], GREEDY, shared_cache_op="extend"), "level 0: got no prompts"),
        (lambda e: Levels([]), "Levels: got no level; accepted: one or more"),
        (lambda e: Levels([[[1]], [[2]]], parents=[]), "Levels: got parents for 0 levels; accepted: for 1"),
        (lambda e: Levels([[[1], [2]], []]), "level 1: got no prompts"),
        (lambda e: Levels([[], [[1]]]), "level 0: got no prompts"),
        # These fail after a level was appended, or could have been.
        (lambda e: e.generate([[1], [2] * 233], GREEDY, shared_cache_op="extend"), "has 253 tokens and is to get 5"),
        (lambda e: e.generate([[1], [2]], [GREEDY], shared_cache_op="extend"), "1 SamplingParams for 2 prompts"),
        (lambda e: e.generate(Levels([[[1], [2]], [[3]]]), GREEDY, shared_cache_op="extend"), "1 prompts do not"),
    ],
)
def test_kept_levels_survive_a_mistake(hf, engine, call, message):
    engine.append_shared([ROOT, ids(20, 8)])
    with pytest.raises(InputError) as error:
        call(engine)
    assert message in str(error.value) and "accepted: " in str(error.value) and "\n" not in str(error.value)
    assert (engine.num_shared_levels, engine.arena.num_used) == (1, 40)
    results = engine.generate([LEFT, RIGHT], GREEDY, shared_cache_op="preserve", return_logits=True)
    check(hf, [ROOT + LEFT, ids(20, 8) + RIGHT], results)


def test_parents_of_a_first_level_are_refused(engine):
    with pytest.raises(InputError, match="parents were given for the first level"):
        engine.append_shared([ROOT], parents=[0])


# --- starting logits, hierarchy ---


@pytest.mark.parametrize("method", METHODS)
def test_starting_logits_equal_computing_them(engine, method):
    params = [SamplingParams(n=2, max_tokens=5, logprobs=0), SamplingParams(temperature=0, max_tokens=3)] * 2
    expected = engine.generate(WHOLE, params, attention=method, return_logits=True)
    logits = torch.stack([samples[0].logits[0] for samples in expected])
    results = engine.generate(WHOLE, params, attention=method, starting_logits=logits, return_logits=True)
    assert tokens(results) == tokens(expected)
    assert results[0][1].logprobs == pytest.approx(expected[0][1].logprobs)
    assert torch.equal(results[2][1].logits[0], logits[2])


def test_the_first_token_is_chosen_from_the_starting_logits(hf, engine):
    """In the caller's order, whatever the tree's, and cut to each rank's part of the vocabulary."""
    prompts = [LEFT, ROOT, LEFT + [1], ROOT + [2]]
    chosen = [66, 0, 33, 34]
    logits = torch.zeros(4, VOCAB_SIZE)
    logits[range(4), chosen] = 1.0

    def work(group):
        model_engine = our_engine(hf, group)
        model_engine.max_batch_size = 3
        return model_engine.generate(prompts, GREEDY, starting_logits=logits)

    for size in (1, 4):
        for results in World(size).run(work):
            assert [r.token_ids[0] for (r,) in results] == chosen
            expected = reference(hf, [p + [c] for p, c in zip(prompts, chosen, strict=True)])
            assert [r.token_ids[1] for (r,) in results] == [int(w.logits[-1].argmax()) for w in expected]


@pytest.mark.parametrize("method", METHODS)
def test_a_disabled_hierarchy_shares_the_roots_only(hf, engine, method):
    with passes(engine.model) as seen:
        results = engine.generate(LEVELS, GREEDY, attention=method, disable_hierarchy=True, return_logits=True)
    check(hf, WHOLE, results)
    unshared = sum(len(prompt) - len(ROOT) for prompt in WHOLE)
    assert [p.num_tokens for p in seen] == [len(ROOT), unshared, 4, 4, 4, 4]
    engine.append_shared([ROOT])
    engine.append_shared([LEFT, RIGHT])
    options = {"attention": method, "shared_cache_op": "preserve", "return_logits": True}
    with passes(engine.model) as seen:
        results = engine.generate(ENDS, GREEDY, disable_hierarchy=True, **options)
    check(hf, WHOLE, results)
    assert seen[0].num_tokens == unshared  # the root is there already


# --- room ---


def test_a_cache_that_is_too_small_says_what_was_needed(engine):
    engine.setup_caches(30)
    assert (engine.arena.capacity, engine.arena.max_tokens) == (30, 30)
    with pytest.raises(InputError) as error:
        engine.generate([[1], ids(40, 6)], SamplingParams(n=2, temperature=0, max_tokens=5))
    assert str(error.value) == (
        "prompt 1 needs room for 44 tokens in the KV cache; there is room for 30; set up a larger cache"
    )
    assert engine.arena.num_used == 0
    with pytest.raises(InputError, match="^the shared level needs room for 31 tokens .* there is room for 30; "):
        engine.append_shared([ids(31, 6)])
    engine.append_shared([ROOT])
    with pytest.raises(InputError, match=r"there is room for 10 \(20 more are held by kept levels\); set up a larger"):
        engine.generate([LEFT + RIGHT], GREEDY, shared_cache_op="preserve")
    assert engine.arena.num_used == len(ROOT)
    engine.setup_caches(13)
    assert engine.num_shared_levels == 0
    engine.generate([LEFT + RIGHT], GREEDY)  # 9 tokens, and 4 of the 5 new ones, whose last is never read
    assert engine.arena.capacity == 13


def test_sizes_that_cannot_be_set_up(engine):
    with pytest.raises(InputError, match="was given 0 tokens; accepted: 1 or more"):
        engine.setup_caches(0)
    with pytest.raises(InputError, match=r"needs \d+\.\d\d GiB on each rank; accepted: at most \d+ tokens"):
        engine.setup_caches(10**12)


def test_without_a_set_up_the_cache_grows_and_keeps_what_it_holds(hf, engine):
    engine.append_shared([ROOT])
    small = engine.arena.capacity
    results = engine.generate([ids(60, 1), ids(60, 2)], GREEDY, shared_cache_op="preserve", return_logits=True)
    check(hf, [ROOT + ids(60, 1), ROOT + ids(60, 2)], results)
    assert engine.arena.capacity > small
    engine.release_caches()
    assert (engine.arena.capacity, engine.arena.cache, engine.num_shared_levels) == (0, None, 0)
    check(hf, [LEFT], engine.generate([LEFT], GREEDY, return_logits=True))


# --- waves ---


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
def test_a_shared_stretch_is_prefilled_once_over_all_waves(engine, max_batch_size):
    prompts = [ROOT + branch + end for branch in (LEFT, RIGHT) for end in (ids(4, 1), ids(5, 2), ids(6, 3))]
    once = engine.generate(prompts, GREEDY)
    engine.max_batch_size = max_batch_size
    with passes(engine.model) as seen:
        results = engine.generate(prompts, GREEDY)
    assert tokens(results) == tokens(once)
    assert sum(p.num_tokens for p in seen if p.is_prefill) == 20 + 6 + 3 + 2 * (4 + 5 + 6)
    assert sum(not p.is_prefill for p in seen) == 4 * -(-6 // max_batch_size)  # waves
    assert engine.arena.num_used == 0


def test_any_arena_that_holds_each_prompt_alone_serves_them_all(hf):
    """However the nodes that waves pass on lie in it."""
    engine = our_engine(hf)
    num_waves = []

    @given(prompt_sets(VOCAB_SIZE), st.integers(0, 12), st.integers(1, 2), st.sampled_from(METHODS))
    @settings(SETTINGS, max_examples=40)
    def check_any(prompts, spare, n, method):
        params = SamplingParams(n=n, max_tokens=3)
        engine.release_caches()
        expected = engine.generate(prompts, params)
        engine.setup_caches(max(len(prompt) for prompt in prompts) + params.max_tokens - 1 + spare)
        calls = []
        results = engine.generate(prompts, params, attention=method, on_tokens=lambda *call: calls.append(call))
        assert tokens(results) == tokens(expected)
        assert engine.arena.num_used == 0
        num_waves.append(len(calls) // 3)

    check_any()
    assert max(num_waves) > 10


def test_nodes_that_are_passed_on_make_way_where_they_split_the_room(hf, engine):
    """The first wave leaves the root at slot 0 and RIGHT at 26, past LEFT: 19 slots are free behind it where the last
    prompt needs 21 in a row."""
    ends = [ids(1, 1), ids(2, 2), ids(2, 3), ids(17, 4)]
    prompts = [ROOT + branch + end for branch, end in zip((LEFT, LEFT, RIGHT, RIGHT), ends, strict=True)]
    needed = len(prompts[3]) + GREEDY.max_tokens - 1
    engine.setup_caches(needed + 4)
    with passes(engine.model) as seen:
        results = engine.generate(prompts, GREEDY, return_logits=True)
    check(hf, prompts, results)
    assert [p.num_tokens for p in seen if p.is_prefill] == [20, 9, 5, 20, 3, 17]


def test_waves_below_kept_levels(hf, engine):
    engine.setup_caches(29 + 11)
    engine.append_shared([ROOT])
    engine.append_shared([LEFT, RIGHT])
    for method, room in (("hydragen", 40), ("hydragen_noshared", 29 + 34)):
        engine.setup_caches(room)
        engine.append_shared([ROOT])
        engine.append_shared([LEFT, RIGHT])
        with passes(engine.model) as seen:
            results = engine.generate(ENDS, GREEDY, attention=method, shared_cache_op="preserve", return_logits=True)
        check(hf, WHOLE, results)
        assert len(seen) > 5 and engine.arena.num_used == 29


# --- failures ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_batch_size", [1, 1024])
def test_a_failure_in_the_middle_leaves_no_trace(hf, engine, method, max_batch_size):
    """One prompt makes NaN. Afterwards nothing is in use, and calls whose masked reads meet its slots see nothing."""
    ragged = [[token] * length for token, length in zip(range(8), [4, 3, 2, 1] * 2, strict=True)]
    expected = engine.generate(ragged, GREEDY, attention=method)
    healthy = engine.model.embedding.weight[60].clone()
    engine.append_shared([ROOT])
    engine.model.embedding.weight[60] = float("nan")
    for _ in range(2):
        engine.max_batch_size = max_batch_size
        options = {"attention": method, "shared_cache_op": "preserve"}
        with pytest.raises(InputError, match="prompt 1, after 0 new tokens: no token can .*; the embedding is"):
            engine.generate([[7] * 2, [60] * 40, [8]], GREEDY, **options)
        assert (engine.num_shared_levels, engine.arena.num_used) == (1, len(ROOT))
    engine.model.embedding.weight[60] = healthy
    engine.max_batch_size = 1024
    check(hf, [ROOT + LEFT], engine.generate([LEFT], GREEDY, return_logits=True, **options))
    assert tokens(engine.generate(ragged, GREEDY, attention=method)) == tokens(expected)
    assert engine.arena.num_used == 0


def test_slots_of_a_level_that_was_not_kept_are_clean(engine):
    ragged = [[token] * length for token, length in zip(range(8), [4, 3, 2, 1] * 2, strict=True)]
    expected = engine.generate(ragged, GREEDY)
    healthy = engine.model.embedding.weight[60].clone()
    engine.model.embedding.weight[60] = float("nan")
    with pytest.raises(InputError, match="entry 1 of the shared level is not finite at its end: the embedding is the"):
        engine.append_shared([[3] * 2, [60] * 40])
    engine.model.embedding.weight[60] = healthy
    assert tokens(engine.generate(ragged, GREEDY)) == tokens(expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("weight", "part"),
    [
        ("layers.0.mlp.down_proj", "layer 0"),
        ("layers.1.attention.o_proj", "layer 1"),
        ("norm", "the last norm"),
        ("head", "the output head"),
    ],
)
def test_the_first_part_that_is_not_finite_is_named(hf, size, method, weight, part):
    def work(group):
        engine = our_engine(hf, group)
        if group.rank == size - 1 or weight == "norm":
            engine.model.get_submodule(weight).weight.view(-1)[0] = float("nan")
        with pytest.raises(InputError) as caught:
            engine.generate([[1, 2, 3], [1, 2, 4]], GREEDY, attention=method)
        return str(caught.value)

    (message,) = set(run_ranks(size, work))
    assert message.startswith("prompt 0, after 0 new tokens: no token can be chosen from its logits; ")
    assert f"; {part} is the first to give NaN or infinity in float32; use a --dtype" in message


def test_numbers_that_overflow_in_the_middle(hf):
    """A token that is forced makes them."""
    engine = our_engine(hf)
    engine.model.embedding.weight[60] = float("nan")
    with pytest.raises(InputError, match="prompt 1, after 2 new tokens: .*; the embedding is the first"):
        engine.generate([[1, 2], [3, 4]], GREEDY, forced_tokens=[(), (5, 60)])


def test_a_callback_that_raises_stops_the_call(hf, engine):
    engine.max_batch_size = 2
    calls = []

    def stop_in_the_second_wave(*call):
        calls.append(call)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(WHOLE, GREEDY, on_tokens=stop_in_the_second_wave)
    assert engine.arena.num_used == 0
    check(hf, WHOLE, engine.generate(WHOLE, GREEDY, return_logits=True))


def test_an_error_on_one_rank_is_raised_and_hangs_nobody(hf):
    def work(group):
        engine = our_engine(hf, group)
        if group.rank == 1:
            engine.model.layers[1].mlp.down_proj.weight = None
        engine.generate(WHOLE, GREEDY)

    with pytest.raises(TypeError):
        World(4).run(work)


def test_every_prompt_set_leaves_the_arena_empty_and_shares_what_the_tree_shares(engine):
    @given(prompt_sets(VOCAB_SIZE))
    @settings(SETTINGS, max_examples=30)
    def check_any(prompts):
        tree = build_from_prompts(prompts)
        with passes(engine.model) as seen:
            engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
        nodes, suffixes = sum(len(n.tokens) for n in tree.nodes), sum(len(s) for s in tree.suffixes)
        assert sum(p.num_tokens for p in seen) == nodes + suffixes
        assert engine.arena.num_used == 0

    check_any()


def test_only_roots_are_shared_between_samples_too(engine, monkeypatch):
    seen = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda tree, *rest: seen.append(tree) or run(tree, *rest))
    prompts, params = [ROOT + [1, 2], ROOT + [3, 4]], SamplingParams(n=3, max_tokens=3)
    expected = engine.generate(prompts, params)
    assert tokens(engine.generate(prompts, params, disable_hierarchy=True)) == tokens(expected)
    assert [len(node.tokens) for node in seen[0].nodes] == [len(ROOT), 2, 2]
    assert [len(node.tokens) for node in seen[1].nodes] == [len(ROOT)]


class OwnTokensOnly(Hydragen):
    """The example of docs/adding-an-attention-method.md."""

    name = "own_tokens_only"

    def shared_segments(self, tree, placement, runs):
        return []


def test_kept_levels_are_computed_by_the_method_that_was_asked_for(engine, monkeypatch):
    monkeypatch.setitem(REGISTRY, "own_tokens_only", OwnTokensOnly())
    whole = engine.generate([ROOT + LEFT], GREEDY, return_logits=True)
    logits = {}
    for method in ("hydragen", "hydragen_noshared", "own_tokens_only"):
        engine.append_shared([ROOT])
        logits[method] = engine.append_shared([LEFT], attention=method)[0]
        engine.empty_shared()
    exact = whole[0][0].logits[0]
    torch.testing.assert_close(logits["hydragen"], exact)
    torch.testing.assert_close(logits["hydragen_noshared"], exact)
    assert (logits["own_tokens_only"] - exact).abs().max() > 0.01 * exact.abs().max()


def test_prompts_name_the_kept_entry_that_they_continue(engine):
    engine.append_shared([ROOT])
    engine.append_shared([LEFT, RIGHT])
    ends = [[1], [2], [3]]
    results = engine.generate(ends, GREEDY, shared_cache_op="preserve", parents=[1, 0, 1])
    whole = [ROOT + above + end for above, end in zip((RIGHT, LEFT, RIGHT), ends, strict=True)]
    assert tokens(results) == tokens(engine.generate(whole, GREEDY))
    with pytest.raises(InputError, match="no kept levels to continue"):
        engine.generate(ends, GREEDY, parents=[0, 0, 0])


def test_kept_entries_may_go_unnamed(hf, engine):
    """Entries that nothing continues are kept, cost no work, and can be named again."""
    engine.append_shared([LEFT, ROOT])
    engine.append_shared([RIGHT, ENDS[0], ENDS[1]], parents=[1, 1, 1])
    with passes(engine.model) as seen:
        results = engine.generate([[1]], GREEDY, shared_cache_op="preserve", parents=[2], return_logits=True)
    assert [p.num_tokens for p in seen] == [1] * 5
    check(hf, [ROOT + ENDS[1] + [1]], results)
    results = engine.generate([[3], [2]], GREEDY, shared_cache_op="preserve", parents=[1, 0], return_logits=True)
    check(hf, [ROOT + ENDS[0] + [3], ROOT + RIGHT + [2]], results)
    engine.truncate_shared(1)
    assert engine.arena.num_used == len(LEFT) + len(ROOT), "the entry that nothing continued is still there"
    with passes(engine.model) as seen:
        results = engine.generate([[5]], GREEDY, shared_cache_op="preserve", parents=[0], return_logits=True)
    assert seen[0].num_tokens == 1
    check(hf, [LEFT + [5]], results)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        (Levels([[[1]], [[2]]]), dict(min_shared=2), "min_shared 2 was given, but levels"),
        ([[1]], dict(min_shared=2, shared_cache_op="preserve"), "min_shared 2 was given, but levels"),
        ([[1]], dict(min_shared=2, shared_cache_op="extend"), "min_shared 2 was given, but levels"),
        ([[1]], dict(params=SamplingParams(stop_token_ids=(10**6,))), "stop_token_ids holds token id 1000000"),
        ([[10**6]], {}, "holds token id 1000000"),
    ],
)
def test_a_call_that_is_refused_drops_nothing(engine, prompts, options, message):
    engine.append_shared([ROOT])
    with pytest.raises(InputError, match=message):
        engine.generate(prompts, options.pop("params", GREEDY), **options)
    assert engine.num_shared_levels == 1
