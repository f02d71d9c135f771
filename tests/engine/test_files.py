import os

import pytest

from engine.files import write_whole


def test_replaces_a_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "x.json"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_whole(path, b"one")

    def disk_full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
