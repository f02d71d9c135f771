import pytest

from kernels import simd


@pytest.fixture(params=["host", "avx2", "torch"])
def target(request, monkeypatch):
    """Operations compiled for this machine, for the least target (which runs here too), and PyTorch's own."""
    host = simd.host()
    if request.param != "torch" and host is None:
        pytest.skip("kernels cannot be compiled for this CPU, or no llvmlite")
    chosen = {"host": host, "avx2": simd.Target.avx2(), "torch": None}[request.param]
    monkeypatch.setattr(simd, "host", lambda: chosen)
