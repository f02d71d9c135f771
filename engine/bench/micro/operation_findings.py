"""Operations of a decode step at one size, held against each other."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from engine.bench.micro.decode_operations import PARTS
from engine.bench.micro.micro_ratio import ratio
from engine.bench.micro.micro_results import RowResult
from engine.bench.ratio import Ratio
from kernels import Backend

BASELINE = "base"


def name_of(result: RowResult) -> str:
    """What is timed, in whichever mode."""
    return result.row.operation or result.row.mode


def hydragen_over_parts(results: Sequence[RowResult]) -> tuple[Ratio, str] | None:
    """The time of hydragen's attention over the sum of its parts' best single calls, and what these are.

    ``results`` are those of one size. A kernel that merges its state with that of the segment before leaves no merge
    to be added.
    """
    whole = [result for result in results if name_of(result) == "hydragen"]
    best = [
        min(timed, key=lambda result: result.median_ms)
        for part in PARTS
        if (timed := [result for result in results if name_of(result) == part.name and result.median_ms])
    ]
    attention = [result for result in best if result.backends]
    if not whole or len(attention) < 2:
        return None
    merges_itself = all(backend == Backend.SIMD for backend in whole[0].backends[1:])
    parts = attention if merges_itself else best
    found = ratio(whole, parts)
    return None if found is None else (found, " + ".join(result.row.label for result in parts))


def base_over_read(results: Sequence[RowResult]) -> Ratio | None:
    """The rate at which the baseline moves its bytes, over the rate at which memory was read in the same rounds."""
    base, read = ([result for result in results if name_of(result) == name] for name in (BASELINE, "memory_read"))
    found = ratio(read, base)
    return None if found is None else replace(found, value=found.value * base[0].num_bytes / read[0].num_bytes)


def about_operations(results: Sequence[RowResult]) -> list[str]:
    """Of one size."""
    lines = []
    if parts := hydragen_over_parts(results):
        found, what = parts
        lines.append(f"hydragen takes {found.words} times as long as the best calls of its parts: {what}")
    if found := base_over_read(results):
        lines.append(f"base moves its bytes at {found.words} of the rate at which memory_read does")
    for name, rows in groupby((result for result in results if result.median_ms), key=name_of):
        if len(backends := list(rows)) > 1:
            lines.append(f"{name}: {', '.join(_speed(result) for result in backends)}")
    return lines


def _speed(result: RowResult) -> str:
    fraction = f" ({result.roofline_fraction:.0%} of the roofline)" if result.roofline_fraction else ""
    return f"{result.row.backend} {result.median_ms:.4g} ms{fraction}"
