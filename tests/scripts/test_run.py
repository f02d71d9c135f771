import json
import threading

import pytest
import torch
from checkpoints import save_tiny
from commands import Command, assert_mistake, torchrun
from ranks import run_ranks

from engine import LLM, PromptLevels, SamplingParams
from engine.files import write_whole
from engine.shard_writer import write_shards

run = Command("scripts/run.py")


@pytest.fixture
def complete(tiny_folder):
    """The command with the model and few tokens."""
    return lambda *arguments: run(tiny_folder, "--max-tokens", 4, "--device", "cpu", *arguments)


def in_text(outputs) -> str:
    return "".join(f"--- {output.prompt}\n{sample.text}\n" for output in outputs for sample in output.outputs)


def records(stdout: str) -> list[dict]:
    return [json.loads(line) for line in stdout.splitlines()]


class TestPrompts:
    def test_levels(self, complete, llm):
        levels = ("--prompts", "A story. ", "--prompts", "Once |Never ", "--prompts", "I|you|he|she")
        done = complete(*levels, "--num-samples", 2)
        assert (done.status, done.stderr) == (0, "")
        levels = PromptLevels([["A story. "], ["Once ", "Never "], ["I", "you", "he", "she"]])
        assert done.stdout == in_text(llm.generate(levels, SamplingParams(n=2, max_tokens=4)))
        assert done.stdout.count("--- A story. Never he\n") == 2

    def test_one_level_is_a_list(self, complete, llm):
        done = complete("--prompts", "one|two", "--temperature", 0)
        assert done.stdout == in_text(llm.generate(["one", "two"], SamplingParams(temperature=0, max_tokens=4)))

    def test_a_file_of_lines(self, complete, llm, tmp_path):
        (tmp_path / "p.txt").write_text("one|two\n\nthree\n")
        done = complete("--prompt-file", tmp_path / "p.txt")
        assert done.stdout == in_text(llm.generate(["one|two", "three"], SamplingParams(max_tokens=4)))

    def test_a_file_of_json_lines(self, complete, llm, tmp_path):
        prompts = ["one\ntwo", [70, 80], "three"]
        (tmp_path / "p.jsonl").write_text('"one\\ntwo"\n[70, 80]\n{"prompt": "three"}\n')
        outputs = llm.generate(prompts, SamplingParams(max_tokens=4))
        assert complete("--prompt-file", tmp_path / "p.jsonl").stdout == in_text(outputs).replace("None", "[2 tokens]")
        found = records(complete("--prompt-file", tmp_path / "p.jsonl", "--jsonl").stdout)
        assert [record["prompt"] for record in found] == prompts


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return folder


class TestChat:
    @pytest.fixture
    def chat(self, chat_model):
        return lambda *arguments: run(chat_model, "--chat", "--max-tokens", 4, "--device", "cpu", *arguments)

    def prompts(self, done) -> list[str]:
        assert (done.status, done.stderr) == (0, "")
        return [record["prompt"] for record in records(done.stdout)]

    def test_prompts_are_messages(self, chat, chat_model):
        arguments = ("--prompts", "one|two", "--num-samples", 2, "--seed", 3)
        conversations = [[{"role": "user", "content": text}] for text in ("one", "two")]
        outputs = LLM(chat_model, device="cpu").chat(conversations, SamplingParams(n=2, max_tokens=4, seed=3))
        assert chat(*arguments).stdout == in_text(outputs)
        assert self.prompts(chat(*arguments, "--jsonl")) == ["user: one\nassistant:", "user: two\nassistant:"]

    def test_a_system_message(self, chat):
        done = chat("--prompts", "one", "--system", "Be brief.", "--jsonl")
        assert self.prompts(done) == ["system: Be brief.\nuser: one\nassistant:"]

    def test_files(self, chat, tmp_path):
        (tmp_path / "p.txt").write_text("one\ntwo\n")
        done = chat("--prompt-file", tmp_path / "p.txt", "--jsonl")
        assert self.prompts(done) == ["user: one\nassistant:", "user: two\nassistant:"]
        messages = [{"role": "user", "content": "one"}, {"role": "critic", "content": [{"type": "text", "text": "no"}]}]
        (tmp_path / "p.jsonl").write_text(f'"one"\n{json.dumps({"messages": messages})}\n')
        done = chat("--prompt-file", tmp_path / "p.jsonl", "--jsonl")
        assert self.prompts(done) == ["user: one\nassistant:", "user: one\ncritic: no\nassistant:"]

    def test_mistakes(self, chat, complete, tmp_path):
        assert_mistake(complete("--prompts", "a", "--system", "b"), "--system gives a system message", "add --chat")
        assert_mistake(complete("--prompts", "a", "--chat"), "has no chat template", "give whole prompts in place of")
        assert_mistake(chat("--prompts", "a", "--prompts", "b"), "--chat with 2 levels of --prompts", "one level")
        (tmp_path / "p.jsonl").write_text('"a"\n{"messages": "b"}\n')
        assert_mistake(chat("--prompt-file", tmp_path / "p.jsonl"), "p.jsonl, line 2: messages are a str")


