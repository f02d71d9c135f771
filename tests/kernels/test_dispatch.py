"""What runs the operations around attention: by default, and by name."""

import pytest
import torch

from kernels import Backend, available_operations_backends, check_operations_backend, dispatch, simd
from kernels.dispatch import choose_backend
from kernels.logit_blocks import block_masses, block_maxima
from kernels.norm import add_rms_norm_, rms_norm
from kernels.rotary import apply_rotary_, rotate_into_cache_
from kernels.swiglu import swiglu

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))
X = torch.zeros(4, 6)
ANGLES = torch.zeros(4, 1, 6)


@pytest.fixture
def has_all(monkeypatch):
    """As where vector code can be compiled, and Triton's interpreter runs."""
    monkeypatch.setattr(simd, "host", lambda: simd.Target.avx2())
    monkeypatch.setattr(dispatch, "triton_runs", lambda device: True)


@pytest.mark.usefixtures("has_all")
class TestDefault:
    def test_on_cpu_is_vector_code_where_there_is_any(self, monkeypatch):
        assert choose_backend(None, X, X) == Backend.SIMD
        assert choose_backend(None, X, has_simd=False) == Backend.ATEN
        assert choose_backend(None, X.double()) == Backend.ATEN
        assert choose_backend(None, X[:, ::2]) == Backend.ATEN
        assert choose_backend(None, X, X.half()) == Backend.ATEN
        assert choose_backend(None, X, X[:, ::2]) == Backend.ATEN
        monkeypatch.setattr(simd, "host", lambda: None)
        assert choose_backend(None, X) == Backend.ATEN

    def test_elsewhere_is_pytorch(self):
        """On CUDA until our kernels are measured."""
        assert available_operations_backends(CUDA, torch.bfloat16) == (Backend.ATEN, Backend.TRITON)
        assert available_operations_backends(META, torch.bfloat16) == (Backend.ATEN,)
        assert choose_backend(None, X.to("meta")) == Backend.ATEN

    def test_is_what_comes_first_of_those_that_take_the_tensors(self, monkeypatch):
        monkeypatch.setitem(dispatch._BEST_FIRST, "cpu", (Backend.TRITON, Backend.ATEN))
        assert choose_backend(None, X) == Backend.TRITON
        assert choose_backend(None, X[:, ::2]) == Backend.ATEN


@pytest.mark.usefixtures("has_all")
class TestByName:
    @pytest.mark.parametrize("backend", [Backend.SIMD, Backend.TRITON, Backend.ATEN])
    def test_is_what_runs(self, backend):
        assert choose_backend(backend, X, X) == backend

    def test_simd_is_pytorch_where_an_operation_has_no_vector_code(self):
        assert choose_backend(Backend.SIMD, X, has_simd=False) == Backend.ATEN

    @pytest.mark.parametrize(
        ("backend", "device", "dtype", "accepted"),
        [
            ("reference", CPU, torch.float32, "simd, aten, triton"),
            ("flash", CPU, torch.float16, "simd, aten, triton"),
            ("simd", CUDA, torch.bfloat16, "aten, triton"),
            ("simd", CPU, torch.float64, "aten"),
            ("triton", META, torch.float32, "aten"),
        ],
    )
    def test_that_cannot_run_is_refused(self, backend, device, dtype, accepted):
        name = str(dtype).removeprefix("torch.")
        message = f"backend '{backend}' cannot run {name} on {device}; accepted: {accepted}; use one of these, or none"
        with pytest.raises(ValueError, match=message):
            check_operations_backend(backend, device, dtype)

    @pytest.mark.parametrize("backend", [Backend.SIMD, Backend.TRITON])
    @pytest.mark.parametrize("others", [(X.half(),), (X[:, ::2],), (X, X.to("meta"))])
    def test_that_does_not_take_the_tensors_is_refused(self, backend, others):
        with pytest.raises(ValueError, match=f"'{backend}': the tensors are float32 on cpu .*; accepted: one dtype"):
            choose_backend(backend, X, *others)


@pytest.mark.parametrize(
    "run",
    [
        lambda backend: rms_norm(X, X[0], 1e-5, backend),
        lambda backend: add_rms_norm_(X, X, X[0], 1e-5, backend),
        lambda backend: swiglu(X, backend),
        lambda backend: apply_rotary_(X[:, None], ANGLES, ANGLES, False, backend),
        lambda backend: rotate_into_cache_(
            X.expand(3, 4, 6).transpose(0, 1), ANGLES, ANGLES, X[:, None], X[:, None], torch.arange(4), False, backend
        ),
        lambda backend: block_maxima(X, backend),
        lambda backend: block_masses(X, None, X[:, 0], X[:, 0], None, backend),
    ],
)
def test_every_operation_checks_it(run):
    with pytest.raises(ValueError, match="operations backend 'reference' cannot run float32 on cpu"):
        run(Backend.REFERENCE)
