"""What a request asks for holds whatever surrounds it: the batch, its order, the number of ranks."""

import random
from dataclasses import replace

import pytest
from ranks import run_ranks

from engine import LLM, SamplingParams
from engine.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SHARED = "A beginning that many of the prompts have in common, "


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        n=rng.choice([1, 1, 2, 3]),
        temperature=rng.choice([0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 5, 40]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.3]),
        max_tokens=rng.randrange(1, 14),
        seed=rng.randrange(3),
        stop=rng.choice([(), (), tuple(LETTERS), tuple("0123456789 .,"), "th"]),
        include_stop_str_in_output=rng.random() < 0.5,
        stop_token_ids=rng.choice([(), (), tuple(range(0, 512, 9))]),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, 0, 3, 20]),
        prompt_logprobs=rng.choice([None, None, 0, 3]),
    )


def random_requests(seed: int, count: int) -> list[tuple[str, SamplingParams]]:
    """No two prompts are equal: of equal ones the first draws as the first."""
    rng = random.Random(seed)
    prompts = [rng.choice(["", SHARED, SHARED + "and more of it, "]) + f"{number} " for number in range(count)]
    return [(prompt + "x" * rng.randrange(4), random_params(rng)) for prompt in prompts]


def exact(output) -> tuple:
    """All that must be the very same."""
    samples = [(s.index, s.text, s.token_ids, s.finish_reason, s.logprobs is None) for s in output.outputs]
    return output.prompt, output.prompt_token_ids, samples


def assert_same(outputs, expected):
    for output, other in zip(outputs, expected, strict=True):
        assert exact(output) == exact(other)
        assert (output.prompt_logprobs is None) == (other.prompt_logprobs is None)
        assert (output.prompt_top_logprobs is None) == (other.prompt_top_logprobs is None)
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs[1:] == pytest.approx(other.prompt_logprobs[1:], abs=1e-5)
        for sample, its in zip(output.outputs, other.outputs, strict=True):
            assert sample.logprobs == (its.logprobs and pytest.approx(its.logprobs, abs=1e-5))
            assert (sample.top_logprobs is None) == (its.top_logprobs is None)
            for top, others in zip(sample.top_logprobs or (), its.top_logprobs or (), strict=True):
                assert top == pytest.approx(others, abs=1e-5)


REQUESTS = random_requests(0, 24)


@pytest.fixture(scope="module")
def alone(llm):
    """Each of REQUESTS in a call of its own."""
    return [llm.generate([prompt], params)[0] for prompt, params in REQUESTS]


def generate(llm, order, **options):
    prompts, params = zip(*(REQUESTS[number] for number in order), strict=True)
    return llm.generate(prompts, params, **options)


class TestMixes:
    def test_they_end_in_every_way(self, alone):
        ends = {(s.finish_reason, bool(p.stop)) for (_, p), o in zip(REQUESTS, alone) for s in o.outputs}
        assert ends == {("stop", True), ("stop", False), ("length", True), ("length", False)}

    @pytest.mark.parametrize("max_batch_size", [1024, 5])
    def test_any_order(self, llm, alone, max_batch_size, monkeypatch):
        monkeypatch.setattr(llm.engine, "max_batch_size", max_batch_size)
        for seed in range(3):
            order = random.Random(seed).sample(range(24), 24)
            assert_same(generate(llm, order), [alone[number] for number in order])
        some = [3, 20, 7, 11]
        for attention in ("hydragen", "hydragen_noshared"):
            assert_same(generate(llm, some, attention=attention), [alone[number] for number in some])

    @pytest.mark.parametrize("size", [2, 4])
    def test_any_number_of_ranks(self, tiny_folder, alone, size):
        order = random.Random(7).sample(range(24), 24)
        for outputs in run_ranks(size, lambda group: generate(LLM(tiny_folder, group=group), order)):
            assert_same(outputs, [alone[number] for number in order])


