"""Weights with NaN or infinity are refused where they are read: nothing that is computed with them means anything."""

from collections.abc import Mapping

from torch import Tensor

from engine.errors import InputError
from engine.mapped_weights import as_one


def check_all_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises InputError, naming the first, unless all of the tensors are finite in the dtype that they are used in."""
    runs: list[list[str]] = []
    end = None
    for name, weight in weights.items():
        if weight.data_ptr() != end:
            runs.append([])
        runs[-1].append(name)
        end = weight.data_ptr() + weight.nbytes
    # Neighbours are checked at once: on cores that other work shares, threads wait for each other after each operation.
    for names in runs:
        together = as_one([weights[name] for name in names])
        if together is None or not together.sum().isfinite():
            for name in names:
                check_finite(name, weights[name])


def check_finite(name: str, weight: Tensor) -> None:
    """Raises InputError unless all of tensor ``name``, in the dtype that it is used in, is finite."""
    # A sum is many times faster than looking at each value, and can only be wrong in one way: it may overflow.
    if weight.sum().isfinite() or weight.isfinite().all():
        return
    raise InputError(
        f"{name} holds NaN or infinity in {str(weight.dtype).removeprefix('torch.')}; accepted: finite weights; fetch "
        "the model again, or use a --dtype that holds its values (float16 ends at 65504)"
    )
