"""The search for each head's pattern: planted heads, scores against the mask written out in float64, and whole models.

Shapes: T tokens, H query heads, D head dimension.
"""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from models import assert_close, hf_model, our_model, passes, reference
from ranks import run_ranks

from engine.errors import InputError
from engine.head_search import score_heads
from engine.prefill import parse_prefill
from engine.prefill.search import (
    DEFAULT_CANDIDATES,
    Candidate,
    HeadScore,
    SearchPlan,
    choose,
    choose_all,
    mean,
    parse_candidates,
)
from engine.prefill.search_state import SearchState
from kernels import AttentionPlan
from kernels.segment import Segment
from kernels.sparse import AShape, BlockSparse, Dense, SparsePlan, SparseRows, VerticalSlash, lower
from kernels.sparse.reference import expanded_mask

LIST = (
    "a_shape:n_init=3:n_local=66,vertical_slash:num_vertical=40:num_slash=1,vertical_slash:num_vertical=30:num_slash=70,"
    "block_sparse:num_blocks=3,dense"
)
CANDIDATES = parse_candidates(LIST)


def score(q, k, v, candidates, scale, layers=(0,), layer=0):
    """What a plan tells of one layer, and the output that it passes on."""
    T, found, calls = len(q), [], []
    rows, (device, dtype) = SparseRows.contiguous([T], [0], [T]), (q.device, q.dtype)
    segment = Segment(np.array([0, T]), np.array([0]), np.array([T]), causal=True)
    plan = SearchPlan(
        AttentionPlan.of([segment], device, dtype),
        SparsePlan(rows, device, dtype),
        candidates,
        set(layers),
        lambda *scores: found.append(scores),
        lambda: calls.append(1),
    )
    out = plan.run(q, k, v, scale, layer)
    assert len(calls) == len(candidates) * len(found)
    return found, out


def random_inputs(T, H, Hkv, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(T, heads, D, generator=generator) for heads in (H, Hkv, Hkv))


