"""``scripts/needles.py``: the original's commands, what the options do, going on after a stop, and mistakes."""

import json
import re
import shutil

import pytest
import yaml
from checkpoints import save_tiny
from commands import Command, torchrun
from documented import fields_of_table
from safetensors.torch import load_file, save_file

from engine.arena import NoRoomError
from engine.bench import report
from engine.bench.needles.asking import Asker
from engine.bench.needles.needle_results import NEEDLE_FILES
from engine.bench.needles.passkey_results import PASSKEY_FILES
from engine.bench.needles.settings import SHIPPED_MODEL
from engine.shard_writer import write_shards

needles = Command("scripts/needles.py")
SMALL = (
    "--base-prompt-string-length", 1500, "--num-questions", 4, "--num-few-shot", 2, "--num-timing-iters", 1,
    "--num-warmup-iters", 0, "--device", "cpu", "--dtype", "float32",
)  # fmt: skip


@pytest.fixture
def command():
    return needles


class TestTheOriginals:
    """The three commands of the Hydragen paper's needle experiment."""

    @pytest.fixture(scope="class")
    @staticmethod
    def shards(tmp_path_factory):
        folder = tmp_path_factory.mktemp("models")
        model = save_tiny(folder / "yi")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200_000}))
        write_shards(model, folder / "split4-yi-6b-200k", 4, model_name="01-ai/Yi-6B-200K")
        return folder / "split4-yi-6b-200k"

    def arguments(self, shards, out):
        return [
            "--pretrained-name", "01-ai/Yi-6B-200K", "--tp-path", shards, "--save-dir", out / "needles",
            "--base-prompt-string-length", 50000, "--num-timing-iters", 10,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("save_name", "options", "method"),
        [
            ("hydragen", [], "hydragen"),
            ("no_attention", ["--disable-attention"], "noattention"),
            ("disable_hydragen", ["--disable-hydragen"], "hydragen_noshared"),
        ],
    )
    def test_is_planned_as_printed(self, shards, out, save_name, options, method):
        done = needles(*self.arguments(shards, out), f"--save-name={save_name}", *options, "--dry-run")
        assert (done.status, done.stderr) == (0, "")
        first, *counts = done.stdout.splitlines()
        assert first.startswith("01-ai/Yi-6B-200K: 256 needles in 6") and "of generated prose (seed 0)" in first
        planned = [re.fullmatch(r"(\d+) questions: (\w+) \([\d.]+ GiB\)", line).groups() for line in counts]
        assert planned == [(str(2**i), method) for i in range(1, 11)]
        assert not out.exists()

    def test_runs_in_processes(self, shards, out):
        smaller = ["--base-prompt-string-length", 300, "--num-questions", 2, "--num-timing-iters", 1]
        model = ["--pretrained-name", shards.parent / "yi"]  # by its own name it is held to the real one's sizes
        arguments = [*self.arguments(shards, out), *model, *smaller, "--save-name=hydragen", "--num-warmup-iters", 0]
        done = torchrun("scripts/needles.py", *arguments, "--device", "cpu", num_ranks=4)
        assert done.returncode == 0, done.stderr
        (result,) = NEEDLE_FILES.read_all([out / "needles"])
        assert (result.questions.name, result.attention, result.environment["world_size"]) == (
            "hydragen",
            "hydragen",
            4,
        )
        assert len(result.answer_ms) == 1 and len(result.peak_bytes) == 4
        assert (out / "needles" / "needles.csv").exists()


