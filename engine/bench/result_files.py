"""Files of results: one YAML file a result, ``OUTDIR/MODE/NAME.yaml``, with every field checked when it is read.

A result is a frozen dataclass. One of its fields, its *key*, is a dataclass too: what was measured, and so the file's
path. A file has the fields of both side by side.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Protocol, TypeVar, get_args, get_origin, get_type_hints

import yaml

from engine.errors import InputError
from engine.files import write_whole
from engine.messages import one_line, shown

Warn = Callable[[str], None]
"""Takes one line about a file that cannot be used."""


def print_warning(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


class Status(StrEnum):
    OK = "ok"
    DOES_NOT_FIT = "does_not_fit"  # predicted to need more memory than there is, so it was not run
    OUT_OF_MEMORY = "out_of_memory"  # ran out of memory all the same


class Kind(StrEnum):
    """Of a result. Files of the first are older than this field and do not have it."""

    THROUGHPUT = "throughput"
    MICROBENCHMARK = "microbenchmark"
    NEEDLES = "needles"
    PASSKEY = "passkey"
    PREFILL = "prefill"


class Key(Protocol):
    """What was measured. Keys of one kind are ordered."""

    def path(self, outdir: Path) -> Path: ...


class Result(Protocol):
    """What came of it. ``sweep`` is the OUTDIR that it was read from; it is not in the file."""

    status: Status
    sweep: str

    @property
    def headline(self) -> str:
        """The result in words, for a person who opens the file."""

    @property
    def is_complete(self) -> bool:
        """Whether it holds what a result of status ok must hold."""


R = TypeVar("R", bound=Result)


class ResultFiles(Generic[R]):
    """Writes and reads the files of one kind of result."""

    def __init__(self, kind: Kind, schema_version: int, result_type: type[R], key: str):
        self._kind, self._version, self._result_type, self._key = kind, schema_version, result_type, key
        self._key_type = get_type_hints(result_type)[key]
        self._key_fields = _types(self._key_type)
        self._fields = {k: v for k, v in _types(result_type).items() if k not in (key, "sweep")}
        self._what = key  # what a person calls one
        self._remedy = f"delete it and run the {key} again"

    def write(self, outdir: Path, result: R) -> Path:
        """Writes the result's file, whole or not at all, and returns its path. An earlier one is replaced."""
        key = getattr(result, self._key)
        path = key.path(outdir)
        written: dict[str, Any] = {"schema_version": self._version}
        if self._kind != Kind.THROUGHPUT:
            written["kind"] = str(self._kind)
        for name in self._key_fields:
            written[name] = _plain(name, getattr(key, name))
        for name in self._fields:
            written[name] = _plain(name, getattr(result, name))
        text = yaml.dump(written, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=116)
        self._parse(text, path)  # a mistake of the caller shows now, not when the sweep is reported
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"# {result.headline}\n{text}".encode())
        return path

    def read(self, path: Path) -> R:
        """The result in ``path``.

        Raises InputError, naming the file, when it is missing or damaged, has another kind or schema version, or when a
        field is missing, unknown or of the wrong type.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise InputError(f"{path}: cannot be read ({reason}); expected a result file of a sweep") from error
        return self._parse(text, path)

    def is_finished(self, outdir: Path, key: Key, warn: Warn = print_warning) -> bool:
        """Whether there is a usable result, of any status, so that a sweep can go on to the next.

        A file that is there but cannot be used is named to ``warn`` and does not count: running it again replaces it.
        """
        path = key.path(outdir)
        if not path.exists():
            return False
        try:
            found = getattr(self.read(path), self._key)
        except InputError as error:
            warn(f"{error}; it is measured again")
            return False
        if found != key:
            other = one_line(str(found.path(Path())))
            warn(f"{path}: holds another {self._what}, {other}; it is measured again")
            return False
        return True

    def read_all(self, outdirs: Iterable[Path], warn: Warn = print_warning) -> list[R]:
        """Every usable result under ``outdirs``, ordered by directory, then key. Files that cannot be used go to
        ``warn``; those of another kind are left alone.

        Raises InputError for a directory that does not exist.
        """
        results = []
        for outdir in dict.fromkeys(outdirs):
            if not outdir.is_dir():
                raise InputError(f"{outdir} is not a directory; give the OUTDIR of a sweep, which holds MODE/*.yaml")
            found = []
            for path in sorted(outdir.glob("*/*.yaml")):
                try:
                    found.append(replace(self.read(path), sweep=str(outdir)))
                except _AnotherKindError:
                    continue
                except InputError as error:
                    warn(f"{error}; skipped")
            results += sorted(found, key=lambda result: getattr(result, self._key))
        return results

    def _parse(self, text: str, path: Path) -> R:
        try:
            found = yaml.safe_load(text)
        except _NOT_YAML as error:
            raise InputError(f"{path}: not YAML; delete it and run the sweep again") from error
        if not isinstance(found, dict) or "schema_version" not in found:
            raise InputError(f"{path}: not a result file of a sweep: it has no schema_version")
        self._check_kind(found.pop("kind", str(Kind.THROUGHPUT)), path)
        version = found.pop("schema_version")
        if version != self._version:
            raise InputError(
                f"{path}: has schema version {shown(version)}, this program reads {self._version}; {self._remedy}"
            )
        types = self._key_fields | self._fields
        for problem, names in (("lacks", types.keys() - found.keys()), ("has unknown", found.keys() - types.keys())):
            if names:
                listed = ", ".join(sorted(name if isinstance(name, str) else shown(name) for name in names))
                raise InputError(f"{path}: {problem} {one_line(listed)}; {self._remedy}")
        for name, kind in types.items():
            if not _is_a(found[name], kind):
                raise InputError(f"{path}: {name} is {shown(found[name])}; {self._remedy}")
        values = {name: _typed(value, types[name]) for name, value in found.items()}
        key = self._key_type(**{name: values.pop(name) for name in self._key_fields})
        result = self._result_type(**{self._key: key}, **values)
        if result.status == Status.OK and not result.is_complete:
            raise InputError(
                f"{path}: status is ok, but what it measured is missing or contradicts itself; {self._remedy}"
            )
        return result

    def _check_kind(self, kind: object, path: Path) -> None:
        if kind not in list(Kind):
            raise InputError(f"{path}: kind is {shown(kind)}; accepted: {', '.join(Kind)}; delete it")
        if kind != self._kind:
            raise _AnotherKindError(f"{path}: holds a {kind} result, not a {self._kind} one; delete it")


class _AnotherKindError(InputError):
    """A result file of a kind that is not asked for."""


# What reading damaged YAML raises: for brackets without end, a month 13, and values that do not suit their tags, such
# as !!bool x, !!int '' and !!timestamp x.
_NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)


class _Dumper(yaml.SafeDumper):
    """Block style for mappings, one line for lists: raw times read as one row."""

    def represent_list(self, data: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)


def _types(dataclass: type) -> dict[str, Any]:
    hints = get_type_hints(dataclass)
    return {field.name: hints[field.name] for field in fields(dataclass)}


def _plain(name: str, value: Any) -> Any:
    """``value`` as YAML data: 0.1 us for times, six digits for other measured numbers."""
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, float):
        return round(float(value), 4) if name.endswith("_ms") else float(f"{value:.6g}")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(name, item) for item in value]
    return value


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value from YAML is one of ``kind``: numbers finite and not negative, names known."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, option) for option in get_args(kind))
    if get_origin(kind) is Sequence:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        # A damaged file can hold integers that take minutes to print, and that Python therefore refuses to.
        return isinstance(value, dict) and not any(isinstance(x, int) and abs(x) >= 2**64 for x in value.values())
    if issubclass(kind, StrEnum):
        return value in list(kind)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and 0 <= value <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
    return isinstance(value, kind)


def _typed(value: Any, kind: Any) -> Any:
    """A value that ``_is_a`` has passed, as the dataclass has it."""
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(value)
    return tuple(value) if isinstance(value, list) else value
