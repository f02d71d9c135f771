import importlib.machinery
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_tiny

from engine import LLM, SamplingParams, decoding
from engine.attention.crossover import ALWAYS, NEVER
from engine.bench import hf_mode, modes
from engine.bench.environment import Execution
from engine.bench.modes import MODES, ModelOptions, check_mode, make_mode, make_prompt
from engine.bench.results import Cell
from engine.distributed import TPGroup
from engine.errors import InputError

TINY = ModelOptions("tiny", load_format="dummy", seed=3)
PROMPT = make_prompt(512, 40, seed=3)


@pytest.fixture
def chosen(monkeypatch):
    """The token ids that a mode chooses, a list of one entry for each sequence of the batch."""
    steps = []

    def recorded(choose):
        def recording(*args):
            steps.append(choose(*args))
            return steps[-1]

        return recording

    monkeypatch.setattr(decoding, "greedy", recorded(decoding.greedy))
    monkeypatch.setattr(hf_mode, "greedy", recorded(hf_mode.greedy))

    def generate(mode, num_tokens):
        steps.clear()
        mode.generate(num_tokens)
        return torch.stack(steps, dim=1).tolist()

    return generate


@pytest.mark.parametrize("name", ["hf", "hf_static", "hydragen_noshared"])
def test_every_mode_generates_the_same(chosen, name):
    ours, theirs = (make_mode(mode, TINY, TPGroup(), None, 3) for mode in ("hydragen", name))
    # Twice with other sizes: what a cell leaves behind does not show in the next.
    for cell in (Cell(name, 3, 40, 9), Cell(name, 2, 17, 4)):
        for mode, own in ((ours, "hydragen"), (theirs, name)):
            mode.set_up(replace(cell, mode=own))
            mode.prefill(PROMPT[: cell.num_shared])
        for num_tokens in (cell.num_unique, 1, cell.num_unique):  # each time from the prompt's end
            expected = chosen(ours, num_tokens)
            assert len(expected) == cell.batch_size and len(expected[0]) == num_tokens
            assert len(set(expected[0])) > num_tokens // 2
            assert chosen(theirs, num_tokens) == expected
        for mode in (ours, theirs):
            mode.release()


def test_hf_reads_a_checkpoint_quietly(chosen, tmp_path, capfd):
    options = ModelOptions(str(save_tiny(tmp_path)))
    mode = make_mode("hf", options, TPGroup(), None, 3)
    assert mode.model.config._attn_implementation == "sdpa"
    mode.set_up(Cell("hf", 2, 40, 5))
    mode.prefill(PROMPT)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    expected = LLM(tmp_path, device="cpu").generate([PROMPT], params)
    assert chosen(mode, 5) == [list(expected[0].outputs[0].token_ids)] * 2
    assert capfd.readouterr() == ("", "")  # no bar but the sweep's


def test_hf_runs_in_the_dtype_that_was_asked_for():
    mode = make_mode("hf", replace(TINY, dtype="bfloat16"), TPGroup(), None, 3)
    assert {parameter.dtype for parameter in mode.model.parameters()} == {torch.bfloat16}
    assert replace(TINY, dtype="bfloat16").config().dtype == torch.bfloat16


def test_hf_gives_the_cache_back():
    mode = make_mode("hf", TINY, TPGroup(), None, 3)
    mode.set_up(Cell("hf", 2, 40, 5))
    mode.prefill(PROMPT)
    assert mode._cache.get_seq_length() == 40 and mode._cache.layers[0].keys.shape[0] == 2
    mode.release()
    assert mode._cache is None


def test_an_engine_mode_gives_the_cache_back():
    mode = make_mode("hydragen", TINY, TPGroup(), None, 3)
    mode.set_up(Cell("hydragen", 2, 40, 5))
    mode.prefill(PROMPT)
    assert mode.engine.arena.capacity == 48
    mode.release()
    assert mode.engine.arena.cache is None


