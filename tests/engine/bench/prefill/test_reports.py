"""What the table, the CSV file and the plot say of prefill methods."""

import csv
import io

import pytest
import yaml
from rich.console import Console

from engine.bench.prefill.prefill_report import (
    build_prefill_rows,
    plot_prefill,
    print_prefill_tables,
    write_prefill_csv,
)
from engine.bench.prefill.prefill_results import PREFILL_FILES, PrefillPoint, PrefillResult
from engine.bench.result_files import Status

SPARSE = "a_shape:n_init=128:n_local=1024"


def result(prefill="dense", num_tokens=4096, ms=(400.0, 400.0, 400.0), density=(1.0, 1.0), **changes):
    environment = {"device": "cpu", "device_name": "a CPU", "dtype": "float32", "world_size": 2}
    fields = {
        "point": PrefillPoint(prefill, num_tokens),
        "status": Status.OK,
        "model_name": "models/small",
        "model_digest": "0123456789ab",
        "load_format": "auto",
        "prefill": prefill,
        "attention": "hydragen",
        "prompt": "random tokens (seed 0)",
        "prompt_digest": "",
        "seed": 0,
        "environment": environment | changes.pop("env", {}),
        "predicted_bytes": 2**30,
        "first_token_ms": ms,
        "first_token": 7,
        "density_by_layer": density,
        "peak_bytes": (2**30, 3 * 2**29),
        "run": "a",
    }
    return PrefillResult(**fields | changes)


def sparse(ms=(100.0, 160.0, 100.0), density=(0.1, 0.3), **changes):
    return result(SPARSE, ms=ms, density=density, **changes)


def failed(prefill, **changes):
    nothing = {"first_token": None, "peak_bytes": (), "run": ""}
    return result(prefill, ms=(), density=(), message="12 GB were asked for", **nothing | changes)


def lines(results):
    stream = io.StringIO()
    print_prefill_tables(build_prefill_rows(results), Console(file=stream, width=140))
    return [line.split() for line in stream.getvalue().splitlines()], stream.getvalue()


class TestFiles:
    def test_a_result_comes_back_as_it_was(self, tmp_path):
        PREFILL_FILES.write(tmp_path, sparse())
        assert PREFILL_FILES.read_all([tmp_path]) == [sparse()]
        assert (tmp_path / SPARSE / "4096.yaml").exists()

    @pytest.mark.parametrize(
        "changes",
        [{"first_token_ms": []}, {"density_by_layer": []}, {"density_by_layer": [1.1]}, {"first_token": None}],
    )
    def test_damaged(self, tmp_path, changes):
        path = PREFILL_FILES.write(tmp_path, sparse())
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
        warnings = []
        assert PREFILL_FILES.read_all([tmp_path], warnings.append) == []
        (warning,) = warnings
        assert "status is ok, but what it measured is missing or contradicts itself" in warning


class TestRatio:
    def ratio(self, *results):
        (row,) = [row for row in build_prefill_rows(results) if row.result.prefill == SPARSE]
        return row.vs_dense

    def test_is_that_of_the_rounds(self):
        """Median of 400/100, 200/160 and 900/100: not that of the medians, 4."""
        found = self.ratio(result(ms=(400.0, 200.0, 900.0)), sparse(ms=(200.0, 160.0, 100.0)))
        assert (found.value, found.same_run) == (2, True)

    def test_of_separate_runs_it_is_that_of_the_medians(self):
        found = self.ratio(result(ms=(400.0, 200.0, 900.0)), sparse(ms=(200.0, 160.0, 100.0), run="b"))
        assert (found.value, found.same_run) == (2.5, False)

    def test_dense_itself_has_none(self):
        assert [row.vs_dense for row in build_prefill_rows([result()])] == [None]

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_tokens": 2048},
            {"seed": 1},
            {"model_digest": "0123"},
            {"model_name": "models/large"},
            {"load_format": "dummy"},
            {"env": {"dtype": "bfloat16"}},
            {"env": {"world_size": 1}},
        ],
    )
    def test_only_with_the_same_prompt_and_setting(self, changes):
        assert self.ratio(result(**changes), sparse()) is None

    def test_none_where_dense_did_not_run(self):
        assert self.ratio(failed("dense", status=Status.DOES_NOT_FIT), sparse()) is None


