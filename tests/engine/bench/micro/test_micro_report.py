import csv
import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from rows import PARTS_OF_A_STEP, operation_result, row_result

from engine.bench.micro.micro_report import (
    build_micro_rows,
    plot_micro,
    print_micro_tables,
    write_micro_csv,
)
from engine.bench.result_files import Status
from engine.errors import InputError


def table(results, width=140):
    stream = io.StringIO()
    print_micro_tables(build_micro_rows(results), Console(file=stream, width=width))
    return stream.getvalue()


def lines(text):
    return [line.split() for line in text.splitlines()]


class TestRows:
    def test_the_baseline_is_at_the_same_sizes(self):
        rows = build_micro_rows(
            [row_result("hydragen"), row_result("base", (3, 3, 3)), row_result("hydragen", batch_size=8)]
        )
        assert [(r.result.row.mode, r.vs_base and r.vs_base.value) for r in rows] == [
            ("hydragen", None), ("base", 1), ("hydragen", 3)
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "changes",
        [
            {"sweep": "results/b"},
            {"env": {"device_name": "another"}},
            {"env": {"dtype": "float32"}},
            {"num_shared": 2048},
            {"unique_seq_len": 1},
            {"num_heads": 16},
            {"backend": "aten"},
        ],
    )
    def test_no_ratio_to_what_is_not_comparable(self, changes):
        rows = build_micro_rows([row_result("hydragen"), row_result("base", **changes)])
        assert [row.vs_base for row in rows if row.result.row.mode == "hydragen"] == [None]

    def test_whole_attention_among_operations(self):
        rows = build_micro_rows(
            row_result("operations", times, operation)
            for operation, times in (("swiglu", (9,)), ("hydragen", (1,)), ("base", (5,)))
        )
        assert [(r.result.row.operation, r.vs_base and r.vs_base.value) for r in rows] == [
            ("base", 1), ("hydragen", 5), ("swiglu", None)
        ]  # fmt: skip


class TestChoices:
    def rows(self, base, hydragen, auto, **changes):
        kinds = (("base", base, None), ("hydragen", hydragen, None), ("auto", auto, "shared"))
        return [replace(row_result(mode, times, **changes), choice=choice) for mode, times, choice in kinds]

    def test_auto_is_held_against_the_better_one(self):
        *_, auto = build_micro_rows(self.rows((4, 8), (2, 4), (3, 6)))
        assert auto.result.row.mode == "auto" and auto.vs_best.value == 1.5
        for row in build_micro_rows(self.rows((1, 2), (2, 4), (2, 4))):
            assert row.vs_best is None or row.vs_best.value == 2

    def test_not_where_one_of_them_is_missing(self):
        assert all(row.vs_best is None for row in build_micro_rows(self.rows((4, 8), (2, 4), (3, 6))[1:]))

    def test_the_table_says_how_far_it_is_at_most(self):
        good = self.rows((4, 4), (2, 2), (2.1, 2.1))
        text = table(good)
        assert "auto takes 1.05 times as long as the best in the middle of 1 sizes" in text
        assert "and at most 1.05 (spread 0%), at batch" in text
        assert "beyond 10% and the spread: none" in text
        bad = [replace(r, row=replace(r.row, batch_size=7)) for r in self.rows((4, 4), (2, 2), (3, 3))]
        assert "beyond 10% and the spread: 1: batch 7, shared" in table([*good, *bad])
        noisy = self.rows((4, 4, 4), (2, 2, 2), (2, 3, 8))
        assert "and the spread: none" in table(noisy)


