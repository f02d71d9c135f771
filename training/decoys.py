"""Sentences with numbers that are no passkey's: what a passkey has to be told from.

A book of a few thousand sentences has dozens that begin with a number, as the passkey's second mention does. Documents
to train on are shorter than those that evaluation asks about; in these they would be too few to learn from.
"""

from collections.abc import Iterator

import numpy as np

from engine.bench.needles.passkey import draw_passkey
from engine.bench.needles.words import INTRANSITIVE_VERBS, NOUNS

_FORMS = (
    "{number} {noun}s {verb}.",
    "{number} is the number of the {noun}.",
    "{number} was the {noun}.",
    "The number of the {noun} is {number}.",
    "The {noun} is {number}.",
    "The {noun} had {number} {noun}s.",
)
_MAX_DIGITS = 7  # as many as passkeys have


def decoys(num: int, rng: np.random.Generator) -> Iterator[str]:
    """``num`` sentences, of numbers of one to seven digits; half of them begin with theirs."""
    for _ in range(num):
        form = _one_of(_FORMS, rng)
        number = draw_passkey(int(rng.integers(1, _MAX_DIGITS + 1)), rng).digits
        yield form.format(number=number, noun=_one_of(NOUNS, rng), verb=_one_of(INTRANSITIVE_VERBS, rng))


def _one_of(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
