"""Runs a target on many drawn cases. Each must end soon, in little memory, in a result or an InputError of one line.

What the cases came to is counted, so that a test can show that they reached what it is about.
"""

import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from engine.errors import InputError

Case = TypeVar("Case")

MAX_MESSAGE = 2000  # characters, of which a test's folder takes up to 200
MAX_SECONDS = 30.0  # of a case, which takes a few at most where nothing else runs
MAX_GROWTH = 1 << 30  # bytes that a whole run may add to the process

# Every test here takes its number of cases from this mark.
_LONG_RUN = 10_000
for_cases = pytest.mark.parametrize("num_cases", [300, pytest.param(_LONG_RUN, marks=pytest.mark.slow)])


@dataclass
class Outcomes:
    """What the cases of a run came to."""

    num_accepted: int = 0
    messages: list[str] = field(default_factory=list)  # of the refused

    @property
    def num_cases(self) -> int:
        return self.num_accepted + len(self.messages)

    @property
    def accepted_share(self) -> float:
        return self.num_accepted / self.num_cases

    def share(self, pattern: str) -> float:
        """Of all cases, those refused with a message in which the regular expression is found."""
        return sum(re.search(pattern, message) is not None for message in self.messages) / self.num_cases

    def assert_reached(self, patterns: list[str]) -> None:
        """A message for every regular expression in a long run, for half of them in a short one."""
        missed = [pattern for pattern in patterns if not self.share(pattern)]
        accepted = 0 if self.num_cases >= _LONG_RUN else len(patterns) // 2
        assert len(missed) <= accepted, f"no case was refused for {missed}"


def fuzz(num_cases: int, cases: SearchStrategy[Case], target: Callable[[Case], object]) -> Outcomes:
    """Calls ``target`` on at least ``num_cases`` cases, the same ones in every run of the same code.

    Raises what a case raises that is no InputError, MemoryError and TimeoutError among them, with the least such case.
    """
    outcomes = Outcomes()

    @settings(
        max_examples=num_cases,
        derandomize=True,
        database=None,
        deadline=None,  # it is looked at when a case has ended, and these may not end
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    @given(cases)
    def run(case: Case) -> None:
        try:
            with _ends_soon():
                target(case)
        except InputError as error:
            message = str(error)
            assert message.isprintable(), f"more than one line: {message[:200]!r}"
            assert len(message) <= MAX_MESSAGE, f"{len(message)} characters: {message[:200]}"
            outcomes.messages.append(message)
        else:
            outcomes.num_accepted += 1

    with _little_memory():
        run()
    assert outcomes.num_cases >= num_cases
    return outcomes


@contextmanager
def _ends_soon() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"a case takes more than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again each second: the first may come in a callback, out of which no exception gets.
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _little_memory() -> Iterator[None]:
    """Beyond the limit an allocation fails, in Python with MemoryError, whoever makes it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_GROWTH, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
