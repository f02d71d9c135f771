"""Long prompts to measure with, of a length in tokens: texts, documents with needles, or random tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.bench.needles.document import make_document
from engine.bench.needles.haystack import generated_haystack
from engine.bench.needles.needle import names_for_training
from engine.errors import InputError
from engine.text_file import read_text
from engine.tokenizer import Tokenizer

# Needles of a document, each asked for and answered at its end: heads that look far back have something to look for.
_NUM_NEEDLES = 8


@dataclass(frozen=True)
class Prompts:
    """Token ids of equally long prompts; ``description`` says in words what they are."""

    tokens: tuple[tuple[int, ...], ...]
    description: str

    @property
    def digest(self) -> str:
        """Tells them from others."""
        return _digest(self.tokens)


@dataclass(frozen=True)
class TokenizedText:
    """A file's tokens, and what prompts begin with besides."""

    path: Path
    begin: tuple[int, ...]
    tokens: list[int]

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer) -> "TokenizedText":
        """Raises InputError for a file that cannot be read."""
        return cls(path, _beginning(tokenizer), tokenizer.encode(read_text(path), add_special_tokens=False))

    @property
    def name(self) -> str:
        return f"text of {self.path.name}"

    @property
    def digest(self) -> str:
        """Tells it from others."""
        return _digest([*self.begin, *self.tokens])

    def stretches(self, context: int, count: int) -> list[tuple[int, ...]]:
        """``count`` prompts of ``context`` tokens that are evenly spread over the text and do not overlap, a single one
        from its beginning on. Raises InputError for a text that is too short for them."""
        length = context - len(self.begin)
        if len(self.tokens) < count * length:
            raise InputError(
                f"{self.path} has {len(self.tokens):,} tokens; accepted: {count * length:,} or more, for {count} "
                f"prompt{'s' * (count != 1)} of {context:,}; give a longer text, or ask for shorter or fewer prompts"
            )
        starts = [place * (len(self.tokens) - length) // max(1, count - 1) for place in range(count)]
        return [(*self.begin, *self.tokens[start : start + length]) for start in starts]


def prompts_of_texts(texts: Sequence[TokenizedText], context: int, num_prompts: int) -> Prompts:
    """Of each text in turn. Raises InputError for one that is too short, and for more of them than prompts."""
    if len(texts) > num_prompts:
        raise InputError(
            f"{len(texts)} text files for {num_prompts} prompts; accepted: no more files than prompts; raise "
            "--num-prompts, or leave files out"
        )
    counts = (len(range(number, num_prompts, len(texts))) for number in range(len(texts)))
    tokens = [prompt for text, count in zip(texts, counts, strict=True) for prompt in text.stretches(context, count)]
    return Prompts(tuple(tokens), f"text of {', '.join(text.path.name for text in texts)}")


def prompts_of_needles(tokenizer: Tokenizer, context: int, num_prompts: int, seed: int) -> Prompts:
    """Generated documents with needles, which are asked for and answered at their ends: the last ``context`` tokens."""
    begin = _beginning(tokenizer)
    tokens = tuple((*begin, *_document(tokenizer, context - len(begin), seed + i)) for i in range(num_prompts))
    return Prompts(tokens, f"generated documents with needles (seeds {seed} to {seed + num_prompts - 1})")


def random_prompts(vocab_size: int, context: int, num_prompts: int, seed: int) -> Prompts:
    drawn = np.random.default_rng(seed).integers(0, vocab_size, (num_prompts, context))
    return Prompts(tuple(map(tuple, drawn.tolist())), f"random tokens (seed {seed})")


def _document(tokenizer: Tokenizer, length: int, seed: int) -> list[int]:
    num_characters = length  # most tokenizers need more; how many, the first try tells
    while True:
        haystack = generated_haystack(seed, num_characters)
        prompt = make_document(haystack, num_characters, 0, _NUM_NEEDLES, names_for_training(), seed).prompt
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        if len(tokens) >= length:
            return tokens[len(tokens) - length :]
        num_characters = num_characters * length * 21 // (20 * len(tokens)) + 1


def _digest(tokens: Sequence[int] | Sequence[Sequence[int]]) -> str:
    """12 hexadecimal digits."""
    return hashlib.sha256(np.array(tokens, dtype=np.int64).tobytes()).hexdigest()[:12]


def _beginning(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The model's BOS, where its prompts have one."""
    return tuple(token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id)
