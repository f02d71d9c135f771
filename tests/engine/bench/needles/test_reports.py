"""What the tables, the CSV files and the plots say of results."""

import csv
import io

import pytest
import yaml
from asked import needles_result, passkey_result, write_needles, write_passkeys
from rich.console import Console

from engine.bench.needles.needle_report import (
    build_needle_rows,
    most_questions,
    plot_needles,
    print_needle_tables,
    write_needle_csv,
)
from engine.bench.needles.needle_results import NEEDLE_FILES
from engine.bench.needles.passkey_report import passkey_grids, plot_passkeys, print_passkey_tables, write_passkey_csv
from engine.bench.needles.passkey_results import PASSKEY_FILES
from engine.bench.result_files import Status


def printed(show, rows):
    stream = io.StringIO()
    show(rows, Console(file=stream, width=140))
    return stream.getvalue()


def lines(text):
    return [line.split() for line in text.splitlines()]


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


class TestFiles:
    def test_a_result_comes_back_as_it_was(self, tmp_path):
        needles, passkeys = needles_result(), passkey_result()
        write_needles(tmp_path, needles)
        write_passkeys(tmp_path, passkeys)
        assert NEEDLE_FILES.read_all([tmp_path]) == [needles]
        assert PASSKEY_FILES.read_all([tmp_path]) == [passkeys]
        assert (tmp_path / "hydragen" / "3000c_20qs.yaml").exists()
        assert (tmp_path / "hydragen" / "passkey_w512.yaml").exists()

    @pytest.mark.parametrize(
        "changes",
        [
            {"answer_ms": []},
            {"right_by_depth": []},
            {"right_by_depth": [3] * 10},
            {"asked_by_depth": [2] * 9},
            {"right_by_depth": [0] * 10, "asked_by_depth": [0] * 10},
        ],
    )
    def test_damaged_needles(self, tmp_path, changes):
        write_needles(tmp_path, needles_result())
        self.damage(tmp_path / "hydragen" / "3000c_20qs.yaml", changes, NEEDLE_FILES)

    @pytest.mark.parametrize(
        "changes", [{"exact_by_depth": [2, 2]}, {"exact_by_depth": [3, 2, 2]}, {"num_repeats": 0}, {"depths": []}]
    )
    def test_damaged_passkeys(self, tmp_path, changes):
        write_passkeys(tmp_path, passkey_result())
        self.damage(tmp_path / "hydragen" / "passkey_w512.yaml", changes, PASSKEY_FILES)

    def damage(self, path, changes, files):
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
        warnings = []
        assert files.read_all([path.parents[1]], warnings.append) == []
        (warning,) = warnings
        assert "status is ok, but what it measured is missing or contradicts itself" in warning


class TestComparison:
    def rows(self, tmp_path, *results, token_ids=None):
        for result in results:
            write_needles(tmp_path, result, (token_ids or {}).get(result.attention))
        return {row.result.attention: row for row in build_needle_rows(NEEDLE_FILES.read_all([tmp_path]))}

    def test_with_the_baseline(self, tmp_path):
        rows = self.rows(tmp_path, needles_result(), needles_result("hydragen_noshared", answer_ms=(100.0,) * 3))
        assert rows["hydragen"].vs_baseline.value == 3
        assert rows["hydragen"].vs_baseline.same_run
        assert rows["hydragen"].same_answers == 20
        assert rows["hydragen_noshared"].vs_baseline is None and rows["hydragen_noshared"].same_answers is None

    def test_answers_are_compared_token_by_token(self, tmp_path):
        other = [[1, 2]] * 18 + [[1, 3], [1, 2, 3]]
        rows = self.rows(
            tmp_path, needles_result(), needles_result("hydragen_noshared"), token_ids={"hydragen_noshared": other}
        )
        assert rows["hydragen"].same_answers == 18

    @pytest.mark.parametrize(
        "changes",
        [
            {"tokens": 1001},
            {"num_questions": 10, "num_right": 9},
            {"seed": 1},
            {"names": "unseen"},
            {"haystack": "book.txt"},
            {"haystack_digest": "0123"},
            {"model_digest": "0123"},
            {"env": {"dtype": "bfloat16"}},
            {"model_name": "models/large"},
            {"num_few_shot": 0},
        ],
    )
    def test_only_with_what_was_asked_the_same(self, tmp_path, changes):
        rows = self.rows(tmp_path, needles_result(), needles_result("hydragen_noshared", **changes))
        assert rows["hydragen"].vs_baseline is None

    def test_separate_runs(self, tmp_path):
        rows = self.rows(tmp_path, needles_result(), needles_result("hydragen_noshared", run="b"))
        assert not rows["hydragen"].vs_baseline.same_run

    def test_without_the_first_tokens_times_there_is_no_ratio(self, tmp_path):
        rows = self.rows(tmp_path, needles_result(first_token_ms=()), needles_result("hydragen_noshared"))
        assert rows["hydragen"].vs_baseline is None and rows["hydragen"].same_answers == 20

    def test_lost_answers(self, tmp_path):
        write_needles(tmp_path, needles_result())
        write_needles(tmp_path, needles_result("hydragen_noshared"))
        (tmp_path / "hydragen" / "3000c_20qs.answers.jsonl").write_text("{")
        (row,) = [row for row in build_needle_rows(NEEDLE_FILES.read_all([tmp_path])) if row.vs_baseline]
        assert row.same_answers is None


