"""What the command adds to ``engine.bench.micro``, and mistakes in its arguments."""

import pytest
from commands import Command, assert_mistake, torchrun
from micro_machine import set_machine

from engine.bench.micro import decode_operations, prefill_operations
from engine.bench.micro.micro_results import FILES

micro = Command("scripts/microbenchmark.py")
TINY = (
    "--qheads-range", 4, "--kvheads-range", 2, "--dim-range", 8, "--num-iters", 2, "--num-warmup", 0, "--device", "cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    set_machine(monkeypatch)


def test_the_table_goes_to_stdout_and_the_rest_to_stderr(out):
    done = micro(out, 2, 8, "0:9:4", *TINY)
    assert done.status == 0
    rows = done.stderr.splitlines()
    assert len(rows) == 3 and rows[0].startswith("hydragen, batch 2, shared 8, unique 0, 4/2 heads of 8: ")
    title, *_, last = done.stdout.splitlines()
    assert title.startswith("Attention of one layer in a decode step, bfloat16 on ")
    assert last == f"Results are in {out}. To plot them: python scripts/report.py {out}"
    again = micro(out, 2, 8, "0:9:4", *TINY)
    assert again.stderr == f"3 of 3 sizes have results in {out} and are skipped.\n"
    assert again.stdout == done.stdout


def test_options_reach_the_sweep(out):
    options = ("--dtype", "float32", "--backend", "reference", "--seed", 7, "--num-iters", 3, "--num-warmup", 2)
    done = micro(out, 2, 8, 4, *TINY, *options, "--unique-seq-len", 3, "--mode", "base", "--verbose")
    (result,) = FILES.read_all([out])
    assert (result.row.mode, result.row.unique_seq_len, result.row.backend, result.seed) == ("base", 3, "reference", 7)
    assert (len(result.times_ms), result.num_warmup, result.environment["dtype"]) == (3, 2, "float32")
    assert result.backends == ("reference",)
    assert " ms: " in done.stderr and "3 of 4" in done.stdout


def test_the_defaults_are_the_originals(out):
    done = micro(out, 2, 8, 4, "--num-iters", 1, "--device", "cpu")
    (result,) = FILES.read_all([out])
    assert (result.row.mode, result.row.heads, result.row.head_dim) == ("hydragen", "8/1", 128)
    assert "8/1" in done.stdout


def test_modes_compared(out):
    done = micro(out, 2, 8, 4, *TINY, "--compare", "base")
    assert {result.row.mode for result in FILES.read_all([out])} == {"base", "hydragen"}
    assert "~" not in done.stdout and "base" in done.stdout
    micro(out, 2, 16, 4, *TINY, "--mode", "base")
    assert "~ timed in separate runs" in micro(out, 2, 16, 4, *TINY, "--mode", "hydragen").stdout


def test_operations(out):
    done = micro(out, 2, 8, 4, *TINY, "--mode", "operations")
    assert done.status == 0, done.stderr
    assert "of the rate at which memory_read does" in done.stdout
    assert "times as long as the best calls of its parts" in done.stdout


PREFILL = ("--mode", "prefill", "--prefill", "dense,a_shape:n_init=1:n_local=1,block_sparse:num_blocks=1")


def test_prefill(out):
    done = micro(out, 2, "0,8", "200,256", *TINY, *PREFILL)
    assert done.status == 0, done.stderr
    title, *_, last = done.stdout.splitlines()
    assert title.startswith("Attention of one layer where prompts are read, 4/2 heads of 8, bfloat16 on ")
    assert last == f"Results are in {out}. To plot them: python scripts/report.py {out}"
    results = FILES.read_all([out])
    assert len(results) == 4 * 5  # dense has no index
    assert {(r.row.method, r.row.operation) for r in results if r.density == 1} == {("dense", "attention")}
    assert done.stderr.splitlines()[0].startswith("dense attention, batch 2, shared 0, unique 200, 4/2 heads of 8: ")
    again = micro(out, 2, "0,8", "200,256", *TINY, *PREFILL)
    assert again.stderr == f"4 of 4 sizes have results in {out} and are skipped.\n"
    assert again.stdout == done.stdout
    # One more method times all of them anew, turn by turn.
    more = micro(out, 2, 8, 256, *TINY, "--mode", "prefill", "--prefill", f"{PREFILL[3]},tri_shape:n_local=1:n_last=1")
    assert len(FILES.read_all([out])) == 4 * 5 + 2 and "~" not in more.stdout.partition("tri_shape")[2]
    assert [line.split()[0] for line in more.stderr.splitlines()].count("dense") == 1


def test_prefill_by_default_and_with_a_backend(out):
    done = micro(out, 1, 0, 65, *TINY, "--mode", "prefill", "--backend", "aten")
    assert done.status == 0, done.stderr
    results = FILES.read_all([out])
    assert {r.row.method for r in results} == {"dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse"}
    assert {r.backends for r in results if r.row.operation == "attention"} == {("aten",)}
    assert ", by aten, " in done.stdout


def test_a_dry_run_of_prefill_does_nothing(out, monkeypatch):
    monkeypatch.setattr(prefill_operations, "PrefillWorkload", None)
    done = micro(out, 1, "0,8", 128, *TINY, *PREFILL, "--dry-run")
    assert (done.status, done.stderr, out.exists()) == (0, "", False)
    assert done.stdout.count("to be run") == 10


def test_without_saving(out):
    done = micro(out, 2, 8, 4, *TINY, "--no-save")
    assert (done.status, out.exists()) == (0, False)
    assert "hydragen" in done.stdout and "Results are in" not in done.stdout


def test_a_dry_run_does_nothing(out, monkeypatch):
    monkeypatch.setattr(decode_operations, "DecodeWorkload", None)
    done = micro(out, "2,4", 8, "0:9:4", *TINY, "--dry-run", "--compare", "base")
    assert (done.status, done.stderr, out.exists()) == (0, "", False)
    assert done.stdout.count("to be run") == 12


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["0", "8", "4"], ["BS '0' holds 0; values start at 1"]),
        (["2", "x", "4"], ["NUM_SHARED 'x' cannot be read"]),
        (["2", "8", "0:9:x2"], ["NUM_UNIQUE '0:9:x2' multiplies from 0"]),
        (["2", "0", "0"], ["NUM_SHARED 0 with no unique keys leaves nothing to attend to"]),
        (["2", "8", "4", "--unique-seq-len", "5"], ["--unique-seq-len 5 is above NUM_UNIQUE 4"]),
        (["2", "8", "4", "--unique-seq-len", "-1"], ["--unique-seq-len"]),
        (["2", "0", "4", "--unique-seq-len", "0"], ["leaves nothing to attend to"]),
        (["2", "8", "4", "--qheads-range", "8,12", "--kvheads-range", "5"], ["8 to 5, 12 to 5"]),
        (["2", "8", "4", "--kvheads-range", "0"], ["--kvheads-range '0' holds 0"]),
        (["2", "8", "4", "--dim-range", "7", "--mode", "operations"], ["--dim-range holds 7; accepted: even"]),
        (["2", "8", "4", "--mode", "fast"], ["mode 'fast' is not known; accepted: base, hydragen"]),
        (["2", "8", "4", "--compare", "hydragen"], ["mode hydragen was given twice"]),
        (["2", "8", "4", "--compare", "operations"], ["mode 'operations' is not known here"]),
        (["2", "8", "0:9:4", "--mode", "prefill"], ["NUM_UNIQUE 0 leaves nothing to read in mode prefill"]),
        (["2", "8", "4", "--compare", "prefill"], ["mode 'prefill' is not known here", "alone: they compare by"]),
        (["2", "8", "4", "--prefill", "dense"], ["--prefill dense was given in mode hydragen; accepted: in mode pre"]),
        (["2", "8", "4", *PREFILL[:3], "fast"], ["prefill 'fast' is not known; accepted: dense"]),
        (["2", "8", "4", *PREFILL[:3], ""], ["prefill '' is not known"]),
        (["2", "8", "4", *PREFILL[:3], "minference"], ["minference has a pattern for each head", "scripts/prefill.py"]),
        (["2", "8", "4", *PREFILL[:3], "a_shape:dense_below=1"], ["has the option dense_below", "leave it out"]),
        (["2", "8", "4", *PREFILL[:3], "a_shape:dense_below=2048"], ["has the option dense_below", "leave it out"]),
        (["2", "0", "0", "--mode", "prefill"], ["NUM_UNIQUE 0 leaves nothing to read in mode prefill"]),
        (
            ["2", "8", "4", *PREFILL[:3], "a_shape,a_shape:n_local=4096"],
            ["--prefill has a_shape and a_shape:n_local=4096, which are the same"],
        ),
        (["2", "8", "4", "--dtype", "auto"], ["dtype 'auto' is not known; accepted: float32, bfloat16, float16"]),
        (["2", "8", "4", "--backend", "abacus"], ["attention backend 'abacus' cannot run bfloat16 on cpu"]),
        (["2", "8", "4", "--backend", "aten", "--mode", "operations"], ["--backend aten", "leave it out"]),
        (["2", "8", "4", "--device", "abacus"], ["device 'abacus' is not known"]),
        (["2", "8", "4", "--num-iters", "0"], ["--num-iters"]),
        (["2", "8", "4", "--num-warmup", "-1"], ["--num-warmup"]),
        (["2", "8", "4", "--seed", "-1"], ["--seed"]),
        (["1:10001:1", "1:10001:1", "4"], ["the ranges make 100000000 rows; accepted: at most 10000"]),
        (["2", "8"], ["NUM_UNIQUE"]),
    ],
)
def test_mistakes(out, arguments, parts):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    for extra in ([], ["--dry-run"]):
        assert_mistake(micro(out, *arguments, *device, *extra), *parts)
    assert not out.exists()


def test_outdir_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for extra in ([], ["--dry-run"]):
        assert_mistake(micro(tmp_path / "file", 2, 8, 4, *TINY, *extra), "file is a file; accepted: an OUTDIR")
    assert micro(tmp_path / "file", 2, 8, 4, *TINY, "--no-save").status == 0


def test_what_does_not_fit_is_no_mistake(out):
    done = micro(out, f"2,{2**31 - 1}", 8, 4, *TINY)
    assert done.status == 0
    assert "does not fit" in done.stdout and "needs " in done.stderr
    assert len(FILES.read_all([out])) == 2


def test_it_is_one_process(out, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_mistake(micro(out, 2, 8, 4, *TINY), "the microbenchmark is one process, not 2 ranks; start it with python")


def test_torchrun_is_told_once(tmp_path):
    done = torchrun("scripts/microbenchmark.py", tmp_path / "out", 2, 8, 4, *TINY)
    assert done.returncode != 0
    assert done.stderr.count("the microbenchmark is one process, not 2 ranks; start it with python") == 1
    assert not (tmp_path / "out").exists()
