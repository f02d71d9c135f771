"""What ``scripts/prefill.py`` reads: random tokens, or the beginning of a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.bench.long_prompts import TokenizedText
from engine.bench.modes import make_prompt
from engine.errors import InputError
from engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Of any length: ``take`` gives so many tokens. ``digest`` tells a text from others of its name."""

    name: str
    take: Callable[[int], Sequence[int]]
    digest: str = ""  # of random tokens none: their seed is in the name


def random_prompt(vocab_size: int, seed: int) -> Prompt:
    return Prompt(f"random tokens (seed {seed})", lambda num_tokens: make_prompt(vocab_size, num_tokens, seed))


def prompt_of_text(path: Path, model_folder: Path | None) -> Prompt:
    """The tokens of a text by a model's tokenizer. Raises InputError for a file that cannot be read, where there is no
    tokenizer, and, when they are taken, for more tokens than the text has."""
    if model_folder is None:
        raise InputError("--prompt-file was given, but dummy weights of a preset have no tokenizer; leave it out")
    text = TokenizedText.read(path, Tokenizer.from_folder(model_folder))
    return Prompt(text.name, lambda num_tokens: text.stretches(num_tokens, 1)[0], text.digest)
