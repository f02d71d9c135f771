import json
import struct
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from engine.checkpoint import (
    Checkpoint,
    check_weights,
    load_config,
    resolve_model,
    weight_shapes,
    write_checkpoint,
)
from engine.config import ModelConfig
from engine.dummy import dummy_tensor
from engine.errors import InputError
from engine.presets import find_preset

TINY = find_preset("tiny")


def tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: dummy_tensor(name, shape, config.dtype) for name, shape in weight_shapes(config).items()}


def save_model(folder: Path, config: ModelConfig = TINY, **changes: torch.Tensor | None) -> Path:
    """A single-file checkpoint, some of whose tensors are replaced, added or (None) dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor for name, tensor in (tensors(config) | changes).items() if tensor is not None}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def save_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder


class TestResolveLocal:
    def test_a_folder_is_itself(self, tmp_path):
        assert resolve_model(save_model(tmp_path / "m")) == tmp_path / "m"

    def test_revision_of_a_folder_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="revision 'v1' has no effect on the local folder"):
            resolve_model(save_model(tmp_path), revision="v1")

    def test_a_folder_without_a_config_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="has no config.json"):
            resolve_model(tmp_path)

    def test_a_file_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="is a file"):
            resolve_model(save_model(tmp_path) / "model.safetensors")

    @pytest.mark.parametrize(
        "name", ["/no/such", "./a/b", "../a", "~/nothing-here", "a/b/c", "a/b/", "tinny", "a b/c", "a\nb/c", ""]
    )
    def test_what_looks_like_a_path_never_reaches_the_hub(self, name, monkeypatch, tmp_path):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="no such folder|has no config.json"):
            resolve_model(name)


class FakeHub:
    """Stands in for ``snapshot_download``: copies what the patterns select, and records each call."""

    def __init__(self, cache: Path, files: dict[str, bytes]):
        self.folder = cache / "snapshots" / "c0ffee"
        self.files = files
        self.calls: list[tuple[str, str | None]] = []

    def __call__(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((repo_id, revision))
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in huggingface_hub.utils.filter_repo_objects(self.files, allow_patterns=allow_patterns):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_bytes(self.files[file])
        return str(self.folder)

    @property
    def downloaded(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
    useless = ["pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "README.md"]
    fake = FakeHub(tmp_path, {file: b"{}" for file in small + useless})
    fake.small = set(small)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


class TestResolveHub:
    def test_a_single_file_and_nothing_that_repeats_it(self, hub):
        hub.files |= {"model.safetensors": b"x"}
        assert resolve_model("owner/name", revision="v2") == hub.folder
        assert hub.downloaded == hub.small | {"model.safetensors"}
        assert hub.calls == [("owner/name", "v2")]

    def test_the_files_of_the_index_from_the_same_commit(self, hub):
        index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
        hub.files |= {"model.safetensors.index.json": json.dumps(index).encode()}
        hub.files |= {f"part-{i}.safetensors": b"x" for i in (1, 2, 3)}
        resolve_model("owner/name")
        parts = {"part-1.safetensors", "part-2.safetensors", "model.safetensors.index.json"}
        assert hub.downloaded == hub.small | parts
        assert hub.calls == [("owner/name", None), ("owner/name", "c0ffee")]

    def test_without_weights(self, hub):
        hub.files |= {"model.safetensors": b"x"}
        resolve_model("owner/name", weights=False)
        assert hub.downloaded == hub.small

    def test_an_index_that_leaves_the_folder_downloads_nothing_more(self, hub):
        hub.files |= {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'}
        with pytest.raises(InputError, match="x.safetensors"):
            resolve_model("owner/name")
        assert len(hub.calls) == 1

    def test_bin_files_only_where_there_are_no_safetensors(self, hub):
        assert resolve_model("owner/name", revision="v2") == hub.folder
        assert hub.downloaded == hub.small | {"pytorch_model.bin"}
        assert hub.calls == [("owner/name", "v2"), ("owner/name", "c0ffee")]

    def test_the_files_of_a_bin_index(self, hub):
        del hub.files["pytorch_model.bin"]
        index = {"weight_map": {"a": "part-1.bin", "b": "part-2.bin"}}
        hub.files |= {"pytorch_model.bin.index.json": json.dumps(index).encode()}
        hub.files |= {file: b"x" for file in ("part-1.bin", "part-2.bin", "part-3.bin", "training_args.bin")}
        resolve_model("owner/name")
        assert hub.downloaded == hub.small | {"part-1.bin", "part-2.bin", "pytorch_model.bin.index.json"}
        assert {revision for _, revision in hub.calls[1:]} == {"c0ffee"}

    def test_safetensors_win_whole_or_in_parts(self, hub):
        hub.files |= {"model.safetensors.index.json": b'{"weight_map": {"a": "part-1.safetensors"}}'}
        hub.files |= {"part-1.safetensors": b"x", "pytorch_model.bin.index.json": b"never read"}
        resolve_model("owner/name")
        assert hub.downloaded == hub.small | {"part-1.safetensors", "model.safetensors.index.json"}

    def test_a_model_without_a_config_is_refused(self, hub):
        del hub.files["config.json"]
        with pytest.raises(InputError, match="owner/name has no config.json"):
            resolve_model("owner/name")

    def test_errors_are_one_line_and_say_what_to_do(self, monkeypatch):
        def bare(kind):
            return kind.__new__(kind)  # what their constructors want differs between the library's versions

        class TransportError(Exception):
            pass

        cases = [
            (bare(errors.GatedRepoError), "is gated; ask for access"),
            (bare(errors.RepositoryNotFoundError), "no such model: owner/name is neither"),
            (bare(errors.RevisionNotFoundError), "has no revision 'v9'"),
            (bare(errors.LocalEntryNotFoundError), "HF_HUB_OFFLINE"),
            (TransportError("connection lost\nwith details"), "cannot download owner/name: connection lost$"),
            (OSError(), "cannot download owner/name: OSError"),
        ]
        for error, message in cases:

            def fail(*_, raised=error, **__):
                raise raised

            monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
            with pytest.raises(InputError, match=message) as caught:
                resolve_model("owner/name", revision="v9")
            assert "\n" not in str(caught.value)

    def test_offline_mode_and_cache_are_those_of_the_hub_library(self, monkeypatch, tmp_path):
        """The real library, offline, with an empty cache."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(InputError, match="nor complete in the Hub's cache"):
            resolve_model("owner/name")


