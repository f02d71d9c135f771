import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import SPLITS, save_hf, save_tiny
from huggingface_hub import errors
from models import hf_model, our_model
from ranks import run_ranks

import engine.loader
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.cpu import CPU
from engine.distributed import TPGroup
from engine.dummy import dummy_tensor
from engine.errors import InputError
from engine.loader import find_checkpoint, load_model
from engine.model import Transformer
from engine.presets import find_preset
from engine.shard_writer import write_shards
from engine.shards import MANIFEST_FILE, rank_file


class Alone(TPGroup):
    """One rank of several that do not run: as if all others had its memory and succeeded at what it does."""

    def gather_objects(self, value) -> list:
        failed = isinstance(value, tuple) and isinstance(value[0], bool)
        return [None if failed and rank != self.rank else value for rank in range(self.size)]


def parameters(model: Transformer) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def assert_equal(model: Transformer, expected: Transformer) -> None:
    """Bit for bit."""
    ours, theirs = parameters(model), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype
        assert torch.equal(parameter, theirs[name]), name


@pytest.fixture
def offline(monkeypatch):
    """The Hub cannot be reached; the calls that try are recorded."""
    calls = []

    def fail(name, **_):
        calls.append(name)
        raise errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    return calls


@pytest.fixture
def poison():
    """Memory that nobody writes to holds NaN, so that an element that is left out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def shard_folder(hf_folder, tmp_path_factory):
    """For two ranks."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(hf_folder, folder, 2, model_name=str(hf_folder))
    return folder


@pytest.fixture
def own_shards(hf_folder, tmp_path):
    """For two ranks, to be damaged."""
    write_shards(hf_folder, tmp_path / "own", 2, model_name=str(hf_folder))
    return tmp_path / "own"


@pytest.mark.usefixtures("poison")
class TestSameNumbersFromEverySource:
    @pytest.mark.parametrize(("family", "changes", "size"), SPLITS)
    def test_shards_and_checkpoint(self, tmp_path, family, changes, size):
        hf = hf_model(family, **changes)
        hf.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
        write_shards(tmp_path / "hf", tmp_path / "shards", size, model_name="x")
        for rank in range(size):
            group = Alone(rank, size)
            expected = our_model(hf, group)
            assert_equal(load_model(tmp_path / "hf", group).model, expected)
            assert_equal(load_model(tmp_path / "hf", group, tp_dir=tmp_path / "shards").model, expected)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_converted_before_or_while_loading(self, hf_folder, shard_folder, tmp_path, dtype):
        wanted = getattr(torch, dtype)
        write_shards(hf_folder, tmp_path, 2, dtype=wanted, model_name="x")
        expected = our_model(hf_model(), Alone(1, 2)).to(wanted)
        for options in (dict(dtype=dtype), dict(dtype=dtype, tp_dir=shard_folder), dict(tp_dir=tmp_path)):
            loaded = load_model(hf_folder, Alone(1, 2), **options)
            assert_equal(loaded.model, expected)
            assert loaded.config.dtype == loaded.model.config.dtype == wanted
        assert torch.get_default_dtype() == torch.float32

    def test_a_narrow_split_can_be_widened(self, hf_folder, tmp_path):
        write_shards(hf_folder, tmp_path, 1, dtype=torch.bfloat16, model_name="x")
        loaded = load_model(hf_folder, TPGroup(), tp_dir=tmp_path, dtype="float32")
        assert_equal(loaded.model, our_model(hf_model()).bfloat16().float())

    @pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
    def test_dummy_weights(self, dtype):
        for rank in range(4):
            loaded = load_model("tiny", Alone(rank, 4), load_format="dummy", dtype=dtype, seed=3)
            assert loaded.folder is None
            assert loaded.config == replace(find_preset("tiny"), dtype=loaded.config.dtype)
            for slot in loaded.model.weight_slots():
                full = dummy_tensor(slot.shard.name, slot.shard.full_shape, loaded.config.dtype, seed=3)
                assert slot.target.dtype == getattr(torch, dtype if dtype != "auto" else "float32")
                assert torch.equal(slot.target, slot.shard.cut(full))

    def test_dummy_weights_for_a_folder_that_has_none(self, tmp_path):
        config = replace(find_preset("tiny"), vocab_size=67, tie_word_embeddings=True)
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
        loaded = load_model(tmp_path, Alone(3, 4), load_format="dummy")
        assert (loaded.config, loaded.folder) == (config, tmp_path)
        assert not any(parameter.isnan().any() for parameter in loaded.model.parameters())
        assert loaded.model.head.weight is loaded.model.embedding.weight
        assert not loaded.model.embedding.weight[67 - 3 * 17 :].any()

    def test_a_folder_comes_before_the_preset_of_its_name(self, tmp_path, monkeypatch):
        (tmp_path / "tiny").mkdir()
        monkeypatch.chdir(tmp_path)
        assert load_model("tiny", TPGroup(), load_format="dummy").folder is None  # no model in it
        config = replace(find_preset("tiny"), num_layers=1)
        (tmp_path / "tiny" / "config.json").write_text(json.dumps(config.to_hf()))
        assert load_model("tiny", TPGroup(), load_format="dummy").config == config

    def test_something_left_out_does_not_pass(self, hf_folder, monkeypatch):
        slots = Transformer.weight_slots
        monkeypatch.setattr(Transformer, "weight_slots", lambda model: list(slots(model))[:-1])
        with pytest.raises(AssertionError, match="elements were loaded"):
            load_model(hf_folder, TPGroup())

    def test_a_part_of_another_shape_is_not_broadcast(self, hf_folder, monkeypatch):
        monkeypatch.setattr(engine.loader.Checkpoint, "read", lambda self, name, *_: torch.zeros(1))
        with pytest.raises(AssertionError, match="model.embed_tokens.weight"):
            load_model(hf_folder, TPGroup())


