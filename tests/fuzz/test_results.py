"""Result files of a sweep that are damaged or forged."""

import json

import yaml
from fuzz.documents import by_weight, changed
from fuzz.harness import for_cases, fuzz
from hypothesis import strategies as st
from rows import row_result

from engine.bench.micro.micro_report import build_micro_rows
from engine.bench.micro.micro_results import FILES
from engine.bench.results import Cell, CellResult, Status, is_finished, read_results, write_cell
from engine.errors import InputError

CELL = Cell("hydragen", 4, 256, 16)
_RESULT = CellResult(
    cell=CELL, status=Status.OK, model_name="owner/name", seed=0, num_iters=2, num_warmup=1,
    environment={"device": "cpu", "dtype": "bfloat16"}, decode_ms=(9.5, 9.75), first_token_ms=(1.25, 1.5),
    prefill_ms=(30.0,), predicted_bytes=(10**9,), peak_bytes=(10**9,), achieved_gbs=3.5,
)  # fmt: skip

_ROW = row_result("base", (1.5, 2.0), backends=("simd", "aten"), hidden_size=768)

# Text of YAML that stands for a value.
_TEXTS = [
    "!!int ''", "!!bool x", "!!float ''", "!!timestamp x", "!!binary x", "!!set {a, b}", "!!omap [a]", "!!merge x",
    "!!python/name:os.system", "!unknown 1", "&a [*a]", "&a {b: *a}", "*a", "2026-13-40", "1:1:1", "1:" * 4000 + "1",
    "0x", "0b", "1_000", "1e999", ".inf", "-.inf", ".nan", "9" * 5000, "9" * 4200, "~", "|\n  a", "[" * 990,
    "{a: " * 990, "[" * 300 + "]" * 300, "'", '"', "a: b: c", "%a", "@", "`", "\t", "\x07", "? a", "- ", "--- 1", "...",
    "[&a [x, x, x], &b [*a, *a, *a], &c [*b, *b, *b], &d [*c, *c, *c], *d, *d, *d]",
]  # fmt: skip


@st.composite
def _edited(draw, text: str) -> str:
    """One line's value replaced, a line lost or doubled, or the end cut off."""
    lines = text.splitlines()
    index = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(["value", "value", "value", "lost", "twice", "cut", "text"]))
    if kind == "value":
        lines[index] = lines[index].partition(": ")[0] + ": " + draw(st.sampled_from(_TEXTS))
    elif kind == "lost":
        del lines[index]
    elif kind == "twice":
        lines.insert(index, draw(st.sampled_from(lines)))
    elif kind == "text":
        lines[index] = draw(st.text(max_size=20))
    joined = "\n".join(lines)
    return joined[: draw(st.integers(0, len(joined)))] if kind == "cut" else joined


def _fuzz(num_cases, tmp_path, path, values, read_all, figures, is_finished, reached) -> None:
    """Damages and forges the file at ``path`` of a result that ``read_all`` reads."""
    text = path.read_text()
    # JSON is YAML, and quick to write.
    documents = changed(st.just(yaml.safe_load(text)), ["speed", "a\nb"], values, most=1)
    files = by_weight((4, documents.map(json.dumps)), (4, _edited(text)), (1, st.text()))

    def read(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        warnings: list[str] = []
        results = read_all([tmp_path], warnings.append)
        if not results:
            raise InputError("; ".join(warnings))
        for result in results:
            figures(result)
            assert is_finished(result, warnings.append)
        assert all(warning.isprintable() for warning in warnings)

    outcomes = fuzz(num_cases, files, read)
    assert outcomes.accepted_share > 0.1
    assert outcomes.share("not YAML|cannot be read|no schema_version") < 0.7
    outcomes.assert_reached(["not YAML", "no schema_version", "has schema version", "lacks", "unknown", *reached])


@for_cases
def test_results(num_cases, tmp_path):
    def is_finished_as(result, warn) -> bool:
        return is_finished(tmp_path, CELL, warn) == (result.cell == CELL)

    def figures(result) -> None:
        _ = (result.tokens_per_second, result.spread, result.high_spread, result.roofline_fraction)

    path, values = write_cell(tmp_path, _RESULT), ["ok", "does_not_fit", [0.5], [], 2**40]
    _fuzz(num_cases, tmp_path, path, values, read_results, figures, is_finished_as, ["status is", "ms is"])


@for_cases
def test_rows(num_cases, tmp_path):
    def is_finished_as(result, warn) -> bool:
        return FILES.is_finished(tmp_path, _ROW.row, warn) == (result.row == _ROW.row)

    def figures(result) -> None:
        (row,) = build_micro_rows([result])
        _ = (result.high_spread, result.achieved_gbs, result.achieved_tflops, result.roofline_fraction, row.vs_base)

    path, values = FILES.write(tmp_path, _ROW), ["ok", "clock", [0.5], [], ["simd"], 2**40]
    reached = ["status is", "ms is", "kind is", "timed_with is"]
    _fuzz(num_cases, tmp_path, path, values, FILES.read_all, figures, is_finished_as, reached)
