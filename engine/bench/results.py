"""The files of a sweep: one YAML file a cell, ``OUTDIR/MODE/b{batch}_s{shared}_u{unique}.yaml``.

A cell is one mode at one batch size, shared length and unique length. Its file holds the raw times and what makes them
comparable; whatever can be computed from those (throughput, spread, ratios) is computed when it is read.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from engine.bench.timing import HIGH_SPREAD, summarize
from engine.errors import InputError
from engine.files import write_whole
from engine.messages import one_line, shown

SCHEMA_VERSION = 1

Warn = Callable[[str], None]
"""Takes one line about a file that cannot be used."""


def print_warning(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


class Status(StrEnum):
    OK = "ok"
    DOES_NOT_FIT = "does_not_fit"  # predicted to need more memory than there is, so it was not run
    OUT_OF_MEMORY = "out_of_memory"  # ran out of memory all the same


@dataclass(frozen=True, order=True)
class Cell:
    """One point of a sweep. Lengths are in tokens, and are those of one sequence."""

    mode: str
    batch_size: int
    num_shared: int
    num_unique: int

    def path(self, outdir: Path) -> Path:
        return outdir / self.mode / f"b{self.batch_size}_s{self.num_shared}_u{self.num_unique}.yaml"


@dataclass(frozen=True)
class CellResult:
    """What one cell measured, or why it did not. Times are in ms, one an iteration, each that of the slowest rank."""

    cell: Cell
    status: Status
    model_name: str
    seed: int
    num_iters: int
    num_warmup: int
    environment: dict[str, Any]  # as from describe_environment
    message: str = ""  # why a cell that is not ok has no times
    decode_ms: Sequence[float] = ()  # generating num_unique tokens for the whole batch
    first_token_ms: Sequence[float] = ()  # generating one token: what decode_ms holds besides decode steps
    prefill_ms: Sequence[float] = ()  # prefilling the shared prefix; empty when that was not timed
    predicted_bytes: Sequence[int] = ()  # memory needed as computed beforehand, one a rank
    peak_bytes: Sequence[int] = ()  # memory used at most, one a rank
    achieved_gbs: float | None = None  # per rank: what a decode step must read over the time that it took
    achieved_tflops: float | None = None  # per rank: what a decode step must compute over the time that it took
    roofline_ms: float | None = None  # the least time of a decode step that the machine's ceilings allow
    sweep: str = field(default="", compare=False)  # the OUTDIR it was read from; not in the file

    @property
    def decode_step_ms(self) -> float | None:
        """Median time of one decode step; None without a second token, or where noise exceeds the time of the steps."""
        if self.status != Status.OK or self.cell.num_unique < 2:
            return None
        steps_ms = summarize(self.decode_ms).median - summarize(self.first_token_ms).median
        return steps_ms / (self.cell.num_unique - 1) if steps_ms > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decode throughput as the Hydragen paper has it: tokens after the first over (time for all - time for one)."""
        step_ms = self.decode_step_ms
        return None if step_ms is None else self.cell.batch_size * 1e3 / step_ms

    @property
    def spread(self) -> float | None:
        """20th to 80th percentile of the decode time as a fraction of it; None where there is no such time.

        The decode time is a difference of two measured times, so the widths of both count, as those of independent
        errors do: the root of the sum of their squares, over the difference of the medians. With one token only,
        the spread is that of ``decode_ms``.
        """
        if self.status != Status.OK:
            return None
        every = summarize(self.decode_ms)
        if self.cell.num_unique < 2:
            return every.relative
        first = summarize(self.first_token_ms)
        if every.median <= first.median:
            return None
        return math.hypot(every.p80 - every.p20, first.p80 - first.p20) / (every.median - first.median)

    @property
    def high_spread(self) -> bool:
        """True when the times vary so much that the throughput says little, or says nothing."""
        return self.status == Status.OK and (self.spread is None or self.spread > HIGH_SPREAD)

    @property
    def roofline_fraction(self) -> float | None:
        """The roofline's time of a decode step over the measured one: 1 is as fast as the machine allows."""
        step_ms = self.decode_step_ms
        return None if self.roofline_ms is None or step_ms is None else self.roofline_ms / step_ms


# ---- writing


def write_cell(outdir: Path, result: CellResult) -> Path:
    """Writes the cell's file, whole or not at all, and returns its path. An earlier result of the cell is replaced."""
    path = result.cell.path(outdir)
    fields = {"schema_version": SCHEMA_VERSION}
    for name in _CELL_TYPES:
        fields[name] = _plain(name, getattr(result.cell, name))
    for name in _RESULT_TYPES:
        fields[name] = _plain(name, getattr(result, name))
    text = yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=116)
    _parse(text, path)  # a mistake of the caller shows now, not when the sweep is reported
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"# {_headline(result)}\n{text}".encode())
    return path


