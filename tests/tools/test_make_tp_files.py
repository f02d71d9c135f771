import importlib.util
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import save_hf
from typer.testing import CliRunner

from engine.checkpoint import weight_shapes, write_checkpoint
from engine.config import ModelConfig
from engine.dummy import dummy_tensor
from engine.errors import InputError
from engine.files import locked_directory
from engine.presets import find_preset
from engine.safetensors_writer import num_bytes
from engine.shard_writer import write_shards
from engine.shards import MANIFEST_FILE, open_shards, rank_file, verify

TOOL = Path(__file__).parents[2] / "tools" / "make_tp_files.py"
MIB = 2**20


def load_tool():
    spec = importlib.util.spec_from_file_location("make_tp_files", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, TOOL, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def save_random(folder: Path, config: ModelConfig) -> Path:
    shapes = weight_shapes(config)
    write_checkpoint(folder, config, ((name, dummy_tensor(name, shapes[name], config.dtype)) for name in shapes))
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """100 MiB of which no tensor has more than 8."""
    config = replace(find_preset("tiny"), vocab_size=4096, hidden_size=512, intermediate_size=1408)
    config = replace(config, num_layers=7, num_heads=8, num_kv_heads=8, head_dim=64)
    return save_random(tmp_path_factory.mktemp("large"), config)


class TestCommand:
    def test_cut_and_verify(self, hf_folder, tmp_path, capsys):
        outdir = tmp_path / "new" / "x"
        code, stdout, stderr = finish(start(hf_folder, outdir, "--num-splits", 2, "--dtype", "float16"))
        assert code == 0, stderr
        assert "cutting" in stderr
        for text in (rank_file(0, 2), rank_file(1, 2), "config.json", "float16", "MB/s", "5 files"):
            assert text in stdout
        manifest = open_shards(outdir).manifest
        assert (manifest.model_name, manifest.config.dtype) == (str(hf_folder), torch.float16)

        tool.main(verify_dir=outdir)
        assert capsys.readouterr().out == f"{outdir}: all 5 files are as they were written\n"
        path = outdir / rank_file(1, 2)
        data = bytearray(path.read_bytes())
        data[-9] ^= 4
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"{outdir}: bad files, 1 of 5: {path.name} has another checksum"):
            tool.main(verify_dir=outdir)

    def test_a_complete_one_is_said_to_be(self, hf_folder, tmp_path, capsys):
        arguments = dict(model=str(hf_folder), outdir=tmp_path, num_splits=4)
        tool.main(**arguments)
        capsys.readouterr()
        tool.main(**arguments)
        assert capsys.readouterr() == (
            f"{tmp_path} is complete already: {hf_folder} in 4 parts; nothing to do (--force cuts it anew)\n",
            "",
        )
        tool.main(**arguments, force=True)
        assert "7 files" in capsys.readouterr().out

    def test_a_mistake_is_one_line(self, hf_folder, tmp_path):
        (tmp_path / "file").write_text("")
        code, stdout, stderr = finish(start(hf_folder, tmp_path / "file" / "x", "--num-splits", 2))
        assert (code, stdout, stderr) == (2, "", f"error: {tmp_path}/file/x: Not a directory\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(), "accepted: MODEL OUTDIR --num-splits N, or --verify OUTDIR"),
            (dict(model="m", outdir=Path("x")), "accepted: MODEL OUTDIR --num-splits N, or --verify OUTDIR"),
            (dict(verify_dir=Path("x"), model="m"), "accepted: nothing else with it"),
            (dict(verify_dir=Path("x"), num_splits=2), "accepted: nothing else with it"),
            (dict(verify_dir=Path("x"), force=True), "accepted: nothing else with it"),
            (dict(verify_dir=Path("/none")), f"/none has no {MANIFEST_FILE}"),
            (dict(model="tiny", outdir=Path("x"), num_splits=2), "no such folder: 'tiny'"),
        ],
    )
    def test_mistakes(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=message):
            tool.main(**arguments)
        assert list(tmp_path.iterdir()) == []

    def test_the_help_shows_how(self):
        stdout = CliRunner().invoke(tool.app, ["--help"]).stdout
        assert "python tools/make_tp_files.py codellama/CodeLlama-7b-hf split8 --num-splits 8" in stdout
        assert "python tools/make_tp_files.py --verify split8" in stdout


def test_after_a_kill_nothing_loads_and_the_same_command_finishes(large_folder, tmp_path):
    arguments = (large_folder, tmp_path, "--num-splits", 4)
    process = start(*arguments)
    while not any(path.stat().st_size > 5 * MIB for path in tmp_path.glob(".rank-*.partial")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    with pytest.raises(InputError, match=f"has no {MANIFEST_FILE}"):
        open_shards(tmp_path)

    code, _, stderr = finish(start(*arguments))
    assert code == 0, stderr
    verify(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST_FILE, *open_shards(tmp_path).manifest.files}


def peak_anonymous(process: subprocess.Popen) -> int:
    """The most anonymous memory, in bytes, that the process was seen with until it ended."""
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if match := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, int(match[1]) * 1024)
        time.sleep(0.001)
    assert finish(process)[0] == 0
    return peak


def growth(folder: Path, small: Path, tmp_path: Path, *options: object) -> int:
    """Bytes of anonymous memory beyond what the same command takes for a model that is next to nothing."""
    own = peak_anonymous(start(small, tmp_path / "small", *options))
    return peak_anonymous(start(folder, tmp_path / "large", *options)) - own


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestMemory:
    def test_tensor_by_tensor(self, large_folder, hf_folder, tmp_path):
        largest = 8 * MIB
        total = sum(path.stat().st_size for path in large_folder.glob("*.safetensors"))
        assert total > 90 * MIB
        assert growth(large_folder, hf_folder, tmp_path, "--num-splits", 2) < 2 * largest + 24 * MIB

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [("1", "float32"), ("1", "bfloat16"), ("4", "float32"), ("4", "bfloat16")])
    def test_within_the_promise(self, hf_folder, tmp_path, options):
        """Twice the largest tensor and 200 MiB, for a checkpoint that is several times that."""
        num_splits, dtype = options
        config = replace(find_preset("llama-125m"), num_layers=36)
        folder = save_random(tmp_path / "checkpoint", config)
        largest = max(num_bytes(config.dtype, shape) for shape in weight_shapes(config).values())
        limit = 2 * largest + 200 * MIB
        assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 1.5 * limit
        assert growth(folder, hf_folder, tmp_path, "--num-splits", num_splits, "--dtype", dtype) < limit


def test_one_run_at_a_time_writes_a_directory(hf_folder, tmp_path):
    with locked_directory(tmp_path), pytest.raises(InputError, match="is being written by another run; wait for its"):
        write_shards(hf_folder, tmp_path, 2, model_name="x")
    assert list(tmp_path.iterdir()) == []
    assert write_shards(hf_folder, tmp_path, 2, model_name="x").written
