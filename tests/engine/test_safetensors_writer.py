import pytest
import torch
from safetensors.torch import load_file

from engine.safetensors_writer import SafetensorsWriter

TENSORS = {
    "a.half": torch.arange(7, dtype=torch.float16),
    "b.double": torch.rand(2, 3, dtype=torch.float64),
    "c.scalar": torch.tensor(2.5),
    "d.empty": torch.zeros(0, 4),
    "e.transposed": torch.rand(5, 3).T.to(torch.bfloat16),
}
DECLARED = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_the_library_reads_back_what_was_written_in_any_order(tmp_path):
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, DECLARED, {"note": "é"}) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
        assert not path.exists()
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("name", ["a", "a" * 13])
def test_tensors_begin_where_a_cache_line_does(tmp_path, name):
    with SafetensorsWriter(tmp_path / "x", {name: (torch.float32, (16,))}) as writer:
        writer.write(name, torch.ones(16))
    data = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 64 == 0 and len(data) == start + 64


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), SafetensorsWriter(path, DECLARED) as writer:
        writer.write("a.half", TENSORS["a.half"])
        raise KeyError
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_every_tensor_is_written_once_as_declared(tmp_path):
    declared = {"a": (torch.float32, (2,))}
    for name, tensor in [("a", torch.ones(3)), ("a", torch.ones(2).double()), ("b", torch.ones(2))]:
        with pytest.raises(AssertionError), SafetensorsWriter(tmp_path / "x", declared) as writer:
            writer.write(name, tensor)
    with pytest.raises(AssertionError, match="never written"), SafetensorsWriter(tmp_path / "x", declared):
        pass
    with pytest.raises(AssertionError, match="before"), SafetensorsWriter(tmp_path / "x", declared) as writer:
        writer.write("a", torch.ones(2))
        writer.write("a", torch.ones(2))
    assert list(tmp_path.iterdir()) == []
