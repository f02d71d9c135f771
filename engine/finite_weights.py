"""Weights with NaN or infinity are refused where they are read: nothing that is computed with them means anything."""

from torch import Tensor

from engine.errors import InputError


def check_finite(name: str, weight: Tensor) -> None:
    """Raises InputError unless all of tensor ``name``, in the dtype that it is used in, is finite."""
    # A sum is many times faster than looking at each value, and can only be wrong in one way: it may overflow.
    if weight.sum().isfinite() or weight.isfinite().all():
        return
    raise InputError(
        f"{name} holds NaN or infinity in {str(weight.dtype).removeprefix('torch.')}; accepted: finite weights; fetch "
        "the model again, or use a --dtype that holds its values (float16 ends at 65504)"
    )