class TestStop:
    @pytest.fixture
    def forced(self, llm):
        """Generates a text that is forced, one byte a token, with the model's own after it."""

        def generate(text, **options):
            token_ids = llm.tokenizer.encode(text, add_special_tokens=False)
            params = replace(GREEDY, max_tokens=len(token_ids) + 2, **options)
            (output,) = llm.generate(["a prompt"], params, forced_tokens=[token_ids])
            return output.outputs[0]

        return generate

    def test_the_text_ends_before_it(self, forced, llm):
        sample = forced("A name\n\nB name", stop="\n\n")
        assert (sample.text, sample.finish_reason) == ("A name", "stop")
        assert llm.tokenizer.decode(sample.token_ids) == "A name\n\n"

    def test_or_after_it(self, forced):
        assert forced("A name\n\nB", stop="\n\n", include_stop_str_in_output=True).text == "A name\n\n"

    def test_characters_of_several_tokens(self, forced, llm):
        sample = forced("1 日本語 2", stop=("語", "none"))
        assert (sample.text, sample.finish_reason) == ("1 日本", "stop")
        assert llm.tokenizer.decode(sample.token_ids) == "1 日本語"

    def test_the_one_that_ends_first(self, forced):
        assert forced("one two three", stop=("three", "wo", "o three")).text == "one t"

    def test_every_sample_has_a_text_of_its_own(self, llm):
        token_ids = llm.tokenizer.encode("one two", add_special_tokens=False)
        params = SamplingParams(n=3, max_tokens=len(token_ids), stop="tw", ignore_eos=True)
        for prompts in (["a"], ["a", "b"]):
            for output in llm.generate(prompts, params, forced_tokens=[token_ids] * len(prompts)):
                assert [(s.text, s.finish_reason) for s in output.outputs] == [("one ", "stop")] * 3

    def test_none_in_the_text(self, forced):
        sample = forced("one two", stop="\N{SNOWMAN}")
        assert sample.finish_reason == "length" and sample.text.startswith("one two")

    def test_the_prompt_is_not_looked_at(self, forced):
        assert forced("x", stop="a prompt").finish_reason == "length"

    def test_at_the_last_token_it_counts_as_stop(self, llm):
        token_ids = llm.tokenizer.encode("end", add_special_tokens=False)
        params = replace(GREEDY, max_tokens=len(token_ids), stop="end")
        ((sample,),) = [o.outputs for o in llm.generate(["a"], params, forced_tokens=[token_ids])]
        assert (sample.text, sample.finish_reason) == ("", "stop")

    def test_logprobs_are_of_all_tokens(self, forced):
        sample = forced("ab cd", stop=" c", logprobs=2)
        assert sample.text == "ab"
        assert len(sample.logprobs) == len(sample.top_logprobs) == len(sample.token_ids) == 4

    def test_it_needs_a_tokenizer(self):
        with pytest.raises(InputError, match="stop: got .'x',.*there is no tokenizer.*use stop_token_ids"):
            LLM("tiny", load_format="dummy", device="cpu").generate([[5]], SamplingParams(stop="x"))


class TestOnOutput:
    PROMPTS = [SHARED + "1", "2", SHARED + "3", "4"]

    def test_outputs_come_as_they_end(self, llm):
        """All samples of a prompt together, the moment the last one ends, each prompt once."""
        events = []
        params = [replace(GREEDY, max_tokens=count, n=n) for count, n in ((5, 1), (2, 3), (1, 1), (5, 1))]
        outputs = llm.generate(
            self.PROMPTS,
            params,
            on_tokens=lambda new, ended: events.append(("step", ended)),
            on_output=lambda number, output: events.append((number, output)),
        )
        numbers = [event[0] for event in events]
        assert numbers[:5] == [2, "step", 1, "step", "step"] and sorted(numbers[-3:-1]) == [0, 3]
        told = dict(event for event in events if event[0] != "step")
        assert [told[number] for number in range(4)] == outputs
        assert [len(output.outputs) for output in outputs] == [1, 3, 1, 1]

    def test_one_wave_s_outputs_come_before_the_next_wave(self, llm, monkeypatch):
        monkeypatch.setattr(llm.engine, "max_batch_size", 1)
        events = []
        params = replace(GREEDY, max_tokens=2, n=2)
        llm.generate(
            self.PROMPTS[:2],
            params,
            on_tokens=lambda *_: events.append("step"),
            on_output=lambda number, _: events.append(number),
        )
        # Two steps a sample, which is a wave.
        first, second = (event for event in events if event != "step")
        assert events == ["step", "step", "step", first, "step", "step", "step", "step", second, "step"]
        assert {first, second} == {0, 1}

    def test_on_every_rank_in_the_same_order(self, tiny_folder):
        def work(group):
            numbers = []
            params = [replace(GREEDY, max_tokens=count) for count in (5, 2, 1, 2)]
            on_output = lambda number, _: numbers.append(number)  # noqa: E731
            LLM(tiny_folder, group=group).generate(self.PROMPTS, params, on_output=on_output)
            return numbers

        first, second = run_ranks(2, work)
        assert first == second and sorted(first) == [0, 1, 2, 3] and first[0] == 2

    def test_an_error_in_it_is_the_call_s_and_leaves_the_engine_usable(self, llm):
        def fail(number, output):
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            llm.generate(["a", "b"], GREEDY, on_output=fail)
        assert llm.engine.arena.num_used == 0
        assert len(llm.generate(["a", "b"], GREEDY)) == 2
