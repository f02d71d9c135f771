"""Every kernel compiles for three generations of chips, as it is launched, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

ROOT = Path(__file__).parents[3]
# Shared memory that a program may have; the consumer chips of the first generation (8.6, 8.9) have 99 KiB.
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What every compilation came to; a process for each chip."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("compiling.py")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*command, str(chip)], env=environment, **pipes) for chip in SHARED_BYTES]
    made = []
    for process in processes:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        made += map(json.loads, output.splitlines())
    return made


ATTENTION = ("_attend", "_attend_sparse", "_merge")
OPERATIONS = ("_rms_norm", "_swiglu", "_rotate_in_place", "_rotate_into_cache", "_block_maxima", "_block_masses")


def test_all_kernels_for_all_chips(compiled):
    found = {(made["kernel"], made["capability"]) for made in compiled}
    assert found == {(kernel, capability) for kernel in ATTENTION + OPERATIONS for capability in SHARED_BYTES}
    assert len(compiled) <= 120
    assert all(made["cubin_bytes"] > 1000 for made in compiled)


def test_shared_memory_is_within_the_chips(compiled):
    assert [made for made in compiled if made["shared_bytes"] > SHARED_BYTES[made["capability"]]] == []


def test_registers_are_enough(compiled):
    assert [made for made in compiled if made["spilled_bytes"]] == []


def test_products_use_the_tensor_cores_of_hopper(compiled):
    """Where a tile has the 64 rows that its instruction takes."""
    tiled = [made for made in compiled if made["kernel"] == "_attend" and made["capability"] == 90]
    halves = [made for made in tiled if "float32" not in made["case"]]
    assert any(made["has_wgmma"] for made in halves)
    assert all(made["has_wgmma"] for made in halves if "x 4096 queries" in made["case"])
    sparse = [made for made in compiled if made["kernel"] == "_attend_sparse" and made["capability"] == 90]
    # Those of heads of 256 have tiles of 32 rows: of 64, registers of older chips would not do.
    assert all(made["has_wgmma"] for made in sparse if "float32" not in made["case"] and "256" not in made["case"])


def test_min_p_compares_exact_quotients(compiled):
    """Division is an approximation unless it is asked for otherwise; then tokens would pass that do not elsewhere."""
    assert all(made["divides_exactly"] for made in compiled if made["kernel"] == "_block_masses")
