"""Reading a JSON object such as ``config.json``: what is damaged or of a wrong type is refused by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import InputError

_REQUIRED = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises InputError when the file is absent or holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; accepted: the folder of a Hugging Face-format model") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; accepted: a JSON object; fetch it again")
    return value


@dataclass(frozen=True)
class Fields:
    """The fields of ``values``. One that is left out takes the value in ``defaults``, else the caller's default.

    Every method raises InputError for a field that is missing and has no default, or is of another type.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """An int; None only where the caller's default is None."""
        value = self._get(name, default)
        if not _is_integer(value) and not (value is None and default is None):
            raise refused(name, value, "an integer")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A finite float; None only where the caller's default is None."""
        value = self._get(name, default)
        if value is None and default is None:
            return None
        # the bound keeps out infinities, NaN and integers that no float holds
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise refused(name, value, "a finite number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite floats."""
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list | tuple):
            raise refused(name, value, "a list of numbers")
        return tuple(Fields({name: item}).number(name) for item in value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or False, never null."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise refused(name, value, "true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An id, a list of ids, or null, which is none."""
        value = self._get(name, None)
        ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
        if not all(_is_integer(token_id) for token_id in ids):
            raise refused(name, value, "an integer, a list of integers or null")
        return tuple(ids)

    def either(self, first: str, second: str) -> Any:
        """The one value under two spellings, of any type; None when neither is there. Two that differ are refused."""
        return agreed(first, self.values.get(first), second, self.values.get(second))

    def _get(self, name: str, default: Any) -> Any:
        if name in self.values:
            return self.values[name]
        value = self.defaults.get(name, default)
        if value is _REQUIRED:
            raise InputError(f"config field {name} is missing; it has no default; add it to config.json")
        return value


def agreed(first: str, a: Any, second: str, b: Any) -> Any:
    """The value that two fields state, either of which may be None; InputError when both state one and they differ."""
    if a is not None and b is not None and a != b:
        raise InputError(f"config fields {first} ({a!r}) and {second} ({b!r}) disagree; accepted: equal; remove one")
    return b if a is None else a


def refused(name: str, given: object, accepted: str, remedy: str = "correct it in config.json") -> InputError:
    """The error to raise for a field whose value cannot be used."""
    return InputError(f"config field {name} is {given!r}; accepted: {accepted}; {remedy}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