class TestCheck:
    @pytest.mark.parametrize(
        ("name", "options", "num_ranks", "tp", "message"),
        [
            ("hydragen_disabled", {}, 1, None, f"'hydragen_disabled' is not known; accepted: {', '.join(MODES)}"),
            ("hydragen", {}, 1, 8, r"--tp 8 was given to 1 rank.*torchrun --standalone --nproc_per_node=8"),
            ("noattention", {}, 4, 2, "--tp 2 was given to 4 rank"),
            ("hf", {"tp_dir": "shards"}, 1, None, "--tp-dir shards was given, but mode hf reads no shards"),
            ("vllm", {"tp_dir": "shards"}, 1, 8, "--tp-dir shards was given, but mode vllm reads no shards"),
            ("hf", {}, 2, None, "mode hf is started once, not on 2 ranks; use python instead of torchrun"),
            ("hf", {}, 1, 2, "--tp 2 was given, but mode hf runs in one process; leave it out"),
        ],
    )
    def test_mistakes(self, name, options, num_ranks, tp, message):
        with pytest.raises(InputError, match=message):
            check_mode(name, replace(TINY, **options), num_ranks, tp)

    @pytest.mark.parametrize(("name", "library"), modes.EXTERNAL_MODES.items())
    def test_what_is_not_installed_is_named(self, monkeypatch, name, library):
        monkeypatch.setattr(modes, "find_spec", lambda module: None)
        message = rf'mode {name} needs {library}, which is not installed; .*root: pip install -e "\.\[{library}\]"$'
        with pytest.raises(InputError, match=message):
            check_mode(name, TINY, 1, None)

    @pytest.mark.parametrize(
        "execution", [Execution("aten"), Execution(operations_backend="aten"), Execution(cuda_graphs=True)]
    )
    def test_how_the_engine_runs_is_no_matter_of_other_systems(self, execution):
        check_mode("auto", TINY, 1, None, execution=execution)
        with pytest.raises(InputError, match="--[a-z]+-(backend|graphs) was given, but mode hf is another system"):
            check_mode("hf", TINY, 1, None, execution=execution)

    def test_good_ones(self):
        for name in ("hydragen", "hydragen_noshared", "noattention"):
            check_mode(name, TINY, 8, None)
            check_mode(name, TINY, 8, 8)
            check_mode(name, TINY, 1, 8, dry_run=True)
        check_mode("hf", TINY, 1, 1)


@pytest.mark.parametrize(("crossover", "choice"), [(ALWAYS, "shared"), (NEVER, "unshared")])
def test_auto_says_what_it_does_with_the_prompt(crossover, choice):
    cell = Cell("auto", 3, len(PROMPT), 4)
    for name in ("auto", "hydragen"):
        mode = make_mode(name, TINY, TPGroup(), None, 3)
        mode.engine.crossover = crossover
        mode.set_up(cell)
        mode.prefill(PROMPT)
        mode.generate(4)
        assert mode.choice() == (choice if name == "auto" else None)
        mode.release()


def test_the_prompt_depends_on_the_seed_alone():
    assert make_prompt(512, 40, 3) == PROMPT
    assert make_prompt(512, 40, 4) != PROMPT
    assert len(PROMPT) == 40 and all(0 <= token < 512 for token in PROMPT)


class TestVLLM:
    @pytest.fixture
    def calls(self, monkeypatch):
        """What is asked of a vLLM that does nothing."""
        calls = []

        class FakeLLM:
            def __init__(self, *args, **options):
                calls.append(("LLM", args, options))

            def generate(self, prompts, params, use_tqdm):
                calls.append(("generate", len(prompts), params))

            def reset_prefix_cache(self):
                calls.append(("reset",))

        fake = SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **options: options)
        fake.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
        monkeypatch.setitem(sys.modules, "vllm", fake)
        monkeypatch.delitem(sys.modules, "engine.bench.vllm_mode", raising=False)
        yield calls
        sys.modules.pop("engine.bench.vllm_mode", None)  # it holds the fake one

    @pytest.mark.parametrize("name", ["vllm", "vllm_notok"])
    def test_is_run_with_its_prefix_cache(self, calls, tmp_path, name):
        options = ModelOptions(str(save_tiny(tmp_path)), dtype="bfloat16", seed=3)
        check_mode(name, options, 1, 8)
        mode = make_mode(name, options, TPGroup(), 8, 600)
        (_, (folder,), given) = calls.pop()
        assert folder == str(tmp_path)
        assert given["max_num_seqs"] == 600  # not in turns
        assert given["tensor_parallel_size"] == 8 and given["enable_prefix_caching"] is True
        assert (given["dtype"], given["load_format"], given["seed"]) == ("bfloat16", "auto", 3)
        mode.set_up(Cell(name, 16, 40, 5))
        mode.prefill(PROMPT)
        mode.generate(5)
        params = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "detokenize": name == "vllm"}
        assert calls == [("reset",), ("generate", 1, params | {"max_tokens": 1}), ("generate", 16, params)]
        mode.release()
        assert calls[-1] == ("reset",)
