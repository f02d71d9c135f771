"""Which backend runs an operation around attention: norms, SwiGLU, rotary embedding, blocks of logits.

PyTorch's own lines (``aten``) serve every device, dtype and layout. Beside them each operation has kernels of ours for
those that occur in a model.
"""

import torch

from kernels import simd
from kernels.backend import Backend, triton_runs

OPERATIONS_BACKENDS = (Backend.SIMD, Backend.TRITON, Backend.ATEN)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# By device, best first. On CUDA our kernels have not been measured against PyTorch's: until they are, they run only
# where they are asked for. To make them the default, exchange the two.
_BEST_FIRST = {
    "cpu": (Backend.SIMD, Backend.ATEN, Backend.TRITON),
    "cuda": (Backend.ATEN, Backend.TRITON),
}


def available_operations_backends(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """The backends that can run on ``device`` in ``dtype``, best first."""
    return tuple(backend for backend in _best_first(device) if _can_run(backend, device, dtype))


def check_operations_backend(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of this name. Raises ValueError for one that is not known, or cannot run there."""
    if backend not in _best_first(device) or not _can_run(Backend(backend), device, dtype):
        raise ValueError(
            f"operations backend {str(backend)!r} cannot run {_name(dtype)} on {device.type}; accepted: "
            f"{', '.join(available_operations_backends(device, dtype))}; use one of these, or none, for the best of "
            "them"
        )
    return Backend(backend)


def choose_backend(
    backend: Backend | None, x: torch.Tensor, *others: torch.Tensor, has_simd: bool = True
) -> Backend:
    """What runs an operation on ``x`` and ``others``: ``backend``, or where it is None the best that takes them.

    ``has_simd`` says whether the operation has vector code for such tensors. Where it has none, ``simd`` means
    PyTorch's lines. Raises ValueError for a backend that cannot run on the device in the dtype, or does not take these
    tensors: our kernels want one dtype and device, and the last dimension contiguous.
    """
    if backend is None:
        return _best(x, others, has_simd)
    backend = check_operations_backend(backend, x.device, x.dtype)
    if backend is Backend.SIMD and not has_simd:
        return Backend.ATEN
    if not _takes(backend, x, others):
        given = ", ".join(f"{_name(t.dtype)} on {t.device.type} with strides {t.stride()}" for t in (x, *others))
        raise ValueError(
            f"operations backend {str(backend)!r}: the tensors are {given}; accepted: one dtype and device for all, "
            "their last dimension contiguous; use aten, or none"
        )
    return backend


def _best(x: torch.Tensor, others: tuple[torch.Tensor, ...], has_simd: bool) -> Backend:
    device, dtype = x.device, x.dtype
    for backend in _best_first(device):
        if backend is Backend.SIMD and not has_simd:
            continue
        if _can_run(backend, device, dtype) and _takes(backend, x, others):
            return backend
    raise AssertionError("PyTorch's lines take everything")


def _best_first(device: torch.device) -> tuple[Backend, ...]:
    return _BEST_FIRST.get(device.type, (Backend.ATEN,))


def _can_run(backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    if backend is Backend.ATEN:
        return True
    runs = simd.host() is not None if backend is Backend.SIMD else triton_runs(device)
    return runs and dtype in _DTYPES


def _takes(backend: Backend, x: torch.Tensor, others: tuple[torch.Tensor, ...]) -> bool:
    if backend is Backend.ATEN:
        return True
    if x.stride(-1) != 1:
        return False
    device, dtype = x.device, x.dtype
    return all([y.dtype == dtype and y.device == device and y.stride(-1) == 1 for y in others])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
