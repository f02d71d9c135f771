from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from engine import memory
from engine.distributed import TPGroup
from engine.memory import available_bytes, free_host_bytes, is_out_of_memory, mapped_bytes

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """Writes the files that Linux tells its memory in, and reads them."""

    def free(version: int, limit: str, used: int, cache: int, host: int = 100 * GIB, active: int = 0) -> int:
        meminfo = tmp_path / "meminfo"
        meminfo.write_text(f"MemTotal:       99 kB\nHugePages_Total:     0\nMemAvailable:   {host // 1024} kB\n")
        cgroup = tmp_path / "cgroup"
        cgroup.mkdir()
        if version == 1:
            (cgroup / "memory").mkdir()
            (cgroup / "memory" / "memory.limit_in_bytes").write_text(f"{limit}\n")
            (cgroup / "memory" / "memory.usage_in_bytes").write_text(f"{used}\n")
            counted = f"total_inactive_file {cache}\ntotal_active_file {active}\n"
            (cgroup / "memory" / "memory.stat").write_text(f"inactive_file 1\n{counted}")
        if version == 2:
            (cgroup / "memory.max").write_text(f"{limit}\n")
            (cgroup / "memory.current").write_text(f"{used}\n")
            (cgroup / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file {active}\n")
        return free_host_bytes(meminfo, cgroup)

    return free


@pytest.mark.parametrize("version", [1, 2])
class TestContainer:
    def test_its_limit_counts_and_its_file_cache_gives_way(self, machine, version):
        assert machine(version, str(16 * GIB), used=10 * GIB, cache=7 * GIB) == 13 * GIB

    def test_files_that_were_read_more_than_once_give_way_too(self, machine, version):
        assert machine(version, str(16 * GIB), used=10 * GIB, cache=2 * GIB, active=5 * GIB) == 13 * GIB

    def test_the_host_may_have_less(self, machine, version):
        assert machine(version, str(16 * GIB), used=GIB, cache=0, host=3 * GIB) == 3 * GIB

    def test_never_less_than_nothing(self, machine, version):
        assert machine(version, str(GIB), used=2 * GIB, cache=0) == 0


def test_no_limit(machine):
    assert machine(2, "max", used=5, cache=0) == 100 * GIB


def test_no_container(machine):
    assert machine(0, "", used=0, cache=0) == 100 * GIB


def test_where_nothing_tells(tmp_path):
    assert free_host_bytes(tmp_path / "none", tmp_path) > 0


def test_ranks_of_one_machine_share_and_agree(monkeypatch):
    free = iter([6 * GIB, 4 * GIB])
    monkeypatch.setattr(memory, "free_host_bytes", lambda: next(free))
    monkeypatch.setattr(memory, "mapped_bytes", lambda: GIB)
    assert run_ranks(2, available_bytes) == [GIB, GIB]  # half of 4 less what both use of files


def test_never_less_than_nothing_beside_mapped_files(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: GIB)
    monkeypatch.setattr(memory, "mapped_bytes", lambda: 2 * GIB)
    assert available_bytes(TPGroup()) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory accounting")
def test_a_mapped_file_counts_as_far_as_it_was_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(64 * 2**20))
    before = mapped_bytes()
    mapped = torch.from_file(str(tmp_path / "file"), size=64 * 2**20, dtype=torch.uint8)
    assert mapped[: 32 * 2**20].sum() == 0
    assert 32 * 2**20 <= mapped_bytes() - before < 48 * 2**20
    assert mapped_bytes(tmp_path / "none") == 0


def test_ranks_of_two_machines_do_not(monkeypatch):
    class Elsewhere(TPGroup):
        def gather_objects(self, value):
            return [value, ("another machine", GIB, GIB)]

    monkeypatch.setattr(memory, "free_host_bytes", lambda: 6 * GIB)
    monkeypatch.setattr(memory, "mapped_bytes", lambda: 0)
    assert available_bytes(Elsewhere(0, 2)) == 6 * GIB


def test_a_gpu_gives_what_pytorch_keeps_of_earlier_work(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: calls.append("mem_get_info") or (5 * GIB, 9 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a GPU"))
    assert available_bytes(TPGroup(device="cuda:0")) == 5 * GIB
    assert calls == ["empty_cache", "mem_get_info"]


def test_what_an_allocation_that_fails_raises():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("another"))
