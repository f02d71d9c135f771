import os

import pytest

from engine.batch import input_file
from engine.batch.input_file import InputFile
from engine.errors import InputError


@pytest.fixture
def read(tmp_path):
    def write_and_read(content: bytes) -> list[tuple[int, bytes | None]]:
        path = tmp_path / "x.jsonl"
        path.write_bytes(content)
        return [(line.number, line.data) for line in InputFile(path).lines()]

    return write_and_read


def test_lines_keep_their_numbers(read):
    assert read(b"one\r\n\n  \ntwo\x0b\xe2\x80\xa8still\nlast") == [
        (1, b"one"), (4, b"two\x0b\xe2\x80\xa8still"), (5, b"last"),
    ]  # fmt: skip
    assert read(b"") == read(b"\n\n") == []


def test_a_byte_order_mark_is_no_part_of_a_line(read):
    assert read(b"\xef\xbb\xbfone\n\xef\xbb\xbf") == [(1, b"one"), (2, b"\xef\xbb\xbf")]


def test_a_line_that_is_too_long_is_passed_over(read, monkeypatch):
    monkeypatch.setattr(input_file, "MAX_LINE_BYTES", 5)
    monkeypatch.setattr(input_file, "_PIECE", 2)
    assert read(b"12345\n123456\n12345678901\nabc\n123456") == [
        (1, b"12345"), (2, None), (3, None), (4, b"abc"), (5, None),
    ]  # fmt: skip


def test_a_first_line_with_a_mark_that_is_too_long_is_one_line(read, monkeypatch):
    monkeypatch.setattr(input_file, "MAX_LINE_BYTES", 5)
    mark = b"\xef\xbb\xbf"
    assert read(mark + b"1\nab") == [(1, b"1"), (2, b"ab")]
    for first in (b"1234", b"123456", b"123456789012"):
        assert read(mark + first + b"\nab") == [(1, None), (2, b"ab")]


def test_ids_stand_for_what_a_line_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(input_file, "MAX_LINE_BYTES", 5)
    path = tmp_path / "x"
    path.write_bytes(b"one\n one\r\ntwo\n123456789a\n123456789b\n123456789a\n")
    ids = [line.request_id for line in InputFile(path).lines()]
    assert ids[0] == ids[1] and ids[3] == ids[5]
    assert len(set(ids)) == 4
    assert all(len(i) == 28 and i.startswith("req_") for i in ids)


def test_what_cannot_be_read_twice(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist; accepted: a file with one request a line"):
        InputFile(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is no regular file"):
        InputFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"):
        InputFile(tmp_path / "pipe")
