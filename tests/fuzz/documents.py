"""Strategies for JSON documents that are nearly right: valid ones, changed in ways that files are damaged or forged.

A document is a dict. Changes keep the rest as it was, so that a reader gets past its first checks.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

Document = dict[str, Any]

# Values at the edges of types, and such as are no value at all.
_ODD = [
    None, True, False, 0, 1, 2, 3, 5, 7, -1, 2**16, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 10**400, -(10**400), 10**4000,
    0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 5e-324, 1e-310, 1e-40, 1e38, 1e39, 1e299, 1e308,
    float("inf"), float("-inf"), float("nan"),
    "", "0", "1", "a", "true", "a\nb", "\r\n", "\u2028", "\x00", "\x1b[31m", "\ud800", "é", "\U0001f600", ".", "..",
    "../a", "/etc/passwd", "x" * 300, "x" * 5_000, "\n" * 1000,
    [], {}, [[]], [{}], {"": None}, [None], ["a"], [0] * 1000, [0.5, 1.5], {"a\nb": 1},
    {str(i): i for i in range(999)},
]  # fmt: skip

# Text that takes a value's place in the file, where Python could not write the value down.
_RAW = [
    *("[" * depth + "]" * depth for depth in (10, 60, 150, 900, 960, 990, 5000, 200_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (60, 900, 960, 990, 100_000)),
    "[" * 100_000, '"', '"\\', '"\\ud800', '"\\u12', "[1,", "{", "}", "nul", "+1", "01", "1.", ".5", "1e", "0x10",
    "1e999", "-1e999", "1e-999", "9" * 4299, "9" * 5000, "1" + "0" * 1_000_000, "0." + "3" * 100_000,
    "NaN", "Infinity", "-Infinity", '"\t"', '"\\u0000"', "[1 2]", '{"a" 1}', "'a'", "// a", "",
]  # fmt: skip


def by_weight(*choices: tuple[int, st.SearchStrategy]) -> st.SearchStrategy:
    """Of pairs (weight, strategy) one. ``st.one_of`` takes a strategy that it is given twice for one."""
    return st.sampled_from([strategy for weight, strategy in choices for _ in range(weight)]).flatmap(lambda x: x)


def odd_values() -> st.SearchStrategy[Any]:
    """Any JSON value, most often a hard one."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    anything = st.recursive(
        scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=6
    )
    return by_weight((2, st.sampled_from(_ODD)), (1, anything))


@st.composite
def changed(
    draw, documents: st.SearchStrategy[Document], names: Sequence[str] = (), values: Sequence[Any] = (), most: int = 3
) -> Document:
    """A document with up to ``most`` changes; ``names`` are fields, and ``values`` values, that it may be given."""
    document = deepcopy(draw(documents))
    new_values = st.sampled_from(values) | odd_values() if values else odd_values()
    for _ in range(draw(st.integers(0, most))):
        if names and draw(st.integers(0, 3)) == 0:
            document[draw(st.sampled_from(names))] = deepcopy(draw(new_values))
            continue
        paths = _paths(document)
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        _change(draw, document, path, paths, new_values)
    return document


def _change(draw, document: Document, path: tuple, paths: list[tuple], new_values) -> None:
    holder, key = _at(document, path[:-1]), path[-1]
    value = holder[key]
    kind = draw(st.sampled_from(["replace", "replace", "near", "near", "drop", "retype", "wrap", "copy", "rename"]))
    if kind == "replace":
        holder[key] = deepcopy(draw(new_values))
    elif kind == "near":
        holder[key] = _near(draw, value)
    elif kind == "drop":
        del holder[key]
    elif kind == "retype":
        holder[key] = draw(st.sampled_from([_text, lambda x: [x], lambda x: {"a": x}, bool, _list, _float]))(value)
    elif kind == "wrap":
        for _ in range(draw(st.sampled_from([1, 2, 30]))):
            value = [value] if draw(st.booleans()) else {str(key): value}
        holder[key] = value
    elif kind == "copy":
        holder[key] = deepcopy(_at(document, draw(st.sampled_from(paths))))
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from([f"{key}\n", f"{key}_", "", "a\u2028b", "y" * 5000]))] = holder.pop(key)


def _near(draw, value: Any) -> Any:
    """A value of the same type that may well be valid."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([value + 1, value - 1, value * 2, value // 2, -value, value * 1000, value + 2**32]))
    if isinstance(value, float):
        return draw(st.sampled_from([value * 2, value / 2, -value, value * 1e10, 1 / value if value else 1.0]))
    if isinstance(value, str):
        return draw(st.sampled_from([value + "x", value[1:], value.upper(), value * 2, value + "\n", _long(value)]))
    if isinstance(value, list):
        return draw(st.sampled_from([value * 2, value[1:], value[::-1], _long(value)]))
    if isinstance(value, dict):
        return dict(list(value.items())[1:])
    return 1


def _long(value: str | list) -> Any:
    if any(isinstance(item, list | dict) for item in value):
        return value * 2  # as it may come here again
    return value * (5_000 // len(value)) if 0 < len(value) < 5_000 else value[:5_000]


def _text(value: Any) -> str:
    return json.dumps(value)[:100]


def _list(value: Any) -> list:
    return list(value) if isinstance(value, str | list | dict) else [value, value]


def _float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and abs(value) < 2**1000 else 1.5


def _paths(document: Document) -> list[tuple]:
    """Where the values lie, those of long lists left out."""
    found: list[tuple] = []
    todo: list[tuple[tuple, Any]] = [((), document)]
    while todo:
        path, value = todo.pop()
        if path:
            found.append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        todo += [((*path, key), item) for key, item in list(items)[:100]]
    return found


def _at(document: Document, path: tuple) -> Any:
    value: Any = document
    for key in path:
        value = value[key]
    return value


@st.composite
def as_files(draw, documents: st.SearchStrategy[Document]) -> bytes:
    """A document as a file holds it; of three files one is damaged as text, or anything else."""
    document = draw(documents)
    text = json.dumps(document, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))
    data = text.encode("utf-8", "surrogatepass")
    kind = draw(
        st.sampled_from(["whole"] * 12 + ["raw"] * 4 + "twice cut trailing flipped encoding nested anything".split())
    )
    if kind == "raw":
        return _with_raw(draw, document)
    if kind == "twice" and document:
        name = draw(st.sampled_from(sorted(document)))
        again = json.dumps({name: draw(odd_values())}).encode()
        return data.rstrip()[:-1] + b"," + again[1:]
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "trailing":
        return data + draw(st.sampled_from([b"\0", b"x", b"{}", b"\n\n", b"\xff", b" " * 100_000, data]))
    if kind == "flipped":
        damaged = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            damaged[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(damaged)
    if kind == "encoding":
        encoding = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-7"]))
        return text.encode(encoding, "replace")
    if kind == "nested":
        return draw(st.sampled_from([value.encode() for value in _RAW]))
    if kind == "anything":
        return draw(st.binary(max_size=64) | odd_values().map(lambda value: json.dumps(value).encode()))
    return data


def _with_raw(draw, document: Document) -> bytes:
    paths = _paths(document)
    if not paths:
        return b"{}"
    path = draw(st.sampled_from(paths))
    marker = "what is to be replaced"
    document = deepcopy(document)
    _at(document, path[:-1])[path[-1]] = marker
    return json.dumps(document).replace(f'"{marker}"', draw(st.sampled_from(_RAW))).encode()
