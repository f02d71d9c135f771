"""The command lines of the Hydragen paper's benchmarks, as printed but with ``tools/`` for ``hydragen/``.

Those of end-to-end benchmarks are planned, each on a stand-in for its model that has the positions and the eight heads
that it needs; those of microbenchmarks are planned as they are, and run with smaller sizes.
"""

import re
from dataclasses import dataclass, replace

import huggingface_hub
import pytest
from checkpoints import save_random
from commands import Command, assert_mistake
from micro_machine import set_machine

from engine.bench import modes
from engine.bench.micro import micro_sweep
from engine.bench.micro.micro_results import FILES
from engine.presets import find_preset
from engine.shards import open_shards

make_tp_files = Command("tools/make_tp_files.py")
synth = Command("scripts/synth.py")
micro = Command("scripts/microbenchmark.py")

LENGTHS = {128: "1024,2048,4096,8192,16256", 256: "1024,2048,4096,8192,16128"}  # with these 16384 tokens at most
SHORTER = ["1024", "1024,2048", "1024,2048,4096", "1024,2048,4096,8192"]
VALUES = {
    "32:65:x2": [32, 64],
    "32:129:x2": [32, 64, 128],
    "32:513:x2": [32, 64, 128, 256, 512],
    "32:1025:x2": [32, 64, 128, 256, 512, 1024],
    "32:2049:x2": [32, 64, 128, 256, 512, 1024, 2048],
    "32:4097:x2": [32, 64, 128, 256, 512, 1024, 2048, 4096],
    "128:513:x2": [128, 256, 512],
    "128:2049:x2": [128, 256, 512, 1024, 2048],
    "128:4097:x2": [128, 256, 512, 1024, 2048, 4096],
    "256:513:x2": [256, 512],
    "256:1025:x2": [256, 512, 1024],
    "256:2049:x2": [256, 512, 1024, 2048],
    "256:4097:x2": [256, 512, 1024, 2048, 4096],
    "1024,4096,8192,16256": [1024, 4096, 8192, 16256],
    **{text: [int(number) for number in text.split(",")] for text in (*LENGTHS.values(), *SHORTER)},
}


@dataclass(frozen=True)
class Line:
    mode: str
    size: str
    batch_sizes: str
    num_shared: str
    num_unique: int
    num_iters: int

    def arguments(self, results) -> list[str]:
        """All but how it gets its ranks and where its shards are."""
        outdir = f"{results}/e2e/fsynth-{self.size}" + ("-c256" if self.num_unique == 256 else "")
        return [
            outdir, self.batch_sizes, self.num_shared, str(self.num_unique), "--mode", self.mode,
            "--num-iters", str(self.num_iters), "--num-warmup", str(self.num_iters),
            "--model-name", f"codellama/CodeLlama-{self.size}-Instruct-hf",
        ]  # fmt: skip

    def cells(self) -> list[tuple[int, int, int]]:
        return [
            (batch_size, num_shared, self.num_unique)
            for num_shared in _values(self.num_shared)
            for batch_size in _values(self.batch_sizes)
        ]


def _values(text: str) -> list[int]:
    return VALUES[text] if text in VALUES else [int(text)]


def _hydragen_lines():
    largest = {("7b", 128): 2048, ("7b", 256): 1024, ("13b", 128): 1024, ("13b", 256): 512, ("34b", 128): 4096}
    for (size, num_unique), stop in (largest | {("34b", 256): 2048}).items():
        yield Line("hydragen", size, "32:129:x2", LENGTHS[num_unique], num_unique, 10)
        yield Line("hydragen", size, f"256:{stop + 1}:x2", LENGTHS[num_unique], num_unique, 3)
        yield Line("noattention", size, f"32:{stop + 1}:x2", "1024", num_unique, 10)


def _noshared_lines():
    for num_unique, longest in LENGTHS.items():
        every = [*SHORTER, longest]
        rows = {
            "7b": [("32", 4), ("64", 3), ("128", 2), ("256", 1 if num_unique == 128 else 0)],
            "13b": [("32", 3), ("64", 2), ("128", 1), ("256", 0)],
            "34b": [("32:65:x2", 4), ("128", 3), ("256", 2), ("512", 1)],
        }
        for size, cells in rows.items():
            for batch_sizes, which in cells:
                yield Line("hydragen_noshared", size, batch_sizes, every[which], num_unique, 10)


def _vllm_lines():
    for num_unique, longest in LENGTHS.items():
        for size, stop in (("7b", 2049), ("13b", 2049), ("34b", 4097)):
            if (size, num_unique) != ("13b", 128):
                yield Line("vllm", size, "32:65:x2", longest, num_unique, 3)
                yield Line("vllm", size, f"128:{stop}:x2", longest, num_unique, 1)
    without_2048 = "1024,4096,8192,16256"
    yield Line("vllm", "13b", "32:65:x2", without_2048, 128, 3)
    yield Line("vllm", "13b", "128:513:x2", without_2048, 128, 1)
    yield Line("vllm", "13b", "32:1025:x2", "2048", 128, 3)
    yield Line("vllm", "13b", "1024", without_2048, 128, 3)


RANKS_LINES = [*_hydragen_lines(), *_noshared_lines()]
VLLM_LINES = list(_vllm_lines())


