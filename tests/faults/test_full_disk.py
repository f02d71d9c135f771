"""No room left while sharding and while sweeping: one clear line, nothing half-written, and on it goes with room."""

import resource
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import save_random
from commands import assert_mistake
from faults.processes import TINY, files

from engine.bench.results import read_cell
from engine.presets import find_preset
from engine.shard_writer import write_shards
from engine.shards import verify


@pytest.fixture
def model(tmp_path):
    """Of 1.5 MiB."""
    return save_random(tmp_path / "model", replace(find_preset("tiny"), vocab_size=2048))


def undisturbed(model: Path, folder: Path) -> dict[str, bytes]:
    write_shards(model, folder, 2, model_name=str(model))
    return files(folder)


class TestSharding:
    def test_on_a_full_disk(self, start, model, small_disk, make_room, tmp_path):
        command = ("tools/make_tp_files.py", model, small_disk / "shards", "--num-splits", 2)
        done = start(*command).finish()
        assert (done.status, done.stdout) == (2, "")
        (line,) = [line for line in done.stderr.splitlines() if "error" in line]
        assert line.startswith(f"error: {small_disk}/shards: No space left on device; the split takes 1.4 MB; make ")
        assert files(small_disk) == {}

        make_room(small_disk)
        assert start(*command).finish().status == 0
        verify(small_disk / "shards")
        assert files(small_disk / "shards") == undisturbed(model, tmp_path / "undisturbed")

    @pytest.mark.slow
    def test_files_that_may_not_grow(self, start, model, tmp_path):
        """Of which a disk need not know: a limit of the shell, or of the file system."""
        command = ("tools/make_tp_files.py", model, tmp_path / "shards", "--num-splits", 2)
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))
        done = start(*command, limit=limit).finish()
        assert done.status == 2
        assert f"error: {tmp_path}/shards: File too large; the split takes " in done.stderr
        assert "Traceback" not in done.stderr
        assert files(tmp_path / "shards") == {}
        assert start(*command).finish().status == 0
        assert files(tmp_path / "shards") == undisturbed(model, tmp_path / "undisturbed")


class TestSweep:
    @pytest.mark.slow
    @pytest.mark.parametrize("num_ranks", [1, 2])
    def test_on_a_full_disk(self, start, small_disk, num_ranks):
        outdir, filler = small_disk / "out", small_disk / "filler"
        filler.write_bytes(bytes(2**20 - 3 * 4096))  # each file takes a page: there is room for three
        command = ("scripts/synth.py", outdir, 1, "8:13:1", 2, *TINY)
        done = start(*command, num_ranks=num_ranks).finish()
        assert done.status != 0 and done.stdout == ""
        assert f"error: {outdir}/hydragen/b" in done.stderr
        assert ".yaml: No space left on device\n" in done.stderr
        if num_ranks == 1:
            assert done.status == 2 and "Traceback" not in done.stderr
        before = files(outdir)
        assert 0 < len(before) < 5 and all(name.endswith(".yaml") for name in before)

        filler.unlink()
        again = start(*command, num_ranks=num_ranks).finish()
        assert again.status == 0, again.stderr
        after = files(outdir)
        assert after.keys() == {f"hydragen/b1_s{num_shared}_u2.yaml" for num_shared in range(8, 13)}
        assert before.items() <= after.items()  # what there was stays
        for name in after:
            read_cell(outdir / name)

    @pytest.mark.slow
    def test_on_one_that_is_full_from_the_start(self, start, small_disk):
        (small_disk / "filler").write_bytes(bytes(2**20))
        done = start("scripts/synth.py", small_disk / "out", 1, 8, 2, *TINY).finish()
        first, last = done.stderr.splitlines()
        assert first.startswith("Loading ") and done.status == 2
        assert last.startswith(f"error: {small_disk}/out") and last.endswith("No space left on device")
        assert files(small_disk / "out") == {}


@pytest.mark.slow
def test_generation_into_a_full_disk(start, small_disk, tmp_path):
    (small_disk / "filler").write_bytes(bytes(2**20))
    (tmp_path / "prompts.jsonl").write_text("[5, 6, 7]\n")
    output = small_disk / "completions.txt"
    arguments = ("tiny", "--load-format", "dummy", "--prompt-file", tmp_path / "prompts.jsonl", "--output", output)
    done = start("scripts/run.py", *arguments, "--max-tokens", 4, "--device", "cpu").finish()
    assert_mistake(done, f"error: {output}: No space left on device")
    assert files(small_disk).keys() == {"filler"}
