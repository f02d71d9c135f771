"""The passkey grid: a number hidden at every depth of texts of every length, several times."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.bench.needles.document import place
from engine.bench.needles.haystack import Haystack
from engine.bench.needles.passkey import INSTRUCTION, QUESTION, Passkey, draw_passkey
from engine.errors import InputError

_MIN_WORDS = 512
_GRID = re.compile(r"(?:(\d{1,9}):)?(\d{1,9})words_(\d{1,4})x(\d{1,4})x(\d{1,4})_(\d{1,3})digits")
_MAX_PROBES = 100_000


@dataclass(frozen=True)
class PasskeyGrid:
    """As the benchmark of Yuan et al. (arXiv:2407.01527) names its own, ``20480words_10x10x3_7digits``: lengths up to
    20480 words, 10 lengths x 10 depths x 3 repeats, 7 digits."""

    min_words: int
    max_words: int
    num_lengths: int
    num_depths: int
    num_repeats: int
    num_digits: int

    @classmethod
    def parse(cls, text: str) -> "PasskeyGrid":
        """Raises InputError for what is no grid, or one that holds nothing or too much."""
        match = _GRID.fullmatch(text.strip())
        if match is None:
            raise InputError(
                f"passkey grid {text!r} is not understood; accepted: WORDSwords_LENGTHSxDEPTHSxREPEATS_NUMBERdigits, "
                f"such as 20480words_10x10x3_7digits; they begin at {_MIN_WORDS} words, or where 1024:20480words says"
            )
        low, high, *sizes = (None if group is None else int(group) for group in match.groups())
        if not all((high, *sizes)) or low == 0:
            raise InputError(f"passkey grid {text!r} has a 0 in it; accepted: numbers from 1 up; raise it")
        if low is None:
            low = min(_MIN_WORDS, high)
        if low > high:
            raise InputError(f"passkey grid {text!r} begins with {low} words and ends with {high}; swap them")
        grid = cls(low, high, *sizes)
        if len(set(grid.lengths)) < grid.num_lengths:
            raise InputError(
                f"passkey grid {text!r}: there are no {grid.num_lengths} different lengths from {low} to {high} words; "
                "ask for fewer"
            )
        if grid.num_probes > _MAX_PROBES:
            raise InputError(
                f"passkey grid {text!r} has {grid.num_probes:,} prompts; accepted: {_MAX_PROBES:,} at most; use fewer"
            )
        return grid

    @property
    def num_probes(self) -> int:
        return self.num_lengths * self.num_depths * self.num_repeats

    @property
    def lengths(self) -> tuple[int, ...]:
        """In words of text, evenly from the least to the most; a single one is the most."""
        if self.num_lengths == 1:
            return (self.max_words,)
        step = (self.max_words - self.min_words) / (self.num_lengths - 1)
        return tuple(int(self.min_words + i * step) for i in range(self.num_lengths))

    @property
    def depths(self) -> tuple[float, ...]:
        """Evenly from 0, the beginning, to 1, the end; a single one is the middle."""
        if self.num_depths == 1:
            return (0.5,)
        return tuple(i / (self.num_depths - 1) for i in range(self.num_depths))


@dataclass(frozen=True)
class Probe:
    """One prompt of the grid."""

    num_words: int
    depth: float
    repeat: int
    passkey: Passkey
    prompt: str


def make_probes(grid: PasskeyGrid, num_words: int, haystack: Haystack, seed: int) -> Iterator[Probe]:
    """Those of one length, by depth, then repeat. The same seed gives the same ones, whatever else the grid holds.

    The key stands at a sentence end, the one nearest to its depth. Raises InputError when the haystack is too short.
    """
    sentences = _first_words(haystack, num_words)
    for depth in grid.depths:
        for repeat in range(grid.num_repeats):
            # A depth is known by its place from 0 to 1, so that grids with other depths share what they have in common.
            rng = np.random.default_rng((3, seed, num_words, round(depth * 1_000_000), repeat))
            key = draw_passkey(grid.num_digits, rng)
            text, _ = place(sentences, [key.sentence], [depth])
            yield Probe(num_words, depth, repeat, key, INSTRUCTION + text + QUESTION)


def _first_words(haystack: Haystack, num_words: int) -> list[str]:
    """Whole sentences of ``num_words`` words or a little fewer; the first one in any case."""
    taken: list[str] = []
    room = num_words
    for sentence in haystack.sentences:
        size = len(sentence.split())
        if taken and size > room:
            return taken
        taken.append(sentence)
        room -= size
    if room > 0:
        raise InputError(
            f"{haystack.name} has {num_words - room:,} words; {num_words:,} were asked for; accepted: as many as it "
            "has; ask for fewer, or give a longer text"
        )
    return taken
