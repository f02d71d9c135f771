"""New keys and values, written to their slots of the arenas.

Shapes: T tokens, S slots, H KV heads, D head dimension.
"""

from functools import cache

import torch

from kernels import simd
from kernels.simd import Kernel, Target


def write_cache_(
    k_SHD: torch.Tensor, v_SHD: torch.Tensor, slots_T: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor
) -> None:
    """Copies token ``t``'s key and value to slot ``slots[t]``, int64, each slot at most once.

    Slots are not checked: they are the plan's own, and one beyond the arena would be written all the same.
    """
    T, H, D = k_THD.shape
    if not (simd.runs(k_THD, v_THD, k_SHD, v_SHD) and slots_T.is_contiguous()):
        k_SHD.index_copy_(0, slots_T, k_THD)
        v_SHD.index_copy_(0, slots_T, v_THD)
        return
    num_tasks, rows_per_task = simd.split_rows(T)
    pairs = ((k_THD, k_SHD), (v_THD, v_SHD))
    _compiled(simd.host(), k_THD.dtype, D).launch(
        *(num_tasks, T, rows_per_task, slots_T, H),
        *(x for pair in pairs for tensor in pair for x in (tensor, tensor.stride(0), tensor.stride(1))),
    )


@cache
def _compiled(target: Target, dtype: torch.dtype, head_dim: int) -> simd.CompiledKernel:
    k = Kernel("cache_write", target)
    element = {2: simd.I16, 4: simd.I32}[dtype.itemsize]
    first_tensor, arguments_each = 4, 3  # address, stride of tokens or slots, stride of heads

    def row_of(index, row, head):
        first = first_tensor + index * arguments_each
        return k.pointer(first, element) + row * k.integer(first + 1) + head * k.integer(first + 2)

    with k.rows(0, 1) as token:
        slot = k.pointer(2, simd.I64)[token]
        with k.range(0, k.integer(3)) as head:
            for new, arena in ((0, 1), (2, 3)):
                source, target_row = row_of(new, token, head), row_of(arena, slot, head)

                def copy(i, count, source=source, target_row=target_row):
                    target_row.store(i, source.load_padded(i, count, k.lanes), count)

                k.each_vector(head_dim, copy)
    return k.compile()
