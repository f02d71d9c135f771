"""Log-probabilities of prompts equal transformers', whatever they share and with whom they run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import hf_model, our_engine, passes, reference
from ranks import World
from strategies import SETTINGS, prompt_sets

import engine.generation
import engine.prompt_logprobs
from engine.errors import InputError
from engine.model import Transformer
from engine.prompt_logprobs import PromptLogprobs
from engine.sampling import SamplingParams

METHODS = ["hydragen", "hydragen_noshared"]
VOCAB_SIZE = 67
ROOT = [5, 9, 2, 7] * 5
PROMPTS = [[*ROOT, 1, 2], ROOT, [*ROOT, 1, 2], [*ROOT, 1, 3, 8, 8], [4], [4, 5, 5], ROOT[:7], [8, 8, 8]]
COUNTS = [0, 3, 5, None, 2, 20, 1, 0]


@pytest.fixture(scope="module")
def hf():
    return hf_model()


def check(hf, prompts, counts, results):
    """``results`` have what ``counts`` ask for, and it is what transformers computes."""
    whole = reference(hf, prompts)
    for prompt, count, (first, *others), expected in zip(prompts, counts, results, whole, strict=True):
        assert all(sample.prompt_logprobs is None for sample in others)
        if count is None:
            assert first.prompt_logprobs is None
            continue
        logprobs = expected.logits.double().log_softmax(-1)[:-1]
        found = first.prompt_logprobs
        own = logprobs.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0].tolist()
        assert found.chosen[0] is None and found.chosen[1:] == pytest.approx(own, abs=3e-5)
        if count == 0:
            assert found.top is None
            continue
        assert found.top[0] is None and len(found.top) == len(prompt)
        for row, token, at_token, mine in zip(logprobs, prompt[1:], found.chosen[1:], found.top[1:], strict=True):
            values, _ = row.sort(descending=True)
            assert list(mine.values())[:count] == pytest.approx(values[:count].tolist(), abs=3e-5)
            assert mine == pytest.approx({token: float(row[token]) for token in mine}, abs=3e-5)
            assert mine[token] == at_token and len(mine) in (count, count + 1)


def params(counts=COUNTS, **options):
    return [SamplingParams(max_tokens=3, prompt_logprobs=count, **options) for count in counts]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_batch_size", [1, 3, 1024])
@pytest.mark.parametrize("n", [1, 3])
def test_they_are_those_of_transformers(hf, method, max_batch_size, n):
    engine = our_engine(hf, max_batch_size=max_batch_size)
    check(hf, PROMPTS, COUNTS, engine.generate(PROMPTS, params(n=n), attention=method))


@pytest.mark.parametrize("family", ["llama", "mistral, window", "glm"])
def test_of_any_prompts(family):
    hf = hf_model(family)
    engine = our_engine(hf)

    @given(prompt_sets(VOCAB_SIZE), st.integers(1, 20), st.sampled_from(METHODS), st.data())
    @settings(SETTINGS, max_examples=25)
    def check_any(prompts, max_batch_size, method, data):
        count = st.sampled_from([None, 0, 1, 4])
        counts = data.draw(st.lists(count, min_size=len(prompts), max_size=len(prompts)))
        engine.max_batch_size = max_batch_size
        results = engine.generate(prompts, params(counts), attention=method, min_shared=data.draw(st.integers(1, 4)))
        check(hf, prompts, counts, results)

    check_any()


@pytest.mark.parametrize("size", [2, 4])
def test_on_several_ranks(hf, size):
    for results in World(size).run(lambda group: our_engine(hf, group, max_batch_size=4).generate(PROMPTS, params())):
        check(hf, PROMPTS, COUNTS, results)


def test_logits_are_made_some_rows_at_a_time(hf, monkeypatch):
    monkeypatch.setattr(engine.prompt_logprobs, "_CHUNK", 3 * VOCAB_SIZE)
    ours, sizes = our_engine(hf), []
    ours.model.head.register_forward_hook(lambda _module, _args, logits: sizes.append(len(logits)))
    check(hf, PROMPTS, COUNTS, ours.generate(PROMPTS, params()))
    assert max(sizes[: -3]) == 3, "but for those of the steps"


def test_what_is_shared_is_scored_once(hf):
    ours, rows = our_engine(hf), []
    ours.model.head.register_forward_hook(lambda _module, _args, logits: rows.append(len(logits)))
    with passes(ours.model) as seen:
        ours.generate([[*ROOT, i] for i in range(9)], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert [p.num_tokens for p in seen] == [20, 9]
    assert sum(rows) == 19 + 9 + 9  # the root but its first token, each prompt's last one, and the first new ones


def test_what_nobody_is_going_to_ask_for_is_dropped(hf, monkeypatch):
    made, original = [], PromptLogprobs.__init__

    def noted(self, *args):
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(PromptLogprobs, "__init__", noted)
    our_engine(hf, max_batch_size=2).generate(PROMPTS, params())
    assert len(made) == 1 and made[0]._of_node == {} and made[0]._of_suffix == {}


def test_ids_beyond_the_vocabulary_are_no_likely_tokens():
    """Two ranks of a vocabulary of 5 hold three entries each, one of them padding."""
    hf = hf_model(vocab_size=5)
    prompts = [[1, 2, 3], [1, 2, 4, 0]]
    for results in World(2).run(lambda group: our_engine(hf, group).generate(prompts, params([20, 20]))):
        assert all(row is None or sorted(row) == list(range(5)) for (r,) in results for row in r.prompt_logprobs.top)


def test_tokens_are_the_same_with_and_without(hf):
    ours = our_engine(hf, max_batch_size=3)
    with_them = ours.generate(PROMPTS, params())
    without = ours.generate(PROMPTS, params([None] * len(PROMPTS)))
    assert [s.token_ids for s, in with_them] == [s.token_ids for s, in without]


def test_mistakes(hf):
    ours = our_engine(hf)
    ours.append_shared([ROOT])
    with pytest.raises(InputError, match="^prompt_logprobs were asked for below kept levels, whose tokens .*='wipe'$"):
        ours.generate([[1]], params([3]), shared_cache_op="preserve")
    for count in (-1, 21, 1.5, True):
        with pytest.raises(InputError, match="prompt_logprobs: got .* accepted: None, or an integer from 0 .* to 20"):
            SamplingParams(prompt_logprobs=count)


@pytest.mark.parametrize("max_batch_size", [1, 1024])
def test_a_prompt_with_a_token_whose_logits_are_not_finite_is_told(hf, max_batch_size):
    """Without attention they stay those of one position, so that what is generated tells nothing."""
    engine = our_engine(hf, max_batch_size=max_batch_size)
    engine.model.embedding.weight = torch.nn.Parameter(engine.model.embedding.weight.clone(), requires_grad=False)
    engine.model.embedding.weight[60] = float("nan")
    prompts, told = [[5, 9, 60, 2, 7], [5, 9, 2], [60, 4, 4], [5, 9, 60, 2, 7], [1, 60]], []
    counts = [0, 0, 2, None, 0]
    results = engine.generate(
        prompts, params(counts, n=2), attention="noattention", on_failed=lambda *failure: told.append(failure)
    )
    assert [result[0] is None for result in results] == [True, False, True, False, True]
    assert sorted(number for number, _ in told) == [0, 2, 4]
    first, second, third = (why for _, why in sorted(told))
    assert first.startswith("the prompt, after 3 of its tokens: the next one's log-probability is not defined; the emb")
    assert second.startswith("the prompt, after 1 of its tokens") and "no token can be chosen" in third
    with pytest.raises(InputError, match="^prompt 0, after 3 of its tokens: .* the embedding is the first to give NaN"):
        engine.generate(prompts[:2], params(counts[:2]), attention="noattention")
    assert engine.arena.num_used == 0


def test_logits_that_overflow_at_one_token(hf, monkeypatch):
    logits = Transformer.logits

    def overflow(self, hidden_RI):
        found = logits(self, hidden_RI).clone()
        found[2:3, 5] = float("inf")  # there are as many when prompts are scored
        return found

    monkeypatch.setattr(Transformer, "logits", overflow)
    message = "after 3 of its tokens: .*; run alone it has neither NaN nor infinity in float32"
    with pytest.raises(InputError, match=message):
        our_engine(hf).generate([[5, 9, 3, 2, 7]], params([0]))


def test_memory_is_counted_where_they_are_asked_for(hf, monkeypatch):
    def generate(count):
        our_engine(hf).generate([ROOT], [SamplingParams(max_tokens=1, prompt_logprobs=count)])

    monkeypatch.setattr(PromptLogprobs, "activation_bytes", 2**50)
    generate(None)
    with pytest.raises(InputError, match="GiB for activations"):
        generate(0)


@pytest.mark.parametrize(("chunk", "rows"), [(VOCAB_SIZE * 4 + 1, 4), (1, 1), (2**23, len(ROOT))])
def test_the_bytes_are_those_of_the_logits_that_are_made_at_once(hf, monkeypatch, chunk, rows):
    counted, made, score = [], [], engine.prompt_logprobs.logprobs

    class Noted(PromptLogprobs):
        def take(self, sequences):
            counted.append(self.activation_bytes)
            return super().take(sequences)

    monkeypatch.setattr(engine.prompt_logprobs, "_CHUNK", chunk)
    monkeypatch.setattr(engine.prompt_logprobs, "logprobs", lambda logits, *a: made.append(logits) or score(logits, *a))
    monkeypatch.setattr(engine.generation, "PromptLogprobs", Noted)
    our_engine(hf).generate([ROOT], [SamplingParams(max_tokens=1, prompt_logprobs=0)])
    assert max(len(logits) for logits in made) == min(rows, len(ROOT) - 1)
    assert counted == [rows * VOCAB_SIZE * 4 * 4]  # float32, and three copies
