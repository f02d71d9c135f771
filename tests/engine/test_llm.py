import subprocess
import sys
from dataclasses import fields

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from ranks import run_ranks
from transformers import AutoModelForCausalLM

import engine.llm
from engine import LLM, PromptLevels, RequestOutput, SamplingParams
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.shard_writer import write_shards

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
BOS = 1
TEXTS = ["A long beginning that is shared, then one", "A long beginning that is shared, then another", "short"]


@pytest.fixture(autouse=True)
def nothing_kept(llm):
    llm.engine.empty_shared()


def token_ids(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@torch.inference_mode()
def greedy_of_transformers(tiny_folder, prompt: list[int], count: int) -> tuple[int, ...]:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tuple(ids[len(prompt) :])


class TestPrompts:
    def test_text(self, llm, tiny_folder):
        outputs = llm.generate(TEXTS, GREEDY)
        for text, output in zip(TEXTS, outputs, strict=True):
            assert output.prompt == text
            assert output.prompt_token_ids == llm.tokenizer.encode(text)
            assert output.prompt_token_ids[0] == BOS
            (sample,) = output.outputs
            assert sample.token_ids == greedy_of_transformers(tiny_folder, output.prompt_token_ids, 6)
            assert sample.text == llm.tokenizer.decode(sample.token_ids)
            assert (sample.index, sample.finish_reason) == (0, "length")
            assert (sample.logprobs, sample.logits) == (None, None)

    def test_token_ids(self, llm):
        ids = [llm.tokenizer.encode(text) for text in TEXTS]
        outputs = llm.generate(ids, GREEDY)
        assert token_ids(outputs) == token_ids(llm.generate(TEXTS, GREEDY))
        assert [output.prompt_token_ids for output in outputs] == ids
        assert [output.prompt for output in outputs] == [None] * 3
        assert outputs[0].outputs[0].text

    def test_levels_join_and_begin_once(self, llm):
        texts = [["Once ", "Never "], ["I ", "you ", "they "], ["ran", "", "sat"]]
        levels = PromptLevels(texts, [[0, 0, 1], [2, 0, 1]])
        whole = ["Never they ran", "Once I ", "Once you sat"]
        outputs = llm.generate(levels, GREEDY)
        assert [output.prompt for output in outputs] == whole
        assert [llm.tokenizer.decode(output.prompt_token_ids) for output in outputs] == whole
        assert token_ids(outputs) == token_ids(llm.generate(whole, GREEDY))

    def test_levels_of_token_ids_have_no_text(self, llm):
        outputs = llm.generate(PromptLevels([["Once ", [BOS, 99]], ["a", "b", "c", [5, 6]]]), GREEDY)
        assert [output.prompt for output in outputs] == ["Once a", "Once b", None, None]

    def test_sharing_changes_the_cost_only(self, llm):
        expected = token_ids(llm.generate(TEXTS, GREEDY))
        assert token_ids(llm.generate(TEXTS, GREEDY, attention="hydragen_noshared")) == expected
        assert token_ids(llm.generate(TEXTS, GREEDY, disable_hierarchy=True)) == expected
        assert token_ids(llm.generate(TEXTS, GREEDY, min_shared=1)) == expected
        assert token_ids(llm.generate(TEXTS, GREEDY, attention="noattention")) != expected

    def test_more_work_than_runs_at_once(self, llm, tiny_folder):
        narrow = LLM(tiny_folder, device="cpu", max_batch_size=2, cache_tokens=128)
        assert token_ids(narrow.generate(TEXTS, GREEDY)) == token_ids(llm.generate(TEXTS, GREEDY))
        assert narrow.engine.arena.capacity == 128


class TestSamples:
    def test_defaults(self, llm):
        (output,) = llm.generate(["x"])
        assert len(output.outputs[0].token_ids) <= SamplingParams().max_tokens

    def test_each_prompt_has_its_own_parameters(self, llm):
        params = [SamplingParams(n=3, max_tokens=5, ignore_eos=True), GREEDY, SamplingParams(seed=9, max_tokens=1)]
        outputs = llm.generate(TEXTS, params)
        assert [[len(sample.token_ids) for sample in output.outputs] for output in outputs] == [[5, 5, 5], [6], [1]]
        assert [sample.index for sample in outputs[0].outputs] == [0, 1, 2]
        assert len(set(token_ids(outputs)[0])) == 3
        assert token_ids(outputs)[1] == token_ids(llm.generate(TEXTS[1:2], GREEDY))[0]

    def test_a_draw_depends_on_prompt_and_seed_alone(self, llm):
        params = SamplingParams(n=2, max_tokens=5, seed=3)
        outputs = token_ids(llm.generate(TEXTS, params))
        assert token_ids(llm.generate(TEXTS[::-1], params)) == outputs[::-1]
        assert token_ids(llm.generate(TEXTS, SamplingParams(n=2, max_tokens=5, seed=4))) != outputs

    def test_a_stop_token_is_kept_and_ends_it(self, llm):
        (output,) = llm.generate(TEXTS[:1], GREEDY)
        stop = output.outputs[0].token_ids[2]
        params = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(stop,), ignore_eos=True)
        (sample,) = llm.generate(TEXTS[:1], params)[0].outputs
        assert sample.finish_reason == "stop"
        assert sample.token_ids[-1] == stop and len(sample.token_ids) <= 3

    def test_the_models_end_of_text_ends_it(self, llm):
        (eos,) = llm.config.eos_token_ids
        params = SamplingParams(temperature=0, max_tokens=6)
        (sample,) = llm.generate(TEXTS[:1], params, forced_tokens=[[40, eos]])[0].outputs
        assert (sample.token_ids, sample.finish_reason) == ((40, eos), "stop")
        assert sample.text == llm.tokenizer.decode([40])

    def test_logprobs_and_logits(self, llm):
        params = SamplingParams(temperature=0.7, max_tokens=4, logprobs=0, ignore_eos=True)
        (sample,) = llm.generate(TEXTS[:1], params, return_logits=True)[0].outputs
        assert sample.logits.shape == (4, llm.config.vocab_size) and sample.logits.dtype == torch.float32
        expected = sample.logits.log_softmax(-1)[range(4), list(sample.token_ids)]
        assert sample.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        assert sample.top_logprobs is None

    def test_logprobs_of_the_likeliest(self, llm):
        params = SamplingParams(temperature=2.0, max_tokens=4, logprobs=3, ignore_eos=True)
        (sample,) = llm.generate(TEXTS[:1], params, return_logits=True)[0].outputs
        for logits, token, logprob, top in zip(
            sample.logits, sample.token_ids, sample.logprobs, sample.top_logprobs, strict=True
        ):
            expected = logits.log_softmax(-1)
            assert list(top) == list(dict.fromkeys([*expected.topk(3).indices.tolist(), token]))
            assert list(top.values()) == pytest.approx(expected[list(top)].tolist(), abs=1e-5)
            assert top[token] == logprob

    def test_starting_logits(self, llm):
        logits = torch.zeros(3, llm.config.vocab_size)
        logits[range(3), [7, 8, 9]] = 1
        outputs = llm.generate(TEXTS, GREEDY, starting_logits=logits)
        assert [samples[0][0] for samples in token_ids(outputs)] == [7, 8, 9]

    def test_progress_is_told(self, llm):
        calls = []
        llm.generate(TEXTS, GREEDY, on_tokens=lambda new, ended: calls.append((new, ended)))
        assert calls == [(3, 0)] * 5 + [(3, 3)]


