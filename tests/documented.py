"""What the documents say of files, to be held against the files."""

import re
from itertools import groupby
from pathlib import Path

BENCHMARK_FILES = Path(__file__).parents[1] / "docs" / "benchmark-files.md"


def fields_of_table(index: int) -> set[str]:
    """The fields in the first column of a table of ``docs/benchmark-files.md``."""
    lines = BENCHMARK_FILES.read_text().splitlines()
    tables = [list(group) for is_row, group in groupby(lines, lambda line: line.startswith("|")) if is_row]
    return {name for line in tables[index] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
