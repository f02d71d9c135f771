"""What has a column of its own in ``scripts/prefill.py``: a way to read a prompt, by the name that a user gives it."""

from dataclasses import dataclass, replace
from urllib.parse import quote

from engine.attention import METHODS, Keeps, Streaming, get_method
from engine.errors import InputError
from engine.prefill import DENSE, PREFILL_METHODS, parse_prefill

# What MInference's benchmark calls attention to all keys.
_OTHER_NAMES = {"hf": DENSE}
_MAX_NAME_BYTES = 200  # of a folder


@dataclass(frozen=True)
class Column:
    """``text`` is the prefill method with its options; ``prefill`` and ``attention`` are what the engine is given."""

    text: str
    prefill: str
    attention: str

    @property
    def folder(self) -> str:
        """A name for the folder of its results: the text, with what a path cannot hold as in a URL."""
        return quote(self.text, safe=":=,")

    @property
    def streaming(self) -> Streaming | None:
        """The attention method that reads prompts itself, if this is one."""
        method = get_method(self.attention)
        return method if isinstance(method, Streaming) else None


def parse_columns(text: str, attention: str) -> tuple[Column, ...]:
    """The methods that ``text`` names, with commas between them; ``attention`` is what runs beside all but streaming.

    Raises InputError for a method that is not known or comes twice, and for an ``attention`` that makes no difference
    to see.
    """
    _check_attention(attention)
    columns: dict[object, Column] = {}
    names: dict[object, str] = {}
    for name in (part.strip() for part in text.split(",")):
        column = _column(name, attention)
        # With all options at their usual values a method is the same as without options.
        parsed = replace(parse_prefill(column.prefill), text=""), get_method(column.attention)
        if parsed in columns:
            raise InputError(f"methods {names[parsed]} and {name} are the same; accepted: each once; leave one out")
        columns[parsed], names[parsed] = column, name
    return tuple(columns.values())


def _column(text: str, attention: str) -> Column:
    text = _OTHER_NAMES.get(text, text)
    name = text.partition(":")[0]
    if name == Streaming.name:
        get_method(text)  # says what is wrong with its options
        column = Column(text, DENSE, text)
    elif name in PREFILL_METHODS:
        parse_prefill(text)
        column = Column(text, text, attention)
    else:
        accepted = ", ".join((*PREFILL_METHODS, Streaming.name, *_OTHER_NAMES))
        raise InputError(
            f"method {text!r} is not known; accepted: {accepted}, or several, with options as in "
            "a_shape:n_init=128:n_local=4096"
        )
    if len(column.folder.encode()) > _MAX_NAME_BYTES:
        raise InputError(
            f"method {text!r} cannot name a folder; accepted: up to {_MAX_NAME_BYTES} bytes; use a shorter path"
        )
    return column


def _check_attention(attention: str) -> None:
    method = get_method(attention)
    if method.keeps is Keeps.NOTHING or isinstance(method, Streaming):
        accepted = [name for name, one in METHODS.items() if one.keeps is not Keeps.NOTHING and name != Streaming.name]
        hint = ": --attn-type streaming times it" if isinstance(method, Streaming) else ""
        raise InputError(
            f"--attention {attention} reads prompts its own way{hint}; accepted: {', '.join(accepted)}; leave it out"
        )
