"""A run of ``scripts/prefill.py``: what is left of it, with one loaded model."""

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from engine.bench.needles.identity import config_digest, model_digest
from engine.bench.prefill.prefill_sweep import PrefillSweep
from engine.bench.prefill.prompt import prompt_of_text, random_prompt
from engine.bench.prefill.reader import Reader
from engine.bench.prefill.same_settings import check_folder
from engine.bench.prefill.settings import Settings
from engine.checkpoint import resolve_model
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.engine import check_execution
from engine.files import check_outdir
from engine.prefill import check_prefill
from engine.progress import progress_bar


class _Plan:
    """The sweep of the settings, and what is left of it. No weights are needed for it."""

    def __init__(self, settings: Settings, group: TPGroup):
        check_outdir(settings.outdir)
        config = settings.model.config()
        for column in settings.columns:
            check_execution(group, config.dtype, **asdict(settings.execution(column)))
            check_prefill(column.prefill, settings.model.name, config)
        digest = group.on_rank_0(lambda: _digest(settings, config))
        if settings.prompt_file is None:
            self.prompt = random_prompt(config.vocab_size, settings.model.seed)
        else:
            self.prompt = prompt_of_text(settings.prompt_file, _folder(settings))
        self.sweep = PrefillSweep(settings, config, digest, self.prompt, group)

        def left():
            check_folder(settings, self.sweep.blank(settings.columns[0], settings.contexts[0]))
            return {n: self.sweep.unfinished(n) for n in settings.contexts}

        self.columns = group.on_rank_0(left)  # for each context length those that have no result


def _digest(settings: Settings, config: ModelConfig) -> str:
    folder = _folder(settings)
    return config_digest(config) if folder is None else model_digest(folder)


def _folder(settings: Settings) -> Path | None:
    """Where the model's files are; None of random weights."""
    model = settings.model
    if model.load_format == "dummy":
        return None
    return resolve_model(model.name, model.revision, weights=False) if model.tp_dir is None else model.tp_dir


def print_plan(settings: Settings, group: TPGroup, console: Console) -> None:
    """What a run would do, and the memory that it needs on each rank.

    Runs nothing, loads no weights, writes nothing.
    """
    plan = _Plan(settings, group)
    console.print(
        f"{settings.model_name}, {group.size} rank{'s' * (group.size != 1)}: {settings.num_warmup} + "
        f"{settings.num_iters} rounds of {plan.prompt.name}",
        soft_wrap=True,
    )
    for num_tokens, columns in plan.columns.items():
        needs = plan.sweep.too_long(num_tokens) or f"{plan.sweep.footprint(num_tokens) / 2**30:.2f} GiB a rank"
        names = ", ".join(column.text for column in columns) or "there already"
        console.print(f"{num_tokens:,} tokens ({needs}): {names}", soft_wrap=True)


def run_prefill(settings: Settings, group: TPGroup, console: Console) -> None:
    """Times what has no result yet; the results of a context length are written as soon as they are there.

    Raises InputError for settings that cannot be used, or that are not those of results that are there, and when memory
    runs out.
    """
    plan = _Plan(settings, group)
    sweep = plan.sweep
    left = {num_tokens: columns for num_tokens, columns in plan.columns.items() if columns}
    num_skipped = len(settings.columns) * len(settings.contexts) - sum(map(len, left.values()))
    if num_skipped:
        console.print(f"{num_skipped} of {num_skipped + sum(map(len, left.values()))} points have results: skipped.")
    for num_tokens in [n for n in left if sweep.too_long(n)]:
        reason = sweep.too_long(num_tokens)
        sweep.record_too_long(left.pop(num_tokens), num_tokens, reason)
        console.print(f"{num_tokens:,} tokens: {reason}", soft_wrap=True)
    if not left:
        return
    console.print(f"Loading {settings.model_name} ...", soft_wrap=True)
    model = settings.model.load(group)
    readers = {column: Reader(column, model, settings.execution(column)) for column in settings.columns}
    for num_tokens, columns in left.items():
        with progress_bar(console) as progress:
            task = progress.add_task(f"{num_tokens:,} tokens", total=sweep.num_steps(len(columns)))
            results = sweep.run([readers[column] for column in columns], num_tokens, lambda: progress.advance(task))
        for result in results:
            console.print(result.headline, soft_wrap=True)
