"""Trains the retrieval model that ships in assets/ from nothing, and writes it as a Hugging Face-format checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.bench.needles.haystack import read_haystack
from engine.checkpoint import check_holds_no_model
from engine.cli import make_app, make_console, run
from engine.errors import InputError
from engine.files import check_outdir
from training.export import export
from training.recipe import RECIPE, TINY, Recipe
from training.trainer import StepReport, Trainer, train

app = make_app()

_EVERY = 100  # steps, for a line that stays


class RecipeName(StrEnum):
    shipped = "shipped"
    tiny = "tiny"


_RECIPES: dict[RecipeName, Recipe] = {RecipeName.shipped: RECIPE, RecipeName.tiny: TINY}


@app.command()
def main(
    outdir: Annotated[Path, typer.Argument(help="The folder to write the model to. It must not hold one.")],
    text_file: Annotated[
        list[Path] | None,
        typer.Option(help="Real text for documents, beside the generator's prose. Give it again for more files."),
    ] = None,
    text_share: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Train on so much of each text, from its start; the rest is held out.  [default: 0.8]",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where the state is kept between stops.  [default: OUTDIR.training]")
    ] = None,
    recipe: Annotated[RecipeName, typer.Option(help="tiny, of seconds, learns nothing: to try the program.")] = (
        RecipeName.shipped
    ),
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; the last bits of the result depend on it.  [default: all cores]")
    ] = None,
) -> None:
    """Train the retrieval model from nothing: it finds facts that are hidden in a long text.

    The shipped recipe takes about 40 minutes on two quiet cores. A run that is stopped goes on where it was when the
    same command is given again, and comes to the same numbers. The same machine, threads and versions give the same
    weights; docs/retrieval-model.md has the recipe and how well the model does.

    \b
    Examples:
      python tools/train_retrieval_model.py models/retrieval
      python tools/train_retrieval_model.py models/retrieval --text-file war_and_peace.txt
      python tools/train_retrieval_model.py models/tiny --recipe tiny
    """
    check_holds_no_model(outdir)
    if text_share is not None and not text_file:
        raise InputError(f"--text-share {text_share:g} was given without --text-file; accepted: both, or neither")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if state_dir is None:
        named = outdir if outdir.name not in ("", "..") else outdir.resolve()
        state_dir = named.with_name(f"{named.name}.training")
    for folder in (outdir, state_dir):
        check_outdir(folder)
    texts = []
    for path in text_file or ():
        sentences = read_haystack(path).sentences
        texts.append(sentences[: max(1, int((0.8 if text_share is None else text_share) * len(sentences)))])

    console = make_console(stderr=True)
    console.print("Making the vocabulary ...")
    trainer = Trainer(_RECIPES[recipe], texts)
    begun_otherwise = trainer.resume(state_dir)
    if trainer.step:
        console.print(f"Going on after step {trainer.step} of {trainer.recipe.num_steps}, from {state_dir}.")
    if begun_otherwise:
        console.print(f"It was begun with {begun_otherwise}: the result will differ in its last bits.")
    with _progress(trainer, console) as on_step:
        train(trainer, state_dir, on_step)
    export(trainer.model, trainer.tokenizer, outdir)
    typer.echo(
        f"{outdir}: {sum(p.numel() for p in trainer.model.parameters()):,} parameters after {trainer.step} steps and "
        f"{trainer.seconds / 60:.1f} minutes of training; the state is left in {state_dir}"
    )


@contextmanager
def _progress(trainer: Trainer, console) -> Iterator:
    """A bar with the latest figures, and a line that stays every hundred steps."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=trainer.recipe.num_steps, completed=trainer.step)

        def on_step(report: StepReport) -> None:
            text = f"{report.length} tokens, loss {report.loss:.4f}, right {report.accuracy:.1%}"
            progress.update(task, completed=report.step, description=text)
            if report.step % _EVERY == 0:
                progress.console.print(f"step {report.step}: {text}, {trainer.seconds:.0f} s", highlight=False)

        yield on_step


if __name__ == "__main__":
    run(app)
