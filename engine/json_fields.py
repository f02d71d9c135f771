"""Reading a JSON object such as ``config.json``: what is damaged or of a wrong type is refused by name."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.messages import one_line, shown

_REQUIRED = object()

# Far above what models have: of a file, of its nesting, and of a list of numbers in it.
_MAX_BYTES = 1 << 26
_MAX_DEPTH = 32
_MAX_LIST = 1 << 16

_MAX_FLOAT = (2 - 2**-23) * 2.0**127  # of float32, in which the model computes; keeps out NaN and infinities


def load_json(path: Path) -> Any:
    """The value in a file. Raises ValueError, in one line, when that is not JSON, too long or too deeply nested."""
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"it has {size} bytes, more than {_MAX_BYTES}")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # What is nested less deeply than json can read may still be too much for whoever compares or shows it.
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"it is nested more than {_MAX_DEPTH} deep"


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises InputError when the file is absent or holds anything else."""
    try:
        value = load_json(path)
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
        """An int of 64 bits; None only where the caller's default is None."""
        value = self._get(name, default)
        if value is None and default is None:
            return None
        if not _is_integer(value) or not -(2**63) <= value < 2**63:
            raise refused(name, value, "an integer of 64 bits" if _is_integer(value) else "an integer")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A float in the range of float32; None only where the caller's default is None."""
        value = self._get(name, default)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_FLOAT:
            raise refused(name, value, "a number that float32 holds")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of floats in the range of float32."""
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list | tuple) or len(value) > _MAX_LIST:
            raise refused(name, value, f"a list of up to {_MAX_LIST} numbers")
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
        raise InputError(
            f"config fields {first} ({shown(a)}) and {second} ({shown(b)}) disagree; accepted: equal; remove one"
        )
    return b if a is None else a


def refused(name: str, given: object, accepted: str, remedy: str = "correct it in config.json") -> InputError:
    """The error to raise for a field whose value cannot be used."""
    return InputError(f"config field {one_line(name)} is {shown(given)}; accepted: {accepted}; {remedy}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
