import csv
import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from sweeps import result

from engine.bench import report
from engine.bench.report import build_rows, plot, print_table, write_csv
from engine.bench.results import Status
from engine.errors import InputError


def table(rows, width=140):
    stream = io.StringIO()
    print_table(rows, Console(file=stream, width=width))
    return stream.getvalue()


# ---- ratios


def test_ratios_to_the_baselines_at_the_same_point():
    rows = build_rows(
        [
            result("hf", 50),
            result("hydragen", 1000),
            result("hydragen_noshared", 200),
            result("noattention", 1250),
            result("hydragen", 600, batch_size=16),  # a point without baselines
        ]
    )
    found = {(r.result.cell.mode, r.result.cell.batch_size): r for r in rows}
    row = found["hydragen", 32]
    assert row.vs_noattention == pytest.approx(0.8)
    assert row.vs_noshared == pytest.approx(5)
    assert row.vs_hf == pytest.approx(20)
    assert found["noattention", 32].vs_noattention == 1
    assert found["hf", 32].vs_hf == 1
    alone = found["hydragen", 16]
    assert (alone.vs_noattention, alone.vs_noshared, alone.vs_hf) == (None, None, None)


def test_noattention_of_another_shared_length_is_the_ceiling():
    rows = build_rows([result("noattention", 1250), result("hydragen", 500, num_shared=16256)])
    assert rows[-1].vs_noattention == pytest.approx(0.4)
    # but that of the same shared length comes first
    same_length = [result(mode, speed, num_shared=4096) for mode, speed in (("noattention", 1000), ("hydragen", 500))]
    rows = build_rows([result("noattention", 1250), *same_length])
    assert [r.vs_noattention for r in rows if r.result.cell.mode == "hydragen"] == [pytest.approx(0.5)]


@pytest.mark.parametrize(
    "change",
    [
        {"sweep": "results/b"},
        {"model_name": "other"},
        {"env": {"dtype": "float32"}},
        {"env": {"device_name": "another CPU"}},
        {"env": {"world_size": 1}},
        {"num_unique": 5},
        {"batch_size": 64},
    ],
)
def test_no_ratio_to_what_is_not_comparable(change):
    rows = build_rows([result("hydragen"), result("noattention", **change), result("hydragen_noshared", **change)])
    (row,) = [r for r in rows if r.result.cell.mode == "hydragen"]
    assert (row.vs_noattention, row.vs_noshared) == (None, None)


def test_hf_runs_in_one_process_and_is_compared_all_the_same():
    rows = build_rows([result("hydragen", 1000), result("hf", 50, env={"world_size": 1})])
    assert rows[0].vs_hf == pytest.approx(20)


CPU = {"device": "cpu", "num_threads": 1}


@pytest.mark.parametrize(
    ("env", "ratio"),
    [
        ({"num_threads": 2}, 20),  # as many as both ranks together
        ({"num_threads": 1}, None),
        ({"num_threads": 8}, None),
        ({"num_threads": 8, "device": "cuda", "world_size": 2}, 20),  # threads decide nothing there
        ({"num_threads": 8, "device": "cuda"}, None),
    ],
)
def test_hf_is_compared_with_as_many_threads_or_devices_only(env, ratio):
    ours = CPU | {"world_size": 2, "device": env.get("device", "cpu")}
    rows = build_rows([result("hydragen", 1000, env=ours), result("hf", 50, env=CPU | {"world_size": 1} | env)])
    assert rows[0].vs_hf == (None if ratio is None else pytest.approx(ratio))
    assert rows[1].vs_hf == 1
    what = "1 device(s)" if "device" in env else f"{env['num_threads']} thread(s)"
    note = f"no ratio to hf where it ran with {what} and the mode with 2 in all"
    assert (note in table(rows)) == (ratio is None)


def test_a_baseline_that_did_not_run_gives_no_ratio():
    rows = build_rows([result("hydragen"), result("hf", status=Status.DOES_NOT_FIT)])
    assert [row.vs_hf for row in rows] == [None, None]


# ---- table


