import json
import sys

import pytest
from commands import Command, assert_mistake, torchrun

from engine.llm import LLM
from engine.prefill import parse_prefill
from engine.prefill.search_state import SearchState
from engine.presets import find_preset
from engine.sampling import SamplingParams
from engine.shard_writer import write_shards
from kernels.sparse import Dense

PATH = "tools/search_sparse_heads.py"
tool = Command(PATH)
LIST = "a_shape:n_init=3:n_local=66,vertical_slash:num_vertical=50:num_slash=1,block_sparse:num_blocks=4"
QUICK = ("--context", 600, "--num-prompts", 2, "--candidates", LIST, "--max-density", 0.65)
TINY = find_preset("tiny")  # 2 layers of 4 heads


@pytest.fixture(scope="module")
def searched(tmp_path_factory, tiny_folder):
    """A file, and what was said when it was written."""
    out = tmp_path_factory.mktemp("searched") / "new" / "heads.json"
    return out, tool(tiny_folder, out, *QUICK)


def patterns(path, config=TINY):
    return parse_prefill(f"minference:config={path}").heads("x", config)


def test_writes_a_file_that_the_engine_runs(searched, tiny_folder):
    out, done = searched
    assert done.status == 0, done.stderr
    assert done.stdout.endswith(f"{out} is written; read prompts by it with --prefill minference:config={out}\n")
    assert "heads by pattern" in done.stdout and "block_sparse:num_blocks=4" in done.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["heads.json", "heads.json.search"]
    assert [len(layer) for layer in patterns(out)] == [4, 4]
    llm = LLM(tiny_folder, device="cpu", prefill=f"minference:config={out}:dense_below=0")
    params = SamplingParams(temperature=0, max_tokens=3)
    with llm.engine.sparse_prefill.measured() as density:
        assert llm.generate([[*range(3, 253), *range(3, 253)]], params)[0].outputs[0].token_ids
    assert all(0 < value < 1 for layer in density.by_layer for value in layer)


def test_the_file_says_how_it_came_about(searched, tiny_folder):
    content = json.loads(searched[0].read_text())
    assert content["model"] == str(tiny_folder) and len(content["model_digest"]) == 12
    assert content["candidates"] == LIST.split(",")
    expected = {"context": 600, "num_prompts": 2, "max_density": 0.65, "dtype": "float32"}
    assert {name: content[name] for name in expected} == expected
    assert content["prompts"] == "generated documents with needles (seeds 0 to 1)"
    assert "torch" in content["versions"]
    for layer, of_layer in zip(content["heads"], content["search"], strict=True):
        for entry, found in zip(layer.values(), of_layer, strict=True):
            assert entry[-1] == found["recall"] and 0 < found["density"] <= 0.65 and 0 < found["error"]
            assert found["within_budget"] is True


def test_a_stopped_run_goes_on(searched, tiny_folder, tmp_path, monkeypatch):
    out, write = tmp_path / "heads.json", SearchState.write

    def stop(self, place, scores):
        if place == (1, 0):
            raise KeyboardInterrupt
        write(self, place, scores)

    with monkeypatch.context() as patched:
        patched.setattr(SearchState, "write", stop)
        assert tool(tiny_folder, out, *QUICK).status == 130
    assert not out.exists()
    assert_mistake(tool(tiny_folder, out, *QUICK[:-2], "--seed", 3), "another prompts_digest", "remove the folder, or")
    assert_mistake(
        tool(tiny_folder, out, *QUICK[:-2], "--candidates", "dense"), f"{out}.search is of a search with another cand"
    )
    done = tool(tiny_folder, out, *QUICK)
    assert done.status == 0 and f"Going on: 2 of 4 layers of prompts are in {out}.search.\n" in done.stderr
    assert out.read_bytes() == searched[0].read_bytes()


