"""Searches a sparse attention pattern for each head of a model, for ``--prefill minference``."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from engine import cli_options as options
from engine.bench.long_prompts import (
    Prompts,
    TokenizedText,
    prompts_of_needles,
    prompts_of_texts,
    random_prompts,
)
from engine.bench.needles.identity import model_digest
from engine.cli import make_app, make_console, run
from engine.distributed import TPGroup, init_group
from engine.errors import InputError
from engine.files import check_outdir, locked_directory, write_whole
from engine.head_search import check_searchable, score_heads
from engine.installed import installed_versions
from engine.loader import LoadedModel, load_model, read_config
from engine.prefill.head_config import write_head_config
from engine.prefill.search import DEFAULT_CANDIDATES, Candidate, Choice, choose_all, mean, parse_candidates
from engine.prefill.search_state import SearchState
from engine.progress import progress_bar
from engine.shards import dtype_name
from engine.tokenizer import Tokenizer

app = make_app()

_CONTEXT = 32768
_DECIMALS = 6  # of scores in the file


@app.command()
def main(
    model: options.Model,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.json", help="The file to write.")],
    candidates: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Patterns to choose from, with commas: a_shape:n_init=100:n_local=800, "
            "vertical_slash:num_vertical=30:num_slash=800, block_sparse:num_blocks=100, or dense.  [default: seven of "
            "the published search, see docs/searching-sparse-heads.md]",
            show_default=False,
        ),
    ] = DEFAULT_CANDIDATES,
    max_density: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="The budget: the part of causal attention's pairs that a head's pattern may look at."
        ),
    ] = 0.3,
    context: Annotated[
        int | None,
        typer.Option(min=64, help=f"Tokens of a prompt.  [default: {_CONTEXT}, or the model's positions if fewer]"),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts, over which scores are averaged.")] = 3,
    text_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text that prompts are cut from, at several places. Give it again for more files. Without it: "
            "generated documents with needles, or random tokens for a model that has no tokenizer."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an OUTPUT.json that is there.")] = False,
    tp_dir: options.TpDir = None,
    load_format: options.LoadFormat = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    seed: Annotated[int, typer.Option(min=0, help="Of generated prompts, and of dummy weights.")] = 0,
    timeout: options.Timeout = 600,
) -> None:
    """Search a sparse attention pattern for each head of a model, within one budget.

    Each prompt is read with dense attention, and in every layer all candidates are tried on its queries, keys and
    values. Of those within the budget a head gets the one whose output differs least from dense attention's, on average
    over the prompts. The file goes to --prefill minference:config=OUTPUT.json.

    Scores are kept in OUTPUT.json.search, so that a run that was stopped goes on when the same command is given again.
    With --overwrite and another --max-density they are chosen from anew, in seconds. Remove the folder when done.

    \b
    Examples:
      python tools/search_sparse_heads.py assets/retrieval-1m heads.json --context 8192
      python tools/search_sparse_heads.py 01-ai/Yi-6B-200K yi.json --text-file book.txt --max-density 0.1
      python tools/search_sparse_heads.py ./my-model heads.json --candidates \\
          a_shape:n_init=64:n_local=512,vertical_slash:num_vertical=500:num_slash=700,block_sparse:num_blocks=32,dense
      torchrun --standalone --nproc_per_node=4 tools/search_sparse_heads.py 01-ai/Yi-6B-200K yi.json \\
          --tp-dir shards/yi-4
    """
    if not 0 <= max_density <= 1:  # not a number
        raise InputError(f"--max-density is {max_density}; accepted: from 0 to 1")
    parsed = parse_candidates(candidates)
    if output.is_dir():
        raise InputError(f"{output} is a folder; accepted: the name of a file to write; add one")
    if output.exists() and not overwrite:
        raise InputError(f"{output} is there already; accepted: a new file; choose another, or give --overwrite")
    state_dir = output.with_name(f"{output.name}.search")
    for folder in (output.parent, state_dir):
        check_outdir(folder)
    config = read_config(model, tp_dir=tp_dir, load_format=load_format, dtype=dtype, revision=revision)
    context = min(_CONTEXT, config.max_positions) if context is None else context
    check_searchable(config, context)

    group = init_group(device, timeout_s=timeout)
    try:
        loaded = load_model(
            model, group, tp_dir=tp_dir, load_format=load_format, dtype=dtype, revision=revision, seed=seed
        )
        console = make_console(stderr=True, quiet=group.rank != 0)
        prompts = group.on_rank_0(lambda: _prompts(loaded, context, num_prompts, text_file or [], seed, console))
        settings = {  # what scores depend on; files and folders may be renamed
            "model_digest": group.on_rank_0(lambda: _digest(loaded, model, load_format, seed)),
            "dtype": dtype_name(loaded.config.dtype),
            "context": context,
            "num_prompts": num_prompts,
            "prompts_digest": prompts.digest,
            "candidates": [candidate.text for candidate in parsed],
        }
        choices = _search(loaded, group, prompts, parsed, max_density, state_dir, settings, console)
        if group.rank == 0:
            provenance = {"model": model, **settings, "prompts": prompts.description, "max_density": max_density}
            provenance["versions"] = installed_versions(("torch", "triton", "llvmlite", "tributary"))
            _write(output, choices, provenance)
            _print_summary(choices, max_density, console)
            typer.echo(f"{output} is written; read prompts by it with --prefill minference:config={output}")
    finally:
        group.close()


def _prompts(
    loaded: LoadedModel, context: int, num_prompts: int, text_files: list[Path], seed: int, console: Console
) -> Prompts:
    folder = loaded.folder
    if folder is not None and (text_files or (folder / "tokenizer.json").is_file()):
        tokenizer = Tokenizer.from_folder(folder)
        if text_files:
            texts = [TokenizedText.read(path, tokenizer) for path in text_files]
            return prompts_of_texts(texts, context, num_prompts)
        return prompts_of_needles(tokenizer, context, num_prompts, seed)
    if text_files:
        raise InputError("--text-file was given, but dummy weights of a preset have no tokenizer; leave it out")
    console.print(
        "notice: the model has no tokenizer: its prompts are random tokens, which no trained head is used to",
        soft_wrap=True,
    )
    return random_prompts(loaded.config.vocab_size, context, num_prompts, seed)


def _digest(loaded: LoadedModel, name: str, load_format: str, seed: int) -> str:
    """What tells the weights from others."""
    return f"dummy weights of {name}, seed {seed}" if load_format == "dummy" else model_digest(loaded.folder)


def _search(
    loaded: LoadedModel,
    group: TPGroup,
    prompts: Prompts,
    candidates: tuple[Candidate, ...],
    max_density: float,
    state_dir: Path,
    settings: dict[str, Any],
    console: Console,
) -> list[list[Choice]]:
    """The choice of each head of each layer, on every rank."""
    config, num_prompts = loaded.config, len(prompts.tokens)
    with ExitStack() as stack:

        def begin() -> tuple[SearchState, dict]:
            state_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_directory(state_dir))
            state = SearchState(state_dir, settings)
            return state, state.read(num_prompts, config.num_layers, config.num_heads, len(candidates))

        state, done = group.on_rank_0(begin)
        total = num_prompts * config.num_layers
        if done:
            console.print(f"Going on: {len(done)} of {total} layers of prompts are in {state_dir}.", soft_wrap=True)
        with _progress(len(done), total, len(candidates), console) as on_candidate:
            scores = score_heads(
                loaded.model,
                prompts.tokens,
                candidates,
                done,
                lambda *found: group.on_rank_0(lambda: state.write(*found)),
                on_candidate,
            )
    return choose_all(candidates, scores, num_prompts, config.num_layers, max_density)


@contextmanager
def _progress(num_done: int, total: int, num_candidates: int, console: Console) -> Iterator[Callable[[], None]]:
    with progress_bar(console) as progress:
        task = progress.add_task(
            "candidates in layers", total=total * num_candidates, completed=num_done * num_candidates
        )
        yield lambda: progress.advance(task)


def _write(output: Path, choices: list[list[Choice]], provenance: dict[str, Any]) -> None:
    provenance["search"] = [
        [
            dict(zip(("error", "recall", "density"), (round(x, _DECIMALS) for x in astuple(choice.score)), strict=True))
            | {"within_budget": choice.is_within_budget}
            for choice in layer
        ]
        for layer in choices
    ]
    heads = [
        [(choice.candidate.pattern, round(choice.score.recall, _DECIMALS)) for choice in layer] for layer in choices
    ]
    write_whole(output, write_head_config(heads, provenance))


def _print_summary(choices: list[list[Choice]], max_density: float, console: Console) -> None:
    table = Table("layer", "heads by pattern", "error", "recall", "density")
    for column in table.columns[2:]:
        column.justify = "right"
    for number, layer in enumerate(choices):
        table.add_row(str(number), *_cells(layer))
    table.add_section()
    every = [choice for layer in choices for choice in layer]
    table.add_row("all", *_cells(every))
    make_console().print(table)
    beyond = [
        f"{n}.{h}" for n, layer in enumerate(choices) for h, choice in enumerate(layer) if not choice.is_within_budget
    ]
    if beyond:
        listed = ", ".join(beyond[:12]) + " ..." * (len(beyond) > 12)
        console.print(
            f"warning: no candidate looks at {max_density:g} of the pairs or less for {len(beyond)} of {len(every)} "
            f"heads (layer.head {listed}): each got that of least density",
            soft_wrap=True,
        )


def _cells(choices: list[Choice]) -> list[str]:
    counts = Counter(choice.candidate.text for choice in choices)
    score = mean([choice.score for choice in choices])
    patterns = "\n".join(f"{count} {text}" for text, count in counts.most_common())
    return [patterns, f"{score.error:.4f}", f"{score.recall:.4f}", f"{score.density:.4f}"]


if __name__ == "__main__":
    run(app)