class TestOptions:
    def test_methods_take_turns_on_one_document(self, out):
        done = needles("--save-dir", out, *SMALL, "--attention", "hydragen,hydragen_noshared", "--passkey-grid", "none")
        assert done.status == 0, done.stderr
        hydragen, noshared = NEEDLE_FILES.read_all([out])
        assert (hydragen.attention, noshared.attention) == ("hydragen", "hydragen_noshared")
        assert hydragen.run == noshared.run != ""
        assert hydragen.asked_by_depth == noshared.asked_by_depth and sum(hydragen.asked_by_depth) == 4
        assert "4/4" in done.stdout and done.stdout.endswith(f"Results, CSV and plots are in {out}.\n")
        assert (out / "needles.csv").exists() and not (out / "passkey.csv").exists()

    def test_what_is_recorded(self, out):
        options = ("--save-name", "mine", "--seed", 3, "--names", "unseen", "--num-timing-iters", 2)
        more = ("--num-warmup-iters", 1, "--no-measure-unique-prefill", "--passkey-grid", "100:120words_2x2x1_5digits")
        done = needles("--save-dir", out, *SMALL, *options, *more)
        assert done.status == 0, done.stderr
        (result,) = NEEDLE_FILES.read_all([out])
        assert (result.questions.name, result.seed, result.names) == ("mine", 3, "unseen")
        assert result.model_name == "assets/retrieval-1m"
        kinds = ("answer", "answer_warmup", "prefill", "prefill_warmup")
        assert [len(getattr(result, f"{kind}_ms")) for kind in kinds] == [2, 1, 2, 1]
        assert result.first_token_ms == result.first_token_warmup_ms == ()
        assert result.haystack == "generated prose (seed 3)" and result.num_new_tokens == 10
        assert result.environment["dtype"] == "float32" and result.peak_bytes[0] > 0
        answers = (out / "mine" / "1500c_4qs.answers.jsonl").read_text().splitlines()
        assert len(answers) == 4
        for index, name in ((2, "1500c_4qs"), (3, "passkey_w100")):
            raw = yaml.safe_load((out / "mine" / f"{name}.yaml").read_text())
            assert raw.keys() == fields_of_table(index), raw.keys() ^ fields_of_table(index)
        assert json.loads(answers[0]).keys() == {"question", "expected", "position", "answer", "token_ids", "right"}
        first, second = PASSKEY_FILES.read_all([out])
        assert (first.length.num_words, second.length.num_words, first.num_digits) == (100, 120, 5)
        probes = [json.loads(line) for line in (out / "mine" / "passkey_w100.answers.jsonl").read_text().splitlines()]
        assert [probe["depth"] for probe in probes] == [0, 1]
        assert all(probe["expected"] in probe["prompt"] and len(probe["token_ids"]) == 9 for probe in probes)
        assert sum(probe["exact_match"] for probe in probes) == sum(first.exact_by_depth)

    def test_of_several_lengths_each_has_its_document(self, out):
        done = needles("--save-dir", out, *SMALL, "--base-prompt-string-length", "600,900", "--passkey-grid", "none")
        assert done.status == 0, done.stderr
        short, long = NEEDLE_FILES.read_all([out])
        assert (short.questions.num_characters, long.questions.num_characters) == (600, 900)
        assert short.num_document_tokens < long.num_document_tokens

    def test_a_haystack_of_a_file(self, out, tmp_path):
        book = tmp_path / "book.txt"
        book.write_text("The first part. " * 50 + "The second part is here. " * 50)
        options = ("--haystack-file", book, "--haystack-start", 0.5, "--base-prompt-string-length", 500)
        done = needles("--save-dir", out, *SMALL, *options, "--passkey-grid", "100words_1x1x1_7digits")
        assert done.status == 0, done.stderr
        (result,), (passkeys,) = NEEDLE_FILES.read_all([out]), PASSKEY_FILES.read_all([out])
        assert result.haystack == passkeys.haystack == "book.txt after 50% of its sentences"
        prompt = json.loads((out / "hydragen" / "passkey_w100.answers.jsonl").read_text())["prompt"]
        assert "second part" in prompt and "first part" not in prompt

    def test_sparse_prefill(self, out):
        prefill = "a_shape:n_init=4:n_local=64:dense_below=0"
        done = needles("--save-dir", out, *SMALL, "--prefill", prefill, "--passkey-grid", "100words_1x1x1_7digits")
        assert done.status == 0, done.stderr
        (result,), (passkeys,) = NEEDLE_FILES.read_all([out]), PASSKEY_FILES.read_all([out])
        assert result.prefill == passkeys.environment["prefill"] == prefill
        assert len(result.density) == 2 and all(0.1 < share < 0.9 for share in result.density)
        assert f"hydragen: prefill {prefill}" in done.stdout and f", prefill {prefill}" in done.stdout

    def test_streaming(self, out):
        done = needles(
            "--save-dir", out, *SMALL, "--attention", "streaming:n_init=4:n_local=50", "--passkey-grid", "none"
        )
        assert done.status == 0, done.stderr
        (result,) = NEEDLE_FILES.read_all([out])
        assert result.questions.name == result.attention == "streaming:n_init=4:n_local=50"
        assert result.accuracy.share < 0.5 and result.mean_density is None

    def test_backends_are_recorded(self, out):
        backends = ("--attention-backend", "reference", "--operations-backend", "aten")
        done = needles("--save-dir", out, *SMALL, *backends, "--passkey-grid", "none")
        assert done.status == 0, done.stderr
        (result,) = NEEDLE_FILES.read_all([out])
        environment = result.environment
        assert (environment["attention_backend"], environment["operations_backend"]) == ("reference", "aten")

    def test_the_defaults_of_the_shipped_model_and_of_others(self, out, tmp_path):
        done = needles("--save-dir", out, "--dry-run")
        assert (done.status, done.stderr) == (0, "")
        assert "with 5 examples 6," in done.stdout
        assert [line for line in done.stdout.splitlines() if "questions" in line][-1].startswith(
            "256 questions: hydragen ("
        )
        assert "passkeys, hydragen: texts of 512, 1408, 2304, 3200, 4096 words" in done.stdout

    def test_what_is_asked_again_counts_once(self, out):
        done = needles("--save-dir", out, *SMALL, "--num-questions", "20,40", "--passkey-grid", "none")
        assert done.status == 0, done.stderr
        once, twice = NEEDLE_FILES.read_all([out])
        assert once.num_needles == 20 and sum(once.asked_by_depth) == sum(twice.asked_by_depth) == 20
        assert once.accuracy == twice.accuracy
        assert len((out / "hydragen" / "1500c_40qs.answers.jsonl").read_text().splitlines()) == 40

    def test_without_matplotlib_there_are_tables_all_the_same(self, out, monkeypatch):
        monkeypatch.setattr(report, "find_spec", lambda library: None)
        done = needles("--save-dir", out, *SMALL, "--passkey-grid", "100words_1x1x1_7digits")
        assert (done.status, "\n100 words: exact" in done.stdout) == (0, True)
        assert f"Results and CSV are in {out}. No plots: plotting needs matplotlib" in done.stdout
        assert sorted(path.name for path in out.glob("*.*")) == ["needles.csv", "passkey.csv"]


