from dataclasses import replace

import pytest
import yaml

from engine import files
from engine.bench.results import Cell, CellResult, Status, is_finished, read_cell, read_results, write_cell
from engine.errors import InputError

CELL = Cell("hydragen", batch_size=64, num_shared=4096, num_unique=11)
RESULT = CellResult(
    cell=CELL,
    status=Status.OK,
    model_name="llama-125m",
    seed=3,
    num_iters=3,
    num_warmup=1,
    environment={"device": "cpu", "world_size": 2, "versions": {"torch": "2.13.0"}, "git_revision": None},
    decode_ms=(640.0, 650.0, 660.0),
    first_token_ms=(149.0, 150.0, 152.0),
    prefill_ms=(1200.1234, 1190.5),
    predicted_bytes=(10**11, 10**11),
    peak_bytes=(98 * 10**9, 97 * 10**9),
    achieved_gbs=21.5,
    achieved_tflops=0.4321,
    roofline_ms=30.0,
    choice="shared",
)


@pytest.fixture
def warnings():
    return []


def edit(path, **changes):
    """Changes fields of a result file; None removes one."""
    fields = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({name: value for name, value in fields.items() if value is not None}))


# ---- what is computed from the times


def test_throughput_is_of_the_tokens_after_the_first():
    # 10 steps in 650 - 150 ms: 50 ms a step, 64 tokens each.
    assert RESULT.decode_step_ms == pytest.approx(50)
    assert RESULT.tokens_per_second == pytest.approx(64 / 0.050)
    assert RESULT.roofline_fraction == pytest.approx(30 / 50)


def test_spread_is_relative_to_the_decode_time():
    # Widths from the 20th to the 80th percentile: 12 ms, and 151.2 - 149.4 = 1.8 ms.
    assert RESULT.spread == pytest.approx((12**2 + 1.8**2) ** 0.5 / 500)
    assert not RESULT.high_spread
    assert replace(RESULT, decode_ms=(600.0, 650.0, 700.0)).high_spread
    # Times that look steady by themselves, but not beside the small difference that they are there to measure.
    assert replace(RESULT, decode_ms=(155.0, 158.0, 161.0)).high_spread


def test_one_token_has_no_throughput():
    result = replace(RESULT, cell=replace(CELL, num_unique=1), first_token_ms=())
    assert result.tokens_per_second is None
    assert result.roofline_fraction is None
    assert result.spread == pytest.approx(12 / 650)


def test_a_difference_lost_in_noise_is_no_throughput():
    result = replace(RESULT, decode_ms=(149.0,))
    assert result.tokens_per_second is None
    assert result.spread is None
    assert result.high_spread


def test_a_cell_that_did_not_run_has_no_numbers():
    result = replace(RESULT, status=Status.OUT_OF_MEMORY, decode_ms=(), first_token_ms=())
    assert (result.tokens_per_second, result.spread, result.high_spread) == (None, None, False)


# ---- files


def test_written_and_read_back(tmp_path):
    path = write_cell(tmp_path, RESULT)
    assert path == tmp_path / "hydragen" / "b64_s4096_u11.yaml"
    assert read_cell(path) == RESULT
    assert is_finished(tmp_path, CELL)
    assert not is_finished(tmp_path, replace(CELL, batch_size=32))


@pytest.mark.parametrize("status", [Status.DOES_NOT_FIT, Status.OUT_OF_MEMORY])
def test_a_cell_that_did_not_run_is_recorded_and_finished(tmp_path, status):
    message = "needs 97 GiB: 80 GiB are free"
    result = CellResult(CELL, status, "m", 0, 3, 1, {}, message=message, predicted_bytes=(97 << 30,))
    assert read_cell(write_cell(tmp_path, result)) == result
    assert is_finished(tmp_path, CELL)


def test_a_person_can_read_the_file(tmp_path):
    times = (1 / 3, 1000 / 3)
    path = write_cell(tmp_path, replace(RESULT, first_token_ms=times, achieved_gbs=200 / 3))
    text = path.read_text()
    assert text.startswith("# hydragen: 64 sequences of 4096 shared + 11 generated tokens: ")
    assert "\nfirst_token_ms: [0.3333, 333.3333]\n" in text
    assert "\nachieved_gbs: 66.6667\n" in text
    assert "\nstatus: ok\n" in text


