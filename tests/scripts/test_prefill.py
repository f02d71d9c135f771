"""``scripts/prefill.py``: what it measures, the original's flags, going on after a stop, and mistakes."""

import csv
import shutil
from itertools import islice

import numpy as np
import pytest
import yaml
from commands import Command, torchrun
from documented import fields_of_table
from safetensors.torch import load_file, save_file

from engine import LLM, SamplingParams
from engine.arena import NoRoomError
from engine.bench import report
from engine.bench.modes import ModelOptions
from engine.bench.needles.prose import sentences
from engine.bench.needles.settings import SHIPPED_MODEL
from engine.bench.prefill.prefill_results import PREFILL_FILES
from engine.bench.prefill.prefill_sweep import PrefillSweep
from engine.bench.prefill.reader import Reader

prefill = Command("scripts/prefill.py")
report_script = Command("scripts/report.py")
TINY = ("--model-name", "tiny", "--load-format", "dummy", "--device", "cpu", "--num-iters", 2, "--num-warmup", 1)
SPARSE = "a_shape:n_init=4:n_local=64:dense_below=64"
METHODS = f"dense,{SPARSE}"
ALL = "dense, a_shape, tri_shape, vertical_slash, block_sparse, minference"


@pytest.fixture
def command():
    return prefill


def results(out):
    return {(one.prefill, one.point.num_tokens): one for one in PREFILL_FILES.read_all([out])}


def exact_density(num_tokens, n_init, n_local):
    """Of ``a_shape``: the first keys, and the tiles of 64 with a key less than ``n_local`` before a tile of queries."""
    query, key = np.arange(num_tokens)[:, None], np.arange(num_tokens)
    is_local = query // 64 - key // 64 <= (n_local + 62) // 64
    return ((key <= query) & (is_local | (key < n_init))).sum() / (num_tokens * (num_tokens + 1) / 2)


