"""What questions about a document found: accuracy and time of each run, beside the baseline's."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from engine.attention.noshared import HydragenNoShared
from engine.bench.needles.document import NUM_DEPTHS
from engine.bench.needles.needle_results import NeedlesResult
from engine.bench.ratio import Ratio
from engine.bench.report import MISSING, format_number, require_matplotlib, write_table
from engine.bench.result_files import Status
from engine.bench.timing import HIGH_SPREAD
from engine.files import write_whole
from engine.prefill import DENSE

if TYPE_CHECKING:
    from rich.console import Console

BASELINE = HydragenNoShared.name
# Of the environment, what results that are compared have in common.
_SETTING = "device_name dtype world_size num_threads attention_backend operations_backend cuda_graphs".split()


@dataclass(frozen=True)
class NeedlesRow:
    """A result, and how it compares with that of the baseline: as many questions about the same document."""

    result: NeedlesResult
    vs_baseline: Ratio | None  # how many times as fast it generates the tokens after the first
    same_answers: int | None  # how many of its answers are the baseline's, token for token


def build_needle_rows(results: Iterable[NeedlesResult]) -> list[NeedlesRow]:
    """Ordered by setting, length of the document, number of questions and name."""
    results = sorted(results, key=_order)
    baselines = {_point(result): result for result in results if result.attention == BASELINE}
    return [_row(result, baselines.get(_point(result))) for result in results]


def setting_of(result: NeedlesResult) -> tuple[str, ...]:
    """What the results of one table and one plot have in common."""
    environment = (str(result.environment.get(name, "unknown")) for name in _SETTING)
    return (
        result.sweep,
        result.model_name,
        result.model_digest,
        *environment,
        str(result.num_few_shot),
        result.haystack,
        result.haystack_digest,
        result.names,
        str(result.seed),
    )


def _point(result: NeedlesResult) -> tuple[object, ...]:
    """What results that are compared have in common."""
    document = (result.num_document_tokens, result.num_needles)
    return (setting_of(result), result.prefill, *document, result.questions.num_questions)


def _order(result: NeedlesResult) -> tuple[object, ...]:
    return (_point(result), result.attention != BASELINE, result.questions.name)


def _row(result: NeedlesResult, baseline: NeedlesResult | None) -> NeedlesRow:
    if baseline is None or baseline is result or Status.OK not in (result.status, baseline.status):
        return NeedlesRow(result, None, None)
    ours, theirs = result.decode_rounds_ms, baseline.decode_rounds_ms
    ratio = None
    if ours and theirs:
        same_run = result.run == baseline.run and len(ours) == len(theirs)
        ratio = Ratio.of_rounds(theirs, ours) if same_run else Ratio.of_runs([theirs], [ours])
    return NeedlesRow(result, ratio, _count_same_answers(result, baseline))


def _count_same_answers(result: NeedlesResult, baseline: NeedlesResult) -> int | None:
    """None where the answers of one of them are not there, or are not its own."""
    ours, theirs = (_read_token_ids(one) for one in (result, baseline))
    if not ours or len(ours) != len(theirs):
        return None
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def _read_token_ids(result: NeedlesResult) -> list[list[int]]:
    try:
        lines = result.questions.answers_path(Path(result.sweep)).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["token_ids"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found if len(found) == result.questions.num_questions else []


# ---- tables


def print_needle_tables(rows: Sequence[NeedlesRow], console: "Console") -> None:
    """Of each setting a table of accuracy and times, and one of accuracy by depth for the most questions about each
    document."""
    for _, group in groupby(rows, key=lambda row: setting_of(row.result)):
        members = list(group)
        console.print(needle_title(members[0].result), style="bold", markup=False, soft_wrap=True)
        _print_times(members, console)
        _print_depths(members, console)
    if any(row.result.high_spread or (row.vs_baseline and row.vs_baseline.high_spread) for row in rows):
        console.print(f"! times vary by more than {HIGH_SPREAD:.0%}: differences of that size may be noise")
    if any(row.vs_baseline and not row.vs_baseline.same_run for row in rows):
        console.print("~ timed in separate runs: --attention with several methods times them turn by turn")
    for row in rows:
        if row.result.status != Status.OK and row.result.message:
            where = row.result.questions.path(Path())
            console.print(f"{where}: {row.result.message}", style="dim", markup=False, soft_wrap=True)


def needle_title(result: NeedlesResult) -> str:
    environment, ranks = result.environment, result.environment.get("world_size", 1)
    source = f", from {result.sweep}" if result.sweep else ""
    return (
        f"{Path(result.model_name).name}, {environment.get('dtype')} on {environment.get('device_name')}, "
        f"{ranks} rank{'s' * (ranks != 1)}: needles ({result.names} names) in "
        f"{result.haystack}{source}"
    )


def _print_times(rows: Sequence[NeedlesRow], console: "Console") -> None:
    results = [row.result for row in rows]
    are_dense = all(result.prefill == DENSE for result in results)
    columns = {
        "density": [MISSING if are_dense else format_number(result.mean_density, ".1%") for result in results],
        "right\n(95% interval)": [_outcome(result) for result in results],
        "answers as\nnoshared": [_same_answers(row) for row in rows],
        "prefill\nms": [_median(result.prefill_ms) for result in results],
        "first\nms": [_median(result.first_token_ms) for result in results],
        "others\nms": [format_number(result.decode and result.decode.median, ",.1f") for result in results],
        "others vs\nnoshared": [row.vs_baseline.text if row.vs_baseline else MISSING for row in rows],
        "spread\nof all": [_spread(result) for result in results],
        "ms a\nquestion": [format_number(result.ms_per_question, ",.3g") for result in results],
        "at once": [_at_once(result) for result in results],
    }
    shown = {heading: values for heading, values in columns.items() if set(values) != {MISSING}}
    table = _table("run", *shown)
    previous = None
    for index, result in enumerate(results):
        point = (f"{result.num_document_tokens:,}", str(result.questions.num_questions))
        if previous not in (None, point):
            table.add_section()
        where = ("", "") if point == previous else point
        table.add_row(*where, result.questions.name, *(values[index] for values in shown.values()))
        previous = point
    console.print(table)
    for name, prefill in dict.fromkeys((result.questions.name, result.prefill) for result in results):
        if prefill != DENSE:
            console.print(f"{name}: prefill {prefill}", markup=False, highlight=False, soft_wrap=True)


def _print_depths(rows: Sequence[NeedlesRow], console: "Console") -> None:
    results = most_questions(row.result for row in rows if row.result.status == Status.OK)
    if not results:
        return
    width = 100 // NUM_DEPTHS
    headings = (f"{i * width}-{(i + 1) * width}%" for i in range(NUM_DEPTHS))
    table = _table("right, of those asked,\nby depth", *headings)
    for result in results:
        shares = [f"{one.num_right}/{one.num_asked}" for one in result.accuracy_by_depth]
        sizes = (f"{result.num_document_tokens:,}", str(result.questions.num_questions))
        table.add_row(*sizes, result.questions.name, *shares)
    console.print(table)


def most_questions(results: Iterable[NeedlesResult]) -> list[NeedlesResult]:
    """Of each run and each document the result with the most questions, by run, then length."""
    largest: dict[tuple[str, int], NeedlesResult] = {}
    for result in sorted(results, key=lambda result: result.questions):
        largest[result.questions.name, result.num_document_tokens] = result
    return [largest[key] for key in sorted(largest)]


def _table(name: str, *headings: str):
    from rich import box  # here: rich.table takes longer to import than the rest of this module
    from rich.table import Table

    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    for heading in ("tokens", "asked"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(name, no_wrap=True, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _outcome(result: NeedlesResult) -> str:
    return result.accuracy.text if result.status == Status.OK else str(result.status).replace("_", " ")


def _same_answers(row: NeedlesRow) -> str:
    return MISSING if row.same_answers is None else f"{row.same_answers}/{row.result.questions.num_questions}"


def _median(times: Sequence[float]) -> str:
    return format_number(median(times), ",.1f") if times else MISSING


def _spread(result: NeedlesResult) -> str:
    if len(result.answer_ms) < 2:
        return MISSING
    return f"{result.answer.relative:.1%}{' !' if result.high_spread else ''}"


def _at_once(result: NeedlesResult) -> str:
    """Only where not all questions ran together."""
    return MISSING if result.num_at_once in (0, result.questions.num_questions) else str(result.num_at_once)


# ---- CSV

_RESULT_COLUMNS = (
    "sweep model_digest attention prefill mean_density status haystack haystack_digest names num_document_tokens "
    "num_needles num_few_shot num_new_tokens num_at_once ms_per_question seed run message"
).split()
_ENVIRONMENT_COLUMNS = "device device_name dtype world_size num_threads git_revision".split()
_BY_DEPTH = ("accuracy", "accuracy_low", "accuracy_high", "asked")
_COLUMNS = (
    "name", "num_characters", "num_questions", "model", "accuracy", "accuracy_low", "accuracy_high",
    *(f"{name}_depth_{i}" for i in range(NUM_DEPTHS) for name in _BY_DEPTH),
    "prefill_ms", "answer_ms", "answer_spread", "first_token_ms", "decode_ms", "decode_spread", "vs_noshared",
    "vs_noshared_spread", "vs_noshared_same_run", "same_answers_as_noshared", "num_iters", "num_warmup", "peak_bytes",
    *_RESULT_COLUMNS, *_ENVIRONMENT_COLUMNS, "torch",
)  # fmt: skip


def write_needle_csv(rows: Sequence[NeedlesRow], path: Path) -> None:
    """Writes one line a result; times are medians in ms; depths are tenths."""
    write_table(path, _COLUMNS, [_csv_values(row) for row in rows])


def _csv_values(row: NeedlesRow) -> dict[str, object]:
    result, environment, ratio = row.result, row.result.environment, row.vs_baseline
    low, high = result.accuracy.interval
    return {
        "name": result.questions.name,
        "num_characters": result.questions.num_characters,
        "num_questions": result.questions.num_questions,
        "model": result.model_name,
        "accuracy": result.accuracy.share,
        "accuracy_low": low if result.asked_by_depth else None,
        "accuracy_high": high if result.asked_by_depth else None,
        **_values_by_depth(result),
        "prefill_ms": median(result.prefill_ms) if result.prefill_ms else None,
        "answer_ms": result.answer and result.answer.median,
        "answer_spread": result.answer.relative if len(result.answer_ms) > 1 else None,
        "first_token_ms": median(result.first_token_ms) if result.first_token_ms else None,
        "decode_ms": result.decode and result.decode.median,
        "decode_spread": result.decode.relative if len(result.decode_rounds_ms) > 1 else None,
        "vs_noshared": ratio and ratio.value,
        "vs_noshared_spread": ratio and ratio.spread,
        "vs_noshared_same_run": ratio and ratio.same_run,
        "same_answers_as_noshared": row.same_answers,
        "num_iters": len(result.answer_ms),
        "num_warmup": len(result.answer_warmup_ms),
        "peak_bytes": max(result.peak_bytes, default=None),
        **{name: getattr(result, name) for name in _RESULT_COLUMNS},
        **{name: environment.get(name) for name in _ENVIRONMENT_COLUMNS},
        "torch": (environment.get("versions") or {}).get("torch"),
    }


def _values_by_depth(result: NeedlesResult) -> dict[str, object]:
    values = {}
    for depth, one in enumerate(result.accuracy_by_depth):
        interval = one.interval if one.num_asked else (None, None)
        for name, value in zip(_BY_DEPTH, (one.share, *interval, one.num_asked), strict=True):
            values[f"{name}_depth_{depth}"] = value
    return values


# ---- plot


def plot_needles(rows: Sequence[NeedlesRow], path: Path) -> bool:
    """Writes a PNG of the time per question and of accuracy by depth; False where no result has times.

    Raises InputError when matplotlib is not installed.
    """
    timed = [row.result for row in rows if row.result.status == Status.OK]
    if not timed:
        return False
    require_matplotlib()
    from engine.bench.needles.needle_plot import draw_needles  # here: matplotlib takes half a second to import

    write_whole(path, draw_needles(timed))
    return True
