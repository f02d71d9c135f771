from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rows import row_result
from sweeps import result

from engine.bench.micro.micro_results import FILES, Row, TimedWith
from engine.bench.result_files import Status
from engine.bench.results import read_cell, read_results, write_cell
from engine.errors import InputError

RESULT = row_result(times_ms=(1.5, 2.0, 2.5), backends=("simd", "aten"), timed_with=TimedWith.CUDA_GRAPH, sweep="")


class TestFigures:
    def test_speeds_and_roofline_by_hand(self):
        # 10^7 bytes and 10^9 FLOPs in 2 ms; at 40 GB/s the bytes take 0.25 ms, at 2 TFLOP/s the FLOPs 0.5 ms.
        assert RESULT.median_ms == 2.0
        assert RESULT.achieved_gbs == pytest.approx(5.0)
        assert RESULT.achieved_tflops == pytest.approx(0.5)
        assert RESULT.roofline_ms == pytest.approx(0.5)
        assert RESULT.roofline_fraction == pytest.approx(0.25)
        assert replace(RESULT, num_bytes=10**8).roofline_ms == pytest.approx(2.5)

    def test_spread(self):
        assert RESULT.spread == pytest.approx((2.3 - 1.7) / 2)
        assert RESULT.high_spread
        once = replace(RESULT, times_ms=(2.0,))
        assert (once.spread, once.high_spread) == (None, False)

    def test_a_row_that_did_not_run_has_none(self):
        failed = replace(RESULT, status=Status.DOES_NOT_FIT, times_ms=())
        assert (failed.median_ms, failed.achieved_gbs, failed.achieved_tflops, failed.roofline_fraction) == (None,) * 4

    def test_no_ceilings_no_roofline(self):
        assert replace(RESULT, read_gbs=None).roofline_ms is None
        assert replace(RESULT, read_gbs=0.0).roofline_fraction is None


class TestFiles:
    def test_names(self):
        row = RESULT.row
        for changes, path in (
            ({}, "hydragen/b32_s1024_u64_q8_k1_d128.yaml"),
            ({"backend": "aten"}, "hydragen/b32_s1024_u64_q8_k1_d128_aten.yaml"),
            ({"unique_seq_len": 16}, "hydragen/b32_s1024_u64_n16_q8_k1_d128.yaml"),
            (
                {"mode": "operations", "operation": "attention_own", "backend": "simd"},
                "operations/b32_s1024_u64_q8_k1_d128_attention_own_simd.yaml",
            ),
        ):
            assert replace(row, **changes).path(Path()) == Path(path)

    def test_written_and_read_back(self, tmp_path):
        path = FILES.write(tmp_path, RESULT)
        assert FILES.read(path) == RESULT
        assert FILES.is_finished(tmp_path, RESULT.row)
        assert not FILES.is_finished(tmp_path, replace(RESULT.row, batch_size=1))
        text = path.read_text()
        assert text.startswith("# hydragen: batch 32, shared 1024, unique 64, 8/1 heads of 128: 2.0000 ms, spread 30.")
        assert "\nkind: microbenchmark\n" in text and "\ntimed_with: cuda_graph\n" in text

    def test_an_ok_row_needs_times(self, tmp_path):
        with pytest.raises(InputError, match="missing or contradicts itself"):
            FILES.write(tmp_path, replace(RESULT, times_ms=()))

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"schema_version": 9}, "schema version 9, this program reads 2; delete it and run the row again"),
            ({"kind": "sonnet"}, "kind is 'sonnet'; accepted: throughput, microbenchmark"),
            ({"kind": [1]}, "kind is"),
            ({"timed_with": "sundial"}, "timed_with is 'sundial'"),
            ({"backends": ["simd", 1]}, "backends is"),
            ({"choice": 1}, "choice is 1"),
            ({"num_bytes": -1}, "num_bytes is -1"),
            ({"speed": 1}, "has unknown speed"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path, changes, problem):
        path = FILES.write(tmp_path, RESULT)
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
        warnings: list[str] = []
        assert FILES.read_all([tmp_path], warnings.append) == []
        assert not FILES.is_finished(tmp_path, RESULT.row, warnings.append)
        assert len(warnings) == 2 and all(problem in line and str(path) in line for line in warnings)

    def test_two_kinds_in_one_folder_keep_out_of_each_others_way(self, tmp_path):
        row_path, cell_path = FILES.write(tmp_path, RESULT), write_cell(tmp_path, result("hydragen"))
        assert row_path.parent == cell_path.parent
        warnings: list[str] = []
        assert [found.row for found in FILES.read_all([tmp_path], warnings.append)] == [RESULT.row]
        assert len(read_results([tmp_path], warnings.append)) == 1
        assert warnings == []
        with pytest.raises(InputError, match="holds a throughput result, not a microbenchmark one"):
            FILES.read(cell_path)
        with pytest.raises(InputError, match="holds a microbenchmark result, not a throughput one"):
            read_cell(row_path)

    def test_rows_are_read_in_the_order_of_their_sizes(self, tmp_path):
        for batch_size in (128, 16):
            for mode in ("hydragen", "base"):
                FILES.write(tmp_path, replace(RESULT, row=replace(RESULT.row, mode=mode, batch_size=batch_size)))
        found = [(r.row.batch_size, r.row.mode) for r in FILES.read_all([tmp_path])]
        assert found == [(16, "base"), (16, "hydragen"), (128, "base"), (128, "hydragen")]


def test_a_row_knows_its_sizes():
    assert isinstance(RESULT.row, Row)
    assert RESULT.row.sizes.words == "batch 32, shared 1024, unique 64, 8/1 heads of 128"
    assert replace(RESULT.row, unique_seq_len=16).unique == "16 of 64"
