"""The range syntax of the benchmark programs: which batch sizes and lengths a sweep covers."""

import math
import re
from collections.abc import Sequence

from engine.errors import InputError

GRAMMAR = (
    "a,b,c | start:stop:step | start:stop:xfactor, where stop is exclusive "
    "(16:65:16 is 16, 32, 48, 64; 32:129:x2 is 32, 64, 128)"
)
MAX_VALUE = 2**31 - 1
MAX_VALUES = 10_000
MAX_COMBINATIONS = 10_000

_LIST = re.compile(r"[0-9]+(\s*,\s*[0-9]+)*")
_SPAN = re.compile(r"([0-9]+)\s*:\s*([0-9]+)\s*:\s*(x?)([0-9]+)")


def parse_range(text: str, *, allow_zero: bool = False, name: str = "value") -> tuple[int, ...]:
    """The values that ``text`` names, in the order given.

    ``text`` is a list ``a,b,c`` (one number is a list too), an arithmetic range ``start:stop:step`` or a geometric
    range ``start:stop:xfactor``; ``stop`` is exclusive. ``name`` is what the values are called in an error.

    Raises InputError, showing the grammar, for any other text, for a range that holds no values, for zero unless
    ``allow_zero``, for a value that comes twice, and for more than ``MAX_VALUES`` values or one above ``MAX_VALUE``.
    """
    stripped = text.strip()
    if _LIST.fullmatch(stripped):
        # Numbers too long to be in range are refused before they are converted: that costs quadratic time.
        values = [_number(item, text, name) for item in stripped.split(",")]
    elif span := _SPAN.fullmatch(stripped):
        start, stop, step = (_number(span[i], text, name) for i in (1, 2, 4))
        values = _span(start, stop, step, span[3] == "x", text, name)
    else:
        raise _error(text, name, "cannot be read" if stripped else "is empty")
    if len(values) > MAX_VALUES:
        raise _error(text, name, f"has {len(values)} values, more than {MAX_VALUES}")
    if not allow_zero and 0 in values:
        raise _error(text, name, "holds 0; values start at 1")
    seen: set[int] = set()
    for value in values:
        if value in seen:
            raise _error(text, name, f"holds {value} twice")
        seen.add(value)
    return tuple(values)


def check_combinations(ranges: Sequence[Sequence[int]], what: str) -> None:
    """Raises InputError for ranges that make more than ``MAX_COMBINATIONS`` of ``what``."""
    count = math.prod(map(len, ranges))
    if count > MAX_COMBINATIONS:
        raise InputError(
            f"the ranges make {count} {what}; accepted: at most {MAX_COMBINATIONS}; use longer steps"
        )


def _span(start: int, stop: int, step: int, geometric: bool, text: str, name: str) -> list[int] | range:
    """The values of ``start:stop:step`` or ``start:stop:xstep``."""
    if geometric and start == 0:
        raise _error(text, name, "multiplies from 0, which stays 0")
    if geometric and step < 2:
        raise _error(text, name, f"has factor {step}; a factor is at least 2")
    if step < 1:
        raise _error(text, name, f"has step {step}; a step is at least 1")
    if stop <= start:
        raise _error(text, name, f"holds no values: stop {stop} is not above start {start}")
    if not geometric:
        return range(start, stop, step)
    values = []
    while start < stop:
        values.append(start)
        start *= step
    return values


def _number(digits: str, text: str, name: str) -> int:
    digits = digits.strip().lstrip("0") or "0"
    if len(digits) > len(str(MAX_VALUE)) or int(digits) > MAX_VALUE:
        raise _error(text, name, f"holds a number above {MAX_VALUE}")
    return int(digits)


def _error(text: str, name: str, problem: str) -> InputError:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return InputError(f"{name} {shown!r} {problem}; write {GRAMMAR}")
