"""The linear layer's product.

Shapes: T rows, I input features, O output features.
"""

from functools import cache

import torch
import torch.nn.functional as F

# Elements of a weight that are widened at once: few enough to stay in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 21
# With fewer rows the product is bound by reading the weight, and narrow weights read faster.
_MIN_ROWS = 16


@cache
def _multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in ``dtype``."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, ``(T, O)``, accumulated in float32 and rounded once.

    A CPU without instructions for half precision multiplies it element by element, some ten times slower than
    float32. There the weight is widened to float32 block by block: 64 rows of bfloat16 by (4096, 768) take 4 ms
    instead of 20 on two cores of an AMD EPYC (Zen 3), best of 20.
    """
    narrow = x_TI.device.type == "cpu" and not _multiplies_natively(x_TI.dtype)
    if not narrow or x_TI.shape[0] < _MIN_ROWS:
        return F.linear(x_TI, weight_OI, bias_O)
    wide_TI = x_TI.float()
    out_TO = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])
    step = max(1, _BLOCK_ELEMENTS // weight_OI.shape[1])
    for first in range(0, weight_OI.shape[0], step):
        rows = slice(first, first + step)
        out_TO[:, rows] = F.linear(wide_TI, weight_OI[rows].float(), None if bias_O is None else bias_O[rows].float())
    return out_TO
