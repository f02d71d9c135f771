"""A method and its options in one word: ``NAME``, or ``NAME:option=value:option=value``, as commands take them."""

from collections.abc import Callable, Sequence

from engine.errors import InputError


def split_named(text: str) -> tuple[str, list[str]]:
    """The name, and what may be options."""
    name, *options = text.strip().split(":")
    return name, options


def read_options(what: str, options: Sequence[str], accepted: Sequence[str]) -> dict[str, str]:
    """Each option's value. ``what`` names the method in errors: InputError for one that is not accepted, or comes
    twice."""
    found: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in accepted or key in found:
            listed = ", ".join(f"{name}=..." for name in accepted) or "none"
            raise InputError(f"{what} has the option {option!r}; accepted, each once: {listed}")
        found[key] = value
    return found


def read_integer(what: str, key: str, value: str) -> int:
    if not value.isdecimal() or len(value) > 9:
        raise InputError(f"{what}: {key} is {value!r}; accepted: an integer from 0 to 999999999")
    return int(value)


def checked(what: str, make: Callable[[], object]) -> object:
    """What ``make`` returns; its ValueError as an InputError."""
    try:
        return make()
    except ValueError as error:
        raise InputError(f"{what}: {error}") from None