def test_another_budget_takes_no_new_search(searched, tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "heads.json"
    (tmp_path / "heads.json.search").symlink_to(f"{searched[0]}.search")
    monkeypatch.setattr(SearchState, "write", None)
    done = tool(tiny_folder, out, *QUICK[:-1], 0.05)
    assert done.status == 0, done.stderr
    assert (
        "warning: no candidate looks at 0.05 of the pairs or less for 8 of 8 heads (layer.head 0.0, 0.1, 0.2, 0.3, "
        "1.0, 1.1, 1.2, 1.3): each got that of least density\n" in done.stderr
    )
    search = json.loads(out.read_text())["search"]
    assert all(head["within_budget"] is False for layer in search for head in layer)


def test_dense_is_chosen_where_it_is_asked_for_and_may_be(tmp_path):
    out = tmp_path / "heads.json"
    given = ("tiny", out, "--load-format", "dummy", "--context", 300, "--num-prompts", 1)
    done = tool(*given, "--candidates", f"{LIST},dense", "--max-density", 1)
    assert done.status == 0 and "notice: the model has no tokenizer: its prompts are random tokens" in done.stderr
    assert patterns(out) == ((Dense(),) * 4,) * 2
    content = json.loads(out.read_text())
    assert content["model_digest"] == "dummy weights of tiny, seed 0" and content["prompts"] == "random tokens (seed 0)"
    assert all(head["error"] < 1e-5 for layer in content["search"] for head in layer)


def test_texts(tiny_folder, tmp_path):
    book, other = tmp_path / "book.txt", tmp_path / "other.txt"
    book.write_text("".join(f"Sentence {i} of the first text. " for i in range(70)))
    other.write_text("Nothing happens here. " * 60)
    tokenizer = LLM(tiny_folder, device="cpu").tokenizer
    texts = [tool.module.TokenizedText.read(path, tokenizer) for path in (book, other)]
    prompts = tool.module.prompts_of_texts(texts, 100, 5)
    tokenizer = LLM(tiny_folder, device="cpu").tokenizer
    assert [len(tokens) for tokens in prompts.tokens] == [100] * 5 and len(set(prompts.tokens)) == 5
    assert all(tokens[0] == tokenizer.bos_token_id for tokens in prompts.tokens)
    text = book.read_text()
    first, last = (tokenizer.decode(prompts.tokens[i]) for i in (0, 2))
    assert text.startswith(first) and text.endswith(last)
    out = tmp_path / "heads.json"
    done = tool(tiny_folder, out, *QUICK, "--text-file", book, "--text-file", other)
    assert done.status == 0, done.stderr
    assert json.loads(out.read_text())["prompts"] == "text of book.txt, other.txt"


def test_two_ranks_find_what_one_does(searched, tiny_folder, tmp_path):
    out, shards = tmp_path / "heads.json", tmp_path / "shards"
    write_shards(tiny_folder, shards, 2, model_name=str(tiny_folder))
    done = torchrun(PATH, tiny_folder, out, *QUICK, "--tp-dir", shards, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is written") == 1
    assert patterns(out) == patterns(searched[0])
    found, expected = (json.loads(path.read_text()) for path in (out, searched[0]))
    assert found["model_digest"] == expected["model_digest"]
    for ours, theirs in zip(sum(found["search"], []), sum(expected["search"], []), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_mistakes(searched, tiny_folder, tmp_path):
    out, file = tmp_path / "heads.json", tmp_path / "text.txt"
    file.write_text("A short text.")
    given = (tiny_folder, out, *QUICK)
    assert_mistake(tool(tiny_folder, searched[0], *QUICK), "heads.json is there already", "give --overwrite")
    assert_mistake(tool(tiny_folder, tmp_path, *QUICK), f"{tmp_path} is a folder; accepted: the name of a file")
    assert_mistake(tool(tiny_folder, file / "heads.json", *QUICK), f"{file} is a file")
    assert_mistake(tool(*given, "--candidates", "tri_shape"), "candidate 'tri_shape' cannot be a head's")
    assert_mistake(tool(*given, "--candidates", "a_shape:n_local=x"), "n_local is 'x'")
    assert_mistake(tool(*given, "--context", 5000), "a context of 5000 tokens", "up to 4096, the model's positions")
    assert_mistake(tool(*given, "--max-density", 1.5), "--max-density")
    assert_mistake(tool(*given, "--text-file", tmp_path / "none"), "none cannot be read")
    assert_mistake(tool(*given, "--text-file", file), "text.txt has 13 tokens; accepted: 1,198 or more, for 2 prompts")
    several = ("--text-file", file) * 3
    assert_mistake(tool(*given, *several), "3 text files for 2 prompts; accepted: no more files than prompts")
    dummy = ("tiny", out, *QUICK, "--load-format", "dummy", "--text-file", file)
    assert_mistake(tool(*dummy), "dummy weights of a preset have no tokenizer")
    assert_mistake(tool("none", out, *QUICK), "'none'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_the_help_shows_how(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [PATH, "--help"])
    done = tool("--help")
    assert done.status == 0
    assert "python tools/search_sparse_heads.py assets/retrieval-1m heads.json --context 8192" in done.stdout
    assert "torchrun --standalone --nproc_per_node=4 tools/search_sparse_heads.py" in done.stdout
