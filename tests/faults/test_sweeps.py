"""Sweeps that share a directory, and directories that hold what no sweep of today has written."""

from pathlib import Path

import pytest
import yaml
from faults.processes import TINY, files
from sweeps import result

from engine.bench.results import read_cell, write_cell

SWEEP = (1, "1:9:1", 2, *TINY)


def grid(mode: str) -> set[str]:
    return {f"{mode}/b1_s{num_shared}_u2.yaml" for num_shared in range(1, 9)}


@pytest.mark.slow
@pytest.mark.parametrize("modes", [("hydragen", "hydragen", "hydragen"), ("hydragen", "noattention", "hydragen")])
def test_at_the_same_time(start, tmp_path, modes):
    """Started together, they are at the same cell most of the time."""
    outdir = tmp_path / "out"
    sweeps = [start("scripts/synth.py", outdir, *SWEEP, "--mode", mode) for mode in modes]
    for sweep in sweeps:
        done = sweep.finish()
        assert done.status == 0, done.stderr
        assert "error" not in done.stderr and "Traceback" not in done.stderr
    assert files(outdir).keys() == set().union(*map(grid, modes))
    for name in files(outdir):
        read_cell(outdir / name)


def edit(path: Path, **changes) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_what_cannot_be_used_is_named_and_measured_again(start, tmp_path):
    outdir = tmp_path / "out"
    folder = outdir / "hydragen"
    env = {"device": "cpu", "dtype": "float32", "world_size": 1}
    for num_shared in range(1, 9):
        made = result("hydragen", batch_size=1, num_shared=num_shared, num_unique=2, model_name="tiny", env=env)
        write_cell(outdir, made)
    good = files(outdir)
    edit(folder / "b1_s1_u2.yaml", schema_version=0)
    (folder / "b1_s2_u2.yaml").write_bytes(good["hydragen/b1_s2_u2.yaml"][:300])
    (folder / "b1_s3_u2.yaml").write_bytes(b"")
    (folder / "b1_s4_u2.yaml").write_text("[" * 100_000)
    (folder / "b1_s5_u2.yaml").write_text("schema_version: 2026-13-45\n")
    (folder / "b1_s6_u2.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    edit(folder / "b1_s7_u2.yaml", decode_ms=[10**400])
    problems = {
        1: "has schema version 0, this program reads 2; delete it and run the cell again",
        2: "",  # where it was cut decides what is said
        3: "not a result file of a sweep",
        4: "not YAML",
        5: "not YAML",
        6: "cannot be read (not text)",
        7: "decode_ms is ",
    }
    (folder / "notes.yaml").write_text("by: hand\n")  # no cell of the grid
    (outdir / "readme.txt").write_text("mine")  # in no place of a result

    done = start("scripts/synth.py", outdir, *SWEEP).finish()
    assert done.status == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(problems) + 1
    for (num_shared, problem), line in zip(problems.items(), warnings):
        assert line.startswith(f"warning: {folder}/b1_s{num_shared}_u2.yaml: ") and problem in line
        assert line.endswith("; it is measured again")
        assert len(line) < 1000
    assert warnings[-1].startswith(f"warning: {folder}/notes.yaml: not a result file of a sweep")
    others = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert others[0] == f"1 of 8 cells have results in {outdir} and are skipped."
    assert others[1] == "Loading tiny for mode hydragen ..." and len(others) == 2 + len(problems)

    for name in grid("hydragen"):
        read_cell(outdir / name)
    assert (outdir / "hydragen/b1_s8_u2.yaml").read_bytes() == good["hydragen/b1_s8_u2.yaml"]
    assert files(outdir).keys() == grid("hydragen") | {"hydragen/notes.yaml", "readme.txt"}
