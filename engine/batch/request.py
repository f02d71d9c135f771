"""A line of a batch file as a request."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

from engine.batch import chat_completion, completion
from engine.batch.chat_completion import ChatBody
from engine.batch.completion import CompletionBody
from engine.batch.endpoint import Body
from engine.batch.fields import Fields
from engine.batch.input_file import MAX_LINE_BYTES, Line
from engine.batch.refusal import RefusedError, refused
from engine.batch.sampling_fields import derived_seed
from engine.messages import one_line

_URLS = (completion.URL, chat_completion.URL)
_MAX_DIGITS = 1000  # of an integer, where one is longer than Python reads
_MAX_DEPTH = 32  # what is nested deeper is refused here, rather than by whatever walks through it later
_ACCEPTED = 'accepted: one object a line, {"custom_id": "...", "method": "POST", "url": "...", "body": {...}}'


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say."""

    seed: int = 0  # each request draws under a seed of its own, made of this one and its custom_id
    max_tokens: int = 1024  # of an answer in a conversation


@dataclass(frozen=True)
class Origin:
    """Where a request stands, and what its result is told by."""

    line: int
    request_id: str
    custom_id: str | None  # None where the line has none that can be read


@dataclass(frozen=True)
class BatchRequest:
    """A request that can be run."""

    origin: Origin
    body: Body


@dataclass(frozen=True)
class ParsedLine:
    """The JSON object of a line, some of which may be what no request holds: ``check`` tells."""

    line: Line
    value: dict[str, Any]
    repeated: str | None  # the first field that an object of it has twice

    def custom_id(self) -> str:
        """Raises RefusedError, naming the line, where there is none."""
        custom_id = self.value.get("custom_id")
        if not isinstance(custom_id, str) or not _is_unicode(custom_id):
            found = refused("custom_id", custom_id, "text, another one in each line")
            raise RefusedError(f"line {self.line.number}: {found}", "custom_id")
        return custom_id

    def check(self) -> None:
        """Raises RefusedError, naming the line, for what cannot be walked through, written or told apart."""
        where = f"line {self.line.number}"
        if _is_deeper(self.value, _MAX_DEPTH):
            raise RefusedError(_too_deep(where))
        if b"\\u" in self.line.data and not _is_unicode(self.value):
            raise RefusedError(f"{where} holds half of a surrogate pair, \\ud800 to \\udfff; accepted: Unicode text")
        if self.repeated is not None:
            raise RefusedError(f"{where} has {one_line(self.repeated)} twice in one object; accepted: once; drop one")


def parse_line(line: Line) -> ParsedLine:
    """Raises RefusedError, naming the line, for anything but a JSON object."""
    where = f"line {line.number}"
    if line.data is None:
        raise RefusedError(f"{where} is longer than {MAX_LINE_BYTES} bytes, the most that is accepted; shorten it")
    repeated: list[str] = []

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and not repeated:
            names = [name for name, _ in pairs]
            repeated.append(next(name for name in names if names.count(name) > 1))
        return made

    try:
        value = _parse(line.data.decode(), to_object)
    except UnicodeDecodeError:
        raise RefusedError(f"{where} is not UTF-8 text; {_ACCEPTED}") from None
    except RecursionError:
        raise RefusedError(_too_deep(where)) from None
    except ValueError as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RefusedError(f"{where} is not JSON ({said}); {_ACCEPTED}") from None
    if not isinstance(value, dict):
        raise RefusedError(f"{where} holds a {type(value).__name__}; {_ACCEPTED}")
    return ParsedLine(line, value, repeated[0] if repeated else None)


def _parse(text: str, to_object: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    options = dict(object_pairs_hook=to_object, parse_constant=_refuse_constant)
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of so many digits that Python does not read it: infinity, which no field takes
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < _MAX_DIGITS else inf, **options)


def read_body(value: dict[str, Any], defaults: Defaults) -> Body:
    """Of the request in a line's object. Raises RefusedError, naming the field, for what cannot be used."""
    envelope = Fields(value)
    custom_id = envelope.take("custom_id")
    if (method := envelope.take("method")) != "POST":
        raise refused("method", method, "POST")
    if (url := envelope.take("url")) not in _URLS:
        raise refused("url", url, " or ".join(_URLS))
    body = envelope.take("body")
    if not isinstance(body, dict):
        raise refused("body", body, "an object, the fields of the request")
    envelope.finish({})
    fields, seed = Fields(body), derived_seed(defaults.seed, custom_id)
    if url == completion.URL:
        return CompletionBody.parse(fields, seed)
    return ChatBody.parse(fields, seed, defaults.max_tokens)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _too_deep(where: str) -> str:
    return f"{where} is nested more than {_MAX_DEPTH} deep; {_ACCEPTED}"


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [child for item in level for child in _children(item) if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _is_unicode(value: Any) -> bool:
    """Whether no text in it holds a lone surrogate, which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
