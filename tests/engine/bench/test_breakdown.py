import io

import pytest
import torch
import yaml
from rich.console import Console

from engine.bench.breakdown import Breakdown, matmul_alone_ms, print_breakdown, run_breakdown
from engine.bench.modes import ModelOptions
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.loader import load_model

TIMES = dict(
    batch_size=64, num_shared=4096, num_unique=16, matmul_alone_ms=10.0, prefix_alone_ms=20.0, noattention_ms=15.0,
    hydragen_ms=40.0, noshared_ms=115.0, hf_ms=800.0, read_gbs=30.0, kv_bytes=2 * 10**9,
)  # fmt: skip


def test_what_times_are_held_against():
    row = Breakdown(**TIMES)
    assert row.noattention_ratio == 1.5  # 15 / 10
    assert row.attention_ratio == 1.25  # (40 - 15) / 20
    assert row.hf_ratio == 20.0  # 800 / 40
    assert row.noshared_gbs == pytest.approx(20.0)  # 2 GB in 115 - 15 ms


def test_a_mode_that_was_not_run_has_no_ratio():
    row = Breakdown(**TIMES | dict(noattention_ms=None, hf_ms=None))
    assert row.noattention_ratio is row.attention_ratio is row.hf_ratio is row.noshared_gbs is None
    out = io.StringIO()
    print_breakdown([row], Console(file=out, width=140))
    assert "-" in out.getvalue() and "40.0" in out.getvalue()


def test_one_run_measures_every_part(tmp_path):
    group, quiet = TPGroup(), Console(quiet=True)
    model = ModelOptions("tiny", load_format="dummy", dtype="float32")
    modes = ["noattention", "hydragen", "hydragen_noshared"]
    rows = run_breakdown(tmp_path, 2, [8, 16], 4, model, modes, 1, group, quiet)
    assert [row.num_shared for row in rows] == [8, 16]
    for row in rows:
        assert row.matmul_alone_ms > 0 and row.prefix_alone_ms > 0 and row.read_gbs > 0 and row.hf_ms is None
        assert row.kv_bytes == 2 * 2 * 2 * 16 * 2 * (row.num_shared + 2) * 4  # K and V, layers, heads, D, batch, keys
    written = yaml.safe_load((tmp_path / "breakdown.yaml").read_text())
    assert [step["num_shared"] for step in written["steps"]] == [8, 16] and "versions" in written["environment"]
    assert len(list(tmp_path.glob("*/b2_*.yaml"))) == 6


def test_the_products_alone_are_all_of_the_step(monkeypatch):
    """Every weight but the embedding: four a layer, timed as one layer's, and the head's."""
    model = load_model("tiny", TPGroup(), load_format="dummy").model
    seen = []
    monkeypatch.setattr("engine.bench.breakdown.linear", lambda x, w: seen.append((tuple(x.shape), tuple(w.shape))))
    assert matmul_alone_ms(model, 5, torch.device("cpu")) > 0
    assert set(seen) == {((5, 64), (128, 64)), ((5, 64), (64, 64)), ((5, 64), (352, 64)), ((5, 176), (64, 176)),
                         ((5, 64), (512, 64))}  # fmt: skip


def test_several_ranks_are_refused(tmp_path):
    model = ModelOptions("tiny", load_format="dummy")
    with pytest.raises(InputError, match="one process, not in 2"):
        run_breakdown(tmp_path, 2, [8], 4, model, ["hydragen"], 1, TPGroup(0, 2), Console(quiet=True))