class TestTable:
    def test_modes(self):
        text = table(
            [
                row_result("base", (4, 4, 4), num_bytes=10**8),
                row_result("hydragen", (0.5, 0.5, 0.5)),
                row_result("hydragen", (1, 2, 3), num_unique=0),
                row_result("base", (), batch_size=4096, status=Status.DOES_NOT_FIT, message="needs 97 GiB [of 80]"),
            ]
        )
        assert text.splitlines()[0] == "Attention of one layer in a decode step, bfloat16 on a CPU, from results/a"
        # 10^8 bytes in 4 ms: 25 GB/s; at 40 GB/s they take 2.5 ms.
        base = ["32", "1024", "64", "8/1", "128", "base", "4", "0.0%", "25.0", "0.250", "2.5", "62%", "1.00"]
        assert base in lines(text)
        assert ["hydragen", "0.5", "0.0%", "20.0", "2.000", "0.5", "100%", "8.00"] in lines(text)
        assert any({"60.0%", "!"} <= set(line) for line in lines(text))
        assert any({"4096", "does", "not", "fit"} <= set(line) for line in lines(text))
        assert "base/b4096_s1024_u64_q8_k1_d128.yaml: needs 97 GiB [of 80]" in text
        assert "! times vary by more than 10%" in text
        assert "~" not in text and "choice" not in text

    def test_separate_runs_and_choices(self):
        text = table([row_result("base", run="b"), row_result("auto", choice="shared")])
        assert "~ timed in separate runs" in text
        assert any("shared" in line[1:] and "auto" in line for line in lines(text))

    def test_operations(self):
        whole = operation_result("hydragen", 3.3, backends=("simd", "simd"))
        bounds = [operation_result("base", 40.0), operation_result("memory_read", 30.0)]
        text = table([whole, *PARTS_OF_A_STEP, *bounds])
        assert text.splitlines()[0].startswith("Operations of a decode step, bfloat16 on a CPU")
        order = [line.split()[-8 if "base" in line else 0] for line in text.splitlines() if "attention_" in line]
        assert len(order) == 7  # four rows, the sum, and a line for each of the two with its backends
        assert "(hidden size 1024, MLP 2816):" in text
        expected = "hydragen takes 1.10 (spread -) times as long as the best calls of its parts: attention_shared simd"
        assert expected in text
        assert "base moves its bytes at 0.75 (spread -) of the rate at which memory_read does" in text

    def test_fits_a_file(self):
        results = [row_result(mode, (1, 2, 1000), num_shared=10**6, num_unique=10**6) for mode in ("base", "hydragen")]
        assert max(map(len, table(results).splitlines())) <= 140


class TestCsv:
    def test_holds_every_row(self, tmp_path):
        results = [
            row_result("base", (4, 4, 4), backends=("simd",)),
            row_result("hydragen", (2.0, 2.0, 2.0), env={"versions": {"torch": "2.13.0"}}, backends=("simd", "aten")),
            operation_result("swiglu", 1.0, hidden_size=1024),
            row_result("base", (), batch_size=64, status=Status.DOES_NOT_FIT, message='needs "97" GiB, more'),
        ]
        write_micro_csv(build_micro_rows(results), tmp_path / "a.csv")
        with (tmp_path / "a.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found = {(row["mode"], row["batch_size"], row["operation"]): row for row in rows}
        assert len(found) == len(rows) == 4
        hydragen = found["hydragen", "32", ""]
        assert [hydragen[name] for name in ("median_ms", "vs_base", "vs_base_same_run", "num_iters", "backends")] == [
            "2.0", "2.0", "True", "3", "simd aten"
        ]  # fmt: skip
        assert [hydragen[name] for name in ("torch", "achieved_gbs", "roofline_ms")] == ["2.13.0", "5.0", "0.5"]
        assert found["operations", "32", "swiglu"]["hidden_size"] == "1024"
        failed = found["base", "64", ""]
        assert (failed["median_ms"], failed["vs_base"], failed["message"]) == ("", "", 'needs "97" GiB, more')


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="plotting needs matplotlib"):
        plot_micro(build_micro_rows([row_result()]), tmp_path / "a.png")


def test_nothing_to_plot(tmp_path):
    rows = build_micro_rows([*PARTS_OF_A_STEP, row_result("base", (), status=Status.OUT_OF_MEMORY)])
    assert not plot_micro(rows, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
