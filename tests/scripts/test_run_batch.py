import json
import threading

import pytest
import torch
from batches import chat, completion, results, save_chat_model, write_batch
from commands import Command, assert_mistake, torchrun
from ranks import run_ranks

from engine.batch.job import BatchJob
from engine.batch.request import Defaults
from engine.batch.window import WindowSize
from engine.shard_writer import write_shards

run_batch = Command("scripts/run_batch.py")
LINES = [
    *(completion(f"{i}", f"A long beginning that they share, and then {i}", return_token_ids=True) for i in range(5)),
    completion("n", "Once", n=2, return_token_ids=True),
    chat("chat", "Who?", return_token_ids=True),
    b"bad",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def paths(tmp_path):
    return write_batch(tmp_path / "in.jsonl", *LINES), tmp_path / "out.jsonl"


@pytest.fixture
def answer(model, paths):
    """The command with the model."""
    return lambda *arguments: run_batch(model, *paths, "--device", "cpu", *arguments)


def table(stdout: str) -> dict[str, str]:
    rows = [line.strip().rsplit(None, 1) for line in stdout.splitlines() if not line.startswith(" ─")]
    return {name: value for name, value in rows}


def test_answers_and_tells_what_became_of_them(answer, paths):
    done = answer()
    assert (done.status, done.stderr) == (0, "")
    assert len(results(paths[1])) == len(LINES)
    told = table(done.stdout)
    assert (told["requests"], told["of these failed"], told["of these answered before"]) == ("8", "1", "0")
    usages = [r["response"]["body"]["usage"] for r in results(paths[1]).values() if r["response"]["status_code"] == 200]
    assert told["prompt tokens"] == str(sum(usage["prompt_tokens"] for usage in usages))
    assert told["new tokens"] == str(sum(usage["completion_tokens"] for usage in usages))


def test_goes_on_where_it_was_stopped(answer, paths):
    answer()
    whole = paths[1].read_bytes().splitlines(keepends=True)
    paths[1].write_bytes(b"".join(whole[:4]) + whole[4][:70])
    assert table(answer().stdout)["of these answered before"] == "4"
    assert sorted(paths[1].read_bytes().splitlines(keepends=True)) == sorted(whole)


def test_loads_no_model_for_nothing(answer, paths, monkeypatch):
    answer()
    before = paths[1].read_bytes()
    monkeypatch.setattr(run_batch.module, "LLM", None)
    done = answer()
    assert done.status == 0
    assert table(done.stdout)["of these answered before"] == "8" and table(done.stdout)["new tokens"] == "0"
    assert paths[1].read_bytes() == before


def test_begins_anew(answer, paths):
    answer()
    first = paths[1].read_bytes()
    assert table(answer("--overwrite").stdout)["of these answered before"] == "0"
    assert sorted(paths[1].read_bytes().splitlines()) == sorted(first.splitlines())
    paths[1].write_text("notes")
    assert_mistake(answer(), "out.jsonl, line 1 is not the result of a batch", "--overwrite")
    assert answer("--overwrite", "--seed", 1).status == 0
    assert sorted(paths[1].read_bytes().splitlines()) != sorted(first.splitlines())


def test_results_stay_until_others_take_their_place(answer, paths):
    """A run that finds out that it cannot begin has lost nothing."""
    answer()
    before = paths[1].read_bytes()
    assert_mistake(answer("--overwrite", "--attention", "nothing"), "attention method 'nothing' is not known")
    assert paths[1].read_bytes() == before


def test_requests_without_room_have_no_result(answer, paths):
    """They might have one with more memory, so they are no refusals, and the command has failed."""
    done = answer("--cache-tokens", 12)
    assert done.status == 2 and "requests could not be answered and have no result; the first, line" in done.stderr
    assert "the same command runs them again" in done.stderr and int(table(done.stdout)["without a result"]) > 0
    assert answer().status == 0
    assert len(paths[1].read_bytes().splitlines()) == 8


def test_every_option_arrives(answer, model, paths, monkeypatch):
    seen = {}

    class Recorded(run_batch.module.LLM):
        def __init__(self, model, **options):
            seen.update(model=model, **options)
            super().__init__(model, **options)

    class RecordedJob(BatchJob):
        def __init__(self, *arguments, **options):
            seen["job"] = options
            super().__init__(*arguments, **options)

    monkeypatch.setattr(run_batch.module, "LLM", Recorded)
    monkeypatch.setattr(run_batch.module, "BatchJob", RecordedJob)
    done = answer(
        "--overwrite", "--seed", 3, "--max-tokens", 9, "--window-requests", 7, "--window-mib", 5, "--attention",
        "hydragen_noshared", "--dtype", "bfloat16", "--cache-tokens", 640, "--max-batch-size", 2,
        "--attention-backend", "aten", "--operations-backend", "aten",
    )  # fmt: skip
    assert done.status == 0
    assert seen.pop("group").device == torch.device("cpu")
    assert seen.pop("job") == {"overwrite": True, "defaults": Defaults(3, 9), "window": WindowSize(7, 5 * 2**20)}
    assert seen == {
        "model": str(model), "tp_dir": None, "dtype": "bfloat16", "attention": "hydragen_noshared",
        "attention_backend": "aten", "operations_backend": "aten", "cuda_graphs": False, "prefill": None,
        "load_format": "auto", "revision": None, "cache_tokens": 640, "max_batch_size": 2,
    }  # fmt: skip


def test_the_same_on_two_ranks(answer, model, paths, tmp_path, monkeypatch):
    write_shards(model, tmp_path / "shards", 2, model_name=str(model))
    told, expected = table(answer().stdout), sorted(paths[1].read_bytes().splitlines())
    groups = {}
    monkeypatch.setattr(run_batch.module, "init_group", lambda device, timeout_s: groups[threading.get_ident()])
    output = tmp_path / "two.jsonl"

    def work(group):
        groups[threading.get_ident()] = group
        options = dict(tp_dir=tmp_path / "shards", window_requests=3)
        run_batch.module.run_batch(str(model), paths[0], output, **options)

    run_ranks(2, work)
    assert sorted(output.read_bytes().splitlines()) == expected
    assert told["requests"] == "8"


@pytest.mark.slow
def test_in_two_processes(answer, model, paths, tmp_path):
    told, expected = table(answer().stdout), sorted(paths[1].read_bytes().splitlines())
    output = tmp_path / "two.jsonl"
    done = torchrun("scripts/run_batch.py", model, paths[0], output, "--device", "cpu", "--window-requests", 3)
    assert done.returncode == 0, done.stderr
    assert sorted(output.read_bytes().splitlines()) == expected
    assert table(done.stdout).keys() == told.keys()
    assert table(done.stdout)["new tokens"] == told["new tokens"]


class TestMistakes:
    """None writes anything, and none is found only after the model is loaded."""

    @pytest.fixture
    def refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(run_batch.module, "LLM", None)

        def check(arguments, *parts):
            before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
            assert_mistake(run_batch("nowhere", *arguments, "--device", "cpu"), *parts)
            assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

        return check

    def test_files(self, refused, paths, tmp_path):
        (tmp_path / "empty.jsonl").write_text("\n \n")
        (tmp_path / "notes.txt").write_text("mine")
        output = tmp_path / "out.jsonl"
        refused([tmp_path / "none.jsonl", output], "none.jsonl does not exist; accepted: a file with one request")
        refused([tmp_path, output], "is no regular file")
        refused([tmp_path / "empty.jsonl", output], "empty.jsonl holds no requests")
        refused([paths[0], paths[0], "--overwrite"], "in.jsonl is the file of requests, too")
        refused([paths[0], tmp_path / "notes.txt"], "notes.txt, line 1 is not the result of a batch")
        refused([paths[0], tmp_path / "none" / "out.jsonl"], "out.jsonl: accepted: a file in a directory that exists")

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--seed", -1), ("--max-tokens", 0), ("--window-requests", 0), ("--window-mib", 0), ("--max-batch-size", 0)],
    )
    def test_options(self, refused, paths, option, value):
        refused([*paths, option, value], option)

    def test_a_model_that_is_not_there_leaves_no_file(self, paths):
        assert_mistake(run_batch("nowhere", *paths, "--device", "cpu"), "no such folder: 'nowhere'")
        assert not paths[1].exists()


def test_every_line_of_a_wrong_file_is_told(answer, paths):
    paths[0].write_text("prompt one\nprompt two\n" + json.dumps({"prompt": "three"}) + "\n")
    told = table(answer().stdout)
    assert told["requests"] == told["of these failed"] == "3"
    assert len(results(paths[1])) == 3
