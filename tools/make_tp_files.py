"""Cuts a Hugging Face-format checkpoint into one file for each tensor-parallel rank, or verifies what was cut."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from engine.cli import make_app, run
from engine.errors import InputError
from engine.loader import find_checkpoint
from engine.shard_writer import write_shards
from engine.shards import OnProgress, ShardDir, dtype_name, verify

app = make_app()


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def main(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A local folder, or a Hub id.")] = None,
    outdir: Annotated[Path | None, typer.Argument(metavar="OUTDIR", help="The folder to write.")] = None,
    num_splits: Annotated[int | None, typer.Option(min=1, help="The number of ranks to cut for.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the written weights.  [default: auto, that of the model's config]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit on the Hub.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what OUTDIR holds.")] = False,
    verify_dir: Annotated[
        Path | None, typer.Option("--verify", metavar="OUTDIR", help="Check a split's sizes, headers and checksums.")
    ] = None,
) -> None:
    """Cut a model into one safetensors file for each tensor-parallel rank.

    \b
      python tools/make_tp_files.py codellama/CodeLlama-7b-hf split8 --num-splits 8
      python tools/make_tp_files.py ./my-model split2 --num-splits 2 --dtype bfloat16
      python tools/make_tp_files.py --verify split8

    Weights pass tensor by tensor, so little memory is needed. OUTDIR loads only once it is complete; after a run that
    was stopped, repeat the command. A complete OUTDIR is left as it is.
    """
    if verify_dir is not None:
        if any((model, outdir, num_splits, dtype, revision, force)):
            raise InputError("--verify OUTDIR checks what is there; accepted: nothing else with it; leave the rest out")
        with _progress("verifying") as on_progress:
            shards = verify(verify_dir, on_progress=on_progress)
        typer.echo(f"{verify_dir}: all {len(shards.manifest.files)} files are as they were written")
        return
    if model is None or outdir is None or num_splits is None:
        raise InputError("accepted: MODEL OUTDIR --num-splits N, or --verify OUTDIR; see --help")
    _split(model, outdir, num_splits, dtype or Dtype.auto, revision, force)


def _split(model: str, outdir: Path, num_splits: int, dtype: Dtype, revision: str | None, force: bool) -> None:
    folder = find_checkpoint(model, revision, num_splits)
    start = time.perf_counter()
    with _progress("cutting") as on_progress:
        split = write_shards(
            folder,
            outdir,
            num_splits,
            model_name=model,
            dtype=None if dtype is Dtype.auto else getattr(torch, dtype),
            force=force,
            on_progress=on_progress,
        )
    if split.written:
        _print_summary(split.shards, time.perf_counter() - start)
    else:
        typer.echo(f"{outdir} is complete already: {model} in {num_splits} parts; nothing to do (--force cuts it anew)")


def _print_summary(shards: ShardDir, seconds: float) -> None:
    manifest = shards.manifest
    table = Table("file", "MB", title=f"{manifest.model_name}, {dtype_name(manifest.config.dtype)}, in {shards.folder}")
    table.columns[1].justify = "right"
    for name, record in manifest.files.items():
        table.add_row(name, f"{record.size / 1e6:,.1f}")
    megabytes = sum(record.size for record in manifest.files.values()) / 1e6
    table.add_section()
    table.add_row(f"{len(manifest.files)} files, {seconds:.1f} s, {megabytes / seconds:,.0f} MB/s", f"{megabytes:,.1f}")
    Console().print(table)


@contextmanager
def _progress(description: str) -> Iterator[OnProgress]:
    """A bar on stderr that appears with the first bytes: a mistake found before them is one line."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    task = progress.add_task(description, total=None)

    def on_progress(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield on_progress
    finally:
        if progress.live.is_started:
            progress.stop()


if __name__ == "__main__":
    run(app)