class TestKeptLevels:
    def test_preserve(self, llm):
        logits = llm.append_shared(["A long beginning "])
        assert logits.shape == (1, llm.config.vocab_size)
        llm.append_shared(["of two ", "of more "])
        for _ in range(2):
            outputs = llm.generate(["x", "y", "z", ""], GREEDY, shared_cache_op="preserve")
            assert llm.engine.num_shared_levels == 2
            assert [output.prompt for output in outputs] == ["x", "y", "z", ""]
            assert outputs[0].prompt_token_ids == llm.tokenizer.encode("x", add_special_tokens=False)
        whole = [f"A long beginning of {end}" for end in ("two x", "two y", "more z", "more ")]
        llm.engine.empty_shared()
        assert token_ids(llm.generate(whole, GREEDY)) == token_ids(outputs)

    def test_extend(self, llm):
        llm.append_shared(["A long beginning "])
        outputs = llm.generate(["of two", "of more"], GREEDY, shared_cache_op="extend")
        assert llm.engine.num_shared_levels == 2
        below = llm.generate([" or", " and"], GREEDY, shared_cache_op="preserve")
        whole = ["A long beginning of two", "A long beginning of more"]
        assert token_ids(llm.generate(whole, GREEDY)) == token_ids(outputs)  # which wipes
        assert llm.engine.num_shared_levels == 0
        whole = ["A long beginning of two or", "A long beginning of more and"]
        assert token_ids(llm.generate(whole, GREEDY)) == token_ids(below)

    def test_the_logits_start_what_comes_below(self, llm):
        logits = llm.append_shared(["A long beginning "])
        (output,) = llm.generate([[]], GREEDY, shared_cache_op="preserve")
        assert output.outputs[0].token_ids[0] == logits.argmax().item()