class TestMemory:
    """Of methods that need more than there is, and of one that meets the device's limit."""

    def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(self, out, monkeypatch):
        read = Asker.read

        def refuse(self, document, planned_length):
            if self.method == "hydragen_noshared" and len(document) > 300:
                raise NoRoomError("no room for the document")
            read(self, document, planned_length)

        monkeypatch.setattr(Asker, "read", refuse)
        lengths = ("--base-prompt-string-length", "1500,300")
        arguments = (
            "--save-dir",
            out,
            *SMALL,
            *lengths,
            "--passkey-grid",
            "none",
            "--attention",
            "hydragen,hydragen_noshared",
        )
        done = needles(*arguments)
        assert done.status == 0, done.stderr
        found = {(r.attention, r.questions.num_characters): r for r in NEEDLE_FILES.read_all([out])}
        assert {key: str(result.status) for key, result in found.items()} == {
            ("hydragen", 1500): "ok", ("hydragen", 300): "ok", ("hydragen_noshared", 300): "ok",
            ("hydragen_noshared", 1500): "does_not_fit",
        }  # fmt: skip
        assert "no room for the document" in done.stdout
        assert "4 of 4" not in needles(*arguments, "--dry-run").stdout

    def test_running_out_is_recorded_for_the_method_that_did(self, out, monkeypatch):
        ask = Asker.ask

        def run_out(self, questions, num_tokens):
            if self.method == "hydragen_noshared":
                raise MemoryError
            return ask(self, questions, num_tokens)

        monkeypatch.setattr(Asker, "ask", run_out)
        arguments = ("--save-dir", out, *SMALL, "--passkey-grid", "none", "--attention", "hydragen,hydragen_noshared")
        done = needles(*arguments)
        assert done.status == 2 and "rank 0 ran out of memory with hydragen_noshared, 4 questions about" in done.stderr
        assert [(r.attention, str(r.status)) for r in NEEDLE_FILES.read_all([out])] == [
            ("hydragen_noshared", "out_of_memory")
        ]
        assert needles(*arguments).status == 0  # goes on with the other
        assert len(NEEDLE_FILES.read_all([out])) == 2

    def test_passkeys_that_do_not_fit(self, out, monkeypatch):
        def refuse(*_):
            raise NoRoomError("no room for the prompts")

        monkeypatch.setattr(Asker, "complete", refuse)
        done = needles("--save-dir", out, *SMALL, "--passkey-grid", "100:200words_2x1x1_7digits")
        assert done.status == 0, done.stderr
        assert [str(result.status) for result in PASSKEY_FILES.read_all([out])] == ["does_not_fit"] * 2