def in_float64(q, k, v, mask, scale):
    """``(T, H, D)`` and the probabilities of dense attention that fall on the mask, ``(H, T)``."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    dense = scores.masked_fill(~causal, -math.inf).softmax(-1)
    sparse = scores.masked_fill(~mask, -math.inf).softmax(-1)
    out = [torch.einsum("hqk,khd->qhd", p, v) for p in (sparse, dense)]
    return *out, (dense * mask).sum(-1), causal


@pytest.mark.parametrize("T", [64, 333])
def test_scores_are_those_of_the_mask_in_float64(T):
    q, k, v = random_inputs(T, 4, 2, 16)
    ((layer, scores),), out = score(q, k, v, CANDIDATES, 0.4)
    assert layer == 0 and [len(of_heads) for of_heads in scores] == [4] * len(CANDIDATES)
    rows = SparseRows.contiguous([T], [0], [T])
    for candidate, of_heads in zip(CANDIDATES, scores, strict=True):
        mask = expanded_mask(lower([candidate.pattern] * 4, q, k, rows, 0.4), rows, 0)
        sparse, dense, recalls, causal = in_float64(q, k, v, mask, 0.4)
        assert_close(out.double(), dense)
        for head, found in enumerate(of_heads):
            difference = (sparse - dense)[:, head].norm() / dense[:, head].norm()
            assert found.error == pytest.approx(difference.item(), rel=1e-4, abs=1e-6)
            assert found.recall == pytest.approx(recalls[head].mean().item(), rel=1e-5)
            assert found.density == pytest.approx(int(mask[head].sum()) / int(causal.sum()), rel=1e-12)
    if T == 333:
        assert all(found.error > 0.1 for of_heads in scores[:-1] for found in of_heads), "the masks leave much out"


def test_layers_that_are_not_asked_for_are_only_dense():
    q, k, v = random_inputs(100, 4, 2, 16)
    found, out = score(q, k, v, CANDIDATES, 0.25, layers=(1, 2), layer=0)
    assert found == []
    assert torch.equal(out, score(q, k, v, CANDIDATES, 0.25)[1])


def test_values_that_are_all_zero_have_no_error():
    q, k, v = random_inputs(100, 2, 2, 16)
    ((_, scores),), _ = score(q, k, torch.zeros_like(v), CANDIDATES, 0.25)
    assert all(found.error == 0 for of_heads in scores for found in of_heads)


def planted(T=1024, D=64):
    """Three heads: one looks at what is near, one at 40 keys that are the same for all, one at a tile for each tile."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(T, 3, D, generator=generator) * 0.05
    q, k, position = noise.clone(), noise.flip(0).clone(), torch.arange(T)
    # Products of rotations are largest where the angles are equal.
    angles = position[:, None] * torch.logspace(-2.6, -1.7, D // 2)
    q[:, 0], k[:, 0] = (torch.cat([angles.cos(), angles.sin()], -1) for _ in range(2))
    q[:, 0] *= 0.3  # a few tiles wide
    columns = torch.randperm(T // 2, generator=generator)[:40]
    q[:, 1, 0], k[columns, 1, 0] = 60, 1
    codes = torch.nn.functional.one_hot(position // 64, D).float()
    k[:, 2] += codes
    sought = [int(torch.randint(tile, (1,), generator=generator)) if tile else 0 for tile in range(T // 64)]
    q[:, 2] += 80 * torch.nn.functional.one_hot(torch.tensor(sought)[position // 64], D)
    return q, k, torch.randn(T, 3, D, generator=generator)


def test_planted_heads_get_their_patterns():
    candidates = parse_candidates(
        "a_shape:n_init=0:n_local=192,vertical_slash:num_vertical=70:num_slash=1,block_sparse:num_blocks=3"
    )
    q, k, v = planted()
    ((_, scores),), _ = score(q, k, v, candidates, 0.5)
    (choices,) = choose_all(candidates, {(0, 0): scores}, 1, 1, 0.6)
    assert [choice.candidate for choice in choices] == list(candidates)
    assert all(choice.is_within_budget for choice in choices)
    assert all(choice.score.error < 0.05 and choice.score.recall > 0.95 for choice in choices), choices
    others = [scores[i][head] for i in range(3) for head in range(3) if i != head]
    assert all(score.error > 0.1 for score in others), others


class TestChoice:
    A, B, C = (Candidate("a_shape", AShape(0, n)) for n in (1, 2, 3))

    @pytest.mark.parametrize(
        ("scores", "budget", "expected", "fits"),
        [
            ([(0.3, 0.2), (0.2, 0.4), (0.1, 0.6)], 0.5, "B", True),
            ([(0.3, 0.2), (0.2, 0.4), (0.1, 0.6)], 0.6, "C", True),
            ([(0.3, 0.2), (0.2, 0.4), (0.1, 0.6)], 0.1, "A", False),
            ([(0.20000001, 0.5), (0.2, 0.4), (0.20000002, 0.3)], 0.5, "C", True),  # as good, and looks at less
            ([(0.2, 0.4), (0.2, 0.4), (0.3, 0.1)], 0.5, "A", True),
            ([(0.3, 0.4), (0.2, 0.4), (0.1, 0.6)], 0.1, "B", False),
        ],
    )
    def test_of_one_head(self, scores, budget, expected, fits):
        found = choose([self.A, self.B, self.C], [HeadScore(error, 0.5, density) for error, density in scores], budget)
        assert (found.candidate, found.is_within_budget) == (getattr(self, expected), fits)

    def test_scores_are_means_over_prompts(self):
        first, second = HeadScore(0.25, 0.5, 0.5), HeadScore(0.75, 1.0, 0.25)
        assert mean([first, second]) == HeadScore(0.5, 0.75, 0.375)
        scores = {(0, 0): ((first,), (second,)), (1, 0): ((second,), (second,))}
        ((choice,),) = choose_all([self.A, self.B], scores, 2, 1, 0.4)
        assert (choice.candidate, choice.score) == (self.A, HeadScore(0.5, 0.75, 0.375))


class TestCandidates:
    def test_the_default_ones(self):
        patterns = [candidate.pattern for candidate in parse_candidates(DEFAULT_CANDIDATES)]
        assert patterns == [
            AShape(100, 800), VerticalSlash(30, 800), VerticalSlash(100, 750), VerticalSlash(500, 700),
            VerticalSlash(3500, 100), VerticalSlash(1000, 6096), BlockSparse(100),
        ]  # fmt: skip

    def test_texts_name_the_pattern_again(self):
        found = parse_candidates(" vertical_slash:num_slash=7, dense ,block_sparse")
        assert [candidate.text for candidate in found] == [
            "vertical_slash:num_vertical=1000:num_slash=7",
            "dense",
            "block_sparse:num_blocks=100",
        ]
        assert found[1].pattern == Dense()
        assert all(parse_prefill(candidate.text).pattern == candidate.pattern for candidate in (found[0], found[2]))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "prefill '' is not known"),
            ("dense,", "prefill '' is not known"),
            ("a_shape:n_last=3", "has the option 'n_last=3'"),
            ("minference", "candidate 'minference' cannot be a head's; accepted: a_shape, vertical_slash, block_sp"),
            ("tri_shape", "candidate 'tri_shape' cannot be a head's"),
            ("a_shape:dense_below=0", "without dense_below"),
            ("block_sparse,block_sparse:num_blocks=100", "candidate 'block_sparse:num_blocks=100' is there twice"),
        ],
    )
    def test_mistakes(self, text, message):
        with pytest.raises(InputError, match=message):
            parse_candidates(text)


def long_model():
    """As small as the others, with room for several tiles."""
    return hf_model(max_position_embeddings=512)


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 67, n).tolist() for n in lengths]


class TestModels:
    @pytest.mark.parametrize("chunk", [2048, 64])
    def test_layers_are_given_what_dense_attention_makes(self, chunk):
        hf = long_model()
        model, given = our_model(hf, prefill_chunk=chunk), prompts(400, 330)
        with passes(model) as seen:
            scores = score_heads(model, given, CANDIDATES, {})
        assert set(scores) == {(prompt, layer) for prompt in range(2) for layer in range(2)}
        for made, expected in zip(seen, reference(hf, given), strict=True):
            for ours, theirs in zip(made.layers, expected.layers, strict=True):
                assert_close(ours, theirs)
        for of_dense in (of_candidates[-1] for of_candidates in scores.values()):
            assert all(found.error < 1e-5 and found.recall > 0.9999 and found.density == 1 for found in of_dense)
        of_a_shape = [found for of_candidates in scores.values() for found in of_candidates[0]]
        assert all(found.error > 0.1 and found.recall < 0.95 for found in of_a_shape)

    @pytest.mark.parametrize("size", [2, 4])
    def test_ranks_find_what_one_does(self, size):
        """4 ranks share 2 KV heads."""
        hf, given = long_model(), prompts(400, 330)

        def work(group):
            told = []
            scores = score_heads(our_model(hf, group), given, CANDIDATES, {}, lambda *found: told.append(found))
            assert dict(told) == scores
            return scores

        (expected,) = run_ranks(1, work)
        chosen = choose_all(CANDIDATES, expected, 2, 2, 0.7)
        assert len({choice.candidate for layer in chosen for choice in layer}) > 1
        for found in run_ranks(size, work):
            for place, scores in expected.items():
                for ours, theirs in zip(sum(found[place], ()), sum(scores, ()), strict=True):
                    assert astuple(ours) == pytest.approx(astuple(theirs), rel=1e-3, abs=1e-5)
            for ours, theirs in zip(choose_all(CANDIDATES, found, 2, 2, 0.7), chosen, strict=True):
                assert [choice.candidate for choice in ours] == [choice.candidate for choice in theirs]

    def test_what_is_done_is_not_done_again(self):
        model, given, told, calls = our_model(hf_model()), prompts(100, 90), [], []
        scores = score_heads(model, given, CANDIDATES, {})
        done = {place: found for place, found in scores.items() if place != (1, 1)}
        with passes(model) as seen:
            again = score_heads(
                model, given, CANDIDATES, done, lambda *found: told.append(found), lambda: calls.append(1)
            )
        assert again == scores
        assert told == [((1, 1), scores[1, 1])] and len(calls) == len(CANDIDATES)
        assert [made.num_tokens for made in seen] == [90]
        with passes(model) as seen:
            assert score_heads(model, given, CANDIDATES, scores) == scores
        assert seen == []

    def test_numbers_that_are_not_finite(self):
        model = our_model(hf_model())
        next(model.layers[0].mlp.parameters()).data.fill_(math.nan)
        with pytest.raises(InputError, match="attention of layer 1 is not finite for prompt 0; accepted: models"):
            score_heads(model, prompts(70), CANDIDATES, {})

    def test_models_that_cannot_be_searched(self):
        with pytest.raises(InputError, match="a sliding window of 7 tokens; accepted: models without one"):
            score_heads(our_model(hf_model("mistral, window")), prompts(70), CANDIDATES, {})
        with pytest.raises(InputError, match="context of 257 tokens was asked for; accepted: up to 256, the model's"):
            score_heads(our_model(hf_model()), prompts(257), CANDIDATES, {})


class TestState:
    SETTINGS = {"model": "x", "candidates": ("a", "b"), "context": 3}
    SCORES = ((HeadScore(0.1, 0.2, 1 / 3), HeadScore(0.5, 1.0, 1)), (HeadScore(0.0, 0.25, 0.5),) * 2)

    def test_what_is_written_is_read(self, tmp_path):
        state = SearchState(tmp_path, self.SETTINGS)
        assert state.read(2, 2, 2, 2) == {}
        state.write((1, 0), self.SCORES)
        assert SearchState(tmp_path, self.SETTINGS).read(2, 2, 2, 2) == {(1, 0): self.SCORES}

    @pytest.mark.parametrize("damage", ["", "{}", "3", "[[[1, 2, 3]]]", "[[[1, 2]], [[1, 2]]]", '[[["x", 2, 3]]]'])
    def test_a_damaged_file_is_as_none(self, tmp_path, damage):
        state = SearchState(tmp_path, self.SETTINGS)
        state.write((0, 0), self.SCORES)
        (tmp_path / "prompt0_layer0.json").write_text(damage)
        assert state.read(1, 1, 2, 2) == {}

    def test_other_settings_are_refused(self, tmp_path):
        SearchState(tmp_path, self.SETTINGS)
        with pytest.raises(InputError) as error:
            SearchState(tmp_path, self.SETTINGS | {"model": "y", "context": 4})
        assert f"{tmp_path} is of a search with another context, model (context 3, now 4)" in str(error.value)
        (tmp_path / "settings.json").write_text("{")
        with pytest.raises(InputError, match="settings.json cannot be read .* to begin anew"):
            SearchState(tmp_path, self.SETTINGS)
