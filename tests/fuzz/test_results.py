"""Result files of a sweep that are damaged or forged."""

import json

import yaml
from fuzz.documents import by_weight, changed
from fuzz.harness import for_cases, fuzz
from hypothesis import strategies as st

from engine.bench.results import Cell, CellResult, Status, is_finished, read_results, write_cell
from engine.errors import InputError

CELL = Cell("hydragen", 4, 256, 16)
_RESULT = CellResult(
    cell=CELL, status=Status.OK, model_name="owner/name", seed=0, num_iters=2, num_warmup=1,
    environment={"device": "cpu", "dtype": "bfloat16"}, decode_ms=(9.5, 9.75), first_token_ms=(1.25, 1.5),
    prefill_ms=(30.0,), predicted_bytes=(10**9,), peak_bytes=(10**9,), achieved_gbs=3.5,
)  # fmt: skip

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


@for_cases
def test_results(num_cases, tmp_path):
    path = write_cell(tmp_path, _RESULT)
    text = path.read_text()
    # JSON is YAML, and quick to write.
    values = ["ok", "does_not_fit", [0.5], [], 2**40]
    documents = changed(st.just(yaml.safe_load(text)), ["speed", "a\nb"], values, most=1)
    files = by_weight((4, documents.map(json.dumps)), (4, _edited(text)), (1, st.text()))

    def read(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        warnings: list[str] = []
        results = read_results([tmp_path], warnings.append)
        if not results:
            raise InputError("; ".join(warnings))
        for result in results:
            _ = (result.tokens_per_second, result.spread, result.high_spread, result.roofline_fraction)
            assert is_finished(tmp_path, CELL, warnings.append) == (result.cell == CELL)
        assert all(warning.isprintable() for warning in warnings)

    outcomes = fuzz(num_cases, files, read)
    assert outcomes.accepted_share > 0.1
    assert outcomes.share("not YAML|cannot be read|no schema_version") < 0.7
    outcomes.assert_reached("not YAML|no schema_version|has schema version|lacks|unknown|status is|ms is".split("|"))
