import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import Backend
from kernels.sparse import available_sparse_backends

HERE = Path(__file__)
# The reference is made of PyTorch's indexing, which checks.
BACKENDS = [b for b in available_sparse_backends(torch.device("cpu"), torch.float32) if b is not Backend.REFERENCE]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_read_beside_a_table_or_a_tensor(backend):
    paths = [str(HERE.parents[3]), str(HERE.parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, HERE.with_name("bounds.py"), backend], env=environment, capture_output=True, text=True
    )
    last = (done.stdout.strip().splitlines() or ["nothing ran"])[-1]
    assert (done.returncode, last) == (0, "done"), done.stderr[-2000:]