def test_table():
    rows = build_rows(
        [
            result("noattention", 1250),
            result("hydragen", 1000, prefill_ms=(1200.0, 1300.0, 1400.0), roofline_ms=16.0),
            result("hydragen", 1234567, batch_size=4096, noise=0.5),
            result("hydragen_noshared", status=Status.DOES_NOT_FIT, message="needs 97 GiB [a rank]"),
            result("hydragen_noshared", status=Status.OUT_OF_MEMORY, batch_size=64),
            result("hydragen", num_unique=1),
        ]
    )
    text = table(rows)
    lines = [line.split() for line in text.splitlines()]
    assert ["hydragen", "1,000", "0.80", "0.0%", "1,300.0", "50%"] in lines
    assert ["1024", "32", "noattention", "1,250", "1.00", "0.0%", "-", "-"] in lines
    assert any({"4096", "1,234,567", "!"} <= set(line) for line in lines)
    assert any({"hydragen_noshared", "does", "not", "fit"} <= set(line) for line in lines)
    assert any({"hydragen_noshared", "out", "of", "memory"} <= set(line) for line in lines)
    assert "! times vary by more than 10%" in text
    assert "hydragen_noshared/b32_s1024_u11.yaml: needs 97 GiB [a rank]" in text
    assert "one token" in text
    assert "llama-125m, 11 new tokens, bfloat16 on a CPU, 2 ranks, from results/a" in text


def test_table_shows_no_column_without_values():
    title, *lines = table(build_rows([result("hydragen")])).splitlines()
    assert "2 ranks" in title
    assert ["shared", "batch", "mode", "tokens/s", "spread"] in [line.split() for line in lines]
    both = build_rows([result("hydragen"), result("hydragen", batch_size=8, env={"world_size": 1})])
    assert "ranks tokens/s" in table(both)


def test_table_has_what_auto_chose():
    chosen = replace(result("auto"), choice="unshared")
    lines = [line.split() for line in table(build_rows([chosen, result("hydragen")])).splitlines()]
    assert any(line[-1:] == ["unshared"] and "auto" in line for line in lines)
    assert "choice" not in table(build_rows([result("hydragen")]))


def test_a_single_time_has_no_spread(tmp_path):
    once = replace(result("hydragen"), decode_ms=(420.0,))
    rows = build_rows([once, result("hydragen", batch_size=8)])
    spreads = {line.split()[1]: line.split()[-1] for line in table(rows).splitlines() if " hydragen " in line}
    assert spreads == {"32": "-", "8": "0.0%"}
    write_csv(rows, tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        assert {row["batch_size"]: row["spread"] for row in csv.DictReader(file)} == {"32": "", "8": "0.0"}


def test_table_fits_a_narrow_terminal():
    rows = build_rows([result("hydragen_noshared", 50, prefill_ms=(1200.0,), roofline_ms=16.0), result("noattention")])
    assert max(len(line) for line in table(rows, width=80).splitlines()[1:]) <= 80
    assert "hydragen_noshared" in table(rows, width=80)


# ---- CSV


def test_csv_holds_every_cell(tmp_path):
    path = tmp_path / "report.csv"
    results = [
        result("noattention", 1250),
        result("hydragen", 1000, prefill_ms=(7.0, 8.0, 9.5), peak_bytes=(5, 9), env={"versions": {"torch": "2.13.0"}}),
        result("hf", status=Status.DOES_NOT_FIT, message='needs "97" GiB, more than 80', predicted_bytes=(10, 11)),
    ]
    write_csv(build_rows(results), path)
    with path.open(newline="") as file:
        rows = {row["mode"]: row for row in csv.DictReader(file)}
    assert len(rows) == 3
    hydragen = rows["hydragen"]
    assert float(hydragen["tokens_per_second"]) == pytest.approx(1000)
    assert float(hydragen["vs_noattention"]) == pytest.approx(0.8)
    assert hydragen["vs_hf"] == ""
    assert (hydragen["prefill_ms"], hydragen["first_token_ms"], hydragen["decode_ms"]) == ("8.0", "100.0", "420.0")
    assert (hydragen["peak_bytes"], hydragen["torch"], hydragen["ranks"]) == ("9", "2.13.0", "2")
    assert (hydragen["sweep"], hydragen["model"], hydragen["status"]) == ("results/a", "llama-125m", "ok")
    assert (rows["hf"]["status"], rows["hf"]["tokens_per_second"]) == ("does_not_fit", "")
    assert (rows["hf"]["message"], rows["hf"]["predicted_bytes"]) == ('needs "97" GiB, more than 80', "11")
    assert set(report._csv_values(build_rows(results)[0])) == set(report._COLUMNS)


# ---- plot


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'root: pip install -e "\.\[plots\]"$'):
        plot(build_rows([result("hydragen")]), tmp_path / "report.png")
