"""A run of ``scripts/needles.py``: what is left of it, with one loaded model."""

from dataclasses import asdict

from rich.console import Console

from engine.bench.needles.asking import Asker
from engine.bench.needles.identity import model_digest
from engine.bench.needles.needle_sweep import NeedleSweep
from engine.bench.needles.passkey_sweep import PasskeySweep
from engine.bench.needles.same_settings import check_folder
from engine.bench.needles.settings import Settings
from engine.checkpoint import resolve_model
from engine.distributed import TPGroup
from engine.engine import check_execution
from engine.files import check_outdir
from engine.prefill import check_prefill
from engine.progress import generation_progress, progress_bar
from engine.tokenizer import Tokenizer


class _Plan:
    """The sweeps of the settings, and what is left of them. No weights are needed for it."""

    def __init__(self, settings: Settings, group: TPGroup):
        check_outdir(settings.outdir)
        config, model = settings.model.config(), settings.model
        check_execution(group, config.dtype, **asdict(settings.execution))
        check_prefill(settings.execution.prefill, model.name, config)
        folder = resolve_model(model.name, model.revision, weights=False) if model.tp_dir is None else model.tp_dir
        tokenizer = Tokenizer.from_folder(folder)
        settings.check_lengths(config.max_positions)
        digest = group.on_rank_0(lambda: model_digest(folder))
        loaded = tokenizer, config, digest, group
        self.needles = [NeedleSweep(settings, n, *loaded) for n in settings.document_lengths]
        self.passkeys = None if settings.grid is None else PasskeySweep(settings, settings.grid, *loaded)

        def left() -> tuple[list[dict[int, list[str]]], dict[str, list[int]]]:
            for method in settings.attention:
                check_folder(settings, method, self.needles[0].blank(method, settings.question_counts[0]))
            counts = [{n: sweep.unfinished(n) for n in settings.question_counts} for sweep in self.needles]
            lengths = {} if self.passkeys is None else {m: self.passkeys.unfinished(m) for m in settings.attention}
            return counts, lengths

        # For each document, and each number of questions, the methods that have no result; of passkeys, the lengths.
        self.counts, self.lengths = group.on_rank_0(left)


def print_plan(settings: Settings, group: TPGroup, console: Console) -> None:
    """What a run would do, and the memory that it needs on each rank; questions for which there is none run in turns.

    Runs nothing, loads no weights, writes nothing.
    """
    plan = _Plan(settings, group)
    for sweep, counts in zip(plan.needles, plan.counts, strict=True):
        document = sweep.document
        console.print(
            f"{settings.model_name}: {len(document.needles)} needles in {document.num_characters:,} characters of "
            f"{document.haystack}; with {settings.num_few_shot} examples {sweep.num_document_tokens:,} tokens, "
            f"{sweep.num_sequence_tokens:,} with a question and its answer",
            soft_wrap=True,
        )
        for count, methods in counts.items():
            needed = (f"{method} ({sweep.footprint(method, count) / 2**30:.2f} GiB)" for method in methods)
            console.print(f"{count} questions: {', '.join(needed) or 'there already'}", soft_wrap=True)
    for method, lengths in plan.lengths.items():
        words = ", ".join(map(str, lengths))
        console.print(
            f"passkeys, {method}: {f'texts of {words} words' if lengths else 'there already'}", soft_wrap=True
        )


def run_needles(settings: Settings, group: TPGroup, console: Console) -> None:
    """Asks what has no result yet; each result is written as soon as it is there.

    Raises InputError for settings that cannot be used, or that are not those of results that are there, and when
    memory runs out.
    """
    plan = _Plan(settings, group)
    todo = [
        (sweep, count, methods)
        for sweep, counts in zip(plan.needles, plan.counts, strict=True)
        for count, methods in counts.items()
    ]
    left = [one for one in todo if one[2]]
    lengths = {method: words for method, words in plan.lengths.items() if words}
    if len(left) < len(todo):
        console.print(f"{len(todo) - len(left)} of {len(todo)} numbers of questions have results and are skipped.")
    if not left and not lengths:
        return
    console.print(f"Loading {settings.model_name} ...", soft_wrap=True)
    model = settings.model.load(group)
    most = max(settings.question_counts)
    askers = {method: Asker(method, model, settings.execution, most) for method in settings.attention}
    for sweep, count, methods in left:
        with progress_bar(console) as progress:
            task = progress.add_task(f"{count} questions", total=sweep.num_steps(len(methods)))
            results = sweep.run([askers[m] for m in methods], count, lambda: progress.advance(task))
        for result in results:
            console.print(result.headline, soft_wrap=True)
    for method, words in lengths.items():
        for num_words in words:
            with generation_progress(settings.grid.num_depths * settings.grid.num_repeats, console) as on_tokens:
                result = plan.passkeys.run(askers[method], num_words, on_tokens)
            console.print(result.headline, soft_wrap=True)
