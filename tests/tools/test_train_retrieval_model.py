import pytest
import torch
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
    assert "was begun with" not in done.stderr


def test_goes_on_with_other_threads_and_says_so(tmp_path):
    num_threads = torch.get_num_threads()
    trainer = Trainer(TINY, [])
    trainer.train_step()
    trainer.save(tmp_path / "state")
    try:
        other = num_threads + 1
        done = tool(tmp_path / "model", "--recipe", "tiny", "--state-dir", tmp_path / "state", "--num-threads", other)
    finally:
        torch.set_num_threads(num_threads)
    assert done.status == 0
    assert f"It was begun with {num_threads} thread" in done.stderr and "differ in its last bits" in done.stderr


def test_mistakes(tmp_path, book):
    out = tmp_path / "model"
    assert tool(out, "--recipe", "tiny").status == 0
    assert_mistake(tool(out, "--recipe", "tiny"), f"{out} already holds config.json", "choose another folder")
    (out / "config.json").unlink()
    assert_mistake(tool(out, "--recipe", "tiny"), f"{out} already holds model.safetensors")
    other = tmp_path / "other"
    assert_mistake(tool(other, "--text-file", tmp_path / "none.txt"), "none.txt cannot be read")
    assert_mistake(tool(other, "--text-share", 0), "--text-share")
    assert_mistake(tool(other, "--text-share", 0.5), "--text-share 0.5 was given without --text-file")
    assert_mistake(tool(other, "--recipe", "large"), "shipped", "tiny")
    done = tool(other, "--recipe", "tiny", "--text-file", book, "--state-dir", tmp_path / "model.training")
    assert done.status == 2 and "is of another recipe or of other texts" in done.stderr
    assert not other.exists()


def test_folders_that_cannot_be_written_to_are_told_of_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", None)
    (tmp_path / "file").write_text("")
    assert_mistake(tool(tmp_path / "file", "--recipe", "tiny"), f"{tmp_path / 'file'} is a file")
    assert_mistake(tool(tmp_path / "file" / "model", "--recipe", "tiny"), f"{tmp_path / 'file'} is a file")
    state = ("--state-dir", tmp_path / "file")
    assert_mistake(tool(tmp_path / "model", "--recipe", "tiny", *state), f"{tmp_path / 'file'} is a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_folder_at_hand(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    done = tool(".", "--recipe", "tiny")
    assert done.status == 0, done.stderr
    assert (tmp_path / "model" / "config.json").exists() and (tmp_path / "model.training").is_dir()
