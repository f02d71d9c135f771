"""What launches have in common."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