class TestRanks:
    @pytest.mark.parametrize("size", [2, 4])
    def test_same_results_with_and_without_shards(self, llm, tiny_folder, tmp_path, size):
        params = [
            SamplingParams(n=2, max_tokens=5, logprobs=3),
            GREEDY,
            SamplingParams(top_k=9, min_p=0.1, max_tokens=5),
        ]
        write_shards(tiny_folder, tmp_path / "shards", size, model_name=str(tiny_folder))

        def generate(group, tp_dir):
            return LLM(tiny_folder, tp_dir=tp_dir, group=group).generate(TEXTS, params, return_logits=True)

        expected = llm.generate(TEXTS, params, return_logits=True)
        by_rank = run_ranks(size, lambda group: generate(group, None))
        for outputs in by_rank:
            for output, other in zip(outputs, expected, strict=True):
                assert_same(output, other, bits=False)
        for mine, cut in zip(by_rank, run_ranks(size, lambda group: generate(group, tmp_path / "shards")), strict=True):
            for output, other in zip(cut, mine, strict=True):
                assert_same(output, other, bits=True)

    def test_shards_need_no_checkpoint(self, tiny_folder, tmp_path, llm, capsys, monkeypatch):
        def fail(name, **_):
            raise errors.LocalEntryNotFoundError("no connection")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        write_shards(tiny_folder, tmp_path, 1, model_name=str(tiny_folder))
        alone = LLM("a/model-that-is-nowhere", tp_dir=tmp_path, device="cpu")
        assert "not at hand" in capsys.readouterr().err
        assert token_ids(alone.generate(TEXTS, GREEDY)) == token_ids(llm.generate(TEXTS, GREEDY))


def assert_same(output: RequestOutput, other: RequestOutput, bits: bool) -> None:
    """Equal in everything; numbers bit for bit, or nearly so."""
    assert (output.prompt, list(output.prompt_token_ids)) == (other.prompt, list(other.prompt_token_ids))
    for sample, same in zip(output.outputs, other.outputs, strict=True):
        numbers = {"logits", "logprobs", "top_logprobs"}
        for name in {field.name for field in fields(sample)} - numbers:
            assert getattr(sample, name) == getattr(same, name), name
        if bits:
            assert torch.equal(sample.logits, same.logits) and sample.logprobs == same.logprobs
            assert sample.top_logprobs == same.top_logprobs
        else:
            assert (sample.logits - same.logits).abs().max() <= 1e-5 * same.logits.abs().max()
            assert sample.logprobs == (same.logprobs and pytest.approx(same.logprobs, abs=1e-5))
            for top, expected in zip(sample.top_logprobs or (), same.top_logprobs or (), strict=True):
                assert top == pytest.approx(expected, abs=1e-5)


