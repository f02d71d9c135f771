"""Shard directories that are damaged, unfinished or of something else, as the commands meet them."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import save_random, save_tiny
from commands import assert_mistake
from faults.processes import Running, cause

from engine.presets import find_preset
from engine.shard_writer import write_shards
from engine.shards import MANIFEST_FILE, rank_file

GENERATE = ("--prompts", "one", "--max-tokens", 4, "--temperature", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cut(model, tmp_path):
    """Makes a shard directory, of the model if no other is named."""

    def make(num_splits: int = 1, folder: Path = model, **options) -> Path:
        outdir = tmp_path / f"shards-{num_splits}-{folder.name}"
        return write_shards(folder, outdir, num_splits, model_name=str(folder), **options).shards.folder

    return make


@pytest.fixture
def generate(start, model):
    def begin(shards: Path, *arguments: object, num_ranks: int = 1) -> Running:
        return start("scripts/run.py", model, "--tp-dir", shards, *GENERATE, *arguments, num_ranks=num_ranks)

    return begin


def flip_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-9, os.SEEK_END)
        file.write(bytes([byte ^ 16]))


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_flipped_bit_is_found_by_verify(start, cut):
    shards = cut(2)
    flip_bit(shards / rank_file(1, 2))
    done = start("tools/make_tp_files.py", "--verify", shards).finish()
    assert (done.status, done.stdout) == (2, "")
    assert cause(done).startswith(f"error: {shards}: bad files, 1 of ")
    assert f"{rank_file(1, 2)} has another checksum" in cause(done)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda folder: (folder / rank_file(0, 1)).unlink(), f"{rank_file(0, 1)} is missing; copy the file again"),
        (lambda folder: os.truncate(folder / rank_file(0, 1), 5000), f"{rank_file(0, 1)} has 5000 bytes, not "),
        (lambda folder: edit_manifest(folder, format_version=2), "has format version 2; accepted: 1"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), f"has no {MANIFEST_FILE}"),
    ],
)
def test_damaged(generate, cut, damage: Callable[[Path], None], part):
    shards = cut()
    damage(shards)
    assert_mistake(generate(shards).finish(), part)


@pytest.mark.slow
def test_of_another_dtype(generate, cut, model, tmp_path):
    other = write_shards(model, tmp_path / "other", 1, model_name="other", dtype=torch.float16).shards.folder
    shards = cut(dtype=torch.bfloat16)
    os.replace(other / rank_file(0, 1), shards / rank_file(0, 1))
    parts = (f"{shards}: {rank_file(0, 1)} ", "float16 (512, 64), not bfloat16 (512, 64)", "cut the model again")
    assert_mistake(generate(shards).finish(), *parts)


@pytest.mark.slow
def test_of_other_shapes(generate, cut, tmp_path):
    wider = replace(find_preset("tiny"), intermediate_size=192)
    shards = cut(folder=save_random(tmp_path / "wider", wider))
    assert_mistake(generate(shards).finish(), str(shards), "intermediate_size is 192 in")


@pytest.mark.slow
def test_of_another_name_they_run(generate, cut, model, tmp_path):
    expected = generate(cut()).finish()
    other = Path(shutil.copytree(model, tmp_path / "other"))
    done = generate(cut(folder=other)).finish()
    assert (done.status, done.stdout) == (0, expected.stdout)
    assert done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1
    assert f"are of {other}" in done.stderr


@pytest.mark.slow
def test_what_one_rank_finds_wrong_is_told_once(generate, cut):
    shards = cut(2)
    os.truncate(shards / rank_file(1, 2), 5000)
    done = generate(shards, num_ranks=2).finish(60)
    assert done.status != 0 and done.stdout == ""
    assert cause(done).startswith("error: ") and f"{rank_file(1, 2)} has 5000 bytes, not " in cause(done)
    assert sum(line.startswith("error") for line in done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_from_a_run_that_was_killed(start, generate, model, tmp_path):
    config = replace(find_preset("tiny"), vocab_size=2**17)
    folder, shards = save_random(tmp_path / "large", config), tmp_path / "shards"
    cutting = start("tools/make_tp_files.py", folder, shards, "--num-splits", 1)
    cutting.wait_until(lambda: any(shards.glob(".rank-*.partial")))
    cutting.send(signal.SIGKILL)
    assert cutting.finish().status == -signal.SIGKILL
    assert_mistake(generate(shards).finish(), f"{shards} has no {MANIFEST_FILE}; accepted: a directory that ")
