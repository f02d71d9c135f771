"""A document with needles in it, the examples that show how answers look, and the questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.needles.haystack import Haystack
from engine.bench.needles.needle import DOCUMENT_END, DOCUMENT_START, Needle, draw_needles

# More questions than a document has needles ask for the same ones again.
MAX_NEEDLES = 256
NUM_DEPTHS = 10


@dataclass(frozen=True)
class PlacedNeedle:
    """``position`` is where it begins, as a fraction of the document's characters."""

    needle: Needle
    position: float

    @property
    def depth(self) -> int:
        """Which of ``NUM_DEPTHS`` equal parts of the document it begins in."""
        return min(int(self.position * NUM_DEPTHS), NUM_DEPTHS - 1)


@dataclass(frozen=True)
class Document:
    """What all questions share, and what they ask for, in the order in which they do."""

    haystack: str  # what it is, in words
    prompt: str  # the document and the examples
    num_characters: int  # of the document alone
    num_examples: int
    needles: tuple[PlacedNeedle, ...]

    def ask(self, num_questions: int) -> list[PlacedNeedle]:
        """The needles that so many questions are about; when they are all asked for, from the first on again."""
        return [self.needles[i % len(self.needles)] for i in range(num_questions)]


def make_document(
    haystack: Haystack, num_characters: int, num_needles: int, num_few_shot: int, names: Sequence[str], seed: int
) -> Document:
    """``num_characters`` of the haystack, with ``num_needles`` to ask for and ``num_few_shot`` more, whose questions
    are given with their answers, spread evenly over it.

    Raises InputError when there are not enough names, or the haystack is too short.
    """
    rng = np.random.default_rng((2, seed))
    drawn = draw_needles(num_needles + num_few_shot, rng, tuple(names), held_out=True)
    spread = [i / max(len(drawn) - 1, 1) for i in range(len(drawn))]
    text, positions = place(haystack.take(num_characters), [needle.sentence for needle in drawn], spread)
    placed = [PlacedNeedle(needle, position) for needle, position in zip(drawn, positions, strict=True)]
    shuffled = [placed[i] for i in rng.permutation(len(placed)).tolist()]
    examples, asked = shuffled[:num_few_shot], shuffled[num_few_shot:]
    shown = "".join(one.needle.question + one.needle.answer for one in examples)
    prompt = DOCUMENT_START + text + DOCUMENT_END + shown
    return Document(haystack.name, prompt, len(text), num_few_shot, tuple(asked))


def place(sentences: Sequence[str], hidden: Sequence[str], fractions: Sequence[float]) -> tuple[str, list[float]]:
    """The sentences with ``hidden`` between them, and where each of those begins, as a fraction of the text.

    Each goes to the sentence end that is nearest to its fraction (ascending, of the sentences' characters): before the
    first sentence and after the last too.
    """
    ends = np.cumsum([0, *(len(sentence) + 1 for sentence in sentences)])
    places = [int(np.abs(ends - fraction * ends[-1]).argmin()) for fraction in fractions]
    pieces: list[str] = []
    starts: list[int] = []
    length = before = 0
    for index, one in zip([*places, len(sentences)], [*hidden, None], strict=True):
        pieces += sentences[before:index]
        length += int(ends[index] - ends[before])
        before = index
        if one is not None:
            starts.append(length)
            pieces.append(one)
            length += len(one) + 1
    text = " ".join(pieces)
    return text, [start / len(text) for start in starts]
