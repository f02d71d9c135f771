"""Needle-in-a-haystack: accuracy and time of many questions about one document, and a grid of hidden passkeys."""

from pathlib import Path
from typing import Annotated

import typer

from engine import cli_options as options
from engine.attention import METHODS
from engine.bench.environment import Execution
from engine.bench.modes import ModelOptions
from engine.bench.needles.passkey_grid import PasskeyGrid
from engine.bench.needles.run import print_plan, run_needles
from engine.bench.needles.settings import SHIPPED_MODEL, Settings
from engine.bench.ranges import parse_range
from engine.bench.reports import write_reports
from engine.cli import make_app, make_console, run
from engine.distributed import init_group
from engine.errors import InputError

app = make_app()


@app.command()
def needles(
    pretrained_name: Annotated[
        str | None, typer.Option(help="A local folder or a Hub id. Without it: the model that ships in assets/.")
    ] = None,
    tp_path: options.TpDir = None,
    save_dir: Annotated[Path, typer.Option(help="Where SAVE_DIR/NAME/*.yaml are written.")] = Path("results/needles"),
    save_name: Annotated[str | None, typer.Option(help="NAME.  [default: that of the attention method]")] = None,
    base_prompt_string_length: Annotated[
        str | None,
        typer.Option(
            metavar="RANGE",
            help="Characters of text around the needles; of several, a document each.  "
            "[default: 50000; of the shipped model 20000]",
        ),
    ] = None,
    num_questions: Annotated[
        str | None,
        typer.Option(metavar="RANGE", help="Ask so many.  [default: 2:1025:x2; of the shipped model 2:257:x2]"),
    ] = None,
    num_few_shot: Annotated[int, typer.Option(min=0, help="Questions that are shown with their answers.")] = 5,
    num_timing_iters: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds.  [default: 10; of the shipped model 3]")
    ] = None,
    num_warmup_iters: Annotated[
        int | None, typer.Option(min=0, help="Rounds before those.  [default: 5; of the shipped model 1]")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help=f"{', '.join(METHODS)}, or several, which take turns.  [default: hydragen]")
    ] = None,
    disable_hydragen: Annotated[
        bool, typer.Option("--disable-hydragen", help="As --attention hydragen_noshared.")
    ] = False,
    disable_attention: Annotated[bool, typer.Option("--disable-attention", help="As --attention noattention.")] = False,
    measure_unique_prefill: Annotated[
        bool, typer.Option(help="Time the reading of the questions by itself too: the first token of each answer.")
    ] = True,
    passkey_grid: Annotated[
        str | None,
        typer.Option(
            metavar="GRID",
            help="Such as 20480words_10x10x3_7digits (lengths x depths x repeats), or none.  "
            "[default: none; of the shipped model 4096words_5x10x3_7digits]",
        ),
    ] = None,
    haystack_file: Annotated[
        Path | None, typer.Option(help="Text for the haystack. Without it: prose from a generator.")
    ] = None,
    haystack_start: Annotated[
        float, typer.Option(min=0, max=0.99, help="Begin in the file after this fraction of its sentences.")
    ] = 0.0,
    names: Annotated[str, typer.Option(help="Of the dogs: seen, or unseen by the shipped model in training.")] = "seen",
    graph: Annotated[bool, typer.Option(help="Capture decode steps on CUDA and replay them.")] = False,
    prefill: options.Prefill = None,
    attention_backend: options.AttentionBackend = None,
    operations_backend: options.OperationsBackend = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the text, the needles and the passkeys.")] = 0,
    timeout: options.Timeout = 600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and run nothing.")] = False,
) -> None:
    """Ask many questions about one document that has the answers hidden in it, and time it; hide passkeys at every
    depth of texts of several lengths.

    With no arguments the retrieval model that ships with the project is asked, in less than a minute on 2 cores. A
    number of questions, and a length of the grid, that has a result is skipped, so a run that was stopped goes on.
    Answers are kept beside the results; tables, CSV and plots are made at the end.

    Ranges are a,b,c or start:stop:step or start:stop:xfactor, where stop is exclusive.

    \b
    Examples:
      python scripts/needles.py
      python scripts/needles.py --attention hydragen,hydragen_noshared --num-questions 256 --dtype bfloat16
      python scripts/needles.py --base-prompt-string-length 12000:100000:x2 --num-questions 256 --save-dir results/long
      torchrun --standalone --nproc_per_node=4 scripts/needles.py --pretrained-name 01-ai/Yi-6B-200K \\
          --tp-path shards/yi-6b-4 --save-dir results/yi --base-prompt-string-length 50000 --num-timing-iters 10
    """
    ships = pretrained_name is None

    def default(value, usual, shipped):
        return value if value is not None else shipped if ships else usual

    counts = default(num_questions, "2:1025:x2", "2:257:x2")
    lengths = default(base_prompt_string_length, "50000", "20000")
    grid = default(passkey_grid, "none", "4096words_5x10x3_7digits")
    settings = Settings(
        outdir=save_dir,
        save_name=save_name,
        model=ModelOptions(pretrained_name or str(SHIPPED_MODEL), tp_path, "auto", dtype, revision, seed),
        attention=_methods(attention, disable_hydragen, disable_attention),
        question_counts=parse_range(counts, name="number of questions"),
        document_lengths=parse_range(lengths, name="document length"),
        num_few_shot=num_few_shot,
        num_iters=default(num_timing_iters, 10, 3),
        num_warmup=default(num_warmup_iters, 5, 1),
        measure_first_token=measure_unique_prefill,
        grid=None if grid == "none" else PasskeyGrid.parse(grid),
        haystack_file=haystack_file,
        haystack_start=haystack_start,
        names=names,
        seed=seed,
        execution=Execution(attention_backend, operations_backend, graph, prefill),
    )
    group = init_group(device, timeout_s=timeout)
    try:
        if dry_run:
            print_plan(settings, group, make_console(quiet=group.rank != 0))
            return
        run_needles(settings, group, make_console(stderr=True, quiet=group.rank != 0))
        if group.rank == 0:
            write_reports(save_dir, make_console())
    finally:
        group.close()


def _methods(attention: str | None, disable_hydragen: bool, disable_attention: bool) -> tuple[str, ...]:
    asked = {"--disable-hydragen": disable_hydragen, "--disable-attention": disable_attention}
    given = [option for option, is_given in asked.items() if is_given]
    if attention is not None:
        given.append(f"--attention {attention}")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were given; accepted: one of them; leave the others out")
    if disable_hydragen:
        return ("hydragen_noshared",)
    if disable_attention:
        return ("noattention",)
    return tuple(name.strip() for name in ("hydragen" if attention is None else attention).split(","))


if __name__ == "__main__":
    run(app)
