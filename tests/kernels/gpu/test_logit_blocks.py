"""Blocks of logits by Triton against float64, and draws from them against PyTorch's."""

import math

import pytest
import torch
from gpu_operations import DEVICE, TOLERANCE
from operations import randn

from engine.distributed import TPGroup
from engine.sampling import NotFiniteError, RowParams, SamplingParams, greedy, sample
from kernels import Backend
from kernels.logit_blocks import BLOCK, block_masses, block_maxima

pytest.importorskip("triton", reason="Triton is for Linux")

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# Blocks of one program and of several, whole and not.
WIDTHS = pytest.mark.parametrize("width", [1, 127, 128, 129, 1000, 16 * BLOCK, 5003])


def blocks(logits):
    """``(B, N, BLOCK)`` float64."""
    padded = torch.nn.functional.pad(logits.double(), (0, -logits.shape[1] % BLOCK), value=-math.inf)
    return padded.unflatten(1, (-1, BLOCK))


def masses(logits, rows, *by_row, block=BLOCK):
    arguments = (x if x is None else x.to(DEVICE) for x in (logits, rows, *by_row))
    return block_masses(*arguments, backend=Backend.TRITON, block=block).cpu()


@DTYPES
@WIDTHS
def test_maxima(width, dtype):
    logits = randn(3, width, dtype=dtype) * 9
    logits[1] = -math.inf
    logits[2, width // 2 :] = -math.inf
    found = block_maxima(logits.to(DEVICE), Backend.TRITON)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), blocks(logits).amax(-1), rtol=0, atol=0)


@DTYPES
@WIDTHS
@pytest.mark.parametrize("has_min_p", [False, True])
def test_masses(has_min_p, width, dtype):
    logits, temperature = randn(3, width, dtype=dtype) * 9, torch.tensor([0.3, 1.0, 20.0])
    logits[2, width // 2 + 1 :] = -math.inf
    peak = logits.float().amax(-1)
    log_min_p = torch.tensor([-math.inf, math.log(1e-3), math.log(0.5)]) if has_min_p else None
    exponents = (blocks(logits) - peak[:, None, None]) / temperature[:, None, None]
    kept = exponents >= log_min_p[:, None, None] if has_min_p else torch.ones_like(exponents, dtype=torch.bool)
    found = masses(logits, None, peak, temperature, log_min_p)
    assert found.dtype == torch.float64
    # A float32 exponent of -80 is off by up to 4e-6.
    expected = (exponents.exp() * kept).sum(-1)
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=1e-30)


def test_sums_are_in_float64():
    """A float32 sum would lose most of what lies beside the peak."""
    logits = torch.full((1, BLOCK), -18.0)
    logits[0, 0] = 0.0
    expected = 1 + (BLOCK - 1) * math.exp(-18)
    assert float(masses(logits, None, torch.zeros(1), torch.ones(1), None)) == pytest.approx(expected, rel=1e-11)


@DTYPES
def test_entries_weigh_what_their_blocks_sum(dtype):
    """So that a draw within a block goes by the same terms as that of the block."""
    logits = randn(2, 300, dtype=dtype) * 5
    by_row = logits.float().amax(-1), torch.tensor([0.6, 1.4]), torch.tensor([-4.0, -math.inf])
    entries = masses(logits, None, *by_row, block=1)
    assert entries.shape == (2, 300) and torch.equal(entries, entries.float().double())
    sums = torch.nn.functional.pad(entries, (0, -300 % BLOCK)).unflatten(1, (-1, BLOCK)).sum(-1)
    torch.testing.assert_close(masses(logits, None, *by_row), sums, rtol=1e-14, atol=0)


