import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.mapped_safetensors import MappedSafetensors
from engine.safetensors_writer import SAFETENSORS_DTYPES


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def write_holes(path: Path, num_rows: int) -> None:
    """A tensor of float32 zeros that take no room on the disk, with 4 KiB a row."""
    size = num_rows * 4096
    header = json.dumps({"a": {"dtype": "F32", "shape": [num_rows, 1024], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_reads_what_was_saved(path, dtype):
    tensors = {
        "grid": torch.randn(5, 7).to(dtype),
        "scalar": torch.tensor(3.0, dtype=dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "cube": torch.randn(2, 3, 4).to(dtype),
    }
    save_file(tensors, path)
    with MappedSafetensors(path) as file:
        assert sorted(file.names()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert file.shape(name) == tuple(tensor.shape)
            assert SAFETENSORS_DTYPES[file.dtype(name)] == dtype
            found = file.read(name)
            assert found.dtype == dtype and torch.equal(found, tensor)


def test_tensors_that_are_not_aligned(path):
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(4, 5)}
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [4, 5], "data_offsets": [3, 83]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t.numpy().tobytes() for t in tensors.values()))
    with MappedSafetensors(path) as file:
        assert torch.equal(file.read("b"), tensors["b"])


def test_what_was_read_outlives_the_file_and_its_name(path):
    tensor = torch.randn(1000, 1000)
    save_file({"a": tensor}, path)
    with MappedSafetensors(path) as file:
        found = file.read("a")
    path.unlink()
    assert torch.equal(found, tensor)


def test_what_is_written_to_a_tensor_stays_out_of_the_file(path):
    tensor = torch.randn(10)
    save_file({"a": tensor}, path)
    with MappedSafetensors(path) as file:
        file.read("a").zero_()
    with MappedSafetensors(path) as file:
        assert torch.equal(file.read("a"), tensor)


def test_a_name_that_it_does_not_hold(path):
    save_file({"a": torch.ones(1)}, path)
    with MappedSafetensors(path) as file, pytest.raises(SafetensorError, match="does not contain tensor b"):
        file.read("b")


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 100, (4).to_bytes(8, "little") + b"{}  " + b"more"])
def test_a_file_of_another_format(path, data):
    path.write_bytes(data)
    with pytest.raises(SafetensorError):
        MappedSafetensors(path)


def test_a_file_larger_than_memory(path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    write_holes(path, 8 * memory // 4096)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(torch.tensor([7.0]).numpy().tobytes())
    with MappedSafetensors(path) as file:
        assert file.read("a")[-1, -2:].tolist() == [0, 7]


def test_a_process_that_may_not_map_it(path):
    """The command line tells that memory does not suffice."""
    write_holes(path, 2**18)
    program = """
import sys
from pathlib import Path
from resource import RLIMIT_AS, setrlimit
from engine.mapped_safetensors import MappedSafetensors
from engine.memory import is_out_of_memory
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
setrlimit(RLIMIT_AS, (used + 2**29, used + 2**29))
try:
    MappedSafetensors(Path(sys.argv[1]))
except Exception as error:
    print(is_out_of_memory(error), repr(error))
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True"), done
