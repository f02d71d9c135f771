"""Time to first token against context length, one column a prefill method."""

from pathlib import Path
from typing import Annotated

import typer

from engine import cli_options as options
from engine.bench.modes import ModelOptions
from engine.bench.needles.settings import SHIPPED_MODEL
from engine.bench.prefill.column import parse_columns
from engine.bench.prefill.run import print_plan, run_prefill
from engine.bench.prefill.settings import BENCHMARK_CONTEXTS, Settings
from engine.bench.ranges import parse_range
from engine.bench.reports import write_reports
from engine.cli import make_app, make_console, run
from engine.distributed import init_group
from engine.prefill import PREFILL_METHODS

app = make_app()

_METHODS, _CONTEXTS = "dense,minference", "4096:32769:x2"
# Of the shipped model: in less than a minute on 2 cores.
_SHIPPED_METHODS = "dense,a_shape:n_init=128:n_local=1024,vertical_slash:num_vertical=256:num_slash=64"
_SHIPPED_CONTEXTS = "2048:32769:x4"


@app.command()
def prefill(
    model_name: Annotated[
        str | None,
        typer.Option(
            help="A local folder, a Hub id, or with --load-format dummy a preset's name (llama-125m, tiny).  "
            "[default: the model that ships in assets/]"
        ),
    ] = None,
    tp_dir: options.TpDir = None,
    save_dir: Annotated[Path, typer.Option(help="Where SAVE_DIR/METHOD/{tokens}.yaml are written.")] = Path(
        "results/prefill"
    ),
    attn_type: Annotated[
        str | None,
        typer.Option(
            "--attn-type",
            "--attn_type",
            metavar="METHODS",
            help=f"Of {', '.join(PREFILL_METHODS)} (hf is dense) and streaming, with options as in "
            f"a_shape:n_init=128:n_local=4096; several take turns.  [default: {_METHODS}; of the shipped model "
            "dense, a_shape and vertical_slash with small budgets]",
        ),
    ] = None,
    context_window: Annotated[
        str | None,
        typer.Option(
            "--context-window",
            "--context_window",
            metavar="RANGE",
            help=f"Tokens of the prompt.  [default: {_CONTEXTS}; of the shipped model {_SHIPPED_CONTEXTS}]",
        ),
    ] = None,
    run_benchmark: Annotated[
        bool,
        typer.Option(
            "--run-benchmark",
            "--run_benchmark",
            help="All methods of the registry at 1, 10, 50, 100, 200, 300, 500 and 1000 thousand tokens; --attn-type "
            "and --context-window replace their part of it.",
        ),
    ] = False,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="A text in UTF-8, whose beginning is the prompt.  [default: random tokens]"),
    ] = None,
    num_iters: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
    num_warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 1,
    attention: Annotated[
        str, typer.Option(help="The attention method that decoding would use: it lays out the cache.")
    ] = "hydragen",
    attention_backend: options.AttentionBackend = None,
    operations_backend: options.OperationsBackend = None,
    load_format: options.LoadFormat = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    seed: options.SeedOfDummies = 0,
    timeout: options.Timeout = 600,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the points and each one's memory per rank, and run nothing.")
    ] = False,
) -> None:
    """Time the reading of one prompt, from an empty cache to the choice of the first new token, by several methods.

    With no arguments the retrieval model that ships with the project reads prompts of 2048 to 32768 tokens, in less
    than a minute on 2 cores. Without --prompt-file prompts are random tokens, of real models too: of the methods only
    minference, vertical_slash and block_sparse look at what a prompt says, and what they keep of it is the density in
    the table.

    The methods take turns, round by round, each with all memory to itself. Density, the part of attention's work that
    was done, is counted in a reading of its own before those. A method and length that has a result is skipped, so a
    run that was stopped goes on. A prompt that is too long for the model, or for memory, is recorded as such. Table,
    CSV and plot are made at the end.

    Ranges are a,b,c or start:stop:step or start:stop:xfactor, where stop is exclusive.

    \b
    Examples:
      python scripts/prefill.py
      python scripts/prefill.py --model-name llama-125m --load-format dummy --context-window 4096:32769:x2 \\
          --attn-type dense,vertical_slash,a_shape:n_init=128:n_local=1024 --save-dir results/prefill-125m
      python scripts/prefill.py --prompt-file book.txt --save-dir results/prefill-book
      python scripts/prefill.py --attn_type hf --context_window 1000000
      python scripts/prefill.py --run_benchmark --model-name gradientai/Llama-3-8B-Instruct-262k --save-dir results/8b
      torchrun --standalone --nproc_per_node=8 scripts/prefill.py --model-name meta-llama/Llama-3.1-8B-Instruct \\
          --tp-dir shards/8b --context-window 8192:131072:x2 --save-dir results/8b-tp8
    """
    ships = model_name is None
    methods, contexts = (_SHIPPED_METHODS, _SHIPPED_CONTEXTS) if ships else (_METHODS, _CONTEXTS)
    if run_benchmark:
        methods, contexts = ",".join(PREFILL_METHODS), ",".join(map(str, BENCHMARK_CONTEXTS))
    settings = Settings(
        outdir=save_dir,
        model=ModelOptions(model_name or str(SHIPPED_MODEL), tp_dir, load_format, dtype, revision, seed),
        columns=parse_columns(methods if attn_type is None else attn_type, attention),
        contexts=parse_range(contexts if context_window is None else context_window, name="context window"),
        prompt_file=prompt_file,
        num_iters=num_iters,
        num_warmup=num_warmup,
        attention_backend=attention_backend,
        operations_backend=operations_backend,
    )
    group = init_group(device, timeout_s=timeout)
    try:
        if dry_run:
            print_plan(settings, group, make_console(quiet=group.rank != 0))
            return
        run_prefill(settings, group, make_console(stderr=True, quiet=group.rank != 0))
        if group.rank == 0:
            write_reports(save_dir, make_console())
    finally:
        group.close()


if __name__ == "__main__":
    run(app)