class TestGoingOn:
    def test_what_is_there_is_skipped(self, out):
        grid = ("--passkey-grid", "100words_1x1x1_7digits")
        assert needles("--save-dir", out, *SMALL, *grid).status == 0
        times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.yaml")}
        assert len(times) == 2
        done = needles("--save-dir", out, *SMALL, "--num-questions", "4,8", *grid)
        assert done.status == 0, done.stderr
        assert "1 of 2 numbers of questions have results and are skipped." in done.stderr
        assert {path: path.stat().st_mtime_ns for path in times} == times
        assert "there already" in needles("--save-dir", out, *SMALL, *grid, "--dry-run").stdout

    def test_a_result_that_cannot_be_read_is_measured_again(self, out):
        assert needles("--save-dir", out, *SMALL, "--passkey-grid", "none").status == 0
        path = out / "hydragen" / "1500c_4qs.yaml"
        path.write_text(path.read_text().replace("schema_version: 1", "schema_version: 0"))
        done = needles("--save-dir", out, *SMALL, "--passkey-grid", "none")
        assert done.status == 0 and "; it is measured again" in done.stderr
        assert yaml.safe_load(path.read_text())["num_questions"] == 4

    def test_results_without_their_answers_are_measured_again(self, out):
        arguments = ("--save-dir", out, *SMALL, "--passkey-grid", "100words_1x1x1_7digits")
        assert needles(*arguments).status == 0
        for name in ("1500c_4qs", "passkey_w100"):
            path = out / "hydragen" / f"{name}.answers.jsonl"
            content = path.read_text()
            path.unlink()
            done = needles(*arguments)
            assert done.status == 0 and f"{path}: does not have the" in done.stderr
            assert path.read_text() == content

    @pytest.fixture
    def settled(self, out):
        assert needles("--save-dir", out, *SMALL, "--passkey-grid", "100words_1x1x1_7digits").status == 0

    def test_another_model_of_that_name_is_refused(self, out, refused, tmp_path):
        shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
        arguments = (*SMALL, "--pretrained-name", tmp_path / "model", "--num-warmup-iters", 0, "--passkey-grid", "none")
        assert needles("--save-dir", out, *arguments).status == 0
        weights = load_file(tmp_path / "model" / "model.safetensors")
        save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / "model" / "model.safetensors")
        refused([*arguments], "was measured with model digest ", "; this run has ")

    def test_another_text_of_that_name_is_refused_though_other_numbers_are_asked_for(self, out, refused, tmp_path):
        arguments = (*SMALL, "--base-prompt-string-length", 500, "--haystack-file", tmp_path / "book.txt")
        (tmp_path / "book.txt").write_text("The first text. " * 100)
        assert needles("--save-dir", out, *arguments, "--passkey-grid", "100words_1x1x1_7digits").status == 0
        (tmp_path / "book.txt").write_text("The second text. " * 100)
        other = ["--num-questions", 8, "--passkey-grid", "120words_1x1x1_7digits"]
        refused([*arguments, *other], "was measured with haystack digest ")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["--seed", 1], "was measured with seed 0; this run has 1; use another --save-name or --save-dir"),
            (["--dtype", "bfloat16"], "was measured with dtype float32; this run has bfloat16"),
            (["--num-few-shot", 1], "was measured with num document tokens "),
            (["--num-timing-iters", 2], "was measured with timed rounds 1; this run has 2"),
            (["--num-warmup-iters", 1], "was measured with warm-up rounds 0; this run has 1"),
            (["--no-measure-unique-prefill"], "was measured with first tokens timed True; this run has False"),
            (["--names", "unseen"], "was measured with names seen; this run has unseen"),
            (["--prefill", "a_shape"], "was measured with prefill dense; this run has a_shape"),
            (["--attention-backend", "reference"], "was measured with attention backend simd; this run has reference"),
            (
                ["--disable-attention", "--save-name", "hydragen"],
                "was measured with attention hydragen; this run has noa",
            ),
            (["--passkey-grid", "100words_1x1x2_7digits"], "was measured with num repeats 1; this run has 2"),
        ],
    )
    def test_other_settings_are_refused(self, settled, refused, changes, message):
        refused([*SMALL, "--passkey-grid", "100words_1x1x1_7digits", *changes], message)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["--disable-hydragen", "--disable-attention"], ["--disable-hydragen and --disable-attention were given"]),
            (["--attention", "auto", "--disable-attention"], ["--disable-attention and --attention auto were given"]),
            (["--attention", "flash"], ["attention method 'flash' is not known; accepted: ", "hydragen_noshared"]),
            (["--attention", ""], ["attention method '' is not known"]),
            (["--attention", "hydragen,hydragen"], ["names a method twice"]),
            (["--names", "all"], ["names 'all' are not known; accepted: seen, unseen"]),
            (["--save-name", "a/b"], ["save name 'a/b' cannot be a folder in the save directory"]),
            (["--save-name", ".."], ["save name '..' cannot be"]),
            (["--save-name", ""], ["save name '' cannot be"]),
            (["--save-name", "x" * 201], ["a plain name of up to 200 bytes"]),
            (["--seed", 2**31], ["--seed"]),
            (["--num-questions", "0"], ["number of questions", "holds 0"]),
            (["--num-questions", "2:"], ["'2:' cannot be read", "start:stop:step"]),
            (["--base-prompt-string-length", "5,5"], ["document length", "holds 5 twice"]),
            (["--base-prompt-string-length", "500000"], ["accepted: up to 32,768, the model's positions"]),
            (["--base-prompt-string-length", "2000000000"], ["documents of 2,000,000,000 characters", "32,768"]),
            (["--passkey-grid", "99999999words_1x1x1_7digits"], ["passkeys in 99,999,999 words", "32,768"]),
            (["--passkey-grid", "lots"], ["passkey grid 'lots' is not understood"]),
            (["--passkey-grid", "32000words_1x1x1_7digits"], ["a passkey prompt of 32000 words", "32,768"]),
            (["--num-few-shot", 500], ["500 examples were asked for; accepted: up to 427"]),
            (["--names", "unseen", "--num-few-shot", 64], ["64 examples were asked for; accepted: up to 63"]),
            (["--haystack-file", "nowhere.txt"], ["nowhere.txt cannot be read"]),
            (["--haystack-start", 0.5], ["--haystack-start 0.5 was given without --haystack-file"]),
            (["--pretrained-name", "no/such/model"], ["no/such/model"]),
            (["--attention-backend", "fast"], ["fast"]),
            (["--dtype", "int8"], ["int8"]),
            (["--prefill", "flash"], ["prefill 'flash' is not known; accepted: dense, a_shape"]),
            (["--prefill", "minference:config=none.json"], ["prefill config 'none.json' is no file"]),
            (["--graph", "--device", "cpu"], ["CUDA"]),
        ],
    )
    def test_is_one_line(self, refused, arguments, parts):
        refused([*SMALL, *arguments], *parts)

    def test_a_haystack_that_is_too_short(self, refused, tmp_path):
        (tmp_path / "book.txt").write_text("One sentence.")
        refused(
            [*SMALL, "--haystack-file", tmp_path / "book.txt"],
            "book.txt has 14 characters; 1,500 were asked for; accepted: as many as it has",
        )

    def test_a_file_in_the_place_of_the_folder(self, refused, out):
        out.write_text("")
        refused([*SMALL], f"{out}")

    def test_a_model_without_a_tokenizer(self, refused, tmp_path):
        model = save_tiny(tmp_path / "model")
        (model / "tokenizer.json").unlink()
        refused([*SMALL, "--pretrained-name", model], "tokenizer")
