import errno
import json
import os

import pytest

from engine.batch import results_file as module
from engine.batch.request import Origin
from engine.batch.result import ANSWERED, REFUSED, Result, parse_result, result_line
from engine.batch.results_file import ResultsFile
from engine.errors import InputError

IDS = [f"req_{number:024x}" for number in range(4)]
ORIGINS = [Origin(12, IDS[0], "a"), Origin(3, IDS[1], None), Origin(5, IDS[2], "é\n\u2028\"")]
RESULTS = [Result(origin, failed) for origin, failed in zip(ORIGINS, (False, True, False))]
LINES = [
    result_line(result.origin, REFUSED if result.failed else ANSWERED, {"text": "x\ny"}) for result in RESULTS
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def opened(path):
    files = []

    def begin(**options) -> ResultsFile:
        files.append(ResultsFile(path, **options))
        return files[-1]

    yield begin
    for file in files:
        file._file.close()


class TestLines:
    def test_are_read_as_they_were_written(self):
        assert [parse_result(line) for line in LINES] == RESULTS
        assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in LINES)

    def test_have_the_shape_of_openai(self):
        assert json.loads(LINES[0]) == {
            "id": "batch_req_12",
            "custom_id": "a",
            "response": {"status_code": 200, "request_id": IDS[0], "body": {"text": "x\ny"}},
            "error": None,
        }

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (["id"], "batch_req_x"), (["id"], "batch_req_0"), (["id"], "batch_req_" + "1" * 30), (["id"], 5),
            (["id"], None), (["custom_id"], 5), (["custom_id"], "\ud800"), (["response"], None), (["response"], []),
            (["response", "status_code"], 500), (["response", "status_code"], []), (["response", "request_id"], 5),
            (["response", "request_id"], "req_"),
        ],
    )  # fmt: skip
    def test_that_are_none(self, path, value):
        record = json.loads(LINES[0])
        at = record
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = value
        with pytest.raises(ValueError, match="not a result"):
            parse_result(json.dumps(record).encode())
        del at[path[-1]]
        with pytest.raises(ValueError, match="not a result"):
            parse_result(json.dumps(record).encode())

    @pytest.mark.parametrize("line", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000])
    def test_that_are_no_objects(self, line):
        with pytest.raises(ValueError, match="not a result"):
            parse_result(line)


class TestRecovering:
    def test_what_there_is(self, opened, path):
        path.write_bytes(b"".join(LINES))
        file = opened()
        assert list(file.recover()) == RESULTS
        file.append([LINES[0]])
        assert path.read_bytes() == b"".join(LINES) + LINES[0]

    @pytest.mark.parametrize("length", [1, 10, 18, 19, 40, len(LINES[2]) - 1])
    def test_a_torn_line_is_cut_off(self, opened, path, length):
        path.write_bytes(b"".join(LINES[:2]) + LINES[2][:length])
        file = opened()
        assert list(file.recover()) == RESULTS[:2]
        assert path.read_bytes() == b"".join(LINES[:2])
        file.append([LINES[2]])
        assert path.read_bytes() == b"".join(LINES)

    @pytest.mark.parametrize(
        "content", [b"notes", b"notes\n", b"\n", b'{"id": 5}\n', b"\0" * 99 + b"n", b'{"id": "batch_req_1"}\n']
    )
    def test_another_file_is_left_as_it_is(self, opened, path, content):
        for before in (b"", LINES[0]):
            path.write_bytes(before + content)
            number = 2 if before else 1
            with pytest.raises(InputError, match=f"out.jsonl, line {number} is not the result of a batch; accepted"):
                list(opened().recover())
            assert path.read_bytes() == before + content
            path.unlink()

    @pytest.mark.parametrize("torn", [b"", LINES[1][:30]])
    def test_zeros_at_the_end_are_cut_off(self, opened, path, torn):
        for count in (1, 99, 3 << 20):
            path.write_bytes(LINES[0] + torn + bytes(count))
            file = opened()
            assert list(file.recover()) == RESULTS[:1]
            file.close()
            assert path.read_bytes() == LINES[0]

    def test_a_file_of_zeros_is_another_file(self, opened, path):
        path.write_bytes(bytes(99))
        with pytest.raises(InputError, match="out.jsonl, line 1 is not the result of a batch"):
            list(opened().recover())
        assert path.read_bytes() == bytes(99)

    def test_or_is_dropped_when_told_so(self, opened, path):
        path.write_bytes(b"notes")
        file = opened(overwrite=True)
        assert list(file.recover()) == [] and path.read_bytes() == b"notes", "the run may still fail"
        file.append([LINES[0]])
        assert path.read_bytes() == LINES[0]