def mapped_file(tensor: torch.Tensor) -> str | None:
    """The name of the file whose pages hold all of the tensor; None where it lies in memory of the process."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= start and end <= last:
            return Path(name).name if name.startswith("/") else None
    return None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
class TestWeightsAreUsedWhereTheyLie:
    @pytest.mark.parametrize(("family", "changes", "size"), SPLITS)
    def test_of_a_shard_all(self, tmp_path, family, changes, size):
        folder = save_hf(tmp_path / "hf", family, **changes)
        write_shards(folder, tmp_path / "shards", size, model_name=str(folder))
        for rank in range(size):
            model = load_model(folder, Alone(rank, size), tp_dir=tmp_path / "shards").model
            assert {mapped_file(parameter) for parameter in model.parameters()} == {rank_file(rank, size)}
            for slot in model.weight_slots():
                assert mapped_file(slot.target) == rank_file(rank, size)

    def test_of_a_checkpoint_those_that_lie_as_they_are_needed(self, hf_folder, tmp_path):
        model = load_model(save_tiny(tmp_path), TPGroup()).model
        assert {mapped_file(parameter) for parameter in model.parameters()} == {"model.safetensors"}
        places = {n: mapped_file(p) for n, p in parameters(load_model(hf_folder, TPGroup()).model).items()}
        copied = {name for name, place in places.items() if place is None}  # transformers sorts by name: k, o, q, v
        assert copied == {name for name in places if "qkv_proj" in name}

    def test_not_where_they_are_cut_or_converted(self, hf_folder, shard_folder):
        for group, options in [
            (Alone(0, 2), {}),
            (TPGroup(), dict(dtype="bfloat16")),
            (Alone(0, 2), dict(dtype="float16", tp_dir=shard_folder)),
        ]:
            model = load_model(hf_folder, group, **options).model
            assert {mapped_file(parameter) for parameter in model.parameters()} == {None}

    def test_not_in_files_that_are_read_whole(self, hf_folder, tmp_path):
        with Checkpoint(hf_folder) as checkpoint:
            tensors = {name: checkpoint.read(name).clone() for name in checkpoint.names()}
        (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
        for old, expected in ((False, "pytorch_model.bin"), (True, None)):
            torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
            assert mapped_file(load_model(tmp_path, TPGroup()).model.head.weight) == expected

    def test_the_file_may_go_and_is_never_written(self, own_shards, hf_folder):
        path = own_shards / rank_file(1, 2)
        before = path.read_bytes()
        model = load_model(hf_folder, Alone(1, 2), tp_dir=own_shards).model
        for slot in model.weight_slots():
            slot.target.mul_(2)
        assert path.read_bytes() == before
        path.unlink()
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert_equal(model, our_model(hf_model(), Alone(1, 2)))

    def test_tied_weights_stay_tied(self, tmp_path):
        folder = save_hf(tmp_path, "llama, multi-head, tied")
        model = load_model(folder, TPGroup()).model
        assert model.head.weight is model.embedding.weight
        assert mapped_file(model.head.weight) is not None

    def test_what_is_not_finite_is_named_all_the_same(self, tmp_path):
        hf = hf_model()
        hf.get_parameter("model.layers.1.mlp.up_proj.weight").data[-1, -1] = float("nan")
        hf.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="model.layers.1.mlp.up_proj.weight holds NaN or infinity in float32"):
            load_model(tmp_path, TPGroup())

    def test_another_shape_of_as_many_elements_does_not_pass(self, hf_folder, monkeypatch):
        read = Checkpoint.read
        monkeypatch.setattr(Checkpoint, "read", lambda *args: read(*args).view(-1))
        with pytest.raises(AssertionError, match="model.embed_tokens.weight"):
            load_model(hf_folder, TPGroup())


class TestShardDirectory:
    def test_config_and_tokenizer_are_its_own(self, shard_folder, hf_folder, capsys):
        loaded = load_model(hf_folder, Alone(0, 2), tp_dir=str(shard_folder))
        assert loaded.folder == shard_folder
        assert loaded.config == ModelConfig.from_hf(hf_model().config.to_dict())
        assert capsys.readouterr() == ("", "")

    def test_no_other_ranks_file_is_touched(self, own_shards, hf_folder):
        (own_shards / rank_file(0, 2)).unlink()
        load_model(hf_folder, Alone(1, 2), tp_dir=own_shards)
        with pytest.raises(InputError, match=f"{rank_file(0, 2)} is missing"):
            load_model(hf_folder, Alone(0, 2), tp_dir=own_shards)

    def test_a_truncated_file(self, own_shards, hf_folder):
        path = own_shards / rank_file(1, 2)
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(InputError, match=rf"rank 1: {own_shards}: {path.name} has \d+ bytes, not \d+"):
            load_model(hf_folder, Alone(1, 2), tp_dir=own_shards)

    def test_an_unfinished_one(self, own_shards, hf_folder):
        (own_shards / MANIFEST_FILE).unlink()
        with pytest.raises(InputError, match=f"{own_shards} has no {MANIFEST_FILE}"):
            load_model(hf_folder, Alone(1, 2), tp_dir=own_shards)

    @pytest.mark.parametrize("size", [1, 4])
    def test_the_wrong_number_of_shards_is_refused_at_once(self, shard_folder, size, monkeypatch, offline):
        monkeypatch.setattr(engine.loader, "_allocate", None)
        for rank in range(size):
            with pytest.raises(InputError, match=f"holds shards for 2 ranks, but the world size is {size}; start 2"):
                load_model("owner/name", Alone(rank, size), tp_dir=shard_folder)
        assert offline == []


class TestNameAgainstShards:
    def load(self, shard_folder: Path, name: str | Path, rank: int = 0) -> None:
        load_model(name, Alone(rank, 2), tp_dir=shard_folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(intermediate_size=64), "intermediate_size is 56 in .*, but 64 in "),
            (dict(rms_norm_eps=0.5), "rms_norm_eps is 1e-06 in .*, but 0.5 in "),
            (dict(tie_word_embeddings=True), "tie_word_embeddings is False in .*, but True in "),
        ],
    )
    def test_other_shapes_or_numbers_are_refused(self, shard_folder, tmp_path, changes, message):
        other = save_hf(tmp_path / "other", **changes)
        with pytest.raises(InputError, match=f"rank 0: {message}.*; accepted: shards of the same model; cut "):
            self.load(shard_folder, other)
        self.load(shard_folder, other, rank=1)  # rank 0 alone compares

    def test_other_frequencies_are_refused(self, shard_folder, tmp_path):
        with pytest.raises(InputError, match="rope is .*theta=10000.* but .*theta=5000"):
            self.load(shard_folder, save_hf(tmp_path, "llama, rope llama3"))

    def test_what_changes_no_number_passes(self, shard_folder, tmp_path, capsys):
        other = save_hf(tmp_path / "other", max_position_embeddings=512, eos_token_id=9)
        capsys.readouterr()
        self.load(shard_folder, other, rank=1)
        assert capsys.readouterr().err == ""
        self.load(shard_folder, other)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: the weights in ")
        assert line.endswith(f"they run, not those of {other}")

    def test_a_length_that_scales_the_frequencies_counts(self, tmp_path):
        folder = save_hf(tmp_path / "hf", "llama, rope yarn")
        write_shards(folder, tmp_path / "shards", 2, model_name=str(folder))
        with pytest.raises(InputError, match="max_position_embeddings is 64 in .*, but 128 in "):
            self.load(tmp_path / "shards", save_hf(tmp_path / "x", "llama, rope yarn", max_position_embeddings=128))

    def test_another_tokenizer_is_warned_of(self, own_shards, tmp_path, capsys):
        other = save_hf(tmp_path / "other")
        (other / "tokenizer.json").write_text("{}")
        capsys.readouterr()
        self.load(own_shards, other)
        lines = capsys.readouterr().err.splitlines()
        assert lines[1:] == [f"warning: {own_shards} has another tokenizer than {other}; the directory's is used"]

    def test_one_folder_has_many_names(self, shard_folder, hf_folder, monkeypatch, capsys):
        monkeypatch.chdir(hf_folder.parent)
        self.load(shard_folder, f"./{hf_folder.name}/")
        assert capsys.readouterr().err == ""

    def test_without_the_hub_the_directory_suffices(self, shard_folder, offline, capsys):
        self.load(shard_folder, "owner/name")
        assert offline == ["owner/name"]
        notice, warning = capsys.readouterr().err.splitlines()
        assert notice.startswith(f"notice: owner/name is not at hand; config and tokenizer are those of {shard_folder}")
        assert warning.startswith("warning: the weights in ")
        self.load(shard_folder, "owner/name", rank=1)
        assert capsys.readouterr().err == ""

    def test_hub_ids_ignore_case(self, hf_folder, tmp_path, offline, capsys):
        write_shards(hf_folder, tmp_path, 2, model_name="Owner/Name")
        self.load(tmp_path, "owner/name")
        assert "warning" not in capsys.readouterr().err

    def test_a_preset_still_tells_what_the_model_is(self, shard_folder, offline):
        for name in ("codellama/CodeLlama-7b-Instruct-hf", "tiny"):
            with pytest.raises(InputError, match=f"vocab_size is 67 in .* in {name}"):
                self.load(shard_folder, name)

    def test_a_folder_that_is_no_model_is_refused(self, shard_folder, tmp_path):
        with pytest.raises(InputError, match="has no config.json"):
            self.load(shard_folder, tmp_path)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(dtype="int8"), "dtype 'int8' is not known; accepted: auto, float32, bfloat16, float16"),
            (dict(load_format="random"), "load format 'random' is not known; accepted: auto, dummy"),
            (dict(load_format="dummy", tp_dir="x"), "--tp-dir x gives some; leave one of them out"),
            (dict(load_format="dummy", revision="v1"), "revision 'v1' has no effect on the preset tiny"),
            (dict(), "no such folder: 'tiny'; accepted: .* a preset's name with --load-format dummy"),
        ],
    )
    def test_what_is_refused(self, options, message):
        with pytest.raises(InputError, match=message):
            load_model("tiny", TPGroup(), **options)

    def test_a_world_size_that_does_not_divide_is_refused_before_the_download(self, hf_folder, monkeypatch):
        asked = []

        def resolve(name, revision=None, weights=True):
            asked.append(weights)
            return hf_folder

        monkeypatch.setattr(engine.loader, "resolve_model", resolve)
        with pytest.raises(InputError, match="into 3 parts; accepted: 1, 2, 4"):
            load_model("owner/name", Alone(0, 3))
        assert asked == [False]
        assert find_checkpoint("owner/name", None, 2) == hf_folder
        assert asked == [False, False, True]

    def test_out_of_memory_says_how_much_is_needed(self, hf_folder, monkeypatch):
        def no_memory(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(engine.loader, "Transformer", no_memory)
        with pytest.raises(InputError, match="a rank's weights take 0.0 GB, more than cpu has free; use more devices"):
            load_model(hf_folder, TPGroup(), dtype="bfloat16")
        assert torch.get_default_dtype() == torch.float32

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
    def test_weights_that_are_not_finite_are_named(self, tmp_path, where, value):
        hf = hf_model()
        hf.get_parameter(where).data.view(-1)[-1] = value
        hf.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"{where} holds NaN or infinity in bfloat16; accepted: finite weights"):
            load_model(tmp_path, TPGroup(), dtype="bfloat16")

    def test_weights_that_another_dtype_does_not_hold(self, tmp_path):
        hf = hf_model()
        hf.get_parameter("model.embed_tokens.weight").data[3, 4] = 1e5
        hf.save_pretrained(tmp_path)
        load_model(tmp_path, TPGroup())
        with pytest.raises(InputError, match="embed_tokens.weight holds NaN or infinity in float16; .* ends at 65504"):
            load_model(tmp_path, TPGroup(), dtype="float16")

    def test_a_sum_that_overflows_is_no_fault(self, tmp_path):
        hf = hf_model()
        hf.get_parameter("model.embed_tokens.weight").data.fill_(6e4)
        hf.save_pretrained(tmp_path)
        model = load_model(tmp_path, TPGroup(), dtype="float16").model
        assert torch.equal(model.embedding.weight, torch.full_like(model.embedding.weight, 6e4))

    def test_weights_that_the_host_has_no_room_for(self, monkeypatch):
        """Nothing is read: a host that lends out more memory than it has would end the process."""
        monkeypatch.setattr(engine.loader, "_fill", None)
        monkeypatch.setattr(engine.loader, "available_bytes", lambda group: 10**5)
        with pytest.raises(InputError, match="a rank's weights take .* GB, more than the 0.0 GB that are free for it"):
            load_model("tiny", TPGroup(), load_format="dummy")

    @pytest.mark.gpu
    def test_weights_go_to_the_device(self, hf_folder, shard_folder):
        expected = our_model(hf_model(), Alone(1, 2)).to("cuda")
        for options in ({}, dict(tp_dir=shard_folder)):
            assert_equal(load_model(hf_folder, Alone(1, 2, "cuda"), **options).model, expected)


class TestAllRanksFailTogether:
    def outcome(self, group: TPGroup, *args, **options) -> str:
        try:
            load_model(*args, group, **options)
        except (InputError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    def test_the_mistake_of_one_is_everyones(self, own_shards, hf_folder):
        (own_shards / rank_file(1, 2)).unlink()
        outcomes = run_ranks(2, lambda group: self.outcome(group, hf_folder, tp_dir=own_shards))
        assert len(set(outcomes)) == 1
        assert outcomes[0].startswith(f"InputError: rank 1: {own_shards}: {rank_file(1, 2)} is missing")

    def test_the_fault_of_one_is_everyones(self, hf_folder, monkeypatch):
        fill = engine.loader._fill

        def faulty(model, source):
            if model.group.rank == 1:
                raise KeyError("a bug")
            fill(model, source)

        monkeypatch.setattr(engine.loader, "_fill", faulty)
        outcomes = run_ranks(4, lambda group: self.outcome(group, hf_folder))
        assert set(outcomes) == {"RuntimeError: rank 1: KeyError: 'a bug'"}

    def test_the_first_of_several(self, tmp_path):
        outcomes = run_ranks(2, lambda group: self.outcome(group, tmp_path / "none"))
        assert set(outcomes) == {
            f"InputError: rank 0: no such folder: '{tmp_path}/none'; accepted: a local folder, a Hub id (owner/name), "
            "or a preset's name with --load-format dummy; check the spelling"
        }

    def test_nobody_fails(self, shard_folder, hf_folder):
        assert run_ranks(2, lambda group: self.outcome(group, hf_folder, tp_dir=shard_folder)) == ["loaded"] * 2

    def test_real_processes(self, own_shards, hf_folder, tmp_path):
        (own_shards / rank_file(1, 2)).unlink()
        program = (
            "import sys, torch.distributed as dist\n"
            "from engine.distributed import TPGroup\n"
            "from engine.errors import InputError\n"
            "from engine.loader import load_model\n"
            "rank, store, model, shards = int(sys.argv[1]), *sys.argv[2:]\n"
            "dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)\n"
            "group = TPGroup(rank, 2)\n"
            "print(load_model(model, group).model.head.weight.shape[0])\n"
            "try:\n"
            "    load_model(model, group, tp_dir=shards)\n"
            "except InputError as error:\n"
            "    print(error)\n"
            "group.close()\n"
        )
        arguments = [str(tmp_path / "store"), str(hf_folder), str(own_shards)]
        ranks = [
            subprocess.Popen([sys.executable, "-c", program, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=60)[0].splitlines() for process in ranks]
        assert outputs[0] == outputs[1]
        rows, error = outputs[0]
        assert rows == "34"
        assert error.startswith(f"rank 1: {own_shards}: {rank_file(1, 2)} is missing")


class TestNoticeOfEmulation:
    @pytest.mark.parametrize(
        ("has_bf16", "dtype", "is_told"),
        [(False, "bfloat16", True), (False, "float16", True), (False, "float32", False), (True, "bfloat16", False),
         (None, "bfloat16", False)],
    )  # fmt: skip
    def test_once_on_a_cpu_that_lacks_the_instructions(self, monkeypatch, capsys, has_bf16, dtype, is_told):
        monkeypatch.setattr(engine.loader, "read_cpu", lambda: CPU("its name", has_bf16))
        run_ranks(2, lambda group: load_model("tiny", group, load_format="dummy", dtype=dtype))
        line = (
            "notice: this CPU has no bfloat16 instructions and has to emulate 16-bit products; float32 is faster here: "
            "--dtype float32\n"
        )
        assert capsys.readouterr().err == (line if is_told else "")
