"""What the command adds to ``engine.bench.synth``, and the whole of it on two ranks."""

from pathlib import Path

import pytest
from checkpoints import save_tiny
from commands import Command, assert_mistake, torchrun

from engine.bench import synth as sweeps
from engine.bench.results import Status, read_results
from engine.bench.roofline import Ceilings
from engine.shard_writer import write_shards

synth = Command("scripts/synth.py")
TINY = ("--model-name", "tiny", "--load-format", "dummy", "--num-iters", 2, "--num-warmup", 0, "--device", "cpu")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(sweeps, "measure_ceilings", lambda device, dtype, rows: Ceilings(10.0, 1.0, 0.5, rows))


def test_the_table_goes_to_stdout_and_the_rest_to_stderr(out):
    done = synth(out, "2:5:x2", "8,16", 4, *TINY)
    assert done.status == 0
    first, *cells = done.stderr.splitlines()
    assert first == "Loading tiny for mode hydragen ..."
    assert len(cells) == 4 and cells[0].startswith("hydragen batch 2, shared 8, unique 4: ")
    title, *_, last = done.stdout.splitlines()
    assert title.startswith("tiny, 4 new tokens, float32 on ") and title.endswith(f", 1 rank, from {out}")
    assert last == f"Results are in {out}. To plot them: python scripts/report.py {out}"
    assert [result.cell.batch_size for result in read_results([out])] == [2, 2, 4, 4]

    again = synth(out, "2:5:x2", "8,16", 4, *TINY)
    assert again.stderr == f"4 of 4 cells have results in {out} and are skipped.\n"
    assert again.stdout == done.stdout


def test_modes_in_one_directory_are_compared(out):
    for mode in ("noattention", "hydragen", "hf"):
        done = synth(out, 4, 16, 8, *TINY, "--mode", mode, "--no-calc-prefill")
    assert {"noattention", "hydragen", "hf"} <= set(done.stdout.split())
    assert {"noattn", "hf"} <= set(done.stdout.split())  # the ratios' columns
    assert {result.prefill_ms for result in read_results([out])} == {()}


def test_options_reach_the_sweep(out):
    synth(out, 1, 8, 2, *TINY, "--seed", 7, "--dtype", "bfloat16", "--num-warmup", 1, "--num-iters", 3)
    (result,) = read_results([out])
    assert (result.seed, result.num_warmup, result.num_iters) == (7, 1, 3)
    assert len(result.decode_ms) == len(result.prefill_ms) == 3
    assert result.environment["dtype"] == "bfloat16"


def test_what_was_not_measured_is_said(out):
    done = synth(out, 1, "8,4096", 2, *TINY)
    assert done.status == 0
    assert "shared 4096, unique 2: 4098 tokens a sequence; the model has 4096 positions" in done.stderr
    assert [result.status for result in read_results([out])] == [Status.OK, Status.DOES_NOT_FIT]


class TestDryRun:
    def test_shows_the_grid_and_does_nothing(self, out, monkeypatch):
        monkeypatch.setattr(sweeps, "make_mode", None)
        done = synth(out, "2:5:x2", "8,16", 4, *TINY, "--dry-run")
        assert (done.status, done.stderr) == (0, "")
        assert done.stdout.count("to be run") == 4
        assert "tiny, float32, 1 rank(s); GiB per rank" in done.stdout
        assert not out.exists()

    def test_is_not_squeezed_into_a_narrow_terminal(self, out, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        done = synth(out, 4096, 16256, 128, *TINY, "--dry-run", "--model-name", "codellama/CodeLlama-34b-hf")
        assert "activations" in done.stdout and "…" not in done.stdout

    @pytest.mark.parametrize("mode", ["hydragen", "hydragen_noshared", "noattention"])
    def test_plans_for_as_many_ranks_as_one_likes(self, out, mode):
        done = synth(out, 32, 1024, 128, *TINY, "--dry-run", "--tp", 2, "--mode", mode)
        assert "2 rank(s)" in done.stdout

    def test_refuses_what_the_run_would(self, out):
        for extra, part in (
            (["--mode", "hf", "--tp", 2], "mode hf runs in one process"),
            (["--tp", 3], "3"),
            (["--load-format", "pickle"], "load format 'pickle'"),
            (["--tp-dir", "x"], "leave one of them out"),
        ):
            assert_mistake(synth(out, 32, 8, 4, *TINY, "--dry-run", *extra), part)


class TestTwoRanks:
    """As many processes as these take seconds to start: what one process can show is shown above."""

    def test_shards_are_swept_from_the_printed_command(self, out, tmp_path):
        model = save_tiny(tmp_path / "model")
        write_shards(model, tmp_path / "shards", 2, model_name=str(model))
        done = torchrun(
            "scripts/synth.py", out, "2:5:x2", "8,16", 4, "--mode", "hydragen", "--num-iters", 2, "--num-warmup", 1,
            "--model-name", model, "--tp-dir", tmp_path / "shards", "--device", "cpu",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f", 2 ranks, from {out}") == 1
        assert done.stderr.count("hydragen batch 2, shared 8, unique 4: ") == 1
        found = read_results([out])
        assert len(found) == 4
        for result in found:
            assert (result.status, result.environment["world_size"]) == (Status.OK, 2)
            assert len(result.decode_ms) == 2 and len(result.peak_bytes) == 2

    def test_a_mistake_is_told_once(self, tmp_path):
        (tmp_path / "file").write_text("")
        done = torchrun("scripts/synth.py", tmp_path / "file", 2, 8, 4, *TINY)
        assert done.returncode != 0
        assert done.stderr.count("is a file; accepted: an OUTDIR") == 1, done.stderr
        assert f"error: {tmp_path}/file is a file" in done.stderr
        assert "error (rank 1)" not in done.stderr
        assert str(Path("scripts", "synth.py")) + '", line' not in done.stderr, "a traceback of ours"
