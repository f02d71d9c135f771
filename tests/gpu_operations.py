"""Where operations by Triton are tested, and how close they come: on a GPU, or by Triton's interpreter."""

import operations
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = operations.TOLERANCE | ({torch.bfloat16: 2**-7} if DEVICE.type == "cpu" else {})


def assert_close(actual, expected, dtype):
    """``actual``, on the device, is ``expected``, in float64 on the CPU."""
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
