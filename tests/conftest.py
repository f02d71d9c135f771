import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which transformers does

from checkpoints import save_tiny  # noqa: E402

from engine import LLM  # noqa: E402

# What attention "auto" measures goes to a folder of this run, for the programs that tests start too.
_cache = tempfile.TemporaryDirectory()
os.environ["TRIBUTARY_CACHE"] = _cache.name


def pytest_configure(config):
    torch.set_num_threads(1)  # two cores; every test's tensors are small


# Tests of whatever device there is: with a GPU they are part of what only one can show.
_WHERE_A_GPU_IS_USED = ("tests/kernels/gpu/", "tests/kernels/test_extremes.py")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if item.nodeid.startswith(_WHERE_A_GPU_IS_USED) and "test_compiling" not in item.nodeid:
                item.add_marker("gpu")
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The preset ``tiny`` as a checkpoint, with a tokenizer of bytes. Nothing may be changed in it."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny_folder):
    return LLM(tiny_folder, device="cpu")
