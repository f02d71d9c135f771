"""Passkeys: a number of a few digits hidden in a text, to be repeated at its end.

The needle and the question are those of Mohtashami and Jaggi, "Landmark Attention" (arXiv:2305.16300), as the
benchmark of Yuan et al. (arXiv:2407.01527) has them.
"""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

INSTRUCTION = "Somewhere in the text below a pass key is given. Remember it, for it will be asked for.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """``digits`` may begin with zeros."""

    digits: str

    @property
    def sentence(self) -> str:
        return f"The pass key is {self.digits}. Remember it. {self.digits} is the pass key."

    def exact_match(self, text: str) -> bool:
        """Whether the text has the digits, and no digit before or after them."""
        return re.search(rf"(?<!\d){self.digits}(?!\d)", text) is not None

    def partial_match(self, text: str) -> float:
        """The longest run of the digits that the text has, as a fraction of them."""
        matcher = SequenceMatcher(None, self.digits, text, autojunk=False)
        return matcher.find_longest_match(0, len(self.digits), 0, len(text)).size / len(self.digits)


def draw_passkey(num_digits: int, rng: np.random.Generator) -> Passkey:
    return Passkey("".join(str(digit) for digit in rng.integers(10, size=num_digits).tolist()))
