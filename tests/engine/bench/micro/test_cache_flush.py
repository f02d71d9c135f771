import pytest
import torch

from engine.bench.micro.cache_flush import CacheFlush, last_level_cache_bytes
from engine.bench.streamed_buffer import StreamedBuffer

CPU = torch.device("cpu")


def test_the_largest_cache_counts(tmp_path):
    for index, size in enumerate(("48K\n", "1024K\n", "32M\n", "odd\n")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    assert last_level_cache_bytes(CPU, tmp_path) == 32 << 20


def test_a_system_that_does_not_tell(tmp_path):
    assert last_level_cache_bytes(CPU, tmp_path / "none") == 64 << 20
    assert 1 << 18 <= last_level_cache_bytes(CPU)


def test_several_times_the_cache_is_read(monkeypatch):
    read = []
    monkeypatch.setattr(torch, "dot", lambda left, right: read.append(left.nbytes + right.nbytes))
    flush = CacheFlush(CPU, cache_bytes=1 << 20)
    flush()
    assert read == [4 << 20] and flush.num_bytes == 4 << 20


def test_a_buffer_is_read_from_end_to_end():
    buffer = StreamedBuffer(80, CPU)
    assert buffer.num_bytes == 80
    buffer.read()


@pytest.mark.gpu
def test_the_gpus_cache():
    assert last_level_cache_bytes(torch.device("cuda")) >= 1 << 20
