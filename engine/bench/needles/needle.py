"""Needles: facts to be hidden in a text, each with its question and its answer.

The wording, and how questions and answers are laid out, are those of the needle experiment of the Hydragen paper
(arXiv:2402.05099), so that results can be compared.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from engine.bench.needles.words import COLORS, NAMES, NUM_HELD_OUT_NAMES
from engine.errors import InputError

DOCUMENT_START = "Start of document:\n"
DOCUMENT_END = "\nEnd of document\n\n"
_HELD_OUT_EVERY = 10
_ANSWER = re.compile(r"###(.*?)###", re.DOTALL)


@dataclass(frozen=True)
class Needle:
    """A dog and the colour of its fur."""

    name: str
    color: str

    @property
    def sentence(self) -> str:
        return f"The dog named {self.name} has fur that is {self.color}."

    @property
    def question(self) -> str:
        """What the answer is generated after."""
        return f"Question: What color is the fur of the dog named {self.name}?\nAnswer:"

    @property
    def answer(self) -> str:
        """What a model is to generate after ``question``, and, after it, what comes before the next question."""
        return f" ###{self.color.title()}###\n\n"

    def is_answered_by(self, text: str) -> bool:
        """Whether the first ``###...###`` of the text is the right colour."""
        found = _ANSWER.search(text)
        return found is not None and found[1].strip() == self.color.title()


def names_for_training() -> tuple[str, ...]:
    """Names that training may put into needles; the held-out others are spread over the alphabet."""
    held_out = set(held_out_names())
    return tuple(name for name in NAMES if name not in held_out)


def held_out_names() -> tuple[str, ...]:
    """Names that no needle of the training had, ``NUM_HELD_OUT_NAMES`` of them."""
    order = np.random.default_rng(0).permutation(len(NAMES))
    return tuple(NAMES[i] for i in sorted(order[:NUM_HELD_OUT_NAMES].tolist()))


@cache
def colors_of(name: str, held_out: bool) -> tuple[str, ...]:
    """The colours that needles of the training may give a name, or, ``held_out``, those that evaluation gives it: about
    a tenth of all, others for the next name."""
    shift = NAMES.index(name)
    return tuple(c for i, c in enumerate(COLORS) if ((i + shift) % _HELD_OUT_EVERY == 0) == held_out)


def draw_needles(num: int, rng: np.random.Generator, names: tuple[str, ...], held_out: bool) -> list[Needle]:
    """``num`` needles with different names, each with a colour drawn by itself from ``colors_of`` the name.

    Raises InputError when there are not as many names.
    """
    if num > len(names):
        raise InputError(
            f"{num} needles were asked for; accepted: up to {len(names)}, one for each name; ask for fewer"
        )
    chosen = [names[i] for i in rng.permutation(len(names))[:num].tolist()]
    draws = rng.random(num).tolist()
    colors = [colors_of(name, held_out) for name in chosen]
    return [Needle(name, of[int(draw * len(of))]) for name, of, draw in zip(chosen, colors, draws, strict=True)]
