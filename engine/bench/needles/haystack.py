"""Haystacks: sentences to hide needles between, from the generator or from a file, and needles put into them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.bench.needles.identity import text_digest
from engine.bench.needles.prose import sentences
from engine.errors import InputError
from engine.text_file import read_text

# A word, what ends a sentence, and what closes quotations and brackets after it.
_MAYBE_AN_END = re.compile(r"(\w*)([.!?]+)[\"'\u201d\u2019)\]]* ")
_ABBREVIATIONS = frozenset(
    "Mr Mrs Ms Dr St Messrs Mme Mlle Prof Capt Col Gen Lt Maj Sgt Rev Hon Jr Sr vs cf Fig No".split()
)


@dataclass(frozen=True)
class Haystack:
    """Sentences in the order in which a document takes them; ``name`` says what they are, and ``digest`` tells a text
    from others of that name."""

    name: str
    sentences: Sequence[str]
    digest: str = ""  # of the generator none: its seed is in the name

    def take(self, num_characters: int) -> list[str]:
        """As many sentences, from the first on, as ``num_characters`` hold when a space parts them, or one more.

        Raises InputError when there are not as many: repeated text would hold every needle's surroundings twice.
        """
        taken, room = [], num_characters
        for sentence in self.sentences:
            if room <= 0:
                break
            taken.append(sentence)
            room -= len(sentence) + 1
        if room > 0:
            raise InputError(
                f"{self.name} has {num_characters - room:,} characters; {num_characters:,} were asked for; accepted: "
                "as many as it has; ask for a shorter document, or give a longer text"
            )
        return taken


def generated_haystack(seed: int, num_characters: int) -> Haystack:
    """Prose from the generator, ``num_characters`` of it or a little more, that no training text holds."""
    return Haystack(f"generated prose (seed {seed})", list(_up_to(sentences((1, seed)), num_characters)))


def read_haystack(path: Path, start: float = 0.0) -> Haystack:
    """The sentences of a text file, whose every run of white space counts as one space; without the first of them, the
    fraction ``start``.

    Raises InputError when it cannot be read, is not UTF-8, or has no sentence.
    """
    found = split_sentences(read_text(path))
    if not found:
        raise InputError(f"{path} has no text; accepted: a text file with sentences; give another")
    name = path.name if not start else f"{path.name} after {100 * start:g}% of its sentences"
    left = found[int(start * len(found)) :]
    return Haystack(name, left, text_digest(left))


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text``, each with the punctuation at its end.

    A full stop after a title or an initial ends none, nor does anything that is followed by a lower-case letter, as
    what is said in a quotation is.
    """
    text = " ".join(text.split())
    ends = [match.end() for match in _MAYBE_AN_END.finditer(text) if _ends_a_sentence(match, text)]
    pieces = (text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)], strict=True))
    return [piece for piece in pieces if piece]


def _ends_a_sentence(match: re.Match, text: str) -> bool:
    word, mark = match.groups()
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    if mark == "." and (word in _ABBREVIATIONS or is_initial):
        return False
    return not text[match.end() : match.end() + 1].islower()


def _up_to(found: Iterator[str], num_characters: int) -> Iterator[str]:
    while num_characters > 0:
        sentence = next(found)
        yield sentence
        num_characters -= len(sentence) + 1
