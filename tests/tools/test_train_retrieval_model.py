import pytest
from commands import Command, assert_mistake

from engine.llm import LLM
from training.recipe import TINY
from training.trainer import Trainer

tool = Command("tools/train_retrieval_model.py")


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("The first of it is trained on. " * 40 + "The zeppelin is held out. " * 10)
    return path


def test_trains_and_writes_a_model_that_the_engine_loads(tmp_path, book):
    out = tmp_path / "model"
    done = tool(out, "--recipe", "tiny", "--text-file", book)
    assert done.status == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 153,056 parameters after 6 steps and ")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert '"Ġzeppelin"' not in (out / "tokenizer.json").read_text()
    assert '"Ġtrained"' in (out / "tokenizer.json").read_text()
    llm = LLM(out, device="cpu")
    assert llm.generate(["The pass key is "])[0].outputs[0].token_ids

    again = tmp_path / "again"
    assert tool(again, "--recipe", "tiny", "--text-file", book).status == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_goes_on_after_a_stop(tmp_path):
    state = tmp_path / "state"
    trainer = Trainer(TINY, [])
    for _ in range(4):
        trainer.train_step()
    trainer.save(state)
    done = tool(tmp_path / "model", "--recipe", "tiny", "--state-dir", state)
    assert done.status == 0
    assert f"Going on after step 4 of 6, from {state}." in done.stderr


def test_mistakes(tmp_path, book):
    out = tmp_path / "model"
    assert tool(out, "--recipe", "tiny").status == 0
    assert_mistake(tool(out, "--recipe", "tiny"), f"{out} already holds a model; accepted: a folder without one")
    other = tmp_path / "other"
    assert_mistake(tool(other, "--text-file", tmp_path / "none.txt"), "none.txt cannot be read")
    assert_mistake(tool(other, "--text-share", 0), "--text-share")
    assert_mistake(tool(other, "--text-share", 0.5), "--text-share 0.5 was given without --text-file")
    assert_mistake(tool(other, "--recipe", "large"), "shipped", "tiny")
    done = tool(other, "--recipe", "tiny", "--text-file", book, "--state-dir", tmp_path / "model.training")
    assert done.status == 2 and "is of another recipe or of other texts" in done.stderr
    assert not other.exists()
