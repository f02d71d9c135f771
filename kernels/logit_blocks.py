"""The two passes over all logits that choosing a token takes: the maxima of blocks, and their masses.

What follows them looks at a few blocks. Sums are in float64, of float32 terms.

Shapes: B rows of logits, R rows that are wanted, V entries, N blocks of BLOCK entries, of which a row's last may be
shorter, E entries of a block.
"""

import math

import torch
import torch.nn.functional as F

from kernels.backend import Backend
from kernels.dispatch import choose_backend

BLOCK = 128


def block_maxima(logits_BV: torch.Tensor, backend: Backend | None = None) -> torch.Tensor:
    """``(B, N)`` float32: the largest of each block of ``(B, V)`` logits of any float type, NaN where it holds any.

    Raises ValueError for a ``backend`` that cannot run here.
    """
    if choose_backend(backend, logits_BV, has_simd=False) == Backend.TRITON:
        from kernels.gpu import logit_blocks  # here, as Triton takes long to import

        return logit_blocks.block_maxima(logits_BV, BLOCK)
    return _blocks(logits_BV, BLOCK).amax(-1)


def block_masses(
    logits_BV: torch.Tensor,
    rows_R: torch.Tensor | None,
    peak_R: torch.Tensor,
    temperature_R: torch.Tensor,
    log_min_p_R: torch.Tensor | None = None,
    backend: Backend | None = None,
    block: int = BLOCK,
) -> torch.Tensor:
    """``(R, N)`` float64: the sum of each block's ``weights``, of the rows ``rows`` (int64); of all where it is None.

    ``block``, a power of two, is the number of its entries: with 1, masses are the entries' own, of the very terms that
    larger blocks sum. NaN, and a peak that is infinite, make masses NaN. Raises ValueError for a ``backend`` that
    cannot run here.
    """
    if choose_backend(backend, logits_BV, has_simd=False) == Backend.TRITON:
        from kernels.gpu import logit_blocks

        return logit_blocks.block_masses(logits_BV, rows_R, peak_R, temperature_R, log_min_p_R, block)
    blocks_RNE = _blocks(logits_BV if rows_R is None else logits_BV[rows_R], block)
    return weights(exponents(blocks_RNE, peak_R, temperature_R), log_min_p_R).sum(-1, dtype=torch.float64)


def exponents(values: torch.Tensor, peak_R: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
    """``(values - peak) / temperature``: logarithms of the probabilities up to a term, float32, 0 at the peak.

    ``values`` is (R, ...) float32.
    """
    return (values - _beside(peak_R, values)).div_(_beside(temperature_R, values))


def weights(exponents: torch.Tensor, log_min_p_R: torch.Tensor | None) -> torch.Tensor:
    """Probabilities up to a factor, ``exp(exponents)``, and 0 for what min-p drops: exponents under ``log_min_p``.

    ``exponents`` (R, ...) are lost.
    """
    if log_min_p_R is None:
        return exponents.exp_()
    found = exponents.exp()
    # A factor of 0 or 1 in place of a mask, which would take 7 times as long as the exponential on a CPU.
    return found.mul_(exponents.ge_(_beside(log_min_p_R, exponents)))


def _beside(by_row_R: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``by_row`` as (R, 1, ...), with the dimensions of ``values``."""
    return by_row_R.view((-1,) + (1,) * (values.dim() - 1))


def _blocks(logits_BV: torch.Tensor, block: int) -> torch.Tensor:
    """``(B, N, block)`` float32, each row's last block filled up with -inf."""
    logits_BV = logits_BV.float()
    width = logits_BV.shape[1]
    if width % block:
        logits_BV = F.pad(logits_BV, (0, -width % block), value=-math.inf)
    return logits_BV.reshape(len(logits_BV), -1, block)
