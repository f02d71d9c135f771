import csv
import io

import pytest
from rich.console import Console
from rows import row_result

from engine.bench.micro.micro_report import build_micro_rows
from engine.bench.micro.sparse_report import (
    build_sparse_rows,
    plot_sparse,
    print_sparse_tables,
    sparse_findings,
    write_sparse_csv,
)
from engine.bench.result_files import Status

WINDOW, LINES = "a_shape:n_local=64", "vertical_slash:num_vertical=5:num_slash=101"


def result(method, operation="attention", times_ms=(1.0, 1.0, 1.0), **changes):
    sizes = {"batch_size": 1, "num_shared": 0, "num_unique": 8192} | changes
    return row_result("prefill", times_ms, operation, method=method, **sizes)


def results(num_unique=8192, **changes):
    """Dense attention takes 10 ms; a tenth of it 2 ms, with an index that takes 0.5 ms."""
    changes |= {"num_unique": num_unique}
    return [
        result("dense", times_ms=(10.0, 10.0, 20.0), density=1.0, **changes),
        result(WINDOW, times_ms=(2.0, 2.0, 4.0), density=0.1, **changes),
        result(WINDOW, "index", times_ms=(0.5, 0.5, 1.0), density=0.1, **changes),
    ]


def table(found, width=140):
    stream = io.StringIO()
    print_sparse_tables(build_sparse_rows(found), Console(file=stream, width=width))
    return stream.getvalue()


class TestRows:
    def test_ratios_are_of_rounds(self):
        dense, window = build_sparse_rows(results())
        assert (dense.attention_of_dense, dense.index, dense.vs_dense, dense.over_share) == (None, None, None, None)
        assert (window.attention_of_dense.value, window.attention_of_dense.spread) == (0.2, 0)
        assert window.over_share == pytest.approx(2)
        assert window.index_of_dense.value == 0.05
        assert window.vs_dense.value == 4 and window.vs_dense.same_run

    def test_methods_come_as_the_registry_has_them(self):
        found = [result(LINES), *results(), result("dense", num_shared=512)]
        rows = build_sparse_rows(found)
        assert [(row.sizes.num_shared, row.method) for row in rows] == [
            (0, "dense"), (0, WINDOW), (0, LINES), (512, "dense")
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "changes", [{"num_shared": 64}, {"num_heads": 16}, {"backend": "aten"}, {"env": {"dtype": "float32"}}]
    )
    def test_no_ratio_to_what_is_not_comparable(self, changes):
        rows = build_sparse_rows([*results()[1:], result("dense", **changes)])
        assert all(row.vs_dense is None and row.over_share is None for row in rows)

    def test_of_separate_runs(self):
        dense, *others = results()
        rows = build_sparse_rows([result("dense", times_ms=(10.0, 10.0), run="b"), *others])
        assert [row.vs_dense.text for row in rows if row.vs_dense] == ["~4.00 !"]

    def test_other_modes_have_reports_of_their_own(self):
        found = [*results(), row_result("hydragen")]
        assert [row.method for row in build_sparse_rows(found)] == ["dense", WINDOW]
        assert [row.result.row.mode for row in build_micro_rows(found)] == ["hydragen"]


class TestTable:
    def test_a_line_for_each_method(self):
        text = table(results(num_flops=10**10))
        assert text.splitlines()[0] == (
            "Attention of one layer where prompts are read, 8/1 heads of 128, bfloat16 on a CPU, from results/a"
        )
        lines = [line.split() for line in text.splitlines()]
        # 10^10 FLOPs in 2 ms: 5 TFLOP/s, where large products get 2.
        assert ["a_shape", "n_local=64", "10.0%", "2", "60.0%", "!", "5.000", "250%"] == [
            part for line in lines if "a_shape" in line for part in line[:8]
        ]
        assert [line[-5:] for line in lines if "a_shape" in line] == [["0.20", "2.00", "0.5", "0.050", "4.00"]]
        assert "! times vary by more than 10%" in text and "~" not in text

    def test_heads_and_backends_have_tables(self):
        text = table([*results(), *results(num_heads=16), *results(backend="aten")])
        assert text.count("Attention of one layer where") == 3
        assert "8/1 heads of 128, by aten, " in text and "16/1 heads of 128, bfloat16" in text

    def test_what_does_not_fit_and_long_names(self):
        failed = {"status": Status.DOES_NOT_FIT, "message": "needs 97 GiB", "times_ms": ()}
        long = f"{LINES}0000000:dense_below=12345678"
        text = table([*results(), result(long, **failed), result(long, "index", **failed)])
        assert text.count("does not fit") == 2 and max(map(len, text.splitlines()[1:-2])) <= 140
        assert f"prefill/b1_s0_u8192_q8_k1_d128_{long}_index.yaml: needs 97 GiB" in text

    def test_findings(self):
        assert sparse_findings(build_sparse_rows(results())) == [
            "batch 1, shared 0, unique 8192, 8/1 heads of 128, a_shape:n_local=64: 10.0% of dense attention's work in "
            "0.20 (spread 0%) of its time, the index in 500 us; with it 4.00 (spread 0%) times as fast"
        ]


class TestFiles:
    def test_csv(self, tmp_path):
        write_sparse_csv(build_sparse_rows(results()), tmp_path / "a.csv")
        with (tmp_path / "a.csv").open(newline="") as file:
            dense, window = csv.DictReader(file)
        assert (dense["method"], dense["median_ms"], dense["index_median_ms"]) == ("dense", "10.0", "")
        names = "method density median_ms attention_of_dense over_share index_median_ms index_of_dense vs_dense"
        assert [window[name] for name in names.split()] == [
            WINDOW, "0.1", "2.0", "0.2", "2.0", "0.5", "0.05", "4.0"
        ]  # fmt: skip

    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib", reason="plots are an extra")
        found = [*results(), *results(16384), *results(64, num_shared=4096)]
        assert plot_sparse(build_sparse_rows(found), tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_nothing_to_plot(self, tmp_path):
        rows = build_sparse_rows([result("dense", times_ms=(), status=Status.OUT_OF_MEMORY)])
        assert not plot_sparse(rows, tmp_path / "a.png") and not (tmp_path / "a.png").exists()
