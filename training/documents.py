"""Training documents, as token ids: needles, a passkey and decoys hidden in sentences, then questions and answers.

The answers are trained on, and what surely follows them. Evaluation's text is another stream of the generator, its
pairs of name and colour are never in these documents, and it has names of its own too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from engine.bench.needles import needle, passkey
from engine.bench.needles.needle import Needle
from training.decoys import decoys
from training.vocabulary import BOS_ID, EOS_ID

IGNORED = -100  # the label of a token that is not trained on
_NUM_DECOYS = 5000
_MAX_DECOY_SHARE = 0.3  # of a document's text


@dataclass(frozen=True)
class Shape:
    """What the documents of one batch have in common. Lengths are in tokens, ``length`` with the questions."""

    length: int
    num_needles: int
    num_questions: int
    passkey_share: float  # of documents that ask for a passkey alone, as the passkey grid does


class DocumentMaker:
    """Makes batches from pools of sentences, one pool for each source of text, each as likely."""

    def __init__(self, tokenizer: Tokenizer, pools: Sequence[Sequence[str]], rng: np.random.Generator):
        self._tokenizer, self._rng = tokenizer, rng
        self._pools = [self._encode_all([f" {sentence}" for sentence in pool]) for pool in pools]
        self._decoys = self._encode_all([f" {decoy}" for decoy in decoys(_NUM_DECOYS, rng)])
        self._names = needle.names_for_training()
        self._cache: dict[str, list[int]] = {}
        two = [self._encode(Needle(name, "amber").question) for name in self._names[:2]]
        self._num_before_name = next(i for i, (one, other) in enumerate(zip(*two, strict=True)) if one != other)

    def batch(self, shape: Shape, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels, ``(size, length)`` each: the label of a token is the next one, or IGNORED."""
        tokens = np.full((size, shape.length), EOS_ID)
        labels = np.full((size, shape.length), IGNORED)
        for row in range(size):
            is_passkey = self._rng.random() < shape.passkey_share
            made, asked = (self._passkey_document if is_passkey else self._needle_document)(shape)
            tokens[row, : len(made)] = made
            for start, end in asked:
                labels[row, start - 1 : end - 1] = made[start:end]
        return tokens, labels

    def _needle_document(self, shape: Shape) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and from where to where in them stands what is trained on."""
        rng = self._rng
        needles = needle.draw_needles(shape.num_needles, rng, self._names, held_out=False)
        key = passkey.draw_passkey(7, rng)
        asked_for = [needles[i] for i in rng.permutation(len(needles))[: shape.num_questions].tolist()]
        turns = [(self._encode(one.question), self._encode(one.answer)) for one in asked_for]
        turns.insert(
            int(rng.integers(len(turns) + 1)), (self._encode(passkey.QUESTION), self._encode(f" {key.digits}.\n\n"))
        )
        start, end = self._encode(needle.DOCUMENT_START), self._encode(needle.DOCUMENT_END)
        hidden = [self._needle_tokens(one) for one in needles] + [self._encode(" " + key.sentence)]
        room = shape.length - 1 - len(start) - len(end) - sum(len(q) + len(a) for q, a in turns)
        tokens = [BOS_ID, *start, *self._hide(hidden, room), *end]
        asked = []
        for number, (question, answer) in enumerate(turns):
            if number:  # what follows an answer can be told up to the name, and answers are generated past their end
                asked.append((len(tokens), len(tokens) + self._num_before_name))
            tokens += question
            asked.append((len(tokens), len(tokens) + len(answer)))
            tokens += answer
        return tokens, asked

    def _passkey_document(self, shape: Shape) -> tuple[list[int], list[tuple[int, int]]]:
        key = passkey.draw_passkey(7, self._rng)
        start, question, answer = map(self._encode, (passkey.INSTRUCTION, passkey.QUESTION, f" {key.digits}.\n\n"))
        room = shape.length - 1 - len(start) - len(question) - len(answer)
        tokens = [BOS_ID, *start, *self._hide([self._encode(" " + key.sentence)], room), *question]
        return tokens + answer, [(len(tokens), len(tokens) + len(answer))]

    def _hide(self, hidden: list[list[int]], room: int) -> list[int]:
        """The token ids of a random stretch of a pool with ``hidden`` and some decoys between its sentences, up to
        ``room`` of them.
        """
        pool = self._pools[self._rng.integers(len(self._pools))]
        room -= sum(map(len, hidden))
        assert room >= 0, "the questions and needles of a shape must fit its length"
        some = self._draw_decoys(self._rng.uniform(0, _MAX_DECOY_SHARE) * room)
        room -= sum(map(len, some))
        hidden = [*hidden, *some]
        self._rng.shuffle(hidden)
        at = int(self._rng.integers(len(pool)))
        stretch: list[list[int]] = []
        while (size := len(pool[at]) if stretch else self._size_of_first(pool[at])) <= room:
            stretch.append(pool[at])
            room -= size
            at = (at + 1) % len(pool)
        places = np.sort(self._rng.integers(len(stretch) + 1, size=len(hidden))).tolist()
        pieces: list[list[int]] = []
        before = 0
        for place, one in zip([*places, len(stretch)], [*hidden, []], strict=True):
            pieces += [*stretch[before:place], one]
            before = place
        return [*self._without_space(pieces[0]), *chain.from_iterable(pieces[1:])]

    def _draw_decoys(self, room: float) -> list[list[int]]:
        drawn: list[list[int]] = []
        while True:
            decoy = self._decoys[self._rng.integers(len(self._decoys))]
            room -= len(decoy)
            if room < 0:
                return drawn
            drawn.append(decoy)

    def _size_of_first(self, sentence: list[int]) -> int:
        """A sentence may be longer without the space before it; what is hidden, words that are tokens, is not."""
        return max(len(sentence), len(self._without_space(sentence)))

    def _without_space(self, tokens: list[int]) -> list[int]:
        """As what begins a document has none."""
        return self._encode(self._tokenizer.decode(tokens).lstrip(" "))

    def _needle_tokens(self, one: Needle) -> list[int]:
        return self._encode(" " + one.sentence)

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) > 200_000:  # passkeys are always new
                self._cache.clear()
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._cache[text]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
