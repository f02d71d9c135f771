import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from engine.checkpoint import Checkpoint, check_weights, load_config, weight_shapes
from engine.dummy import dummy_tensor
from engine.errors import InputError
from engine.presets import find_preset, preset_names
from engine.tokenizer import Tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("make_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=120)


def test_the_command_writes_what_a_dummy_load_would_hold(tmp_path):
    folder = tmp_path / "new" / "tiny"
    done = run_tool(
        "TINY", str(folder), "--dtype", "bfloat16", "--seed", "3", "--num-layers", "3", "--max-shard-size", "100KB"
    )
    assert done.returncode == 0, done.stderr
    assert "0.2M parameters" in done.stdout

    config = replace(find_preset("tiny"), dtype=torch.bfloat16, num_layers=3)
    assert load_config(folder) == config
    assert len(list(folder.glob("*.safetensors"))) > 2
    with Checkpoint(folder) as checkpoint:
        check_weights(checkpoint, config)
        for name, shape in weight_shapes(config).items():
            assert torch.equal(checkpoint.read(name), dummy_tensor(name, shape, torch.bfloat16, seed=3))

    again = run_tool("tiny", str(folder))
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {folder} already holds config.json")
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(preset="llama-126m"), "no such preset: llama-126m; accepted: tiny, demo, llama-125m"),
        (dict(max_shard_size="5 parsecs"), "size '5 parsecs' is not understood"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        tool.main(**dict(preset="tiny", outdir=tmp_path / "out") | arguments)
    assert not (tmp_path / "out").exists()


def test_sizes():
    assert [tool.parse_size(text) for text in ("7", "2kb", "5GB", "3 MiB")] == [7, 2000, 5 * 10**9, 3 * 2**20]
    for text in ("", "0", "-1", "1.5GB", "GB", "5XB", "²GB"):
        with pytest.raises(InputError, match="accepted: a whole number"):
            tool.parse_size(text)


def save_tokenizer(folder: Path, config) -> Path:
    for name, data in tool.byte_tokenizer(config).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", ["tiny", "llama-125m", "meta-llama/Llama-3.1-8B-Instruct"])
def test_any_text_survives_the_byte_tokenizer(tmp_path, name):
    config = find_preset(name)
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path, config))
    text = "Hello,  wörld!\n\t\0 日本語 🙂"
    ids = tokenizer.encode(text)
    assert ids[0] == config.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config.bos_token_id, config.eos_token_ids[0])
    assert tokenizer.decode([*ids, config.vocab_size - 1, *config.eos_token_ids]) == text
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ids


def test_without_special_tokens_only_bytes_remain(tmp_path):
    config = replace(find_preset("tiny"), bos_token_id=None, eos_token_ids=(), vocab_size=256)
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path, config))
    assert tokenizer.encode("ab") == tokenizer.encode("ab", add_special_tokens=False)
    assert tokenizer.vocab_size == 256


def test_no_tokenizer_where_the_ids_do_not_suffice():
    assert tool.byte_tokenizer(replace(find_preset("tiny"), vocab_size=257)) == {}
    assert tool.byte_tokenizer(replace(find_preset("tiny"), vocab_size=258))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_gets_a_tokenizer(name):
    assert set(tool.byte_tokenizer(find_preset(name))) == {"tokenizer.json", "tokenizer_config.json"}
