"""What comes from a file, in a message: on one line, printable, and not longer than a person reads."""

import reprlib


class _Repr(reprlib.Repr):
    """Looks at no more of a value than it shows. An integer of more than 4300 digits has no repr at all."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 80, 80
        self.maxdict = self.maxlist = self.maxtuple = 12

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"


_REPR = _Repr()


def shown(value: object) -> str:
    """``repr(value)`` for an error's message: one line, and cut where it is long, whatever the value."""
    return one_line(_REPR.repr(value))


def one_line(text: str, limit: int = 240) -> str:
    """``text`` from a file for an error's message: printable, and cut at ``limit`` characters."""
    # No more of it is looked at than can be kept.
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."
