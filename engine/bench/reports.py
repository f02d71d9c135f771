"""The reports of every kind of result: a table, a CSV file and a plot each."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.micro.micro_report import build_micro_rows, plot_micro, print_micro_tables, write_micro_csv
from engine.bench.micro.micro_results import FILES
from engine.bench.micro.sparse_report import build_sparse_rows, plot_sparse, print_sparse_tables, write_sparse_csv
from engine.bench.needles.needle_report import build_needle_rows, plot_needles, print_needle_tables, write_needle_csv
from engine.bench.needles.needle_results import NEEDLE_FILES
from engine.bench.needles.passkey_report import plot_passkeys, print_passkey_tables, write_passkey_csv
from engine.bench.needles.passkey_results import PASSKEY_FILES
from engine.bench.prefill.prefill_report import (
    build_prefill_rows,
    plot_prefill,
    print_prefill_tables,
    write_prefill_csv,
)
from engine.bench.prefill.prefill_results import PREFILL_FILES
from engine.bench.report import build_rows, plot, print_table, require_matplotlib, write_csv
from engine.bench.result_files import Warn, print_warning
from engine.bench.results import read_results
from engine.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class _Kind:
    """``read`` gives the rows of directories, which the others show; ``stem`` is that of the CSV and of the plot."""

    what: str
    stem: str
    read: Callable[[Iterable[Path], Warn], Sequence[Any]]
    show: Callable[[Sequence[Any], "Console"], None]
    write_csv: Callable[[Sequence[Any], Path], None]
    plot: Callable[[Sequence[Any], Path], bool]


_KINDS = (
    _Kind("synth.py", "report", lambda *a: build_rows(read_results(*a)), print_table, write_csv, plot),
    _Kind(
        "microbenchmark.py",
        "microbenchmark",
        lambda *a: build_micro_rows(FILES.read_all(*a)),
        print_micro_tables,
        write_micro_csv,
        plot_micro,
    ),
    _Kind(
        "microbenchmark.py --mode prefill",
        "microbenchmark_prefill",
        lambda *a: build_sparse_rows(FILES.read_all(*a)),
        print_sparse_tables,
        write_sparse_csv,
        plot_sparse,
    ),
    _Kind(
        "needles.py",
        "needles",
        lambda *a: build_needle_rows(NEEDLE_FILES.read_all(*a)),
        print_needle_tables,
        write_needle_csv,
        plot_needles,
    ),
    _Kind(
        "needles.py --passkey-grid",
        "passkey",
        PASSKEY_FILES.read_all,
        print_passkey_tables,
        write_passkey_csv,
        plot_passkeys,
    ),
    _Kind(
        "prefill.py",
        "prefill",
        lambda *a: build_prefill_rows(PREFILL_FILES.read_all(*a)),
        print_prefill_tables,
        write_prefill_csv,
        plot_prefill,
    ),
)


@dataclass(frozen=True)
class Report:
    """The results of one kind that directories hold."""

    kind: _Kind
    rows: Sequence[Any]

    @property
    def what(self) -> str:
        """The program that made the results."""
        return self.kind.what

    @property
    def stem(self) -> str:
        """Of the names that its files have where none are given."""
        return self.kind.stem

    def show(self, console: "Console") -> None:
        self.kind.show(self.rows, console)

    def write_csv(self, path: Path) -> None:
        self.kind.write_csv(self.rows, path)

    def plot(self, path: Path) -> bool:
        """Writes a PNG; False where there is nothing to draw. Raises InputError when matplotlib is not installed."""
        return self.kind.plot(self.rows, path)


def read_reports(outdirs: Iterable[Path], warn: Warn = print_warning) -> list[Report]:
    """One for each kind that ``outdirs`` have results of. Files that cannot be used go to ``warn``.

    Raises InputError for a directory that does not exist.
    """
    found = [Report(kind, kind.read(outdirs, warn)) for kind in _KINDS]
    return [report for report in found if report.rows]


def write_reports(save_dir: Path, console: "Console") -> None:
    """Prints the tables of all that a run's directory holds, and writes CSV files and plots beside the results; says
    where. Without matplotlib there are no plots, which is said too."""
    reports = read_reports([save_dir])
    for report in reports:
        report.show(console)
        report.write_csv(save_dir / f"{report.stem}.csv")
    try:
        require_matplotlib()
    except InputError as error:  # the figures are there all the same
        print(f"Results and CSV are in {save_dir}. No plots: {error}")
        return
    drawn = [report.plot(save_dir / f"{report.stem}.png") for report in reports]
    print(f"Results{', CSV and plots' if any(drawn) else ' and CSV'} are in {save_dir}.")
