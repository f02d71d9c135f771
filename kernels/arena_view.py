"""Batched keys or values as an arena: the form in which kernels take them, with nothing copied.

Shapes: B batch, Hkv KV heads, N keys, D head dimension, S slots.
"""

import torch


def as_arena(x_BHND: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """``(S, Hkv, D)``, and the slot of each batch member's first key.

    A view, where a member's keys lie as far from the next one's as a whole number of keys takes; a copy where not.
    """
    B, Hkv, N, D = x_BHND.shape
    if x_BHND.stride(3) != 1 or x_BHND.stride(2) == 0 or (B > 1 and x_BHND.stride(0) % x_BHND.stride(2)):
        x_BHND = x_BHND.contiguous()
    step = x_BHND.stride(0) // x_BHND.stride(2) if B > 1 else 0
    size = ((B - 1) * step + N, Hkv, D)
    return x_BHND.as_strided(size, (x_BHND.stride(2), x_BHND.stride(1), 1)), [member * step for member in range(B)]


def as_arenas(k_BHND: torch.Tensor, v_BHND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Keys and values, and the slots that both have."""
    (k_SHD, starts), (v_SHD, v_starts) = as_arena(k_BHND), as_arena(v_BHND)
    if v_starts != starts:  # they lie unlike each other: both are copied
        (k_SHD, starts), (v_SHD, _) = as_arena(k_BHND.contiguous()), as_arena(v_BHND.contiguous())
    return k_SHD, v_SHD, starts
