"""How well the model that ships does on what it never saw, at the length of its longest training documents and twice
that: what docs/retrieval-model.md promises."""

import pytest
from asking import settings

from engine.bench.needles.accuracy import NOTHING_ASKED
from engine.bench.needles.needle_results import NEEDLE_FILES
from engine.bench.needles.passkey_results import PASSKEY_FILES
from engine.bench.needles.run import run_needles
from engine.cli import make_console
from engine.distributed import TPGroup

pytestmark = pytest.mark.slow

# Characters, words, and tokens that those are at least; the least lower bound.
LENGTHS = [(27_000, 7_000, 8_192, 0.95), (66_000, 14_000, 16_384, 0.85)]
SEEDS = (11, 12, 13)


@pytest.mark.parametrize(("characters", "words", "tokens", "least"), LENGTHS)
def test_needles(tmp_path, characters, words, tokens, least):
    found = NOTHING_ASKED
    for seed in SEEDS:
        changes = {"question_counts": (256,), "document_lengths": (characters,), "num_few_shot": 5, "seed": seed}
        run_needles(settings(tmp_path / str(seed), **changes), TPGroup(), make_console(quiet=True))
        (result,) = NEEDLE_FILES.read_all([tmp_path / str(seed)])
        assert result.num_document_tokens >= tokens
        found += result.accuracy
    assert found.num_asked == 3 * 256
    assert found.interval[0] >= least, found.text


@pytest.mark.parametrize(("characters", "words", "tokens", "least"), LENGTHS)
def test_passkeys(tmp_path, characters, words, tokens, least):
    grid = f"{words}words_1x10x20_7digits"
    run_needles(settings(tmp_path, grid=grid, seed=SEEDS[0]), TPGroup(), make_console(quiet=True))
    (result,) = PASSKEY_FILES.read_all([tmp_path])
    assert result.num_tokens >= tokens and result.exact.num_asked == 200
    assert result.exact.interval[0] >= least, result.exact.text