def test_of_some_rows():
    logits, rows = randn(7, 300, dtype=torch.bfloat16), torch.tensor([1, 4, 6])
    peak, temperature, log_min_p = logits[rows].float().amax(-1), torch.tensor([0.5, 1.0, 2.0]), torch.full((3,), -2.0)
    found = masses(logits, rows, peak, temperature, log_min_p)
    assert torch.equal(found, masses(logits[rows], None, peak, temperature, log_min_p))
    expected = block_masses(logits, rows, peak, temperature, log_min_p, Backend.ATEN)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_strided_rows():
    wide = randn(6, 700, dtype=torch.float32)
    peak, temperature = torch.zeros(3), torch.ones(3)
    found = masses(wide[::2, 30:400], None, peak, temperature, None)
    assert torch.equal(found, masses(wide[::2, 30:400].contiguous(), None, peak, temperature, None))
    maxima = block_maxima(wide.to(DEVICE)[::2, 30:400], Backend.TRITON)
    assert torch.equal(maxima.cpu(), block_maxima(wide[::2, 30:400], Backend.ATEN))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_no_rows_and_one(num_rows):
    logits, by_row = randn(num_rows, 300, dtype=torch.float32), torch.ones(num_rows)
    assert block_maxima(logits.to(DEVICE), Backend.TRITON).shape == (num_rows, 3)
    assert masses(logits, None, by_row, by_row, None).shape == (num_rows, 3)
    some = masses(randn(2, 300, dtype=torch.float32), torch.arange(num_rows), by_row, by_row, None)
    assert some.shape == (num_rows, 3)


@DTYPES
def test_nan_shows(dtype):
    logits = randn(2, 400, dtype=dtype)
    logits[0, 130], logits[1, 399] = math.nan, math.nan
    is_nan = torch.tensor([[False, True, False, False], [False, False, False, True]])
    assert torch.equal(block_maxima(logits.to(DEVICE), Backend.TRITON).isnan().cpu(), is_nan)
    for log_min_p in (None, torch.tensor([-1.0, -math.inf])):
        assert torch.equal(masses(logits, None, torch.zeros(2), torch.ones(2), log_min_p).isnan(), is_nan)
    assert masses(logits, None, torch.full((2,), math.nan), torch.ones(2), None).isnan().all()


def test_min_p_keeps_what_reaches_it_exactly():
    """The threshold is an entry's own exponent, as PyTorch rounds it."""
    logits, temperature = randn(1, 1000, dtype=torch.float32) * 3, torch.tensor([0.7])
    peak = logits.amax(-1)
    exponents = (logits - peak[:, None]) / temperature[:, None]
    for threshold in exponents[0].sort(descending=True).values[:200:10]:
        kept = block_masses(logits, None, peak, temperature, threshold[None], Backend.ATEN)
        found = masses(logits, None, peak, temperature, threshold[None])
        torch.testing.assert_close(found, kept, rtol=1e-6, atol=0)


class TestDraws:
    PARAMS = {
        "greedy": SamplingParams(temperature=0),
        "cool": SamplingParams(temperature=0.7),
        "min_p": SamplingParams(temperature=1.5, min_p=0.05),
        "top_k": SamplingParams(top_k=20),
        "top_p": SamplingParams(top_p=0.8),
        "unrestricted": SamplingParams(temperature=1.0),
    }

    @DTYPES
    def test_are_those_of_pytorch(self, dtype):
        params = RowParams.of([*self.PARAMS.values()] * 8, DEVICE)
        generator = torch.Generator().manual_seed(1)
        for seed in range(3):
            logits = (randn(48, 1500, dtype=dtype, seed=seed) * 3).to(DEVICE)
            logits[:, 1490:] = -math.inf
            uniforms = torch.rand(48, generator=generator, dtype=torch.float64).to(DEVICE)
            ours, theirs = (
                sample(logits, params, uniforms, 0, TPGroup(), backend) for backend in (Backend.TRITON, Backend.ATEN)
            )
            assert torch.equal(ours, theirs)

    def test_ties_go_to_the_lowest_id(self):
        logits = torch.zeros(2, 500)
        logits[0, [130, 131, 499]] = 2.0
        assert greedy(logits.to(DEVICE), 0, TPGroup(), Backend.TRITON).tolist() == [130, 0]

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("kind", PARAMS)
    @pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
    def test_logits_that_are_not_finite_are_refused(self, kind, value):
        logits = torch.zeros(3, 500)
        logits[1, 77] = value
        row_params = RowParams.of([self.PARAMS[kind]] * 3, DEVICE)
        with pytest.raises(NotFiniteError, match="row 1"):
            uniforms = torch.full((3,), 0.5, dtype=torch.float64, device=DEVICE)
            sample(logits.to(DEVICE), row_params, uniforms, 0, TPGroup(), Backend.TRITON)