class TestMistakes:
    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ("text", "prompts is one string; accepted: a list"),
            ([], "prompts: got none"),
            ([""], "a prompt is empty text"),
            ([[]], "prompt 0: got no tokens"),
            ([1, 2], "prompt 0: got int"),
            ([[1.5]], "no token ids"),
            ([[512]], "token id 512; accepted: 0 to 511"),
            ([[-1]], "no token ids"),
            (["x" * 5000], "prompt 0 has 5001 tokens and is to get 6 more; accepted: at most 4096 together"),
            (["\udcff"], "a prompt is not Unicode text"),
            (PromptLevels([]), "got no level"),
            (PromptLevels([["a"], "bc"]), "prompts is one string"),
            (PromptLevels([["a", "b"], ["c"]]), "got 1 prompts to divide over the 2 of level 0"),
            (PromptLevels([["a"], ["c"]], [[1]]), "got 1 for entry 0; accepted: 0 to 0"),
        ],
    )
    def test_prompts(self, llm, prompts, message):
        with pytest.raises(InputError, match=message):
            llm.generate(prompts, GREEDY)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"attention": "flash"}, "'flash'"),
            ({"shared_cache_op": "keep"}, "shared_cache_op 'keep' is not known; accepted: wipe, preserve, extend"),
            ({"params": [GREEDY]}, "1 SamplingParams for 3 prompts"),
            ({"forced_tokens": [[1]]}, "forced_tokens for 1 of 3 prompts"),
            ({"starting_logits": torch.zeros(3, 5)}, "starting_logits have shape"),
        ],
    )
    def test_options(self, llm, options, message):
        with pytest.raises(InputError, match=message):
            llm.generate(TEXTS, **{"params": GREEDY} | options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"attention": "flash"}, "'flash'"),  # though the model is not there either
            ({"group": TPGroup(), "device": "cpu"}, "device and group were both given"),
            ({"device": "abacus"}, "device 'abacus' is not known; accepted: cpu, cuda, cuda:N"),
            ({"dtype": "int8"}, "dtype 'int8' is not known; accepted: auto, float32, bfloat16, float16"),
            ({"load_format": "pickle"}, "load format 'pickle' is not known; accepted: auto, dummy"),
            ({"attention_backend": "flash"}, "backend 'flash' is not known; accepted: simd, triton, aten, reference"),
            ({"cuda_graphs": True, "device": "cpu"}, "CUDA graphs were asked for on cpu; accepted: on CUDA;"),
            ({"operations_backend": "reference"}, "backend 'reference' is not known; accepted: simd, triton, aten"),
            ({"load_format": "dummy", "tp_dir": "x"}, "leave one of them out"),
            ({}, "no such folder: 'nowhere'"),
        ],
    )
    def test_loading(self, options, message):
        with pytest.raises(InputError, match=message):
            LLM("nowhere", **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_batch_size": 0}, "max_batch_size is 0; accepted: 1"),
            ({"cache_tokens": 0}, "given 0 tokens; accepted: 1"),
            ({"cache_tokens": 2**60}, "accepted: at most"),
        ],
    )
    def test_a_group_that_was_joined_is_left(self, monkeypatch, options, message):
        class Group(TPGroup):
            is_closed = False

            def close(self):
                self.is_closed = True

        group = Group()
        monkeypatch.setattr(engine.llm, "init_group", lambda device: group)
        with pytest.raises(InputError, match=message):
            LLM("tiny", load_format="dummy", **options)
        assert group.is_closed
        given = Group()
        with pytest.raises(InputError):
            LLM("tiny", load_format="dummy", group=given, **options)
        assert not given.is_closed


class TestTokenizer:
    def test_a_preset_has_none(self):
        llm = LLM("tiny", load_format="dummy", device="cpu")
        assert not llm.has_tokenizer
        with pytest.raises(InputError, match="random weights of a preset have no tokenizer; give prompts as lists"):
            llm.generate(["text"], GREEDY)
        (output,) = llm.generate([[5, 6]], GREEDY)
        assert len(output.outputs[0].token_ids) == 6
        assert output.outputs[0].text is None

    def test_a_folder_may_have_none(self, tiny_folder, tmp_path):
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).symlink_to(tiny_folder / name)
        llm = LLM(tmp_path, device="cpu")
        assert llm.generate([[5, 6]], GREEDY)[0].outputs[0].text is None
        with pytest.raises(InputError, match=f"{tmp_path} has no tokenizer.json"):
            llm.generate(["text"], GREEDY)

    def test_a_damaged_one_shows_when_it_is_loaded(self, tiny_folder, tmp_path):
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).symlink_to(tiny_folder / name)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(InputError, match="tokenizer.json cannot be read"):
            LLM(tmp_path, device="cpu")


def test_importing_it_loads_no_heavy_library():
    heavy = "transformers flash_attn vllm matplotlib huggingface_hub rich typer yaml".split()
    program = f"import sys, engine, engine.llm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_first_call_may_extend(llm):
    """With nothing kept yet the prompts become the first level, and are answered from their ends."""
    try:
        extended = llm.generate(TEXTS, GREEDY, shared_cache_op="extend")
        assert llm.engine.num_shared_levels == 1
    finally:
        llm.engine.empty_shared()
    assert token_ids(extended) == token_ids(llm.generate(TEXTS, GREEDY))