class TestOutput:
    def test_json_lines(self, complete, llm):
        done = complete("--prompts", "hé|two", "--n", 2, "--jsonl")
        outputs = llm.generate(["hé", "two"], SamplingParams(n=2, max_tokens=4))
        assert "hé" in done.stdout
        assert records(done.stdout) == [
            {
                "prompt": output.prompt,
                "outputs": [
                    {"text": s.text, "token_ids": list(s.token_ids), "finish_reason": s.finish_reason}
                    for s in output.outputs
                ],
            }
            for output in outputs
        ]

    def test_a_file(self, complete, tmp_path):
        expected = complete("--prompts", "one").stdout
        done = complete("--prompts", "one", "--output", tmp_path / "o.txt")
        assert (done.status, done.stdout) == (0, "")
        assert (tmp_path / "o.txt").read_bytes() == expected.encode()
        assert [path.name for path in tmp_path.iterdir()] == ["o.txt"]

    def test_a_file_stays_as_it_was_when_the_run_fails(self, complete, tmp_path, monkeypatch):
        (tmp_path / "o.txt").write_text("before")
        monkeypatch.setattr(LLM, "generate", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("ours")))
        with pytest.raises(RuntimeError):
            complete("--prompts", "one", "--output", tmp_path / "o.txt")
        assert (tmp_path / "o.txt").read_text() == "before"
        assert [path.name for path in tmp_path.iterdir()] == ["o.txt"]

    def test_without_a_tokenizer_it_is_token_ids(self, tmp_path):
        (tmp_path / "p.jsonl").write_text("[5, 6]\n")
        arguments = ("tiny", "--load-format", "dummy", "--prompt-file", tmp_path / "p.jsonl", "--max-tokens", 3)
        first, second = run(*arguments).stdout.splitlines()
        assert first == "--- [2 tokens]"
        (record,) = records(run(*arguments, "--jsonl").stdout)
        assert record["outputs"][0]["text"] is None
        assert second.split() == list(map(str, record["outputs"][0]["token_ids"]))


