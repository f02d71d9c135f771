import pytest
import torch

from engine.errors import InputError
from engine.finite_weights import check_all_finite

NAMES = "abcde"


def neighbours(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, torch.ones(5, 40, dtype=dtype), strict=True))


def apart(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, 40, dtype=dtype)[0] for name in NAMES}


def in_two_runs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    first, second = torch.ones(2, 40, dtype=dtype), torch.ones(4, 40, dtype=dtype)
    return dict(zip(NAMES, [*first, second[3], second[0], second[1]], strict=True))


def in_stripes(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, torch.ones(40, 5, dtype=dtype).T, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [neighbours, apart, in_two_runs, in_stripes])
class TestWhereverTheyLie:
    def test_finite_ones_pass(self, weights, dtype):
        check_all_finite(weights(dtype))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", NAMES)
    def test_the_others_are_named(self, weights, dtype, name, value):
        tensors = weights(dtype)
        tensors[name][-1] = value
        with pytest.raises(InputError, match=f"^{name} holds NaN or infinity in {str(dtype)[6:]}; accepted: finite"):
            check_all_finite(tensors)

    def test_infinities_that_cancel_out(self, weights, dtype):
        tensors = weights(dtype)
        tensors["b"][0], tensors["d"][0] = float("inf"), float("-inf")
        with pytest.raises(InputError, match="^b holds"):
            check_all_finite(tensors)

    def test_a_sum_that_overflows_is_no_fault(self, weights, dtype):
        tensors = weights(dtype)
        for tensor in tensors.values():
            tensor.fill_(torch.finfo(dtype).max)
        check_all_finite(tensors)
