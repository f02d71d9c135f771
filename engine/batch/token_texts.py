"""Single tokens as text."""

from collections.abc import Sequence

from engine.stopping import TextStream
from engine.tokenizer import Tokenizer

# Before the number of a token that has no text of its own, as vLLM writes it.
NO_TEXT = "token_id:"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is decoded to


class TokenTexts:
    """What tokens of a model read as, special ones included."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def of(self, token_id: int) -> str:
        """Of a token in the middle of a text: at its beginning some tokenizers leave out a leading space.

        One that has no text of its own, as it is only a part of a character, reads as ``token_id:7``.
        """
        if token_id not in self._texts:
            once, twice = (self._tokenizer.decode([token_id] * k, skip_special_tokens=False) for k in (1, 2))
            text = twice[len(once) :]
            self._texts[token_id] = text if text and _UNFINISHED not in text else f"{NO_TEXT}{token_id}"
        return self._texts[token_id]

    def whole(self, prompt: str | Sequence[int]) -> str:
        """The text of a prompt, special tokens left out as in samples."""
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def offsets(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Where in ``text``, which these tokens make, each of them begins, in characters."""
        stream, offsets, told = TextStream(self._tokenizer), [], 0
        for token_id in token_ids:
            offsets.append(min(told, len(text)))  # a stop string has cut off what comes after
            told += len(stream.push(token_id))
        return offsets