class TestNeedleTables:
    def test_of_two_methods(self, tmp_path):
        write_needles(tmp_path, needles_result())
        write_needles(tmp_path, needles_result("hydragen_noshared", num_right=20, answer_ms=(100.0, 160.0, 100.0)))
        text = printed(print_needle_tables, build_needle_rows(NEEDLE_FILES.read_all([tmp_path])))
        assert text.startswith(
            "small, float32 on a CPU, 2 ranks: needles (seen names) in generated prose (seed 0), from "
        )
        found = lines(text)
        baseline = ["1,000", "20", "hydragen_noshared", "100.0%", "(83.9-100.0)", "-", "200.0", "10.0", "90.0"]
        assert [line[:9] for line in found].count(baseline) == 1
        assert [
            "hydragen", "95.0%", "(76.4-99.1)", "20/20", "200.0", "10.0", "30.0", "3.00", "!", "0.0%", "2"
        ] in found  # fmt: skip
        assert ["1,000", "20", "hydragen", "1/2", *["2/2"] * 9] in found
        assert "! times vary by more than 10%" in text
        assert "~" not in text

    def test_columns_that_say_nothing_are_left_out(self):
        text = printed(print_needle_tables, build_needle_rows([needles_result(first_token_ms=())]))
        assert "noshared" not in text and "first" not in text and "at once" not in text
        text = printed(print_needle_tables, build_needle_rows([needles_result(num_at_once=8)]))
        assert "at once" in text

    def test_sparse_prefill_beside_dense(self, tmp_path):
        sparse = needles_result(
            name="sparse", density=(0.1, 0.3), env={"prefill": "a_shape:n_init=4"}, answer_ms=(20.0,) * 3
        )
        streaming = needles_result("streaming:n_init=4", name="streaming")
        rows = build_needle_rows([needles_result(), sparse, streaming, needles_result("hydragen_noshared")])
        compared = {row.result.questions.name for row in rows if row.vs_baseline is not None}
        assert compared == {"hydragen", "streaming"}  # the baseline read its document with all of attention
        text = printed(print_needle_tables, rows)
        times = [line for line in lines(text) if any(word.startswith("(") for word in line)]
        for name, density in (("hydragen", "100.0%"), ("sparse", "20.0%"), ("streaming", "-")):
            (row,) = [line for line in times if name in line]
            assert row[row.index(name) + 1] == density
        assert "\nsparse: prefill a_shape:n_init=4\n" in text
        path = tmp_path / "needles.csv"
        write_needle_csv(rows, path)
        values = {row["name"]: (row["prefill"], row["mean_density"]) for row in read_csv(path)}
        assert values == {
            "hydragen": ("dense", "1.0"), "hydragen_noshared": ("dense", "1.0"),
            "sparse": ("a_shape:n_init=4", "0.2"), "streaming": ("dense", ""),
        }  # fmt: skip

    def test_what_did_not_run(self):
        failed = needles_result(
            status=Status.OUT_OF_MEMORY,
            message="12 GB were asked for",
            **{name: () for name in ("right_by_depth", "asked_by_depth", "prefill_ms", "answer_ms", "first_token_ms")},
        )
        text = printed(print_needle_tables, build_needle_rows([failed]))
        assert ["1,000", "20", "hydragen", "out", "of", "memory"] in [line[:6] for line in lines(text)]
        assert "hydragen/3000c_20qs.yaml: 12 GB were asked for" in text
        assert not plot_needles(build_needle_rows([failed]), None)

    def test_csv(self, tmp_path):
        write_needles(tmp_path, needles_result(tokens=2000))
        write_needles(tmp_path, needles_result())
        path = tmp_path / "needles.csv"
        write_needle_csv(build_needle_rows(NEEDLE_FILES.read_all([tmp_path])), path)
        first, second = read_csv(path)
        assert (first["num_document_tokens"], second["num_document_tokens"]) == ("1000", "2000")
        assert (first["accuracy"], first["accuracy_depth_0"], first["accuracy_depth_9"]) == ("0.95", "0.5", "1.0")
        assert (first["asked_depth_0"], first["asked_depth_9"]) == ("2", "2")
        low, high = (float(first[f"accuracy_{end}_depth_0"]) for end in ("low", "high"))
        assert (low, high) == (pytest.approx(0.0945, abs=1e-4), pytest.approx(0.9055, abs=1e-4))
        assert (first["answer_ms"], first["decode_ms"], first["ms_per_question"]) == ("40.0", "30.0", "2.0")
        assert (first["vs_noshared"], first["world_size"], first["message"]) == ("", "2", "")

    def test_most_questions(self):
        results = [needles_result(num_questions=n, num_right=n, tokens=t) for n in (20, 10) for t in (2000, 1000)]
        found = [(r.num_document_tokens, r.questions.num_questions) for r in most_questions(results)]
        assert found == [(1000, 20), (2000, 20)]


