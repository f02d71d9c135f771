from pathlib import Path

import pytest
import torch

from engine.huge_pages import use_huge_pages

MIB = 2**20


def flags(address: int) -> list[str]:
    """Of the mapping that holds the address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, end = (int(x, 16) for x in first.split("-"))
            found = start <= address < end
        elif found and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_all_but_the_ends_of_a_tensor_asks_for_them():
    tensor = torch.empty(64 * MIB, dtype=torch.uint8)
    start = tensor.data_ptr()
    assert "hg" not in flags(start + 32 * MIB)
    use_huge_pages(tensor)
    for offset in (2 * MIB, 32 * MIB, 62 * MIB):
        assert "hg" in flags(start + offset)
    assert tensor.fill_(3).sum() == 3 * 64 * MIB


@pytest.mark.parametrize("tensor", [torch.arange(3.0), torch.empty(0), torch.empty(MIB, device="meta")])
def test_what_is_too_small_or_elsewhere_stays_as_it_is(tensor):
    use_huge_pages(tensor)
    assert tensor.is_meta or tensor.tolist() == list(map(float, range(len(tensor))))
