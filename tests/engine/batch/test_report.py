import io

import pytest
from rich.console import Console

from engine.batch.report import batch_progress, print_tally
from engine.batch.tally import Tally


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)


def test_progress_goes_over_the_whole_file(console):
    with batch_progress(Tally(10, num_resumed=4, num_finished=4), console) as on_progress:
        on_progress(Tally(10, num_finished=7, new_tokens=3000, seconds=2.0))
        on_progress(Tally(10, num_finished=9, num_failed=2, new_tokens=4000, seconds=2.0))
    text = console.file.getvalue()
    assert "4/10" in text
    assert "2,000 tokens/s, 2 failed" in text and "9/10" in text


def test_the_table(console):
    tally = Tally(12_000, num_resumed=4, num_finished=12_000, num_failed=2, prompt_tokens=70, new_tokens=90, seconds=4)
    print_tally(tally, console)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    for row in (
        ["requests", "12,000"], ["of", "these", "failed", "2"], ["of", "these", "answered", "before", "4"],
        ["prompt", "tokens", "70"], ["new", "tokens", "90"], ["seconds", "4.0"], ["new", "tokens/s", "22"],
    ):  # fmt: skip
        assert row in rows


def test_no_time_has_passed():
    assert Tally(1).tokens_per_second == 0
