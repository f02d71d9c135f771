"""Root-mean-square normalisation (arXiv:1910.07467), alone and after a sum.

Computed in float32 and rounded once.

Shapes: T rows, I features.
"""

from functools import cache

import torch
import torch.nn.functional as F

from kernels import simd
from kernels.backend import Backend
from kernels.dispatch import choose_backend
from kernels.simd import Kernel, Target, Value


def rms_norm(x: torch.Tensor, weight_I: torch.Tensor, eps: float, backend: Backend | None = None) -> torch.Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension, whatever others there are.

    Raises ValueError for a ``backend`` that cannot run here.
    """
    chosen = choose_backend(backend, x, weight_I, has_simd=x.dim() == 2)
    if chosen == Backend.SIMD:
        return _launch(x, None, weight_I, eps)
    if chosen == Backend.TRITON:
        from kernels.gpu import norm  # here, as Triton takes long to import

        return norm.rms_norm(x, weight_I, eps)
    return F.rms_norm(x, weight_I.shape, weight_I, eps)


def add_rms_norm_(
    x_TI: torch.Tensor, y_TI: torch.Tensor, weight_I: torch.Tensor, eps: float, backend: Backend | None = None
) -> torch.Tensor:
    """Adds ``y`` to ``x``, in place and rounded to its dtype; returns the sum normalised.

    Raises ValueError for a ``backend`` that cannot run here.
    """
    chosen = choose_backend(backend, x_TI, y_TI, weight_I)
    if chosen == Backend.SIMD:
        return _launch(x_TI, y_TI, weight_I, eps)
    if chosen == Backend.TRITON:
        from kernels.gpu import norm

        return norm.add_rms_norm_(x_TI, y_TI, weight_I, eps)
    x_TI += y_TI
    return F.rms_norm(x_TI, weight_I.shape, weight_I, eps)


def _launch(x_TI, y_TI, weight_I, eps):
    T, num_features = x_TI.shape
    out_TI = torch.empty_like(x_TI, memory_format=torch.contiguous_format)
    added = x_TI if y_TI is None else y_TI
    num_tasks, rows_per_task = simd.split_rows(T)
    _compiled(simd.host(), x_TI.dtype, num_features, y_TI is not None).launch(
        num_tasks, T, rows_per_task, x_TI, x_TI.stride(0), added, added.stride(0), weight_I, out_TI, float(eps)
    )
    return out_TI


@cache
def _compiled(target: Target, dtype: torch.dtype, num_features: int, adds: bool) -> simd.CompiledKernel:
    k = Kernel("rms_norm", target)
    element = simd.FLOATS[dtype]
    with k.rows(0, 1) as row:
        x = k.pointer(2, element) + row * k.integer(3)
        y = k.pointer(4, element) + row * k.integer(5)
        weight, out = k.pointer(6, element), k.pointer(7, element) + row * num_features
        squares = k.variable(k.constant(0, simd.F32, k.lanes))

        def add_square(i, count):
            value = x.load_floats(i, count)
            if adds:
                x.store_floats(i, value + y.load_floats(i, count), count)
                value = x.load_floats(i, count)  # rounded, as the next layer will see it
            squares.value = k.fma(value, value, squares.value)

        k.each_vector(num_features, add_square)
        mean = squares.value.reduce(Value.__add__) / num_features
        scale = (1.0 / k.sqrt(mean + k.real(8))).spread()
        k.each_vector(
            num_features,
            lambda i, count: out.store_floats(i, x.load_floats(i, count) * scale * weight.load_floats(i, count), count),
        )
    return k.compile()