class _Dumper(yaml.SafeDumper):
    """Block style for mappings, one line for lists: raw times read as one row."""

    def represent_list(self, data: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)


def _plain(name: str, value: Any) -> Any:
    """``value`` as YAML data: 0.1 us for times, six digits for other measured numbers."""
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, float):
        return round(float(value), 4) if name.endswith("_ms") else float(f"{value:.6g}")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(name, item) for item in value]
    return value


def _headline(result: CellResult) -> str:
    """The cell in words, for a person who opens the file."""
    cell = result.cell
    speed = result.tokens_per_second
    outcome = result.status if speed is None else f"{speed:.1f} tokens/s"
    if speed is not None and len(result.decode_ms) > 1:  # a single time has no spread
        outcome += f", spread {result.spread:.1%}"
    return (
        f"{cell.mode}: {cell.batch_size} sequences of {cell.num_shared} shared + {cell.num_unique} generated tokens: "
        f"{outcome}; times in ms"
    )


# ---- reading

_CELL_TYPES = get_type_hints(Cell)
_RESULT_TYPES = {k: v for k, v in get_type_hints(CellResult).items() if k not in ("cell", "sweep")}

# What reading damaged YAML raises: for brackets without end, a month 13, and values that do not suit their tags, such
# as !!bool x, !!int '' and !!timestamp x.
_NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)

_REMEDY = "delete it and run the cell again"


def read_cell(path: Path) -> CellResult:
    """The result in ``path``.

    Raises InputError, naming the file, when it is missing or damaged, has another schema version, or when a field is
    missing, unknown or of the wrong kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{path}: cannot be read ({reason}); expected a result file of a sweep") from error
    return _parse(text, path)


def is_finished(outdir: Path, cell: Cell, warn: Warn = print_warning) -> bool:
    """Whether the cell has a usable result, of any status, so that a sweep can go on to the next.

    A file that is there but cannot be used is named to ``warn`` and does not count: running the cell replaces it.
    """
    path = cell.path(outdir)
    if not path.exists():
        return False
    try:
        found = read_cell(path).cell
    except InputError as error:
        warn(f"{error}; the cell runs again")
        return False
    if found != cell:
        warn(f"{path}: holds another cell, {one_line(str(found.path(Path())))}; the cell runs again")
        return False
    return True


def read_results(outdirs: Iterable[Path], warn: Warn = print_warning) -> list[CellResult]:
    """Every usable result under ``outdirs``, ordered by directory, then cell. Files that cannot be used go to ``warn``.

    Raises InputError for a directory that does not exist.
    """
    results = []
    for outdir in dict.fromkeys(outdirs):
        if not outdir.is_dir():
            raise InputError(f"{outdir} is not a directory; give the OUTDIR of a sweep, which holds MODE/*.yaml")
        found = []
        for path in sorted(outdir.glob("*/*.yaml")):
            try:
                found.append(replace(read_cell(path), sweep=str(outdir)))
            except InputError as error:
                warn(f"{error}; skipped")
        results += sorted(found, key=lambda result: result.cell)
    return results


def _parse(text: str, path: Path) -> CellResult:
    try:
        fields = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise InputError(f"{path}: not YAML; {_REMEDY}") from error
    if not isinstance(fields, dict) or "schema_version" not in fields:
        raise InputError(f"{path}: not a result file of a sweep: it has no schema_version")
    version = fields.pop("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: has schema version {shown(version)}, this program reads {SCHEMA_VERSION}; {_REMEDY}"
        )
    types = _CELL_TYPES | _RESULT_TYPES
    for problem, names in (("lacks", types.keys() - fields.keys()), ("has unknown", fields.keys() - types.keys())):
        if names:
            listed = ", ".join(sorted(name if isinstance(name, str) else shown(name) for name in names))
            raise InputError(f"{path}: {problem} {one_line(listed)}; {_REMEDY}")
    for name, kind in types.items():
        if not _is_a(fields[name], kind):
            raise InputError(f"{path}: {name} is {shown(fields[name])}; {_REMEDY}")
    fields["status"] = Status(fields["status"])
    result = CellResult(
        cell=Cell(**{name: fields.pop(name) for name in _CELL_TYPES}),
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()},
    )
    needed = [result.decode_ms] + ([result.first_token_ms] if result.cell.num_unique > 1 else [])
    if result.status == Status.OK and not all(needed):
        raise InputError(f"{path}: status is ok, but it has no times; {_REMEDY}")
    return result


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value from YAML is one of ``kind``: numbers finite and not negative, statuses known."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, option) for option in get_args(kind))
    if get_origin(kind) is Sequence:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind is Status:
        return value in list(Status)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and 0 <= value <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
    return isinstance(value, kind)
