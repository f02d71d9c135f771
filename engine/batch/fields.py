"""The fields of a request, each taken once: what is left over at the end is an option that nobody has looked at."""

import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from engine.batch.refusal import RefusedError, refused
from engine.messages import one_line

_MAX_INTEGER = 2**63 - 1
_MAX_TOKEN_ID = 2**32 - 1  # that an array of type I holds; the model's vocabulary ends before


class Fields:
    """A JSON object. As in OpenAI's API, null stands for a field that was left out.

    The methods take a field of one type. They raise RefusedError, naming it, where it holds anything else.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str) -> Any:
        """The value, of any type; None where there is none."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise refused(name, value, "text")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise refused(name, value, "true or false")
        return value

    def integer(self, name: str, default: int | None = None, least: int = 0, most: int = _MAX_INTEGER) -> int | None:
        """From ``least`` to ``most``."""
        value = self.take(name)
        if value is None:
            return default
        if not _is_integer(value) or not least <= value <= most:
            bounds = f"of {least} or more" if most == _MAX_INTEGER else f"from {least} to {most}"
            raise refused(name, value, f"an integer {bounds}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        # The bound keeps out integers that no float holds; it is far above any number that means something here.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300:
            raise refused(name, value, "a number")
        return float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text, or a list of up to ``most``; none of them empty."""
        value = self.take(name)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if len(texts) > most or not all(isinstance(text, str) and text for text in texts):
            raise refused(name, value, f"a text, or a list of up to {most} texts, none of them empty")
        return tuple(texts)

    def token_ids(self, name: str) -> Sequence[int]:
        """A list of token ids, compact."""
        value = self.take(name)
        if value is None:
            return array("I")
        if not is_token_ids(value):
            raise refused(name, value, "a list of token ids, integers of 0 or more")
        return array("I", value)

    def finish(self, neutral: Mapping[str, Sequence[Any]]) -> None:
        """Raises RefusedError for what was not taken, unless its value is among the ``neutral`` ones of its name:
        those that ask for nothing but what is done anyway."""
        for name, value in self._left.items():
            if name not in neutral:
                raise RefusedError(f"{one_line(name)} is not a field that is known here; remove it", one_line(name))
            if not any(_equal(value, harmless) for harmless in neutral[name]):
                raise refused(name, value, f"{_listed(neutral[name])}, as it is not supported; remove it")


def is_token_ids(value: object) -> bool:
    """Whether it is a list of token ids, of whatever vocabulary."""
    return isinstance(value, list) and all(_is_integer(item) and 0 <= item <= _MAX_TOKEN_ID for item in value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _equal(value: object, other: object) -> bool:
    """In JSON, where 1 is not true."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _listed(values: Sequence[Any]) -> str:
    return " or ".join(json.dumps(value) for value in (*values, None))