class TestPasskeyTables:
    RESULTS = (passkey_result(1024, exact=(0, 2, 2)), passkey_result(512))

    def test_of_two_lengths(self):
        text = printed(print_passkey_tables, self.RESULTS)
        found = lines(text)
        assert ["512", "612", "100%", "100%", "50%", "83.3%", "(43.6-97.0)", "91.7%", "1.5"] in found
        assert ["1024", "1124", "0%", "100%", "100%", "66.7%", "(30.0-90.3)", "83.3%", "1.5"] in found
        assert ["all", "50%", "100%", "75%", "75.0%", "(46.8-91.1)", "87.5%"] in found
        assert "all 2 lengths, 512 to 1024 words: exact 75.0% (46.8-91.1), partial 87.5%" in text

    def test_what_did_not_run_is_in_no_sum(self):
        failed = passkey_result(2048, exact=(), partial_by_depth=(), status=Status.DOES_NOT_FIT)
        found = lines(printed(print_passkey_tables, [*self.RESULTS, failed]))
        assert ["all", "50%", "100%", "75%", "75.0%", "(46.8-91.1)", "87.5%"] in found

    def test_texts_and_models_of_one_name_have_a_table_each(self):
        results = [passkey_result(), passkey_result(1024, haystack_digest="b"), passkey_result(700, model_digest="c")]
        assert [[r.length.num_words for r in grid] for grid in passkey_grids(results)] == [[512], [1024], [700]]

    def test_runs_have_a_table_each(self):
        results = [*self.RESULTS, passkey_result(name="noattention"), passkey_result(512, env={"dtype": "bfloat16"})]
        assert [[r.length.num_words for r in grid] for grid in passkey_grids(results)] == [[512], [512, 1024], [512]]

    def test_what_did_not_run(self):
        failed = passkey_result(
            2048, exact=(), partial_by_depth=(), status=Status.OUT_OF_MEMORY, message="12 GB were asked for"
        )
        text = printed(print_passkey_tables, [*self.RESULTS, failed])
        assert ["2048", "2148", "-", "-", "-", "out", "of", "memory", "-", "-"] in lines(text)
        assert "hydragen/passkey_w2048.yaml: 12 GB were asked for" in text
        assert not plot_passkeys([failed], None)

    def test_csv(self, tmp_path):
        path, names = tmp_path / "passkey.csv", ("depth", "exact", "num_repeats")
        write_passkey_csv(self.RESULTS, path)
        found = [
            (
                row["num_words"],
                *(row[name] if row[name] == "all" else pytest.approx(float(row[name])) for name in names),
            )
            for row in read_csv(path)
        ]
        assert found == [
            ("512", 0, 1, 2), ("512", 0.5, 1, 2), ("512", 1, 0.5, 2), ("512", "all", 5 / 6, 6),
            ("1024", 0, 0, 2), ("1024", 0.5, 1, 2), ("1024", 1, 1, 2), ("1024", "all", 4 / 6, 6),
            ("all", 0, 0.5, 4), ("all", 0.5, 1, 4), ("all", 1, 0.75, 4), ("all", "all", 0.75, 12),
        ]  # fmt: skip


