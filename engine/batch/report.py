"""How a batch gets on, and what became of it, for a person to read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from engine.batch.tally import Tally
from engine.progress import progress_bar


@contextmanager
def batch_progress(tally: Tally, console: Console) -> Iterator[Callable[[Tally], None]]:
    """Yields a callback that shows a batch's tally in a bar over its whole file, which begins at ``tally``."""
    with progress_bar(console) as progress:
        task = progress.add_task("prefill", total=tally.num_requests, completed=tally.num_finished)

        def on_progress(tally: Tally) -> None:
            num_failed = tally.num_failed + tally.num_unserved
            failed = f", {num_failed} failed" if num_failed else ""
            description = f"{tally.tokens_per_second:,.0f} tokens/s{failed}"
            progress.update(task, completed=tally.num_finished, description=description)

        yield on_progress


def print_tally(tally: Tally, console: Console) -> None:
    """A small table."""
    from rich import box  # here: rich.table takes long to import
    from rich.table import Table

    table = Table(box=box.HORIZONTALS, show_header=False, padding=(0, 1))
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("requests", f"{tally.num_requests:,}"),
        ("of these failed", f"{tally.num_failed:,}"),
        ("of these answered before", f"{tally.num_resumed:,}"),
        ("without a result", f"{tally.num_requests - tally.num_finished:,}"),
        ("prompt tokens", f"{tally.prompt_tokens:,}"),
        ("new tokens", f"{tally.new_tokens:,}"),
        ("seconds", f"{tally.seconds:,.1f}"),
        ("new tokens/s", f"{tally.tokens_per_second:,.0f}"),
    ):
        table.add_row(name, value)
    console.print(table)
