"""The operations around attention as they are meant, in float64, and inputs for them.

Shapes: T tokens, H heads, D head dimension, P rotated dimensions.
"""

import torch

# One rounding of the result, and in float32 that of a sum of squares.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normalised(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def activated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rotary_inputs(num_tokens, num_heads, head_dim, rotary_dim, interleaved, dtype):
    """Heads (T, H, D), and cosines and sines (T, 1, P) of random angles as the operations take them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype)
    angles = torch.randn(num_tokens, 1, rotary_dim // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    cos, sin = ([cos, cos], [-sin, sin])
    if interleaved:
        return x, *(torch.stack(pair, -1).flatten(-2) for pair in (cos, sin))
    return x, torch.cat(cos, -1), torch.cat(sin, -1)


def rotated(x, cos, sin, interleaved):
    """A pair is a complex number that turns by its angle; what follows the last pair stays."""
    size = cos.shape[-1]
    first, second = slice(size // 2), slice(size // 2, size)
    if interleaved:
        first, second = slice(0, size, 2), slice(1, size, 2)
    turned = torch.complex(x[..., first].double(), x[..., second].double())
    turned = turned * torch.complex(cos[..., first].double(), sin[..., second].double())
    result = x.double().clone()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result
