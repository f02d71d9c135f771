"""Mistakes in ``scripts/synth.py``'s arguments, each with and without ``--dry-run``; those of ``scripts/run.py`` are in
``test_run.py``. None is found only after the model is loaded.
"""

from dataclasses import replace

import pytest
from checkpoints import save_random, save_tiny
from commands import Command, assert_mistake

from engine.bench import synth as sweeps
from engine.presets import find_preset
from engine.shard_writer import write_shards

synth = Command("scripts/synth.py")
GRAMMAR = "write a,b,c | start:stop:step | start:stop:xfactor, where stop is exclusive"


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Asserts that the command is refused, and writes nothing. OUTDIR is added, and a tiny model if there is none."""
    monkeypatch.setattr(sweeps, "make_mode", None)  # it loads the model

    def check(arguments, *parts, outdir=None):
        before = sorted(tmp_path.rglob("*"))
        model = [] if "--model-name" in arguments else ["--model-name", "tiny", "--load-format", "dummy"]
        for extra in ([], ["--dry-run"]):
            assert_mistake(synth(*model, outdir or tmp_path / "out", *arguments, *extra), *parts)
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("32:", "'32:' cannot be read"),
        ("a,b", "'a,b' cannot be read"),
        ("1:5:x1", "'1:5:x1' has factor 1; a factor is at least 2"),
        ("", "'' is empty"),
        (" ", "' ' is empty"),
        ("0", "'0' holds 0; values start at 1"),
        ("4,-1", "'4,-1' cannot be read"),
        ("0:9:x2", "'0:9:x2' multiplies from 0, which stays 0"),
        ("0:9:2", "'0:9:2' holds 0"),
        ("9:1:2", "holds no values: stop 1 is not above start 9"),
        ("1:9:0", "has step 0; a step is at least 1"),
        ("1:9:-2", "cannot be read"),
        ("5,5", "holds 5 twice"),
        ("1.5", "cannot be read"),
        ("1:99999999:1", "has 99999998 values, more than 10000"),
        ("99999999999999999999", "holds a number above 2147483647"),
    ],
)
@pytest.mark.parametrize(("place", "name"), [(0, "BS"), (1, "NUM_SHARED"), (2, "NUM_UNIQUE")])
def test_ranges(refused, text, problem, place, name):
    arguments = ["2", "8", "4"]
    arguments[place] = text
    refused(arguments, f"error: {name} '", problem, GRAMMAR)


def test_a_grid_of_too_many_cells(refused):
    refused(["1:10001:1", "1:10001:1", "1:10001:1"], "the ranges make 1000000000000 cells; accepted: at most 10000")


@pytest.mark.parametrize("place", range(3))
def test_a_negative_number(refused, place):
    arguments = ["2", "8", "4"]
    arguments[place] = "-1"
    refused(arguments, "No such option: -1 (a number cannot be negative here); see python scripts/synth.py --help")


def test_sequences_of_which_none_can_fit(refused):
    refused(
        [2**31 - 1, 2**31 - 1, 2**31 - 1],
        "make 4294967294 tokens a sequence at least; accepted: at most 4096, the model's positions",
    )


def test_a_sequence_too_long_among_others_is_no_mistake(tmp_path):
    """It is a cell that is recorded as such."""
    arguments = (tmp_path, 2, f"8,{2**31 - 1}", 2, "--model-name", "tiny", "--load-format", "dummy")
    assert "too long" in synth(*arguments, "--dry-run").stdout
    done = synth(*arguments)
    assert done.status == 0
    assert "2147483649 tokens a sequence; the model has 4096 positions" in done.stderr


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--mode", "hydragen_disabled"], ["mode 'hydragen_disabled' is not known", "hydragen_noshared", "vllm_notok"]),
        (["--mode", ""], ["mode '' is not known"]),
        (["--device", "abacus"], ["device 'abacus' is not known; accepted: cpu, cuda, cuda:N"]),
        (["--dtype", "int4"], ["dtype 'int4' is not known; accepted: auto, float32, bfloat16, float16"]),
        (["--load-format", "pickle"], ["load format 'pickle' is not known; accepted: auto, dummy"]),
        (["--load-format", "dummy", "--tp-dir", "x"], ["--tp-dir x", "leave one of them out"]),
        (["--revision", "main"], ["revision 'main' has no effect on the preset tiny; leave it out"]),
        (["--num-iters", "0"], ["--num-iters"]),
        (["--num-warmup", "-1"], ["--num-warmup"]),
        (["--tp", "0"], ["--tp"]),
        (["--seed", "-1"], ["--seed"]),
        (["--mode", "hf", "--tp-dir", "x"], ["--tp-dir x was given, but mode hf reads no shards"]),
        (["--mode", "hf", "--tp", "2"], ["mode hf runs in one process; leave it out"]),
        (["--frobnicate"], ["No such option: --frobnicate"]),
        (["5"], ["unexpected extra argument"]),
    ],
)
def test_options(refused, options, parts):
    refused(["2", "8", "4", *options], *parts)


def test_tp_is_no_way_to_start_ranks(tmp_path):
    done = synth(tmp_path / "out", 2, 8, 4, "--model-name", "tiny", "--load-format", "dummy", "--tp", 2)
    assert_mistake(done, "--tp 2 was given to 1 rank(s)", "use torchrun --standalone --nproc_per_node=2")


def test_arguments_that_are_missing(refused):
    refused(["2", "8"], "NUM_UNIQUE")
    assert_mistake(synth("out", 2, 8, 4), "--model-name")


class TestModel:
    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("nowhere", "no such folder: 'nowhere'; accepted: a local folder, a Hub id (owner/name), or a preset"),
            ("tiny", "or a preset's name with --load-format dummy"),
            ("", "config.json"),
            ("/dev/null", "/dev/null is a file; accepted: a model's folder"),
        ],
    )
    def test_names(self, refused, name, part, monkeypatch, tmp_path):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        refused(["2", "8", "4", "--model-name", name], part)

    def test_a_folder_without_weights(self, tmp_path):
        model = save_tiny(tmp_path / "model")
        (model / "model.safetensors").unlink()
        for mode in ("hydragen", "hf"):
            done = synth(tmp_path / "out", 2, 8, 4, "--model-name", model, "--mode", mode)
            first, second = done.stderr.splitlines()
            assert (done.status, done.stdout) == (2, "")
            assert first.startswith("Loading ")
            assert second.startswith(f"error: {model} ") and "model.safetensors" in second
        assert not (tmp_path / "out").exists()

    def test_a_family_that_is_not_known(self, refused, tmp_path):
        model = save_tiny(tmp_path / "model")
        text = (model / "config.json").read_text()
        (model / "config.json").write_text(text.replace("LlamaForCausalLM", "MambaForCausalLM"))
        refused(["2", "8", "4", "--model-name", model], "MambaForCausalLM", "LlamaForCausalLM")


class TestFiles:
    def test_outdir_is_a_file(self, refused, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        refused(["2", "8", "4"], "notes.txt is a file; accepted: an OUTDIR", outdir=tmp_path / "notes.txt")
        refused(["2", "8", "4"], "notes.txt is a file; accepted: an OUTDIR", outdir=tmp_path / "notes.txt" / "x")

    @pytest.mark.parametrize("kind", ["nowhere", "empty", "file", "checkpoint"])
    def test_tp_dir_is_no_shard_directory(self, refused, tmp_path, kind):
        model = save_tiny(tmp_path / "checkpoint")
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("mine")
        refused(["2", "8", "4", "--model-name", model, "--tp-dir", tmp_path / kind], f"{tmp_path / kind} ")

    def test_tp_dir_is_for_more_ranks(self, tmp_path):
        model = save_tiny(tmp_path / "model")
        write_shards(model, tmp_path / "shards", 2, model_name=str(model))
        done = synth(tmp_path / "out", 2, 8, 4, "--model-name", model, "--tp-dir", tmp_path / "shards")
        assert done.status == 2
        assert "shards holds shards for 2 ranks, but the world size is 1; start 2" in done.stderr.splitlines()[-1]

    def test_tp_dir_is_of_another_model(self, tmp_path):
        model = save_tiny(tmp_path / "model")
        other = save_random(tmp_path / "other", replace(find_preset("tiny"), num_layers=1))
        write_shards(other, tmp_path / "shards", 1, model_name=str(other))
        done = synth(tmp_path / "out", 2, 8, 4, "--model-name", model, "--tp-dir", tmp_path / "shards")
        assert done.status == 2
        assert "num_layers is 1 in" in done.stderr.splitlines()[-1]
