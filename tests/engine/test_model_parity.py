"""The same logits and hidden states as transformers in float32, for every family, at the prompt and every step."""

import pytest
import torch
from models import BY_LENGTH, FAMILIES, assert_close, assert_layers_close, hf_model, our_engine, passes, reference
from ranks import run_ranks

from engine.errors import InputError
from engine.prefix_tree import build_from_prompts, levels
from engine.sampling import SamplingParams

METHODS = ["hydragen", "hydragen_noshared"]
NUM_STEPS = 6


def prompts_and_continuations(vocab_size: int):
    """Prompts on two roots, one of them the beginning of others, and tokens to be taken after each."""
    generator = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(0, vocab_size, (n,), generator=generator).tolist()  # noqa: E731
    root = ids(29)
    branch = root + ids(9)
    prompts = [branch + ids(3), root, branch + ids(14), ids(41), root + ids(1)]
    return prompts, [ids(NUM_STEPS) for _ in prompts]


def check(engine, prompts, continuations, method, expected):
    """Runs the prompts with the given continuations; compares the logits of every token with the expected ones."""
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS)
    results = engine.generate(prompts, params, attention=method, forced_tokens=continuations, return_logits=True)
    for prompt, continuation, (result,), whole in zip(prompts, continuations, results, expected, strict=True):
        assert result.token_ids == continuation
        first = len(prompt) - 1
        assert_close(torch.stack(result.logits), whole.logits[first : first + NUM_STEPS], method)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_hidden_states_are_those_of_transformers(family):
    hf = hf_model(family)
    prompts, continuations = prompts_and_continuations(hf.config.vocab_size)
    expected = reference(hf, [p + c for p, c in zip(prompts, continuations, strict=True)])
    tree = build_from_prompts(prompts)
    assert len(levels(tree)) == 2
    engine = our_engine(hf, prefill_chunk=7)  # prompts go through a layer in several chunks, decode steps in one
    for method in METHODS:
        with passes(engine.model) as seen:
            check(engine, prompts, continuations, method, expected)
        assert_layers_close(seen, tree, NUM_STEPS, expected)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_several_ranks_are_those_of_transformers(family, size):
    """The vocabulary does not divide, and with four ranks KV heads are replicated."""
    hf = hf_model(family)
    prompts, continuations = prompts_and_continuations(hf.config.vocab_size)
    expected = reference(hf, [p + c for p, c in zip(prompts, continuations, strict=True)])

    def work(group):
        check(our_engine(hf, group, prefill_chunk=7), prompts, continuations, "hydragen", expected)

    run_ranks(size, work)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", BY_LENGTH)
def test_rope_goes_by_the_planned_length(family, size):
    """Some prompts stay within the original length of 32, some are planned beyond it, to equal and other lengths."""
    hf = hf_model(family)
    prompts, continuations = prompts_and_continuations(hf.config.vocab_size)
    prompts += [prompts[1][:20], prompts[1][:26], prompts[1][:27], prompts[3][:-1] + prompts[1][:1]]
    continuations += continuations[:4]
    lengths = [len(p) + len(c) for p, c in zip(prompts, continuations, strict=True)]
    assert sorted(lengths) == [26, 32, 33, 35, 36, 47, 47, 47, 58]
    expected = [
        reference(hf_model(family), [p + c])[0] for p, c in zip(prompts, continuations, strict=True)
    ]  # a model of transformers keeps what it made of the longest sequence so far

    def work(group):
        engine = our_engine(hf, group, prefill_chunk=7)
        for method in METHODS:
            check(engine, prompts, continuations, method, expected)

    run_ranks(size, work)


@pytest.mark.parametrize("family", BY_LENGTH)
def test_kept_levels_are_rotated_for_one_planned_length(family):
    hf, (prompts, continuations) = hf_model(family), prompts_and_continuations(67)
    root, length = prompts[1], 29 + 9 + NUM_STEPS  # past the original length
    ends = [continuations[0] + [1, 2, 3], continuations[1] + [4, 5, 6]]
    whole = [root + end + c for end, c in zip(ends, continuations[:2], strict=True)]
    expected = [reference(hf_model(family), [s])[0] for s in whole]
    engine = our_engine(hf)
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS)

    def generate(op, **options):
        return engine.generate(
            ends, params, forced_tokens=continuations[:2], return_logits=True, shared_cache_op=op, **options
        )

    def check_all(results):
        for (result,), known in zip(results, expected, strict=True):
            assert_close(torch.stack(result.logits), known.logits[length - NUM_STEPS - 1 : -1])

    engine.append_shared([root], planned_length=length)
    check_all(generate("preserve"))
    check_all(generate("preserve", planned_length=length))
    check_all(generate("extend"))
    engine.empty_shared()
    engine.append_shared([root])  # planned to stay as it is
    with pytest.raises(InputError, match="prompt 0 is planned with RoPE of length .* rotated by the original RoPE"):
        generate("preserve")
    with pytest.raises(InputError, match="the level is planned with RoPE of length"):
        engine.append_shared(ends, planned_length=length)
    with pytest.raises(InputError, match="planned_length is 20, but a prompt and its new tokens make 44; .*; raise it"):
        generate("preserve", planned_length=20)
    with pytest.raises(InputError, match="planned_length is 81; accepted: up to 80, the model's positions"):
        engine.append_shared([root], planned_length=81)


def test_a_prompt_of_one_token_and_a_long_one():
    hf = hf_model("llama, rope llama3")
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 67, (n,), generator=generator).tolist() for n in (1, 250)]
    continuations = [[5] * NUM_STEPS, [6] * NUM_STEPS]
    expected = reference(hf, [p + c for p, c in zip(prompts, continuations, strict=True)])
    for method in METHODS:
        check(our_engine(hf), prompts, continuations, method, expected)


def test_the_comparison_notices_what_it_should():
    """One row of one weight that is off by a hundredth is outside the tolerance."""
    hf = hf_model()
    prompts, continuations = prompts_and_continuations(hf.config.vocab_size)
    expected = reference(hf, [p + c for p, c in zip(prompts, continuations, strict=True)])
    hf.model.layers[1].mlp.down_proj.weight.data[3] *= 1.01
    with pytest.raises(AssertionError, match="off by"):
        check(our_engine(hf), prompts, continuations, "hydragen", expected)
