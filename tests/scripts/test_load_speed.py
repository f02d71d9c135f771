import pytest
from commands import Command, assert_mistake

from engine.bench import load_speed

command = Command("scripts/load_speed.py")


def test_prints_a_table_and_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(load_speed, "_in_processes", lambda work, arguments: 5.0)
    done = command(tmp_path, "--model-name", "tiny", "--num-iters", 1)
    assert (done.status, done.stderr) == (0, "")
    assert "tiny, bfloat16 on " in done.stdout
    assert "cut for 2 ranks" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["load_speed.yaml"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--model-name", "none"), "no such folder: 'none'"),
        (("--model-name", "tiny", "--num-ranks", 3), "into 3 parts; accepted: 1, 2, 4"),
        (("--dtype", "int8"), "'int8' is not one of"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, part):
    assert_mistake(command(tmp_path / "out", *arguments), part)
    assert not (tmp_path / "out").exists()
