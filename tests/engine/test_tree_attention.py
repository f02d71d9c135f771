"""Shared-prefix attention is exact: on any tree, on one rank or several, hydragen, sharing all nodes or some, equals
the baseline that shares nothing, and all equal transformers on each whole sequence."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_close, assert_layers_close, hf_model, our_engine, passes, reference
from ranks import World
from strategies import HARD_CASES, SETTINGS, even_level_sets, hard_cases, level_sets, prompt_sets

from engine.attention.crossover import Crossover
from engine.engine import Levels
from engine.prefix_tree import build_from_levels, build_from_prompts, flatten
from engine.sampling import SamplingParams

METHODS = ["hydragen", "hydragen_noshared", "auto"]
# Some nodes of the trees are shared, and others not.
CROSSOVER = Crossover((2, 3), (4, 2))
WORLD_SIZES = [1, 2, 4]
VOCAB_SIZE = 33  # divides over neither 2 nor 4 ranks
NUM_STEPS = 3
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_STEPS)
# A greedy choice may differ from transformers' only where its two best logits are this close.
NEAR_TIE = 1e-4


class Checker:
    """One model in transformers and in engines of 1, 2 and 4 ranks (KV heads are replicated on 4)."""

    def __init__(self, family="llama, biases, head_dim"):
        self.hf = hf_model(family, vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=24, head_dim=8)
        self.worlds = {size: World(size) for size in WORLD_SIZES}
        self.engines = {
            size: world.run(lambda group: our_engine(self.hf, group, prefill_chunk=16))
            for size, world in self.worlds.items()
        }
        for engine in (engine for engines in self.engines.values() for engine in engines):
            engine.crossover = CROSSOVER
        self.counts = Counter()

    def check(self, given, prompts, tree=None, sizes=(1,), **options):
        """Greedy generation from ``given``, which stands for ``prompts``, equals transformers on every number of ranks.

        With ``tree``, on one rank every token's hidden states too.
        """
        references = {}
        for size in sizes:
            for method in METHODS:
                with passes(self.engines[size][0].model) as seen:
                    results = self._generate(size, given, attention=method, **options)
                sequences = [p + list(r.token_ids) for p, r in zip(prompts, results, strict=True)]
                if str(sequences) not in references:
                    references[str(sequences)] = reference(self.hf, sequences)
                expected = references[str(sequences)]
                self._check_results(prompts, results, expected)
                if tree is not None and size == 1:
                    assert_layers_close(seen, tree, NUM_STEPS, expected)

    def _generate(self, size, given, **options):
        """The single sample of each prompt; all ranks must return the same."""
        engines = self.engines[size]
        by_rank = self.worlds[size].run(
            lambda group: engines[group.rank].generate(given, GREEDY, return_logits=True, **options)
        )
        for rank, samples in enumerate(by_rank):
            assert engines[rank].arena.num_used == 0
            for (mine,), (first,) in zip(samples, by_rank[0], strict=True):
                assert mine.token_ids == first.token_ids
                assert all(torch.equal(a, b) for a, b in zip(mine.logits, first.logits, strict=True))
        return [result for (result,) in by_rank[0]]

    def _check_results(self, prompts, results, expected):
        for prompt, result, whole in zip(prompts, results, expected, strict=True):
            assert len(result.token_ids) == NUM_STEPS and result.finish_reason == "length"
            logits = whole.logits[len(prompt) - 1 : -1]
            assert_close(torch.stack(result.logits), logits)
            best = logits.topk(2)
            for step, token in enumerate(result.token_ids):
                self.counts["tokens"] += 1
                if token != best.indices[step, 0]:
                    assert best.values[step, 0] - best.values[step, 1] <= NEAR_TIE, f"step {step}: another token"
                    self.counts["differences"] += 1


@pytest.fixture(scope="module")
def checker():
    yield from checked(Checker())


def checked(checker):
    yield checker
    differences, tokens = checker.counts["differences"], checker.counts["tokens"]
    print(f"\n{differences} of {tokens} greedy tokens differ from transformers' at a near tie")
    assert differences <= 2


def test_any_prompts_on_any_number_of_ranks(checker):
    met = set()

    @given(prompt_sets(VOCAB_SIZE))
    @settings(SETTINGS, max_examples=40)
    def check(prompts):
        tree = build_from_prompts(prompts)
        met.update(hard_cases(prompts, tree))
        checker.check(prompts, prompts, tree, WORLD_SIZES)

    check()
    assert met == HARD_CASES


def test_any_prompts_under_a_sliding_window():
    """Of 7 tokens: nodes end before it, within it and behind it."""

    @given(prompt_sets(VOCAB_SIZE))
    @settings(SETTINGS, max_examples=30)
    def check(prompts):
        checker.check(prompts, prompts, build_from_prompts(prompts), (1, 2))

    fixture = checked(Checker("mistral, window"))
    checker = next(fixture)
    check()
    next(fixture, None)


@pytest.mark.parametrize("strategy", [level_sets, even_level_sets])
def test_any_levels(checker, strategy):
    @given(strategy(VOCAB_SIZE))
    @settings(SETTINGS, max_examples=25)
    def check(laid_out):
        levels, parents = laid_out
        tree = build_from_levels(levels, parents=parents)
        checker.check(Levels(levels, parents), flatten(tree), tree, WORLD_SIZES)

    check()


def test_no_option_changes_a_result(checker):
    """Hierarchy off, short stretches unshared, waves of a few sequences."""

    @given(prompt_sets(VOCAB_SIZE), st.booleans(), st.integers(1, 4), st.integers(1, 20))
    @settings(SETTINGS, max_examples=40)
    def check(prompts, disable_hierarchy, min_shared, max_batch_size):
        checker.engines[1][0].max_batch_size = max_batch_size
        checker.check(prompts, prompts, disable_hierarchy=disable_hierarchy, min_shared=min_shared)

    try:
        check()
    finally:
        checker.engines[1][0].max_batch_size = 1024
