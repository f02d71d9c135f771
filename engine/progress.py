"""Progress bars, on stderr, for work that takes longer than a breath."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar with count, elapsed and remaining time. A console that is quiet, or no terminal, shows nothing.

    It leaves nothing behind when the work fails: the error is then all that there is to read.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
    with progress:
        try:
            yield progress
        except BaseException:
            progress.live.transient = True
            raise


@contextmanager
def generation_progress(num_sequences: int, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yields an ``on_tokens`` callback (new tokens, sequences that ended) that shows how generation gets on."""
    num_tokens = 0
    with progress_bar(console) as progress:
        task = progress.add_task("prefill", total=num_sequences)

        def on_tokens(new_tokens: int, ended: int) -> None:
            nonlocal num_tokens
            num_tokens += new_tokens
            progress.update(task, advance=ended, description=f"{num_tokens} tokens")

        yield on_tokens
