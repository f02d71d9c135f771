import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from checkpoints import save_hf
from safetensors.torch import save_file

from engine.checkpoint import Checkpoint
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.loader import load_model
from engine.shard_writer import write_shards
from engine.shards import rank_file
from engine.weight_files import TorchFile, open_weights

GRID = torch.arange(12.0).view(3, 4)


def save_bin(path: Path, value: object, old: bool = False) -> Path:
    """As PyTorch writes it; with ``old`` as it did before version 1.6."""
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    return path


def repack(path: Path, compression: int = zipfile.ZIP_STORED, data: slice = slice(None)) -> None:
    """The same zip archive, compressed in another way, or with only a part of each tensor's bytes."""
    original = path.rename(path.with_suffix(".original"))
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[data] if "/data/" in name else old.read(name))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin", "compressed bin"])
class TestEveryKind:
    @pytest.fixture
    def file(self, kind, tmp_path):
        tensors = {"grid": GRID, "half": GRID.to(torch.bfloat16), "one": torch.tensor(7.0), "ids": torch.arange(3)}
        if kind == "safetensors":
            save_file(tensors, tmp_path / "x.safetensors")
            return open_weights(tmp_path / "x.safetensors")
        save_bin(tmp_path / "x.bin", tensors, old=kind == "old bin")
        if kind == "compressed bin":
            repack(tmp_path / "x.bin", zipfile.ZIP_DEFLATED)
        return open_weights(tmp_path / "x.bin")

    def test_reads_whole_tensors_and_parts(self, file):
        assert sorted(file.names()) == ["grid", "half", "ids", "one"]
        assert (file.shape("grid"), file.shape("one")) == ((3, 4), ())
        assert (file.dtype("grid"), file.dtype("half")) == (torch.float32, torch.bfloat16)
        assert torch.equal(file.read("grid"), GRID)
        assert torch.equal(file.read("grid", 0, 1, 2), GRID[1:2])
        assert torch.equal(file.read("half", 1, 2), GRID[:, 2:].to(torch.bfloat16))
        assert file.read("one") == 7

    def test_what_was_read_outlives_the_file(self, file):
        part = file.read("grid", 1, 1, 3)
        file.close()
        assert torch.equal(part, GRID[:, 1:3])

    def test_refuses_by_name(self, file):
        with pytest.raises(InputError, match=r"x\.\w+: cannot read nope \(.*\); fetch the file again"):
            file.shape("nope")
        for use in (file.read, file.dtype):
            with pytest.raises(InputError, match=r"x\.\w+: ids is stored as (I64|int64); accepted: .*use an unquan"):
                use("ids")


class TestTorchFile:
    @pytest.mark.parametrize("old", [False, True])
    def test_tensors_that_share_or_are_not_contiguous(self, tmp_path, old):
        tied = torch.nn.Parameter(GRID.clone())
        state = {"a": tied, "tied": tied, "rows": GRID[1:], "column": GRID[:, 2], "turned": GRID.t()}
        file = TorchFile(save_bin(tmp_path / "x.bin", state | {"spread": torch.ones(1).expand(2, 3)}, old))
        expected = state | {"spread": torch.ones(2, 3)}
        assert all(torch.equal(file.read(name), tensor) for name, tensor in expected.items())
        assert torch.equal(file.read("turned", 0, 1, 3), GRID.t()[1:3])
        assert not file.read("a").requires_grad

    def test_the_state_of_a_module_with_its_metadata(self, tmp_path):
        layer = torch.nn.Linear(3, 2)
        file = TorchFile(save_bin(tmp_path / "x.bin", layer.state_dict()))
        assert torch.equal(file.read("weight"), layer.weight) and torch.equal(file.read("bias"), layer.bias)

    def test_the_file_is_never_written(self, tmp_path):
        path = save_bin(tmp_path / "x.bin", {"a": GRID})
        before = path.read_bytes()
        TorchFile(path).read("a").zero_()
        assert path.read_bytes() == before

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory accounting")
    def test_reading_a_part_allocates_no_memory(self, tmp_path):
        path = save_bin(tmp_path / "x.bin", {"big": torch.ones(16384, 2048)})  # 128 MiB

        def resident(kind: str) -> int:
            return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

        mapped, anonymous = resident("RssFile"), resident("RssAnon")
        file = TorchFile(path)
        assert file.read("big", 0, 4096, 5120).sum() == 1024 * 2048
        assert resident("RssFile") - mapped < 32 * 2**20
        assert file.read("big", 1, 0, 1024).sum() == 16384 * 1024
        assert resident("RssAnon") - anonymous < 32 * 2**20


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made-by-the-file",)


