"""The model that ships answers from the document, alike with and without sharing, and without attention by chance."""

import pytest

from engine.bench.environment import Execution
from engine.bench.modes import ModelOptions
from engine.bench.needles.needle_report import build_needle_rows
from engine.bench.needles.needle_results import NEEDLE_FILES
from engine.bench.needles.passkey_grid import PasskeyGrid
from engine.bench.needles.passkey_results import PASSKEY_FILES
from engine.bench.needles.run import run_needles
from engine.bench.needles.settings import SHIPPED_MODEL, Settings
from engine.cli import make_console
from engine.distributed import TPGroup

METHODS = ("hydragen", "hydragen_noshared", "noattention")


@pytest.fixture(scope="module")
def outdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("needles")
    settings = Settings(
        outdir=path,
        save_name=None,
        model=ModelOptions(str(SHIPPED_MODEL), dtype="float32"),
        attention=METHODS,
        question_counts=(64,),
        num_characters=6000,
        num_few_shot=5,
        num_iters=1,
        num_warmup=0,
        measure_first_token=True,
        grid=PasskeyGrid.parse("600words_2x3x2_7digits"),
        execution=Execution(),
    )
    run_needles(settings, TPGroup(), make_console(quiet=True))
    return path


def test_needles(outdir):
    rows = {row.result.attention: row for row in build_needle_rows(NEEDLE_FILES.read_all([outdir]))}
    assert set(rows) == set(METHODS)
    assert rows["hydragen"].result.accuracy.share >= 0.95
    assert rows["hydragen"].same_answers == 64
    # Without attention nothing tells one question from another: one colour for all, of 76.
    assert rows["noattention"].result.accuracy.share <= 0.1


def test_passkeys(outdir):
    found = {(r.attention, r.length.num_words): r for r in PASSKEY_FILES.read_all([outdir])}
    assert set(found) == {(method, words) for method in METHODS for words in (512, 600)}
    for (method, _), result in found.items():
        assert result.exact.share == (0 if method == "noattention" else 1)
