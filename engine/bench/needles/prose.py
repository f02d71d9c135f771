"""English-like text without end from a seed: a haystack that needs no file.

Sentences follow a small grammar over ``words``. They mention numbers, colours, first names and dogs now and then, as
books do, so that what looks like part of a needle is not always one.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from engine.bench.needles.words import (
    ADJECTIVES,
    ADVERBS,
    COLORS,
    CONJUNCTIONS,
    INTRANSITIVE_VERBS,
    NAMES,
    NOUNS,
    OPENINGS,
    PREPOSITIONS,
    TRANSITIVE_VERBS,
)

# How often a noun phrase is of each kind: with an adjective, bare, coloured, numbered, a first name, a dog.
_PHRASES = ("adjective", "bare", "color", "number", "name", "dog")
_PHRASE_WEIGHTS = (0.36, 0.36, 0.06, 0.06, 0.12, 0.04)
_PREFETCH = 4096


def sentences(seed: int | Sequence[int]) -> Iterator[str]:
    """One sentence after another, with a capital letter and a full stop, the same for the same ``seed``.

    Training of the shipped model has the seed 0, evaluation pairs that begin with 1: their texts differ.
    """
    words = _Words(seed)
    while True:
        yield _sentence(words)


class _Words:
    """Draws from the word lists. Uniform numbers are drawn many at a time, which is most of the cost."""

    def __init__(self, seed: int | Sequence[int]):
        self._rng = np.random.default_rng(seed)
        self._numbers: list[float] = []

    def uniform(self) -> float:
        if not self._numbers:
            self._numbers = self._rng.random(_PREFETCH).tolist()
        return self._numbers.pop()

    def below(self, n: int) -> int:
        return int(self.uniform() * n)

    def one_of(self, words: tuple[str, ...]) -> str:
        return words[self.below(len(words))]

    def weighted(self, names: tuple[str, ...], weights: tuple[float, ...]) -> str:
        left = self.uniform()
        for name, weight in zip(names, weights, strict=True):
            left -= weight
            if left < 0:
                break
        return name


def _sentence(words: _Words) -> str:
    clause = _clause(words)
    draw = words.uniform()
    if draw < 0.2:
        clause = f"{words.one_of(OPENINGS)}, {clause}"
    elif draw < 0.45:
        clause = f"{clause} {words.one_of(CONJUNCTIONS)} {_clause(words)}"
    elif draw < 0.6:
        clause = f"{clause}, and {_predicate(words)}"
    return clause[0].upper() + clause[1:] + "."


def _clause(words: _Words) -> str:
    return f"{_noun_phrase(words)} {_predicate(words)}"


def _predicate(words: _Words) -> str:
    if words.uniform() < 0.55:
        predicate = f"{words.one_of(TRANSITIVE_VERBS)} {_noun_phrase(words)}"
    else:
        predicate = words.one_of(INTRANSITIVE_VERBS)
    if words.uniform() < 0.5:
        predicate += f" {words.one_of(PREPOSITIONS)} {_noun_phrase(words)}"
    if words.uniform() < 0.2:
        predicate += f" {words.one_of(ADVERBS)}"
    return predicate


def _noun_phrase(words: _Words) -> str:
    kind, noun = words.weighted(_PHRASES, _PHRASE_WEIGHTS), words.one_of(NOUNS)
    if kind == "name":
        return words.one_of(NAMES)
    if kind == "number":
        return f"{2 + words.below(1998)} {noun}s"
    article = "the" if words.uniform() < 0.7 else "a"
    if kind == "dog":
        noun = "dog"
    qualifier = {"adjective": ADJECTIVES, "color": COLORS}.get(kind)
    rest = f"{words.one_of(qualifier)} {noun}" if qualifier else noun
    if article == "a" and rest[0] in "aeiou":
        article = "an"
    return f"{article} {rest}"