class TestPlots:
    @pytest.fixture
    def figures(self, monkeypatch):
        pytest.importorskip("matplotlib")
        from drawn import keep_figures

        return keep_figures(monkeypatch)

    def test_needles(self, figures, tmp_path):
        results = [
            needles_result(attention, num_questions=n, num_right=n - wrong, tokens=tokens)
            for attention, wrong in (("hydragen", 1), ("hydragen_noshared", 0))
            for n in (10, 20)
            for tokens in (1000, 2000)
        ]
        assert plot_needles(build_needle_rows(results), tmp_path / "needles.png")
        assert (tmp_path / "needles.png").read_bytes().startswith(b"\x89PNG")
        (figure,) = figures
        times, depths, _ = figure.axes
        assert [text.get_text() for text in times.get_legend().get_texts()] == [
            f"{name}, {tokens} tokens" for name in ("hydragen", "hydragen_noshared") for tokens in ("1,000", "2,000")
        ]
        assert [line.get_ydata().tolist() for line in times.get_lines()] == [[4, 2]] * 4
        shares = depths.get_images()[0].get_array()
        assert shares.shape == (4, 10)
        assert shares[:, 0].tolist() == [0.5, 0.5, 1, 1] and shares[:, 1:].min() == 1
        assert depths.get_yticklabels()[0].get_text() == "hydragen, 1,000 tokens\n20 questions: 95.0% (76.4-99.1)"

    def test_of_sparse_prefill_accuracy_against_density(self, figures, tmp_path):
        sparse = needles_result(name="sparse", density=(0.1, 0.3), env={"prefill": "a_shape"})
        plot_needles(build_needle_rows([needles_result(num_right=20), sparse]), tmp_path / "needles.png")
        axes = next(axes for axes in figures[0].axes if "prefill computed" in axes.get_xlabel())
        points = {tuple(map(float, line.get_xydata()[0])) for line in axes.get_lines() if line.get_marker() in "os"}
        assert points == {(0.2, 0.95), (1.0, 1.0)}
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["a_shape (hydragen), 1,000 tokens", "dense (hydragen), 1,000 tokens"]

    def test_a_depth_that_nothing_was_asked_about(self, figures, tmp_path):
        plot_needles(build_needle_rows([needles_result(num_questions=4, num_right=3)]), tmp_path / "needles.png")
        depths = figures[0].axes[1]
        assert [text.get_text() for text in depths.texts] == ["0%\nof 1", *["100%\nof 1"] * 3, *["-"] * 6]
        assert depths.texts[0].get_color() == depths.texts[4].get_color() == "black"
        assert depths.texts[1].get_color() == "white"

    def test_passkeys(self, figures, tmp_path):
        results = [*TestPasskeyTables.RESULTS, passkey_result(name="noattention", exact=(0, 0, 0))]
        assert plot_passkeys(results, tmp_path / "passkey.png")
        first, second = [axes for axes in figures[0].axes if axes.get_title(loc="left")]
        assert first.get_images()[0].get_array().tolist() == [[1, 0], [1, 1], [0.5, 1]]  # depths by lengths
        assert [label.get_text() for label in first.get_xticklabels()] == ["512\n(612)", "1024\n(1124)"]
        assert first.get_title(loc="left").startswith(
            "hydragen, all 2 lengths, 512 to 1024 words: exact 75.0% (46.8-91.1), partial 87.5%\n"
        )
        assert second.get_images()[0].get_array().max() == 0
