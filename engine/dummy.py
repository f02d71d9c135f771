"""Random weights for a model of which only the shape matters: no download, the same numbers everywhere.

A tensor depends on its name, its shape and the seed alone: not on the dtype, the rank, the machine or the version of
torch. So a model loaded with random weights equals, bit for bit, the checkpoint that ``tools/make_checkpoint.py``
writes, in float32, bfloat16 and float16 alike.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_BIAS_STD = 0.02
_BYTE_STD = math.sqrt((256**2 - 1) / 12)  # of a byte that is uniform over its 256 values


def dummy_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The weight ``name`` on the CPU: ones for a norm, else zero-mean noise.

    A matrix ``(out, in)`` has a standard deviation near ``1/sqrt(in)``, so that activations keep their size from
    layer to layer; a bias 0.02. A value is a random odd multiple, from -255 to 255, of half a power of two: eight
    significant bits, which every dtype holds exactly. That is also faster than normal noise, which nothing here needs.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    std = _BIAS_STD if name.endswith(".bias") else 1 / math.sqrt(shape[-1])
    step = 2.0 ** round(math.log2(std / _BYTE_STD))
    size = math.prod(shape)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    words = np.random.PCG64(key).random_raw(-(-size // 8)).astype("<u8", copy=False)
    noise = torch.from_numpy(words.view(np.uint8)[:size])
    return noise.to(dtype).sub_(127.5).mul_(step).view(shape)