class TestTable:
    def test_has_a_column_for_each_method(self):
        found, text = lines([sparse(), result(), result("block_sparse"), result(num_tokens=8192)])
        assert text.startswith("small, float32 on a CPU, 2 ranks: time to first token")
        heading = next(i for i, line in enumerate(found) if line[:1] == ["tokens"])
        assert found[heading - 2 : heading + 1] == [
            ["a_shape"],
            ["n_init=128"],
            ["tokens", "dense", "n_local=1024", "block_sparse"],
        ]
        start = found.index(["4,096", "ms", "400.0", "100.0", "400.0"])
        assert found[start + 1 : start + 5] == [
            ["spread", "0.0%", "36.0%", "!", "0.0%"],
            ["vs", "dense", "-", "4.00", "!", "1.00"],
            ["density", "100.0%", "20.0%", "100.0%"],
            ["peak", "GiB", "1.50", "1.50", "1.50"],
        ]
        assert found.index(["8,192", "ms", "400.0", "-", "-"]) > start
        assert "! times vary by more than 10%" in text and "~" not in text

    def test_separate_runs_are_marked(self):
        found, text = lines([result(), sparse(run="b")])
        assert ["vs", "dense", "-", "~4.00", "!"] in found
        assert "~ timed in separate runs" in text

    def test_what_did_not_run(self):
        found, text = lines([result(), failed(SPARSE, status=Status.OUT_OF_MEMORY)])
        assert ["4,096", "ms", "400.0", "out", "of", "memory"] in found
        assert f"{SPARSE}/4096.yaml: 12 GB were asked for" in text
        assert not any(line[:2] == ["vs", "dense"] for line in found)

    def test_a_setting_has_a_table_of_its_own(self):
        _, text = lines([result(), result(load_format="dummy"), result(env={"dtype": "bfloat16"})])
        assert text.count("time to first token") == 3
        assert "small with random weights, float32" in text and "small, bfloat16" in text


def test_csv(tmp_path):
    path = tmp_path / "prefill.csv"
    write_prefill_csv(
        build_prefill_rows([sparse(), result(), failed(SPARSE, num_tokens=8192, status="does_not_fit")]), path
    )
    dense, short, long = csv.DictReader(path.read_text().splitlines())
    assert [row["prefill"] for row in (dense, short, long)] == ["dense", SPARSE, SPARSE]
    assert (dense["vs_dense"], short["vs_dense"], short["vs_dense_same_run"]) == ("", "4.0", "True")
    assert (short["first_token_ms"], short["spread"], short["num_iters"]) == ("100.0", "0.36", "3")
    assert (short["density"], short["least_density"], short["most_density"]) == ("0.2", "0.1", "0.3")
    assert short["density_by_layer"] == "0.1 0.3"
    assert (short["peak_bytes"], short["num_tokens"], short["world_size"]) == (str(3 * 2**29), "4096", "2")
    assert (long["status"], long["first_token_ms"], long["message"]) == ("does_not_fit", "", "12 GB were asked for")


class TestPlot:
    @pytest.fixture
    def figures(self, monkeypatch):
        pytest.importorskip("matplotlib")
        from drawn import keep_figures

        return keep_figures(monkeypatch)

    def test_has_a_line_for_each_method(self, figures, tmp_path):
        results = [result(num_tokens=n, ms=(n / 10,)) for n in (4096, 2048)]
        results += [sparse(num_tokens=n, ms=(n / 20,)) for n in (2048, 4096)]
        results.append(failed("block_sparse", status=Status.DOES_NOT_FIT))
        assert plot_prefill(build_prefill_rows(results), tmp_path / "prefill.png")
        assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")
        (axes,) = figures[0].axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", SPARSE]
        assert [line.get_xdata().tolist() for line in axes.get_lines()] == [[2048, 4096]] * 2
        assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[204.8, 409.6], [102.4, 204.8]]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_ylabel() == "time to first token (ms)"

    def test_methods_of_one_name_are_told_apart(self, figures, tmp_path):
        results = [result("a_shape", num_tokens=4096), sparse()]
        assert plot_prefill(build_prefill_rows(results), tmp_path / "prefill.png")
        first, second = figures[0].axes[0].get_lines()
        assert first.get_color() == second.get_color() and first.get_linestyle() != second.get_linestyle()

    def test_nothing_to_draw(self):
        assert not plot_prefill(build_prefill_rows([failed("dense", status=Status.DOES_NOT_FIT)]), None)
