import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(1)  # two cores; every test's tensors are small


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