class TestMeasuring:
    def test_methods_take_turns_at_each_length(self, out):
        done = prefill("--save-dir", out, *TINY, "--attn-type", METHODS, "--context-window", "128,256")
        assert done.status == 0, done.stderr
        found = results(out)
        assert found.keys() == {(method, n) for method in ("dense", SPARSE) for n in (128, 256)}
        for one in found.values():
            assert (len(one.first_token_ms), len(one.first_token_warmup_ms), len(one.peak_bytes)) == (2, 1, 1)
            assert min(one.first_token_ms) > 0 and min(one.peak_bytes) > one.predicted_bytes > 0
            assert (one.model_name, one.load_format, one.environment["prefill"]) == ("tiny", "dummy", one.prefill)
        assert len({one.run for one in found.values()}) == 1
        assert set(found["dense", 256].density_by_layer) == {1}
        raw = yaml.safe_load((out / SPARSE / "256.yaml").read_text())
        assert raw.keys() == fields_of_table(4), raw.keys() ^ fields_of_table(4)
        assert (out / "prefill.csv").read_text().count("\n") == 5
        assert (out / "prefill.png").read_bytes().startswith(b"\x89PNG")
        assert done.stdout.startswith("tiny with random weights, ") and "vs dense" in done.stdout
        assert done.stdout.endswith(f"Results, CSV and plots are in {out}.\n")

    def test_density_is_what_the_pattern_lets_through(self, out):
        done = prefill("--save-dir", out, *TINY, "--attn-type", SPARSE, "--context-window", 500)
        assert done.status == 0, done.stderr
        assert results(out)[SPARSE, 500].density == pytest.approx(exact_density(500, 4, 64), rel=1e-5)

    def test_density_is_counted_in_a_reading_that_is_not_timed(self, out, monkeypatch):
        counting, read = [], Reader.first_token

        def watch(self, prompt):
            counting.append(self._engine.sparse_prefill._density is not None)
            return read(self, prompt)

        monkeypatch.setattr(Reader, "first_token", watch)
        done = prefill("--save-dir", out, *TINY, "--attn-type", SPARSE, "--context-window", "128,256")
        assert done.status == 0, done.stderr
        assert counting == [True, False, False, False] * 2

    def test_each_reading_has_an_empty_cache_and_all_memory(self, out, monkeypatch):
        arenas, read = {}, Reader.first_token

        def watch(self, prompt):
            arenas[self.column.text] = self._engine.arena
            held = {text: (arena.num_used, arena.capacity) for text, arena in arenas.items() if arena.capacity}
            assert held == {self.column.text: (0, 128)}
            return read(self, prompt)

        monkeypatch.setattr(Reader, "first_token", watch)
        done = prefill("--save-dir", out, *TINY, "--attn-type", METHODS, "--context-window", 128)
        assert done.status == 0 and len(arenas) == 2

    def test_of_the_shipped_model(self, out):
        methods = "dense,streaming:n_init=4:n_local=60,vertical_slash:num_vertical=2000:num_slash=2000"
        arguments = ("--device", "cpu", "--attn-type", methods, "--context-window", 1100, "--num-iters", 1)
        done = prefill("--save-dir", out, *arguments, "--num-warmup", 0)
        assert done.status == 0, done.stderr
        dense, streaming, whole = (results(out)[method, 1100] for method in methods.split(","))
        assert dense.model_name == "assets/retrieval-1m" and len(dense.model_digest) == 12
        assert whole.first_token == dense.first_token  # its budget covers all keys
        assert whole.density_by_layer == dense.density_by_layer == (1, 1)
        assert streaming.attention == "streaming:n_init=4:n_local=60"
        seen = sum(min(position + 1, 64) for position in range(1100))
        assert streaming.density == pytest.approx(seen / (1100 * 1101 / 2), rel=1e-5)

    def test_reading_a_text(self, out, book):
        arguments = ("--device", "cpu", "--num-iters", 1, "--num-warmup", 0, "--prompt-file", book)
        sparse = "vertical_slash:num_vertical=60:num_slash=120:dense_below=64"
        arguments = (*arguments, "--attn-type", f"dense,{sparse}", "--context-window", "700,99999")
        plan = prefill("--save-dir", out, *arguments, "--dry-run")
        assert plan.stdout.splitlines()[0] == "assets/retrieval-1m, 1 rank: 0 + 1 rounds of text of book.txt"
        done = prefill("--save-dir", out, *arguments)
        assert done.status == 0, done.stderr
        assert "time to first token after text of book.txt" in done.stdout
        one = results(out)["dense", 700]
        assert (one.prompt, len(one.prompt_digest)) == ("text of book.txt", 12)
        llm = LLM(str(SHIPPED_MODEL), device="cpu")
        tokens = llm.tokenizer.encode(book.read_text())[:700]
        params = SamplingParams(temperature=0, max_tokens=1)
        assert llm.generate([tokens], params)[0].outputs[0].token_ids == (one.first_token,)
        # Words repeat, so the estimate is another than that of random tokens.
        others = (*arguments[:6], "--attn-type", sparse, "--context-window", 700)
        assert prefill("--save-dir", out.parent / "random", *others).status == 0
        drawn = results(out.parent / "random")[sparse, 700]
        assert (drawn.prompt, drawn.prompt_digest) == ("random tokens (seed 0)", "")
        assert drawn.density_by_layer != results(out)[sparse, 700].density_by_layer

    @pytest.fixture
    def book(self, tmp_path):
        path = tmp_path / "book.txt"
        path.write_text(" ".join(islice(sentences((3, 1)), 80)))
        return path

    def test_a_text_that_cannot_be_used(self, out, book, refused):
        shipped = ("--device", "cpu", "--context-window", 700)
        refused([*TINY, "--prompt-file", book], "dummy weights of a preset have no tokenizer; leave it out")
        refused([*shipped, "--prompt-file", book.parent / "none.txt"], "none.txt cannot be read (No such file")
        (book.parent / "raw.txt").write_bytes(b"\xff\xfe\xff")
        refused([*shipped, "--prompt-file", book.parent / "raw.txt"], "raw.txt is not UTF-8 text")
        refused(
            ["--device", "cpu", "--context-window", 30_000, "--prompt-file", book],
            "tokens; accepted: 29,999 or more, for 1 prompt of 30,000; give a longer text",
        )

    def test_another_text_is_refused(self, out, book, refused):
        arguments = ("--device", "cpu", "--context-window", 700, "--attn-type", "dense", "--num-iters", 1)
        arguments = (*arguments, "--num-warmup", 0, "--prompt-file", book)
        assert prefill("--save-dir", out, *arguments).status == 0
        refused(arguments[:-2], "with prompt text of book.txt; this run has random tokens (seed 0)")
        book.write_text(f"Now {book.read_text()}")
        refused(arguments, "was measured with prompt digest ", "; use another --save-dir")

    def test_a_prompt_below_the_sparse_length_is_dense(self, out):
        assert (
            prefill("--save-dir", out, *TINY, "--attn-type", "a_shape:n_local=64", "--context-window", 64).status == 0
        )
        assert results(out)["a_shape:n_local=64", 64].density_by_layer == (1, 1)

    @pytest.fixture
    def heads(self, tmp_path):
        """A method of which the first head alone is sparse: with two ranks, none of the second one's."""
        dense = ", ".join(f'"{head}": ["dense", 0, 0, 1]' for head in range(1, 4))
        layer = f'{{"0": ["stream_llm", 4, 64, 1], {dense}}}'
        (tmp_path / "heads.json").write_text(f"[{layer}, {layer}]")
        return f"minference:config={tmp_path / 'heads.json'}:dense_below=64"

    def test_ranks_agree_with_one(self, out, heads):
        arguments = (*TINY, "--attn-type", f"{heads},block_sparse:num_blocks=2:dense_below=64")
        arguments = (*arguments, "--context-window", 400, "--dtype", "float32")
        assert prefill("--save-dir", out / "1", *arguments).status == 0
        done = torchrun("scripts/prefill.py", "--save-dir", out / "2", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("time to first token") == 1
        one, two = results(out / "1"), results(out / "2")
        assert one.keys() == two.keys() and len(one) == 2
        for key, ours in one.items():
            theirs = two[key]
            assert (theirs.environment["world_size"], len(theirs.peak_bytes)) == (2, 2)
            assert theirs.first_token == ours.first_token
            assert theirs.density_by_layer == pytest.approx(ours.density_by_layer, abs=1e-5)
            assert ours.predicted_bytes > theirs.predicted_bytes > ours.predicted_bytes / 2

    def test_a_path_in_a_method_is_no_folder(self, out, heads):
        done = prefill("--save-dir", out, *TINY, "--attn-type", heads, "--context-window", 256)
        assert done.status == 0, done.stderr
        (folder,) = [path.name for path in out.iterdir() if path.is_dir()]
        assert folder == heads.replace("/", "%2F")
        density = (exact_density(256, 4, 64) + 3) / 4  # in the mean over the heads
        assert results(out)[heads, 256].density_by_layer == pytest.approx((density, density), rel=1e-5)

    def test_without_matplotlib_there_is_a_table_all_the_same(self, out, monkeypatch):
        monkeypatch.setattr(report, "find_spec", lambda library: None)
        done = prefill("--save-dir", out, *TINY, "--attn-type", "dense", "--context-window", 64)
        assert done.status == 0 and f"Results and CSV are in {out}. No plots: plotting needs matplotlib" in done.stdout
        assert [path.name for path in out.glob("*.*")] == ["prefill.csv"]

    def test_the_report_shows_it_too(self, out):
        assert prefill("--save-dir", out, *TINY, "--attn-type", METHODS, "--context-window", 128).status == 0
        (out / "prefill.csv").unlink()
        done = report_script(out, "--no-png")
        assert done.status == 0, done.stderr
        assert "time to first token" in done.stdout
        rows = list(csv.DictReader((out / "prefill.csv").read_text().splitlines()))
        assert [row["prefill"] for row in rows] == ["dense", SPARSE]


class TestTheOriginals:
    """The two commands of MInference's end-to-end benchmark."""

    def test_one_method(self, out):
        arguments = ("--attn_type", "hf", "--context_window", 1000000, "--save-dir", out)
        plan = prefill(*arguments, "--dry-run")
        assert (plan.status, plan.stderr) == (0, "")
        assert plan.stdout.splitlines()[1:] == ["1,000,000 tokens (too long: the model has 32,768 positions): dense"]
        assert not out.exists()
        done = prefill(*arguments)
        assert done.status == 0
        (result,) = PREFILL_FILES.read_all([out])
        assert (result.prefill, result.status, result.point.num_tokens) == ("dense", "does_not_fit", 1000000)
        assert result.message == "too long: the model has 32,768 positions"
        assert "does not fit" in done.stdout and "Loading" not in done.stderr

    def test_all_of_them(self, out):
        arguments = ("--run_benchmark", "--model-name", "01-ai/Yi-6B-200K", "--load-format", "dummy", "--save-dir", out)
        done = prefill(*arguments, "--dry-run")
        assert (done.status, done.stderr) == (0, "")
        first, *points = done.stdout.splitlines()
        assert first == "01-ai/Yi-6B-200K, 1 rank: 1 + 3 rounds of random tokens (seed 0)"
        lengths = ("1,000", "10,000", "50,000", "100,000", "200,000", "300,000", "500,000", "1,000,000")
        assert [point.partition(" tokens (")[0] for point in points] == list(lengths)
        assert all(point.endswith(f"): {ALL}") for point in points)
        assert [point for point in points if " GiB a rank)" in point] == points[:5]
        assert [point for point in points if "(too long: the model has 200,000 positions)" in point] == points[5:]
        assert not out.exists()

    def test_parts_of_it_are_replaced(self, out):
        arguments = ("--run-benchmark", "--attn-type", "hf", "--context-window", "64,100000", *TINY)
        done = prefill("--save-dir", out, *arguments)
        assert done.status == 0, done.stderr
        assert {key: str(one.status) for key, one in results(out).items()} == {
            ("dense", 64): "ok",
            ("dense", 100000): "does_not_fit",
        }

    def test_the_plan_has_the_defaults(self, out):
        for model, methods, contexts in (
            ((), "dense, a_shape:n_init=128:n_local=1024, vertical_slash:", ["2,048", "8,192", "32,768"]),
            (TINY[:4], "dense, minference", ["4,096", "8,192", "16,384", "32,768"]),
        ):
            done = prefill("--save-dir", out, *model, "--dry-run")
            assert (done.status, done.stderr) == (0, "")
            points = done.stdout.splitlines()[1:]
            assert [point.partition(" ")[0] for point in points] == contexts
            assert all(f"): {methods}" in point for point in points)


class TestMemory:
    def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(self, out, monkeypatch):
        set_up = Reader.set_up

        def refuse(self, num_tokens):
            if self.column.text == SPARSE and num_tokens > 100:
                raise NoRoomError("no room for the prompt")
            set_up(self, num_tokens)

        monkeypatch.setattr(Reader, "set_up", refuse)
        arguments = ("--save-dir", out, *TINY, "--attn-type", METHODS, "--context-window", "64,128")
        done = prefill(*arguments)
        assert done.status == 0, done.stderr
        assert {key: str(one.status) for key, one in results(out).items()} == {
            ("dense", 64): "ok", ("dense", 128): "ok", (SPARSE, 64): "ok", (SPARSE, 128): "does_not_fit"
        }  # fmt: skip
        assert "no room for the prompt" in done.stdout
        assert prefill(*arguments, "--dry-run").stdout.count("there already") == 2

    def test_a_cache_for_which_there_is_no_room(self, out, monkeypatch):
        monkeypatch.setattr("engine.arena.available_bytes", lambda group: 100_000)
        done = prefill("--save-dir", out, *TINY, "--attn-type", "dense", "--context-window", 4096)
        assert done.status == 0, done.stderr
        result = results(out)["dense", 4096]
        assert result.status == "does_not_fit" and "a KV cache of 4096 tokens needs" in result.message

    def test_running_out_is_recorded_for_the_method_that_did(self, out, monkeypatch):
        read = Reader.first_token

        def run_out(self, prompt):
            if self.column.text == SPARSE:
                raise MemoryError
            return read(self, prompt)

        monkeypatch.setattr(Reader, "first_token", run_out)
        arguments = ("--save-dir", out, *TINY, "--attn-type", METHODS, "--context-window", 128)
        done = prefill(*arguments)
        assert done.status == 2 and f"rank 0 ran out of memory with {SPARSE}, 128 tokens, which is" in done.stderr
        assert {key: str(one.status) for key, one in results(out).items()} == {(SPARSE, 128): "out_of_memory"}
        assert prefill(*arguments).status == 0  # goes on with the other
        assert len(results(out)) == 2


class TestGoingOn:
    @pytest.fixture
    def settled(self, out):
        assert prefill("--save-dir", out, *TINY, "--attn-type", "dense", "--context-window", 64).status == 0

    def test_what_is_there_is_skipped(self, settled, out, monkeypatch):
        path = out / "dense" / "64.yaml"
        before = path.stat().st_mtime_ns
        done = prefill("--save-dir", out, *TINY, "--attn-type", METHODS, "--context-window", "64,128")
        assert done.status == 0, done.stderr
        assert "1 of 4 points have results: skipped." in done.stderr
        assert path.stat().st_mtime_ns == before and len(results(out)) == 4
        assert "~" in done.stdout  # at 64 tokens the two did not take turns
        monkeypatch.setattr(ModelOptions, "load", None)
        assert prefill("--save-dir", out, *TINY, "--attn-type", METHODS, "--context-window", "64,128").status == 0

    def test_lengths_before_a_stop_stay(self, out, monkeypatch):
        run = PrefillSweep.run

        def stop(self, readers, num_tokens, on_step):
            if num_tokens > 100:
                raise KeyboardInterrupt
            return run(self, readers, num_tokens, on_step)

        monkeypatch.setattr(PrefillSweep, "run", stop)
        arguments = ("--save-dir", out, *TINY, "--attn-type", "dense", "--context-window", "64,128")
        assert prefill(*arguments).status == 130
        assert list(results(out)) == [("dense", 64)]
        assert prefill(*arguments, "--dry-run").stdout.count("there already") == 1

    def test_a_result_that_cannot_be_read_is_measured_again(self, settled, out):
        path = out / "dense" / "64.yaml"
        path.write_text(path.read_text().replace("schema_version: 2", "schema_version: 0"))
        done = prefill("--save-dir", out, *TINY, "--attn-type", "dense", "--context-window", 64)
        assert done.status == 0 and "; it is measured again" in done.stderr
        assert yaml.safe_load(path.read_text())["schema_version"] == 2

    def test_another_model_of_that_name_is_refused(self, out, refused, tmp_path):
        shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
        arguments = (
            "--model-name",
            tmp_path / "model",
            "--attn-type",
            "dense",
            "--context-window",
            64,
            "--num-iters",
            1,
        )
        assert prefill("--save-dir", out, *arguments).status == 0
        weights = load_file(tmp_path / "model" / "model.safetensors")
        save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / "model" / "model.safetensors")
        refused(arguments, "was measured with model digest ", "; this run has ")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["--seed", 1], "was measured with seed 0; this run has 1; use another --save-dir"),
            (["--dtype", "bfloat16"], "was measured with dtype float32; this run has bfloat16"),
            (["--num-iters", 1], "was measured with timed rounds 2; this run has 1"),
            (["--num-warmup", 0], "was measured with warm-up rounds 1; this run has 0"),
            (["--attention", "auto"], "was measured with attention hydragen; this run has auto"),
            (["--attention-backend", "reference"], "; this run has reference"),
            (["--model-name", "llama-125m"], "was measured with model name tiny; this run has llama-125m"),
            (["--attn-type", "block_sparse", "--seed", 1], "was measured with seed 0; this run has 1"),
        ],
    )
    def test_other_settings_are_refused(self, settled, refused, changes, message):
        refused([*TINY, "--attn-type", "dense", "--context-window", 64, *changes], message)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["--attn-type", "flash"], ["method 'flash' is not known; accepted: dense, a_shape, ", "streaming, hf"]),
            (["--attn-type", ""], ["method '' is not known"]),
            (["--attn-type", "hf,dense"], ["methods hf and dense are the same; accepted: each once"]),
            (["--attn-type", "a_shape,a_shape:n_init=128"], ["methods a_shape and a_shape:n_init=128 are the same"]),
            (["--attn-type", "a_shape:top=1"], ["has the option 'top=1'"]),
            (["--attn-type", "streaming:n_local=0"], ["n_local is 0; accepted: 1 or more"]),
            (["--attn-type", "minference:config=no/such.json"], ["'no/such.json' is no file and no known model"]),
            (["--attn-type", f"minference:config={'x' * 200}"], ["cannot name a folder; accepted: up to 200 bytes"]),
            (["--context-window", "0"], ["context window", "holds 0"]),
            (["--context-window", "5,5"], ["context window", "holds 5 twice"]),
            (
                ["--attention", "noattention"],
                ["--attention noattention reads prompts its own way; accepted: hydragen, "],
            ),
            (["--attention", "streaming"], ["--attention streaming reads prompts its own way: --attn-type streaming "]),
            (["--attention", "flash"], ["attention method 'flash' is not known"]),
            (["--attention-backend", "fast"], ["fast"]),
            (["--num-iters", 0], ["--num-iters"]),
            (["--dtype", "int8"], ["int8"]),
            (["--model-name", "no/such/model"], ["no/such/model"]),
            (["--load-format", "gguf"], ["gguf"]),
        ],
    )
    def test_is_one_line(self, refused, arguments, parts):
        refused([*TINY, *arguments], *parts)

    def test_a_configuration_of_another_model(self, refused):
        refused(
            [*TINY, "--attn-type", "minference:config=microsoft/Phi-3-mini-128k-instruct"],
            "has 32 layers; accepted: a list of 2 layers",
        )

    def test_a_file_in_the_place_of_the_folder(self, refused, out):
        out.write_text("")
        refused([*TINY], f"{out}")
