import pytest

from engine import cpu
from engine.cpu import CPU, read_cpu


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Xeon 8480\nflags\t\t: fpu amx_bf16\nmodel name\t: B\nflags\t: fpu\n", CPU("Xeon 8480", True)),
        ("model name\t: EPYC 9654\nflags\t: fpu avx512_bf16\n", CPU("EPYC 9654", True)),
        ("model name\t: EPYC 7763\nflags\t: fpu avx2\n", CPU("EPYC 7763", False)),
        ("Features\t: fp asimd bf16 i8mm\n", CPU("its name", True)),  # Arm: no model name, another word for flags
        ("", CPU("its name", None)),
        (None, CPU("its name", None)),  # not Linux: no such file
    ],
)
def test_cpuinfo(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(cpu.platform, "processor", lambda: "its name")
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert read_cpu(path) == expected