class TestRemoved:
    def test_is_told_at_the_end(self, opened, path):
        for replace in (False, True):
            file = opened()
            file.append([LINES[0]])
            path.unlink()
            if replace:
                path.write_bytes(b"another")
            with pytest.raises(InputError, match="out.jsonl was removed, or replaced, while its results were written"):
                file.close()
        assert path.read_bytes() == b"another"


class TestLock:
    def test_one_writes_at_a_time(self, opened, path):
        first = opened()
        with pytest.raises(InputError, match="out.jsonl is being written by another run; wait for its end, or use an"):
            opened(overwrite=True)
        first.append([LINES[0]])
        first.close()
        assert list(opened().recover()) == RESULTS[:1]

    def test_one_that_was_removed_meanwhile(self, opened, path, monkeypatch):
        """The run that had made it removes it just before this one has the lock."""
        lock = module.fcntl.flock

        def remove_and_lock(*arguments: object) -> None:
            monkeypatch.undo()
            path.unlink()
            lock(*arguments)

        monkeypatch.setattr(module.fcntl, "flock", remove_and_lock)
        opened().append([LINES[0]])
        assert path.read_bytes() == LINES[0]

    def test_what_got_nothing_is_removed_where_it_was_made(self, path):
        ResultsFile(path).close()
        assert not path.exists()
        path.touch()
        ResultsFile(path).close()
        assert path.exists()


class TestNoRoom:
    def test_leaves_whole_lines(self, opened, path, monkeypatch):
        file = opened()
        file.append([LINES[0]])
        write = os.write

        room = len(LINES[0]) + len(LINES[1]) + 20

        def write_what_fits(fd: int, data: bytes) -> int:
            left = room - os.fstat(fd).st_size
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(fd, bytes(data[: min(left, 7)]))

        monkeypatch.setattr(module.os, "write", write_what_fits)
        with pytest.raises(InputError, match="out.jsonl: No space left on device; the results in it are whole: make r"):
            file.append(LINES[1:])
        assert path.read_bytes() == LINES[0] + LINES[1], "what fits is kept"

    def test_signals_too(self, opened, path, monkeypatch):
        file = opened()
        write = os.write

        def stop(fd: int, data: bytes) -> int:
            write(fd, bytes(data[:30]))
            raise KeyboardInterrupt

        monkeypatch.setattr(module.os, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            file.append(LINES)
        assert path.read_bytes() == b""

    def test_when_it_is_synced(self, opened, path, monkeypatch):
        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(module.os, "fsync", fail)
        file = opened()
        file.append([LINES[0]])
        with pytest.raises(OSError, match="Input/output error") as caught:
            file.sync()
        assert caught.value.filename == str(path)
        monkeypatch.setattr(module, "_SYNC_EVERY_S", -1)
        with pytest.raises(OSError, match="Input/output error"):
            file.append([LINES[1]])
        assert path.read_bytes() == LINES[0] + LINES[1], "they are whole"


def test_paths_that_cannot_be_used(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere" / "x", tmp_path / "pipe"):
        with pytest.raises(InputError, match="accepted: a file in a directory that exists"):
            ResultsFile(path)
