"""The prompts that a search for sparse patterns reads: texts, documents with needles, or random tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.bench.needles.document import make_document
from engine.bench.needles.haystack import generated_haystack
from engine.bench.needles.needle import names_for_training
from engine.errors import InputError
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
        """Tells them from others, 12 hexadecimal digits."""
        return hashlib.sha256(np.array(self.tokens, dtype=np.int64).tobytes()).hexdigest()[:12]


def prompts_of_texts(paths: Sequence[Path], tokenizer: Tokenizer, context: int, num_prompts: int) -> Prompts:
    """From each file in turn, stretches of ``context`` tokens that are evenly spread over it and do not overlap.

    Raises InputError for a file that cannot be read or is too short, and for more files than prompts.
    """
    if len(paths) > num_prompts:
        raise InputError(
            f"{len(paths)} text files for {num_prompts} prompts; accepted: no more files than prompts; raise "
            "--num-prompts, or leave files out"
        )
    begin = _beginning(tokenizer)
    length = context - len(begin)
    found: list[tuple[int, ...]] = []
    for number, path in enumerate(paths):
        count = len(range(number, num_prompts, len(paths)))
        tokens = tokenizer.encode(_text(path), add_special_tokens=False)
        if len(tokens) < count * length:
            raise InputError(
                f"{path} has {len(tokens):,} tokens; accepted: {count * length:,} or more, for {count} prompts of "
                f"{context:,}; give a longer text, or lower --context or --num-prompts"
            )
        starts = [place * (len(tokens) - length) // max(1, count - 1) for place in range(count)]
        found += [(*begin, *tokens[start : start + length]) for start in starts]
    return Prompts(tuple(found), f"text of {', '.join(path.name for path in paths)}")


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


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """The model's BOS, where its prompts have one."""
    return [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); accepted: a text file; give another") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; accepted: a text file in UTF-8; convert it") from error