class TestRefusals:
    def refused(self, path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            TorchFile(path)
        assert str(caught.value).startswith(f"{path} ")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("old", [False, True])
    def test_code(self, tmp_path, monkeypatch, old):
        monkeypatch.chdir(tmp_path)
        path = save_bin(tmp_path / "x.bin", {"a": GRID, "b": Evil()}, old)
        self.refused(path, r"asks for posix.mkdir, which is not a tensor and could run code; .*do not trust it")
        assert not (tmp_path / "made-by-the-file").exists()

    def test_a_whole_module(self, tmp_path):
        self.refused(save_bin(tmp_path / "x.bin", torch.nn.Linear(2, 2)), "asks for torch.nn.modules.linear.Linear, wh")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([GRID], "holds list; accepted: a dict of names and tensors"),
            (GRID, "holds Tensor; accepted: a dict"),
            ({"model": {"a": GRID}}, "holds dict as 'model'; accepted: a dict of names and dense tensors"),
            ({"a": GRID, "step": 3}, "holds int as 'step'"),
            ({3: GRID}, "holds a tensor.* as 3|holds Tensor as 3"),
            ({"a": GRID.to_sparse()}, "holds a tensor that is sparse or has no data as 'a'"),
            ({"a": torch.empty(2, device="meta")}, "sparse or has no data as 'a'"),
        ],
    )
    def test_what_is_no_dict_of_dense_tensors(self, tmp_path, value, message):
        self.refused(save_bin(tmp_path / "x.bin", value), message)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
    def test_dtypes(self, tmp_path, dtype):
        file = TorchFile(save_bin(tmp_path / "x.bin", {"a": torch.ones(2).to(dtype)}))
        with pytest.raises(InputError, match=f"x.bin: a is stored as {str(dtype)[6:]}; accepted: float64, float32, fl"):
            file.read("a")

    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize("keep", [0, 1, 4, 60, 400, -1])
    def test_truncated_files(self, tmp_path, old, keep):
        path = save_bin(tmp_path / "x.bin", {"a": GRID}, old)
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(path, r"is truncated or not a PyTorch file of tensors \(.+\); fetch it again")

    @pytest.mark.parametrize("data", [b"<html>", b"version https://git-lfs", b"PK\3\4", b"\x80\x04\x95", b"\0" * 100])
    def test_something_else(self, tmp_path, data):
        (tmp_path / "x.bin").write_bytes(data)
        self.refused(tmp_path / "x.bin", "is truncated or not a PyTorch file of tensors")

    @pytest.mark.parametrize("old", [False, True])
    def test_flipped_bytes_are_refused_or_give_tensors(self, tmp_path, old):
        path = save_bin(tmp_path / "x.bin", {"a": GRID, "b": GRID.t()}, old)
        whole, random = path.read_bytes(), Random(0)
        num_refused = 0
        for _ in range(400):
            damaged = bytearray(whole)
            for place in random.choices(range(len(whole)), k=4):
                damaged[place] = random.randrange(256)
            path.write_bytes(damaged)
            try:
                file = TorchFile(path)
                assert all(len(file.shape(name)) < 5 for name in file.names())
            except InputError as error:
                assert str(error).startswith(f"{path} ") and "\n" not in str(error)
                num_refused += 1
        assert 100 < num_refused < 400

    def test_tensors_larger_than_the_file(self, tmp_path):
        path = save_bin(tmp_path / "x.bin", {"a": torch.ones(10000)})
        repack(path, data=slice(8))
        self.refused(path, "is truncated or not a PyTorch file of tensors")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            TorchFile(tmp_path / "x.bin")


@pytest.fixture(scope="module", params=["one file", "several", "old", "tied"])
def folders(request, tmp_path_factory):
    """One model twice: as safetensors, and as ``.bin`` files."""
    family = "llama, multi-head, tied" if request.param == "tied" else "llama, biases, head_dim"
    folder, other = save_hf(tmp_path_factory.mktemp("safetensors"), family), tmp_path_factory.mktemp("bin")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / name, other)
    with Checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint.read(name).clone() for name in checkpoint.names()}
    if request.param == "several":
        parts = [{name: tensors[name] for name in list(tensors)[number::3]} for number in range(3)]
        for number, part in enumerate(parts):
            save_bin(other / f"part-{number}.bin", part)
        weight_map = {name: f"part-{number}.bin" for number, part in enumerate(parts) for name in part}
        (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder, other
    if request.param == "tied":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    else:  # in another order of memory, and with what old versions of transformers left in
        tensors = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_bin(other / "pytorch_model.bin", tensors, old=request.param == "old")
    return folder, other


class TestWholeModel:
    @pytest.mark.parametrize("num_splits", [1, 4])
    def test_shards_are_the_same_bytes(self, folders, tmp_path, num_splits):
        for folder in folders:
            write_shards(folder, tmp_path / folder.name, num_splits, model_name="owner/name")
        for rank in range(num_splits):
            first, second = ((tmp_path / folder.name / rank_file(rank, num_splits)).read_bytes() for folder in folders)
            assert first == second

    @pytest.mark.parametrize("rank", [0, 3])
    def test_a_rank_loads_the_same_parameters(self, folders, rank, monkeypatch):
        monkeypatch.setattr("engine.loader._together", lambda group, action: action())  # the other ranks are not there
        monkeypatch.setattr("engine.loader.available_bytes", lambda group: 2**40)
        first, second = (dict(load_model(folder, TPGroup(rank, 4)).model.state_dict()) for folder in folders)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("length", [1, 300, 5000, 30_000, 60_000, 90_000])
def test_an_archive_that_ends_too_soon_is_named(tmp_path, length):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(30_000)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"pytorch_model.bin is truncated or not a PyTorch file of tensors"):
        open_weights(path)


def test_a_pytorch_file_that_is_too_large_to_be_mapped(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("unable to mmap 98315847104 bytes from file <x>: Cannot allocate memory (12)")

    path = save_bin(tmp_path / "pytorch_model.bin", {"a": GRID})
    monkeypatch.setattr("torch.load", no_memory)
    with pytest.raises(InputError, match=r"has 0.0 GB, more than PyTorch maps .*Cannot allocate memory"):
        open_weights(path)
