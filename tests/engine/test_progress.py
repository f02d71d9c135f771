import io

import pytest
from rich.console import Console

from engine.progress import generation_progress, progress_bar


def shown(work, **options) -> str:
    """What stays on a console of these options."""
    file = io.StringIO()
    work(Console(file=file, width=100, **options))
    return file.getvalue()


def count_to_three(console):
    with progress_bar(console) as progress:
        task = progress.add_task("counting", total=3)
        progress.advance(task, 3)


def fail(console):
    with pytest.raises(KeyError), progress_bar(console) as progress:
        progress.add_task("counting", total=3)
        raise KeyError


def test_a_terminal_shows_it():
    assert "counting" in shown(count_to_three, force_terminal=True)
    assert "3/3" in shown(count_to_three, force_terminal=True)


def test_nothing_else_does():
    assert shown(count_to_three) == ""
    assert shown(count_to_three, force_terminal=True, quiet=True) == ""


def test_it_goes_when_the_work_fails():
    assert shown(fail, force_terminal=True).endswith("\x1b[1A\x1b[2K")  # up a line, and clear it
    assert not shown(count_to_three, force_terminal=True).endswith("\x1b[1A\x1b[2K")


def test_generation_counts_tokens_and_sequences():
    def generate(console):
        with generation_progress(4, console) as on_tokens:
            on_tokens(4, 0)
            on_tokens(4, 3)
            on_tokens(1, 1)

    text = shown(generate, force_terminal=True)
    assert "9 tokens" in text and "4/4" in text