class TestLoadConfig:
    def test_generation_config_overrides_the_end_of_sequence(self, tmp_path):
        save_model(tmp_path)
        assert load_config(tmp_path) == TINY
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
        assert load_config(tmp_path) == replace(TINY, eos_token_ids=(3, 4))

    @pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b'{"architectures": ["X"]}'])
    def test_errors_name_the_file(self, tmp_path, text):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(InputError, match=rf"^{tmp_path}/config.json[: ]") as caught:
            load_config(tmp_path)
        assert str(caught.value).count("config.json") == 1

    def test_errors_in_the_generation_config_name_that(self, tmp_path):
        save_model(tmp_path)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": 512}')
        with pytest.raises(InputError, match=r"generation_config.json: config field eos_token_id is 512"):
            load_config(tmp_path)


class TestReading:
    def test_a_tensor_and_its_slices(self, tmp_path):
        expected = tensors(TINY)
        name = "model.layers.1.mlp.down_proj.weight"
        with Checkpoint(save_model(tmp_path)) as checkpoint:
            assert checkpoint.names() == sorted(expected)
            assert checkpoint.shape(name) == (64, 176)
            assert checkpoint.dtype(name) == torch.float32
            assert checkpoint.num_bytes(name) == 4 * 64 * 176
            assert torch.equal(checkpoint.read(name), expected[name])
            assert torch.equal(checkpoint.read(name, 0, 7, 20), expected[name][7:27])
            assert torch.equal(checkpoint.read(name, 1, 100, 76), expected[name][:, 100:])
            assert torch.equal(checkpoint.read(name, 1, 100), expected[name][:, 100:])
            assert checkpoint.read(name, 0, 64, 0).shape == (0, 176)
            with pytest.raises(AssertionError, match="60:65 of dimension 0, which has 64"):
                checkpoint.read(name, 0, 60, 5)

    def test_what_was_read_outlives_the_checkpoint(self, tmp_path):
        with Checkpoint(save_model(tmp_path)) as checkpoint:
            weight = checkpoint.read("model.norm.weight")
        assert torch.equal(weight, torch.ones(64))

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory accounting")
    def test_reading_a_slice_allocates_no_memory(self, tmp_path):
        save_file({"big": torch.ones(16384, 2048)}, tmp_path / "model.safetensors")  # 128 MiB

        def resident(kind: str) -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024

        with Checkpoint(tmp_path) as checkpoint:
            files, anonymous = resident("RssFile"), resident("RssAnon")
            part = checkpoint.read("big", 0, 4096, 1024)
            assert part.sum() == 1024 * 2048
            assert resident("RssFile") - files < 32 * 2**20  # 8 MiB asked for; the kernel reads some ahead
            whole = checkpoint.read("big", 1, 0, 1024)
            assert whole.sum() == 16384 * 1024
            assert resident("RssAnon") - anonymous < 32 * 2**20

    def test_the_index_says_which_file_and_others_stay_closed(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        (tmp_path / "y.safetensors").write_bytes(b"never looked at")
        save_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
        with Checkpoint(tmp_path) as checkpoint:
            assert checkpoint.names() == ["a", "b"]
            assert torch.equal(checkpoint.read("a"), torch.ones(2))
            with pytest.raises(InputError, match="y.safetensors is truncated or not safetensors"):
                checkpoint.read("b")

    def test_the_single_file_comes_before_an_index(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
        save_index(tmp_path, {"b": "gone.safetensors"})
        with Checkpoint(tmp_path) as checkpoint:
            assert checkpoint.names() == ["a"]

    def test_safetensors_come_before_bin_files(self, tmp_path):
        torch.save({"of bin": torch.ones(2)}, tmp_path / "pytorch_model.bin")
        with Checkpoint(tmp_path) as checkpoint:
            assert checkpoint.names() == ["of bin"]
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        save_index(tmp_path, {"a": "x.safetensors"})
        with Checkpoint(tmp_path) as checkpoint:
            assert checkpoint.names() == ["a"]

    def test_the_index_of_bin_files(self, tmp_path):
        torch.save({"a": torch.ones(2), "not in the index": torch.ones(1)}, tmp_path / "x.bin")
        torch.save({"b": torch.arange(6.0).view(2, 3)}, tmp_path / "y.bin")
        save_index(tmp_path, {"a": "x.bin", "b": "y.bin"}, "pytorch_model.bin.index.json")
        with Checkpoint(tmp_path) as checkpoint:
            assert checkpoint.names() == ["a", "b"]
            assert checkpoint.num_bytes("b") == 24
            assert checkpoint.read("b", 1, 1).tolist() == [[1, 2], [4, 5]]
        (tmp_path / "y.bin").unlink()
        with pytest.raises(InputError, match="lacks y.bin, which pytorch_model.bin.index.json names"):
            Checkpoint(tmp_path)

    def test_links_to_blobs_as_in_the_hubs_cache(self, tmp_path):
        blob = tmp_path / "blobs" / "0a1b"
        blob.parent.mkdir()
        save_file({"a": torch.ones(2)}, blob)
        snapshot = save_index(tmp_path / "snapshot", {"a": "x.safetensors"})
        (snapshot / "x.safetensors").symlink_to("../blobs/0a1b")
        with Checkpoint(snapshot) as checkpoint:
            assert checkpoint.read("a").sum() == 2


class TestRefusals:
    @pytest.mark.parametrize(
        "file",
        ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "./x.safetensors", "x.safetensors/", ".."]
        + ["", ".", "a\\x.safetensors", "C:\\x.safetensors", "x\0.safetensors", "pytorch_model.bin"]
        + [7, None, ["x.safetensors"]],
    )
    def test_an_index_names_files_of_its_own_folder_only(self, tmp_path, file):
        folder = save_index(tmp_path / "inside" / "m", {"fine": "y.safetensors", "a": file})
        for place in (tmp_path / "inside", folder):  # what would be read, were the name believed
            save_file({"a": torch.ones(2), "fine": torch.ones(2)}, place / "x.safetensors")
            save_file({"fine": torch.ones(2)}, place / "y.safetensors")
        with pytest.raises(InputError, match="accepted: plain names of .safetensors files"):
            Checkpoint(folder)

    @pytest.mark.parametrize("file", ["../x.bin", "/etc/x.bin", "a/x.bin", "x.safetensors", "x.bin.py", None])
    def test_an_index_of_bin_files_is_trusted_no_more(self, tmp_path, file):
        folder = save_index(tmp_path / "m", {"fine": "y.bin", "a": file}, "pytorch_model.bin.index.json")
        for place in (tmp_path, folder):
            torch.save({"a": torch.ones(2), "fine": torch.ones(2)}, place / "x.bin")
            torch.save({"fine": torch.ones(2)}, place / "y.bin")
        with pytest.raises(InputError, match="accepted: plain names of .bin files"):
            Checkpoint(folder)

    @pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
    def test_an_index_without_a_map(self, tmp_path, weight_map):
        with pytest.raises(InputError, match="has no weight_map"):
            Checkpoint(save_index(tmp_path, weight_map))

    def test_files_that_the_index_names_and_that_are_not_there(self, tmp_path):
        with pytest.raises(InputError, match="lacks p.safetensors, q.safetensors"):
            Checkpoint(save_index(tmp_path, {"a": "q.safetensors", "b": "p.safetensors"}))

    def test_no_weights(self, tmp_path):
        for name in ("training_args.bin", "model-00001-of-00002.safetensors", "tf_model.h5"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match="has no weights; accepted: model.safetensors, pytorch_model.bin"):
            Checkpoint(tmp_path)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_a_truncated_file(self, tmp_path, keep):
        path = save_model(tmp_path) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(InputError, match="model.safetensors is truncated or not safetensors"):
            Checkpoint(tmp_path)

    def test_a_header_longer_than_the_file(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
        with pytest.raises(InputError, match="model.safetensors"):
            Checkpoint(tmp_path)

    def test_an_unknown_tensor_lists_what_there_is(self, tmp_path):
        with Checkpoint(save_model(tmp_path)) as checkpoint:
            with pytest.raises(InputError, match=r"no tensor nope; it has lm_head.weight, .* and 17 more"):
                checkpoint.read("nope")

    def test_a_tensor_that_the_index_puts_into_the_wrong_file(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        with Checkpoint(save_index(tmp_path, {"b": "x.safetensors"})) as checkpoint:
            with pytest.raises(InputError, match="x.safetensors: cannot read b"):
                checkpoint.shape("b")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
    def test_quantised_weights(self, tmp_path, dtype):
        name = "model.norm.weight"
        with Checkpoint(save_model(tmp_path, **{name: torch.ones(64).to(dtype)})) as checkpoint:
            for use in (checkpoint.read, checkpoint.dtype, checkpoint.num_bytes):
                with pytest.raises(InputError, match=f"model.safetensors: {name} is stored as"):
                    use(name)


SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize(
    "theirs",
    [
        LlamaConfig(**SIZES),
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=6, tie_word_embeddings=True),
        MistralConfig(**SIZES, sliding_window=None),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    ],
    ids=lambda config: config.model_type,
)
def test_weight_shapes_are_those_of_transformers(theirs):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert weight_shapes(ModelConfig.from_hf(theirs.to_dict())) == expected


class TestCheckWeights:
    def check(self, folder: Path, config: ModelConfig = TINY) -> None:
        with Checkpoint(folder) as checkpoint:
            check_weights(checkpoint, config)

    def test_what_fits(self, tmp_path):
        self.check(save_model(tmp_path))

    def test_harmless_extras(self, tmp_path):
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        self.check(save_model(tmp_path, **extra))

    def test_missing_misshapen_and_unknown_tensors_in_one_line(self, tmp_path):
        changes = {
            "model.norm.weight": None,
            "model.layers.0.mlp.up_proj.weight": torch.zeros(175, 64),
            "model.layers.1.self_attn.q_proj.bias": torch.zeros(64),
        }
        with pytest.raises(InputError) as caught:
            self.check(save_model(tmp_path, **changes))
        message = str(caught.value)
        assert "missing model.norm.weight" in message
        assert "wrong shape: model.layers.0.mlp.up_proj.weight (175, 64), not (176, 64)" in message
        assert "unexpected model.layers.1.self_attn.q_proj.bias" in message
        assert "\n" not in message

    def test_a_tied_head_that_is_stored_all_the_same(self, tmp_path):
        tied = replace(TINY, tie_word_embeddings=True)
        embeddings = tensors(TINY)["model.embed_tokens.weight"]
        self.check(save_model(tmp_path / "equal", tied, **{"lm_head.weight": embeddings}), tied)
        other = embeddings.clone()
        other[-1, -1] += 1
        with pytest.raises(InputError, match="lm_head.weight differs from the embeddings"):
            self.check(save_model(tmp_path / "other", tied, **{"lm_head.weight": other}), tied)

    def test_a_layer_too_many(self, tmp_path):
        with pytest.raises(InputError, match="unexpected model.layers.1.* and 5 more"):
            self.check(save_model(tmp_path), replace(TINY, num_layers=1))


class TestWriting:
    @pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000, 1])
    def test_transformers_reads_the_same_model(self, tmp_path, max_shard_bytes):
        config = replace(TINY, dtype=torch.bfloat16)
        expected = tensors(config)
        backwards = reversed(expected.items())  # the order is free
        write_checkpoint(tmp_path / "new" / "m", config, backwards, max_shard_bytes, {"extra.txt": b"hello"})

        folder = tmp_path / "new" / "m"
        assert load_config(folder) == config
        assert (folder / "extra.txt").read_bytes() == b"hello"
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        assert len(sizes) == {10**9: 1, 200_000: 2, 1: len(expected)}[max_shard_bytes]
        assert not list(folder.glob(".*"))
        with Checkpoint(folder) as checkpoint:
            check_weights(checkpoint, config)
            assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        assert theirs.dtype == torch.bfloat16
        assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())

    def test_a_run_that_fails_leaves_nothing_that_loads(self, tmp_path):
        def stops():
            yield from list(tensors(TINY).items())[:5]
            raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            write_checkpoint(tmp_path, TINY, stops(), max_shard_bytes=100_000)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_tensor_is_our_fault(self, tmp_path):
        with pytest.raises(AssertionError, match="lm_head.weight"):
            write_checkpoint(tmp_path, TINY, list(tensors(TINY).items())[:-1])
        assert list(tmp_path.iterdir()) == []

    def test_leftovers_of_a_killed_run_are_removed(self, tmp_path):
        (tmp_path / ".model-00007-of-00009.safetensors.partial").write_bytes(b"x")
        write_checkpoint(tmp_path, TINY, tensors(TINY).items())
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors.index.json", "weights.safetensors", "pytorch_model.bin"]
    )
    def test_an_existing_model_is_never_overwritten(self, tmp_path, name):
        (tmp_path / name).write_text("precious")
        with pytest.raises(InputError, match=f"already holds {name}"):
            write_checkpoint(tmp_path, TINY, tensors(TINY).items(), extra_files={"other": b""})
        assert [path.name for path in tmp_path.iterdir()] == [name]
