"""Text to token ids and back, by a model's ``tokenizer.json``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from engine.errors import InputError
from engine.json_fields import read_json

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


class Tokenizer:
    """A thin wrapper over ``tokenizers`` that knows what ``tokenizer_config.json`` says of special tokens.

    ``bos_token_id`` and ``eos_token_id`` are None where the model has none or does not say.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        backend.no_truncation()  # a stored training length would cut prompts silently
        backend.no_padding()
        self._backend = backend
        self.bos_token_id = self._special_id(config.get("bos_token"))
        self.eos_token_id = self._special_id(config.get("eos_token"))
        self._add_bos(config)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Raises InputError when there is no ``tokenizer.json``, or a file cannot be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
                raise InputError(f"{folder} has no tokenizer.json; add the model's, or give prompts as token ids")
            convert = f"t = AutoTokenizer.from_pretrained({str(folder)!r}); t.save_pretrained({str(folder)!r})"
            raise InputError(
                f"{folder} has no tokenizer.json, only a tokenizer in another format; convert it: "
                f'python -c "from transformers import AutoTokenizer; {convert}"'
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise InputError(f"{path} cannot be read ({error}); fetch it again") from error
        return cls(backend, read_tokenizer_config(folder))

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text, added ones included. A model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``, with the model's BOS or EOS around them where it wants any."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. Ids that have none (rows that only pad the embedding) add nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _special_id(self, token: str | dict[str, Any] | None) -> int | None:
        if isinstance(token, dict):
            token = token.get("content")
        return self._backend.token_to_id(token) if isinstance(token, str) else None

    def _add_bos(self, config: dict[str, Any]) -> None:
        """Makes ``encode`` begin with BOS where ``add_bos_token`` asks for it and ``tokenizer.json`` adds none.

        Otherwise ``tokenizer.json`` alone decides, as in transformers 5.
        """
        bos, eos = self.bos_token_id, self.eos_token_id
        added = self._backend.encode("", add_special_tokens=True).ids
        if not config.get("add_bos_token") or bos is None or bos in added[:1]:
            return
        tokens = [(self._backend.id_to_token(token_id), token_id) for token_id in (bos, eos) if token_id is not None]
        end = [tokens[1][0]] if eos is not None and eos in added[-1:] else []
        self._backend.post_processor = TemplateProcessing(single=[tokens[0][0], "$A", *end], special_tokens=tokens)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """What a model's files say of its tokenizer beside ``tokenizer.json``: special tokens, a chat template."""
    config: dict[str, Any] = {}
    # The later one decides; older models have their special tokens in the first only.
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG_FILE):
        if (folder / name).is_file():
            config |= read_json(folder / name)
    return config