class TestOptions:
    def test_all_reach_the_model(self, complete, monkeypatch, tiny_folder):
        seen = {}

        class Recorded(LLM):
            def __init__(self, model, **options):
                seen.update(options, model=model)
                super().__init__(model, **options)

            def generate(self, prompts, params, **options):
                seen.update(options, params=params)
                return super().generate(prompts, params, **options)

        monkeypatch.setattr(run.module, "LLM", Recorded)
        done = complete(
            "--prompts", "one", "--n", 2, "--temperature", 0.5, "--top-p", 0.9, "--top-k", 7, "--seed", 3,
            "--stop-token-id", 8, "--stop-token-id", 9, "--ignore-eos", "--attention", "hydragen_noshared",
            "--disable-hierarchy", "--dtype", "bfloat16", "--cache-tokens", 640, "--max-batch-size", 1,
            "--attention-backend", "aten", "--operations-backend", "aten",
        )  # fmt: skip
        assert done.status == 0
        assert seen.pop("group").device == torch.device("cpu")
        assert callable(seen.pop("on_tokens"))
        assert seen == {
            "model": str(tiny_folder), "tp_dir": None, "dtype": "bfloat16", "attention": "hydragen_noshared",
            "attention_backend": "aten", "operations_backend": "aten", "cuda_graphs": False, "prefill": None,
            "load_format": "auto", "revision": None, "cache_tokens": 640, "max_batch_size": 1,
            "disable_hierarchy": True, "params": SamplingParams(
                n=2, temperature=0.5, top_p=0.9, top_k=7, max_tokens=4, seed=3, stop_token_ids=(8, 9), ignore_eos=True
            ),
        }  # fmt: skip

    def test_the_same_on_two_ranks(self, complete, tiny_folder, tmp_path, monkeypatch):
        write_shards(tiny_folder, tmp_path / "shards", 2, model_name=str(tiny_folder))
        arguments = ("--prompts", "one|two", "--n", 3)
        expected = complete(*arguments).stdout
        options = dict(max_tokens=4, n=3, prompts=["one|two"], tp_dir=tmp_path / "shards")

        groups = {}
        monkeypatch.setattr(run.module, "init_group", lambda device, timeout_s: groups[threading.get_ident()])

        def work(group):
            groups[threading.get_ident()] = group
            run.module.generate(str(tiny_folder), output=tmp_path / "o.txt", **options)

        run_ranks(2, work)
        assert (tmp_path / "o.txt").read_text() == expected


    def test_in_two_processes(self, complete, tiny_folder):
        arguments = ("--prompts", "one|two", "--num-samples", 2)
        done = torchrun("scripts/run.py", tiny_folder, "--max-tokens", 4, "--device", "cpu", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout == complete(*arguments).stdout


class TestMistakes:
    def test_one_way_to_give_prompts(self, complete, tmp_path):
        assert_mistake(complete(), "give prompts in one way: either --prompts")
        assert_mistake(complete("--prompts", "a", "--prompt-file", tmp_path / "p"), "give prompts in one way")

    @pytest.mark.parametrize(
        ("name", "content", "part"),
        [
            ("p.txt", "", "p.txt holds no prompts"),
            ("p.jsonl", '"a"\n{bad', "p.jsonl, line 2: not JSON"),
            ("p.jsonl", "[512]", "token id 512; accepted: 0 to 511"),
            ("p.jsonl", "[]", "line 1: the prompt is empty"),
        ],
    )
    def test_files(self, complete, tmp_path, name, content, part):
        (tmp_path / name).write_text(content)
        assert_mistake(complete("--prompt-file", tmp_path / name), part)

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["--prompt-file", "nowhere.txt"], ["nowhere.txt does not exist"]),
            (["--prompts", "a|b", "--prompts", "x|y|z"], ["3 prompts do not divide evenly over the 2"]),
            (["--prompts", ""], ["prompt 0 of 1 is empty"]),
            (["--prompts", "x" * 4093], ["prompt 0 has 4094 tokens", "at most 4096"]),
            (["--prompts", "\udcff"], ["not Unicode text"]),
            (["--prompts", "a", "--n", 0], ["n: got 0; accepted: an integer of 1 or more"]),
            (["--prompts", "a", "--max-tokens", 0], ["max_tokens: got 0; accepted: an integer of 1 or more"]),
            (["--prompts", "a", "--temperature", -1], ["temperature: got -1.0"]),
            (["--prompts", "a", "--top-p", 0], ["top_p: got 0.0"]),
            (["--prompts", "a", "--seed", -1], ["seed: got -1"]),
            (["--prompts", "a", "--n", "two"], ["--n"]),
            (["--prompts", "a", "--cache-tokens", 0], ["--cache-tokens"]),
            (["--prompts", "a", "--cache-tokens", 3], ["prompt 0 needs room for", "set up a larger cache"]),
            (["--prompts", "a", "--max-batch-size", 0], ["--max-batch-size"]),
            (["--prompts", "a", "--attention", "flash"], ["'flash'", "hydragen"]),
            (["--prompts", "a", "--output", "nowhere/o.txt"], ["--output nowhere/o.txt", "a directory that exists"]),
            (["--prompts", "a", "--output", "."], ["--output .", "accepted: a file"]),
        ],
    )
    def test_options(self, complete, arguments, parts):
        assert_mistake(complete(*arguments), *parts)

    def test_output_is_checked_before_the_model_is_loaded(self, tmp_path):
        assert_mistake(run("nowhere", "--prompts", "a", "--output", tmp_path), "--output")

    def test_text_without_a_tokenizer(self):
        assert_mistake(run("tiny", "--load-format", "dummy", "--prompts", "a"), "have no tokenizer; give prompts as")

    def test_a_full_disk_leaves_nothing(self, complete, tmp_path, monkeypatch):
        def fail(path, data):
            monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            write_whole(path, data)

        monkeypatch.setattr(run.module, "write_whole", fail)
        assert_mistake(complete("--prompts", "a", "--output", tmp_path / "o.txt"), "No space left on device")
        assert list(tmp_path.iterdir()) == []
