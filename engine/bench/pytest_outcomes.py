"""A plugin of pytest that writes each test's outcome as soon as it is known: a run that is stopped has told what it
came to. ``pytest -p engine.bench.pytest_outcomes --outcomes PATH`` appends a JSON line for each to ``PATH``."""

import json
from pathlib import Path

_OPTION = "--outcomes"


def pytest_addoption(parser) -> None:
    parser.addoption(_OPTION, metavar="PATH", type=Path, help="Where each test's outcome goes, a JSON line for each.")


def pytest_configure(config) -> None:
    if (path := config.getoption(_OPTION)) is not None:
        config.pluginmanager.register(_Writer(path))


class _Writer:
    """Of a test that passes its call counts; a failure or a skip counts wherever it comes, once."""

    def __init__(self, path: Path):
        self._path = path
        self._told: set[str] = set()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            self._tell(report)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._tell(report)

    def _tell(self, report) -> None:
        if report.nodeid in self._told and not report.failed:
            return
        self._told.add(report.nodeid)
        error = report.longreprtext.rstrip().rpartition("\n")[2] if report.failed else None
        with self._path.open("a") as file:
            file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "error": error}) + "\n")
