import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from engine.errors import InputError
from engine.tokenizer import Tokenizer

BOS, EOS = 1, 2


def save_tokenizer(folder: Path, processor: str | None, **config: object) -> Path:
    """A word-level tokenizer whose post-processor surrounds the text as ``processor`` says."""
    vocab = {"[UNK]": 0, "<s>": BOS, "</s>": EOS, "hello": 3, "world": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if processor is not None:
        backend.post_processor = TemplateProcessing(
            single=processor, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("processor", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": True}], ids=str)
def test_special_tokens_are_those_of_transformers(tmp_path, processor, flags):
    save_tokenizer(tmp_path, processor, **flags)
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello world", "", "<s> hello"):
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("processor", "expected"),
    [(None, [BOS, 3, 4]), ("<s> $A", [BOS, 3, 4]), ("$A </s>", [BOS, 3, 4, EOS]), ("<s> $A </s>", [BOS, 3, 4, EOS])],
)
def test_add_bos_token_is_respected_where_the_post_processor_adds_none(tmp_path, processor, expected):
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path, processor, add_bos_token=True))
    assert tokenizer.encode("hello world") == expected
    assert tokenizer.encode("hello world", add_special_tokens=False) == [3, 4]


def test_a_flag_that_is_null_or_has_no_token_changes_nothing(tmp_path):
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path, "<s> $A", add_bos_token=None))
    assert tokenizer.encode("hello") == [BOS, 3]
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path, None, add_bos_token=True, bos_token=None))
    assert tokenizer.encode("hello") == [3]
    assert tokenizer.bos_token_id is None


def test_decode_skips_special_tokens_and_ids_without_a_text(tmp_path):
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path, "<s> $A"))
    assert tokenizer.decode([BOS, 3, 4, 99, 31999, EOS]) == "hello world"
    assert tokenizer.decode([BOS, 3], skip_special_tokens=False) == "<s> hello"
    assert tokenizer.decode([]) == ""
    assert tokenizer.vocab_size == 5


def test_special_ids_from_either_file_and_spelling(tmp_path):
    save_tokenizer(tmp_path, None, bos_token={"content": "<s>", "lstrip": False})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).bos_token_id is None
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "nowhere"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, None)


def test_stored_truncation_and_padding_are_off(tmp_path):
    path = save_tokenizer(tmp_path, None) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(path))
    assert Tokenizer.from_folder(tmp_path).encode("hello " * 5) == [3] * 5


class TestRefusals:
    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(InputError, match="has no tokenizer.json; add the model's, or give prompts as token ids"):
            Tokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
    def test_another_format_says_how_to_convert(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match="convert it: python -c .*AutoTokenizer.*save_pretrained") as caught:
            Tokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["", "{}", "not json", "[1]"])
    def test_a_damaged_tokenizer(self, tmp_path, text):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match="tokenizer.json cannot be read"):
            Tokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_a_damaged_config(self, tmp_path, text):
        save_tokenizer(tmp_path, None)
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(InputError, match="tokenizer_config.json"):
            Tokenizer.from_folder(tmp_path)
