"""Stop strings: ending a sequence where a text first occurs in what it has generated.

The text of token ids is what ``Tokenizer.decode`` makes of all of them. It cannot be told token by token: a character
may be spread over tokens, and a piece's leading space counts only where something stands before it. So tokens are
decoded behind a few of those before them, and what may still change is held back. Nothing here depends on anything but
the sequence's own tokens, so all ranks agree without talking.
"""

from collections.abc import Sequence

from engine.tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the bytes of a character become until the last of them is there
# A window of more tokens than this is cut, to those that came with its last whole character and after it.
_WINDOW = 16
# A character has at most 4 bytes, so a tail of more tokens than this that ends in none is not the start of one.
_LONGEST_TAIL = 12
_KEPT_OF_TAIL = 9


class TextStream:
    """The text of one sequence's tokens as they come, at a cost a token that does not grow with the sequence.

    The texts that ``push`` returns join to what the tokenizer makes of all tokens at once, less the unfinished
    characters at its end. They may differ where bytes are no UTF-8: a tokenizer with byte fallback then takes back all
    characters of the run of bytes.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the last tokens
        self._text = ""  # of the window
        self._num_told = 0  # characters of it that were returned
        self._whole = self._whole_before = 0  # tokens of the window that ended in a whole character, and before that

    def push(self, token: int) -> str:
        """The text that is certain now and was not before ``token``."""
        text = self._tokenizer.decode([*self._window, token])
        # A token without text (a special one) must not be what the next one's leading space is judged by. A token that
        # is a space changes nothing at the very beginning, but is something twice.
        if text == self._text and not self._tokenizer.decode([token, token]):
            return ""
        self._window.append(token)
        self._text = text
        certain = len(text.rstrip(_UNFINISHED))
        new = text[self._num_told : certain]
        self._num_told = max(self._num_told, certain)
        if certain == len(text):
            # Bytes that counted one by one, behind one that was no UTF-8, are characters now that the window was cut.
            self._num_told = certain
            self._whole_before, self._whole = self._whole, len(self._window)
            if len(self._window) > _WINDOW:
                self._cut(self._whole_before)
        elif len(self._window) - self._whole > _LONGEST_TAIL:
            new += text[self._num_told : -3]
            self._num_told = max(self._num_told, len(text) - 3)
            self._cut(len(self._window) - _KEPT_OF_TAIL)
        return new

    def _cut(self, start: int) -> None:
        """The window begins at ``start`` from now on."""
        num_held = len(self._text) - self._num_told
        self._window = self._window[start:]
        self._text = self._tokenizer.decode(self._window)
        self._num_told = max(0, len(self._text) - num_held)
        self._whole, self._whole_before = (max(0, place - start) for place in (self._whole, self._whole_before))


class StopChecker:
    """Tells when the text of one sequence holds one of the stop strings. It is to be told every token."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = TextStream(tokenizer)
        self._num_kept = max(map(len, stop)) - 1  # characters that may begin a stop string which goes on
        self._tail = ""

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of ``token_ids``, all that the sequence has, completes a stop string."""
        text = self._tail + self._stream.push(token_ids[-1])
        self._tail = text[max(0, len(text) - self._num_kept) :]
        # The whole text, which decides, is made for the one token where it seems so.
        if _first(text, self._stop) is None:
            return False
        return _first(self._tokenizer.decode(token_ids), self._stop) is not None


def cut_at_stop(text: str, stop: Sequence[str], include: bool) -> str:
    """``text`` up to the stop string that ends first, which is left out or included; all of it where there is none."""
    found = _first(text, stop)
    if found is None:
        return text
    start, end = found
    return text[: end if include else start]


def _first(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
    """Where the stop string that ends first begins and ends; of several that end there, the longest."""
    text = text.rstrip(_UNFINISHED)
    ends = [(start + len(s), start) for s in stop if (start := text.find(s)) >= 0]
    if not ends:
        return None
    end, start = min(ends)
    return start, end