def test_a_single_time_has_no_spread_to_read(tmp_path):
    first_line = write_cell(tmp_path, RESULT).read_text().splitlines()[0]
    assert first_line.endswith(": 1280.0 tokens/s, spread 2.4%; times in ms")
    once = replace(RESULT, num_iters=1, decode_ms=(650.0,), first_token_ms=(150.0,))
    first_line = write_cell(tmp_path, once).read_text().splitlines()[0]
    assert first_line.endswith(": 1280.0 tokens/s; times in ms")


def test_a_result_without_times_is_not_written(tmp_path):
    for broken in (replace(RESULT, decode_ms=()), replace(RESULT, decode_ms=(float("nan"),))):
        with pytest.raises(InputError):
            write_cell(tmp_path, broken)
    assert not CELL.path(tmp_path).exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema_version": 0}, "schema version 0, this program reads 2"),
        ({"schema_version": None}, "no schema_version"),
        ({"seed": None, "decode_ms": None}, "lacks decode_ms, seed"),
        ({"surprise": 1}, "unknown surprise"),
        ({"decode_ms": [1.0, "fast"]}, "decode_ms is"),
        ({"decode_ms": 1.0}, "decode_ms is"),
        ({"decode_ms": [-1.0]}, "decode_ms is"),
        ({"decode_ms": [float("inf")]}, "decode_ms is"),
        ({"decode_ms": []}, "missing or contradicts itself"),
        ({"first_token_ms": []}, "missing or contradicts itself"),
        ({"status": "fine"}, "status is 'fine'"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"environment": [1]}, "environment is"),
        ({"model_name": 7}, "model_name is 7"),
    ],
)
def test_an_unusable_file_is_named_skipped_and_run_again(tmp_path, warnings, changes, problem):
    path = write_cell(tmp_path, RESULT)
    other = write_cell(tmp_path, replace(RESULT, cell=replace(CELL, batch_size=8)))
    edit(path, **changes)
    with pytest.raises(InputError) as caught:
        read_cell(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)

    assert not is_finished(tmp_path, CELL, warnings.append)
    assert [result.cell.batch_size for result in read_results([tmp_path], warnings.append)] == [8]
    assert len(warnings) == 2
    assert all(str(path) in line for line in warnings)
    assert other.exists()


@pytest.mark.parametrize("data", [b"", b"decode_ms: [1, 2", b"[1, 2]", b"\xff\xfe\x00", b"a: b: c"])
def test_a_damaged_file(tmp_path, warnings, data):
    path = write_cell(tmp_path, RESULT)
    path.write_bytes(data)
    with pytest.raises(InputError, match=path.name):
        read_cell(path)
    assert not is_finished(tmp_path, CELL, warnings.append)
    assert len(warnings) == 1


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="nothing.yaml: cannot be read"):
        read_cell(tmp_path / "nothing.yaml")


def test_a_file_copied_over_another_cell_is_not_its_result(tmp_path, warnings):
    wanted = replace(CELL, batch_size=128)
    write_cell(tmp_path, RESULT).rename(wanted.path(tmp_path))
    assert not is_finished(tmp_path, wanted, warnings.append)
    assert "holds another cell, hydragen/b64_s4096_u11.yaml" in warnings[0]


def test_results_of_several_sweeps(tmp_path):
    for sweep in ("a", "b"):
        for batch_size in (128, 16):
            write_cell(tmp_path / sweep, replace(RESULT, cell=replace(CELL, batch_size=batch_size)))
    a, b = tmp_path / "a", tmp_path / "b"
    found = [(result.sweep, result.cell.batch_size) for result in read_results([b, a, b])]
    assert found == [(str(b), 16), (str(b), 128), (str(a), 16), (str(a), 128)]
    with pytest.raises(InputError, match="none is not a directory"):
        read_results([tmp_path / "none"])


# ---- whole or not at all


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_cell(tmp_path, RESULT)
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_cell(tmp_path, replace(RESULT, seed=4))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_run_left_is_ignored_and_removed(tmp_path, warnings):
    path = CELL.path(tmp_path)
    path.parent.mkdir()
    files.partial_path(path).write_text("schema_ver")
    assert not is_finished(tmp_path, CELL, warnings.append)
    assert read_results([tmp_path], warnings.append) == []
    assert warnings == []
    write_cell(tmp_path, RESULT)
    assert list(path.parent.iterdir()) == [path]
