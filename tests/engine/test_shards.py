import errno
import hashlib
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from checkpoints import SPLITS, save_hf
from models import hf_model
from safetensors.torch import load_file, save_file

import engine.shard_writer
from engine.checkpoint import Checkpoint, load_config
from engine.errors import InputError
from engine.safetensors_writer import SafetensorsWriter
from engine.shard_writer import Split, write_shards
from engine.sharding import Rule
from engine.shards import MANIFEST_FILE, open_shards, rank_file, verify


def split(folder: Path, outdir: Path, num_splits: int = 2, **options) -> Split:
    return write_shards(folder, outdir, num_splits, **dict(model_name="owner/name") | options)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def shard_folder(hf_folder, tmp_path):
    return split(hf_folder, tmp_path / "shards").shards.folder


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestWhatIsWritten:
    @pytest.mark.parametrize(("family", "changes", "num_splits"), SPLITS)
    def test_the_parts_make_up_the_checkpoint(self, tmp_path, family, changes, num_splits):
        folder = save_hf(tmp_path / "hf", family, **changes)
        shards = split(folder, tmp_path / "shards", num_splits).shards
        ranks = [load_file(tmp_path / "shards" / rank_file(rank, num_splits)) for rank in range(num_splits)]
        with Checkpoint(folder) as checkpoint:
            assert set(shards.manifest.tensors) == set(checkpoint.names())
            for name, record in shards.manifest.tensors.items():
                full = checkpoint.read(name)
                assert record.shape == full.shape
                self.check(record, full, [rank.pop(name) for rank in ranks], shards.manifest.config.head_dim)
        assert not any(ranks)

    def check(self, record, full: torch.Tensor, parts: list[torch.Tensor], head_dim: int) -> None:
        if record.rule is Rule.REPLICATED:
            assert all(torch.equal(part, full) for part in parts)
            return
        assert len({part.shape for part in parts}) == 1
        if record.rule is Rule.KV_HEADS and len(full) < head_dim * len(parts):
            parts = parts[:: len(parts) * head_dim // len(full)]  # neighbours share a head
            assert {len(part) for part in parts} == {head_dim}
        if record.rule is Rule.FUSED:
            pieces = self.pieces(full, len(parts), head_dim)
            for rank, part in enumerate(parts):
                assert torch.equal(part, torch.cat([piece[rank] for piece in pieces]))
            return
        joined = torch.cat(parts, record.dim)
        if record.rule is Rule.VOCAB:
            assert not joined[len(full) :].any()
            joined = joined[: len(full)]
        assert torch.equal(joined, full)

    def pieces(self, full: torch.Tensor, num_ranks: int, head_dim: int) -> list[list[torch.Tensor]]:
        """Of each projection in a fused tensor what each rank holds. (Of 4 query and 2 KV heads, or gate and up.)"""
        if len(full) != 8 * head_dim:
            return [list(half.chunk(num_ranks)) for half in full.chunk(2)]
        heads = full.unflatten(0, (8, head_dim))
        q, k, v = heads[:4].flatten(0, 1), heads[4:6], heads[6:]
        kv_rank = [rank * 2 // num_ranks for rank in range(num_ranks)] if num_ranks > 1 else [slice(None)]
        return [list(q.chunk(num_ranks)), *[[x[r].reshape(-1, full.shape[1]) for r in kv_rank] for x in (k, v)]]

    def test_neighbouring_ranks_hold_the_same_kv_head(self, hf_folder, tmp_path):
        split(hf_folder, tmp_path, 4)
        keys = [load_file(tmp_path / rank_file(r, 4))["model.layers.1.self_attn.k_proj.weight"] for r in range(4)]
        assert torch.equal(keys[0], keys[1])
        assert torch.equal(keys[2], keys[3])
        assert not torch.equal(keys[0], keys[2])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype(self, hf_folder, tmp_path, dtype):
        manifest = split(hf_folder, tmp_path, 1, dtype=dtype).shards.manifest
        assert manifest.config.dtype == load_config(tmp_path).dtype == dtype
        with Checkpoint(hf_folder) as checkpoint:
            for name, tensor in load_file(tmp_path / rank_file(0, 1)).items():
                assert tensor.dtype == dtype
                assert torch.equal(tensor, checkpoint.read(name).to(dtype))

    def test_the_manifest_describes_every_file(self, hf_folder, shard_folder):
        raw = json.loads((shard_folder / MANIFEST_FILE).read_text())
        assert (raw["format_version"], raw["num_splits"], raw["dtype"]) == (1, 2, "float32")
        assert raw["model_name"] == "owner/name"
        assert raw["tensors"]["lm_head.weight"] == {"rule": "vocab", "shape": [67, 48], "dim": 0}
        files = state(shard_folder)
        del files[MANIFEST_FILE]
        assert {rank_file(0, 2), rank_file(1, 2), "config.json", "tokenizer.json"} < set(files)
        assert raw["files"] == {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        }
        assert load_config(shard_folder) == load_config(hf_folder) == open_shards(shard_folder).manifest.config

    def test_generation_config_and_its_end_of_sequence_ids(self, tmp_path):
        folder = save_hf(tmp_path / "hf")
        (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
        shards = split(folder, tmp_path / "shards").shards
        assert shards.manifest.config.eos_token_ids == (3, 5)
        assert open_shards(tmp_path / "shards") == shards

    def test_progress_counts_every_byte_of_the_tensors(self, hf_folder, tmp_path):
        calls = []
        split(hf_folder, tmp_path, on_progress=lambda *call: calls.append(call))
        tensors = [t for r in range(2) for t in load_file(tmp_path / rank_file(r, 2)).values()]
        total = sum(tensor.nbytes for tensor in tensors)
        assert calls[-1] == (total, total)
        assert len(calls) == len(tensors)
        assert calls == sorted(calls)


class TestRefusedBeforeWriting:
    def test_a_number_of_splits_that_does_not_divide(self, hf_folder, tmp_path):
        with pytest.raises(InputError, match="into 3 parts; accepted: 1, 2, 4"):
            split(hf_folder, tmp_path / "new", 3)
        assert not (tmp_path / "new").exists()

    def test_an_incomplete_checkpoint(self, tmp_path):
        folder = save_hf(tmp_path / "hf")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"]["model.norm.weight"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="missing model.norm.weight"):
            split(folder, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("force", [False, True])
    def test_a_checkpoint_is_never_written_into(self, hf_folder, force):
        before = state(hf_folder)
        with pytest.raises(InputError, match="holds a model .model.safetensors.index.json.; accepted: an empty folder"):
            split(hf_folder, hf_folder, force=force)
        assert state(hf_folder) == before

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
    def test_a_checkpoint_of_bin_files_is_never_written_into(self, hf_folder, tmp_path, name, force):
        (tmp_path / name).write_text("precious")
        with pytest.raises(InputError, match=f"holds a model .{name}.; accepted: an empty folder"):
            split(hf_folder, tmp_path, force=force)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_weights_that_the_dtype_does_not_hold(self, tmp_path):
        hf = hf_model()
        hf.get_parameter("model.layers.1.mlp.up_proj.weight").data[5, 5] = 1e5
        hf.save_pretrained(tmp_path / "large")
        with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight holds NaN or infinity in float16; .* 65504"):
            split(tmp_path / "large", tmp_path / "out", dtype=torch.float16)
        with pytest.raises(InputError, match="unfinished|has no tp_manifest"):
            open_shards(tmp_path / "out")

    def test_a_file_in_the_place_of_the_folder(self, hf_folder, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="file is a file"):
            split(hf_folder, tmp_path / "file", force=True)

    @pytest.mark.parametrize("name", ["notes.txt", "config.json", "tokenizer.json", "rank-0.safetensors"])
    def test_foreign_files(self, hf_folder, tmp_path, name):
        (tmp_path / name).write_text("precious")
        with pytest.raises(InputError, match=f"holds {name}, which is not of a split; .* --force"):
            split(hf_folder, tmp_path)
        assert state(tmp_path) == {name: b"precious"}
        assert split(hf_folder, tmp_path, force=True).written
        verify(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "options", "message"),
        [
            ({}, dict(num_splits=4), "2 parts, not 4"),
            ({}, dict(dtype=torch.bfloat16), "float32 weights, not bfloat16"),
            (dict(rms_norm_eps=0.5), {}, "another config than owner/name's"),
            (dict(seed=1), {}, "other weights than owner/name's"),
        ],
    )
    def test_another_split(self, shard_folder, tmp_path, changes, options, message):
        other = save_hf(tmp_path / "other", **changes)
        before = state(shard_folder)
        with pytest.raises(InputError, match=f"holds a split of owner/name with {message}; .* --force"):
            split(other, shard_folder, **options)
        assert state(shard_folder) == before

        done = split(other, shard_folder, **options, force=True)
        assert done.written
        assert open_shards(shard_folder) == done.shards
        verify(shard_folder)
        assert set(state(shard_folder)) == {*done.shards.manifest.files, MANIFEST_FILE}

    def test_another_tokenizer(self, shard_folder, tmp_path):
        other = save_hf(tmp_path / "other")
        (other / "tokenizer.json").write_text("{}")
        with pytest.raises(InputError, match="with another tokenizer.json than owner/name's"):
            split(other, shard_folder)


class TestRepeated:
    def test_a_finished_split_is_left_alone(self, hf_folder, shard_folder):
        inodes = {path: path.stat().st_ino for path in shard_folder.iterdir()}
        done = split(hf_folder, shard_folder, model_name="the same under another name")
        assert not done.written
        assert done.shards == open_shards(shard_folder)
        assert {path: path.stat().st_ino for path in shard_folder.iterdir()} == inodes
        assert split(hf_folder, shard_folder, force=True).written

    @pytest.mark.parametrize("name", [rank_file(1, 2), "tokenizer.json"])
    def test_one_that_lost_a_file_is_written_again(self, hf_folder, shard_folder, name):
        before = state(shard_folder)
        (shard_folder / name).unlink()
        assert split(hf_folder, shard_folder).written
        assert state(shard_folder) == before


class Killed(BaseException):
    """Stands for what no handler expects."""


def stop_after(monkeypatch, count: int, stop) -> None:
    """The run calls ``stop`` instead of its ``count``-th step, where a step is a tensor, a rename or a small file."""
    steps = iter(range(count))

    def counted(function):
        def step(*args):
            if next(steps, None) is None:
                stop()
            return function(*args)

        return step

    monkeypatch.setattr(SafetensorsWriter, "write", counted(SafetensorsWriter.write))
    monkeypatch.setattr(engine.safetensors_writer, "replace_whole", counted(engine.safetensors_writer.replace_whole))
    monkeypatch.setattr(engine.files, "replace_whole", counted(engine.files.replace_whole))


NUM_STEPS = 2 * 21 + 2 + 4  # tensors and renames of two ranks; config, generation config, tokenizer and manifest


class TestStopped:
    @pytest.mark.parametrize("count", [0, 1, 30, 42, 43, 44, 46, NUM_STEPS - 1])
    def test_after_a_kill_nothing_loads_and_a_repeated_run_finishes(self, hf_folder, tmp_path, count, monkeypatch):
        child = os.fork()
        if child == 0:
            try:
                stop_after(monkeypatch, count, lambda: os.kill(os.getpid(), signal.SIGKILL))
                split(hf_folder, tmp_path)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert list(tmp_path.iterdir())
        for use in (open_shards, verify):
            with pytest.raises(InputError, match=f"has no {MANIFEST_FILE}; .* run it again"):
                use(tmp_path)
        assert split(hf_folder, tmp_path).written
        assert verify(tmp_path) == open_shards(tmp_path)
        assert set(state(tmp_path)) == {*open_shards(tmp_path).manifest.files, MANIFEST_FILE}

    def test_a_kill_while_writing_over_another_split(self, hf_folder, shard_folder, monkeypatch):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(engine.shard_writer, "_write", self.raise_killed)
            split(hf_folder, shard_folder, 4, force=True)
        assert state(shard_folder) == {}

    @staticmethod
    def raise_killed(*_):
        raise Killed

    @pytest.mark.parametrize("count", [0, 30, 43, 45, NUM_STEPS - 1])
    def test_a_full_disk_leaves_nothing(self, hf_folder, tmp_path, count, monkeypatch):
        def stop():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        stop_after(monkeypatch, count, stop)
        message = r"No space left on device; the split takes \d\.\d MB; make room"
        with pytest.raises(InputError, match=message) as caught:
            split(hf_folder, tmp_path / "new")
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "new").iterdir()) == []

    def test_these_are_all_the_steps(self, hf_folder, tmp_path, monkeypatch):
        stop_after(monkeypatch, NUM_STEPS, lambda: pytest.fail("one more"))
        assert split(hf_folder, tmp_path).written


def edit(path: Path, **changes) -> None:
    """Changes fields of a JSON object; None drops one."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


class TestDamagedManifest:
    def refused(self, folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            open_shards(folder)
        assert MANIFEST_FILE in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"null", b"\xff", b'{"format_version": 1'])
    def test_not_a_json_object(self, shard_folder, data):
        (shard_folder / MANIFEST_FILE).write_bytes(data)
        self.refused(shard_folder, f"{MANIFEST_FILE} is damaged .* cut the model again")

    @pytest.mark.parametrize("version", [0, 2, "1"])
    def test_another_format(self, shard_folder, version):
        edit(shard_folder / MANIFEST_FILE, format_version=version, files=None)
        self.refused(shard_folder, f"has format version {version!r}; accepted: 1")

    @pytest.mark.parametrize(
        "field",
        ["format_version", "model_name", "num_splits", "dtype", "config", "fingerprint", "tensors", "files"],
    )
    def test_a_missing_field_and_one_of_a_wrong_type(self, shard_folder, field):
        path = shard_folder / MANIFEST_FILE
        whole = path.read_text()
        edit(path, **{field: None})
        self.refused(shard_folder, f"has no field '{field}'")
        path.write_text(whole)
        edit(path, **{field: 1.5})
        self.refused(shard_folder, "is damaged|has format version 1.5")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(num_splits=True), "True where a int belongs"),
            (dict(num_splits=4), "no record of rank-00000-of-00004"),
            (dict(dtype="float16"), "dtype is 'float16', but the config's 'float32'"),
            (dict(config={}), "is damaged .*model_type"),
            (dict(tensors={"a": {"rule": "diagonal", "shape": [1], "dim": 0}}), "diagonal"),
            (dict(tensors={"a": {"rule": "row", "shape": [1]}}), "has no field 'dim'"),
            (dict(tensors={}), "not cut by the rules of this engine"),
            (dict(files={"x": {"size": "1", "sha256": ""}}), "'1' where a int belongs"),
        ],
    )
    def test_fields_that_cannot_be(self, shard_folder, changes, message):
        edit(shard_folder / MANIFEST_FILE, **changes)
        self.refused(shard_folder, message)

    def test_a_file_outside_the_directory(self, shard_folder):
        path = shard_folder / MANIFEST_FILE
        files = json.loads(path.read_text())["files"]
        edit(path, files=files | {"../secret": {"size": 1, "sha256": ""}})
        self.refused(shard_folder, "file '../secret' is not a plain name")

    def test_a_config_that_was_edited(self, shard_folder):
        edit(shard_folder / "config.json", rms_norm_eps=0.25)
        self.refused(shard_folder, "config.json or generation_config.json differs from")

    def test_one_that_was_cut_by_other_rules(self, shard_folder):
        path = shard_folder / MANIFEST_FILE
        tensors = json.loads(path.read_text())["tensors"]
        tensors["lm_head.weight"]["rule"] = "column"
        edit(path, tensors=tensors)
        self.refused(shard_folder, "not cut by the rules of this engine")

    def test_no_shard_directory_at_all(self, tmp_path, hf_folder):
        (tmp_path / "file").write_text("")
        for folder in (tmp_path, tmp_path / "none", tmp_path / "file", hf_folder):
            self.refused(folder, f"has no {MANIFEST_FILE}; accepted: a directory that tools/make_tp_files.py")

    def test_writing_over_it_needs_force(self, hf_folder, shard_folder):
        (shard_folder / MANIFEST_FILE).write_text("{")
        with pytest.raises(InputError, match="holds a split that does not load: .* --force"):
            split(hf_folder, shard_folder)
        assert split(hf_folder, shard_folder, force=True).written


def flip_bit(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rename_tensor(path: Path) -> None:
    """The file keeps its size."""
    path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.form.weight"))


class TestVerify:
    def test_what_was_just_written(self, shard_folder):
        calls = []
        shards = verify(shard_folder, on_progress=lambda *call: calls.append(call))
        total = sum(record.size for record in shards.manifest.files.values())
        assert calls[-1] == (total, total)

    def test_every_bad_file_in_one_line(self, hf_folder, tmp_path):
        split(hf_folder, tmp_path, 4)
        flip_bit(tmp_path / rank_file(0, 4))
        (tmp_path / rank_file(1, 4)).unlink()
        os.truncate(tmp_path / rank_file(2, 4), 100)
        flip_bit(tmp_path / "tokenizer.json")
        with pytest.raises(InputError) as caught:
            verify(tmp_path)
        message = str(caught.value)
        assert "\n" not in message
        assert "bad files, 4 of 7: " in message
        assert f"{rank_file(0, 4)} has another checksum" in message
        assert f"{rank_file(1, 4)} is missing" in message
        assert re.search(rf"{rank_file(2, 4)} has 100 bytes, not \d+", message)
        assert "tokenizer.json has another checksum" in message

    def test_two_ranks_files_that_were_exchanged(self, shard_folder):
        first, second = shard_folder / rank_file(0, 2), shard_folder / rank_file(1, 2)
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        with pytest.raises(InputError, match="bad files, 2 of 5"):
            verify(shard_folder)

    def test_without_checksums_sizes_and_headers_remain(self, shard_folder):
        path = shard_folder / rank_file(1, 2)
        flip_bit(path)
        verify(shard_folder, checksums=False)
        rename_tensor(path)
        with pytest.raises(InputError, match=f"{path.name} holds other tensors .* model.form.weight"):
            verify(shard_folder, checksums=False)


class TestOpenRank:
    def refused(self, folder: Path, message: str) -> None:
        shards = open_shards(folder)
        with shards.open_rank(0):
            pass
        with pytest.raises(InputError, match=message) as caught:
            shards.open_rank(1)
        assert "\n" not in str(caught.value)

    def test_missing(self, shard_folder):
        (shard_folder / rank_file(1, 2)).unlink()
        self.refused(shard_folder, f"{rank_file(1, 2)} is missing; copy the file again")

    @pytest.mark.parametrize("size", [0, 10, 1000])
    def test_truncated(self, shard_folder, size):
        os.truncate(shard_folder / rank_file(1, 2), size)
        self.refused(shard_folder, f"{rank_file(1, 2)} has {size} bytes, not")

    @pytest.mark.parametrize("offset", [7, 8, 20])
    def test_a_damaged_header(self, shard_folder, offset):
        flip_bit(shard_folder / rank_file(1, 2), offset)
        self.refused(shard_folder, f"{rank_file(1, 2)} is not safetensors|holds other tensors")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t | {"model.norm.weight": torch.zeros(24, 2)}, r"model.norm.weight: float32 \(24, 2\), not "),
            (lambda t: t | {"model.norm.weight": torch.zeros(48).half()}, r"float16 \(48,\), not float32 \(48,\)"),
            (lambda t: t | {"model.norm.weight": torch.zeros(48).int()}, "another dtype"),
            (lambda t: t | {"extra": torch.zeros(1)}, r"extra: float32 \(1,\), not none"),
            (lambda t: {name: t[name] for name in list(t)[:-1]}, ": none, not float32"),
        ],
    )
    def test_other_tensors_than_the_model_needs(self, shard_folder, change, message):
        path = shard_folder / rank_file(1, 2)
        save_file(change(load_file(path)), path, {"format": "pt"})
        manifest = shard_folder / MANIFEST_FILE
        files = json.loads(manifest.read_text())["files"]
        files[path.name]["size"] = path.stat().st_size  # so that the header is what is found wrong
        edit(manifest, files=files)
        self.refused(shard_folder, f"holds other tensors than its rank needs, such as .*{message}")