def rows(stdout: str) -> list[list[str]]:
    """Those of the plan's table."""
    return [re.findall(r"[^│\s][^│]*?(?=\s*│)", line) for line in stdout.splitlines() if line.startswith("│")]


def planned(stdout: str) -> list[tuple[int, int, int]]:
    assert {row[-1] for row in rows(stdout)} == {"to be run"}
    return [tuple(map(int, row[:3])) for row in rows(stdout)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where the models are saved: each Hub id's stand-in has been cut by the printed command."""
    folder = tmp_path_factory.mktemp("models")
    config = replace(find_preset("tiny"), num_heads=8, num_kv_heads=8, head_dim=8, max_position_embeddings=16384)
    stand_in = save_random(folder / "stand-in", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(stand_in))
        for model, outdir, num_splits in (
            ("codellama/CodeLlama-7b-hf", "split8-codellama7b", 8),
            ("codellama/CodeLlama-13b-hf", "split8-codellama13b", 8),
            ("codellama/CodeLlama-34b-hf", "split8-codellama34b", 8),
            ("01-ai/Yi-6B-200K", "split4-yi-6b-200k", 4),
        ):
            done = make_tp_files(model, folder / outdir, "--num-splits", num_splits)
            assert done.status == 0, done.stderr
            manifest = open_shards(folder / outdir).manifest
            assert (manifest.model_name, manifest.num_splits) == (model, num_splits)
    return folder


def test_there_are_as_many_as_are_printed():
    assert len(set(RANKS_LINES)) == 12 + 6 + 24
    assert len(set(VLLM_LINES)) == 14
    assert sum(len(line.cells()) for line in RANKS_LINES if line.mode == "noattention") == 7 + 6 + 6 + 5 + 8 + 7


@pytest.mark.parametrize("line", RANKS_LINES, ids=lambda line: "-".join(map(str, vars(line).values())))
def test_of_the_engine(line, saved, tmp_path):
    shards = saved / f"split8-codellama{line.size}"
    done = synth(*line.arguments(tmp_path), "--tp-dir", shards, "--tp", 8, "--dry-run")
    assert (done.status, done.stderr) == (0, "")
    assert planned(done.stdout) == line.cells()
    assert f"{line.mode}: codellama/CodeLlama-{line.size}-Instruct-hf, float32, 8 rank(s)" in done.stdout

    # The same with the real shapes, which fit the eight GPUs of 40 GB that the figures are of.
    done = synth(*line.arguments(tmp_path), "--load-format", "dummy", "--tp", 8, "--dry-run")
    assert planned(done.stdout) == line.cells()
    assert max(float(row[-2]) for row in rows(done.stdout)) < 40e9 / 2**30


@pytest.mark.parametrize("mode", ["vllm", "vllm_notok"])
@pytest.mark.parametrize("line", VLLM_LINES, ids=lambda line: "-".join(map(str, vars(line).values())))
def test_of_vllm(line, mode, tmp_path, monkeypatch):
    arguments = [*replace(line, mode=mode).arguments(tmp_path), "--tp", 8]
    monkeypatch.setattr(modes, "find_spec", lambda library: None)
    for extra in ([], ["--dry-run"]):
        assert_mistake(synth(*arguments, *extra), f"mode {mode} needs vllm, which is not installed; run in the repository's root: pip install -e")
    monkeypatch.setattr(modes, "find_spec", lambda library: library)
    done = synth(*arguments, "--load-format", "dummy", "--dry-run")
    assert planned(done.stdout) == line.cells()


UNIQUE = list(range(0, 513, 16))
# ``for u in {0..512..16}`` is a command for each length.
MICRO_LINES = [
    *((mode, size, 2 * size, "0:513:16") for mode in ("base", "hydragen") for size in (512, 1024, 2048)),
    ("hydragen", 4096, 8192, "0:513:16"),
    *(("base", 4096, 8192, str(unique)) for unique in UNIQUE),
]


@pytest.mark.parametrize("line", MICRO_LINES, ids=lambda line: "-".join(map(str, line)))
def test_of_the_microbenchmarks(line, tmp_path, monkeypatch):
    mode, batch_size, num_shared, num_unique = line
    monkeypatch.setattr(micro_sweep, "available_bytes", lambda group: 40 * 10**9)  # the figures' GPUs have as much
    done = micro(tmp_path / "microbenchmarks", batch_size, num_shared, num_unique, "--mode", mode, "--dry-run")
    assert (done.status, done.stderr) == (0, "")
    lengths = UNIQUE if ":" in num_unique else [int(num_unique)]
    assert planned(done.stdout) == [(batch_size, num_shared, unique) for unique in lengths]
    assert {row[5] for row in rows(done.stdout)} == {mode}


def test_of_the_microbenchmarks_in_one_directory_and_process(tmp_path, monkeypatch):
    """The last of them took a process for each length, as the first run left no memory to the second."""
    set_machine(monkeypatch)
    outdir = tmp_path / "microbenchmarks"
    for mode, batch_size, num_shared, _ in MICRO_LINES[:8]:
        smaller = (outdir, batch_size // 256, num_shared // 256, "0:17:16", "--mode", mode, "--num-iters", 1)
        done = micro(*smaller, "--num-warmup", 0, "--device", "cpu")
        assert done.status == 0, done.stderr
    results = FILES.read_all([outdir])
    assert {result.status for result in results} == {"ok"} and len(results) == 16
    assert done.stdout.count("~") > 4  # ratios between the runs
