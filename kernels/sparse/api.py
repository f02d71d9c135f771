"""Sparse attention over whole tensors, as the users of MInference (arXiv:2407.02490) call it, and more: fewer KV heads
than query heads, batches, queries of the last positions only, and the log-sum-exp, with which results merge.

Shapes: B batch, H query heads, Hkv KV heads, Q queries, N keys, D head dimension.
"""

from collections.abc import Callable

import torch

from kernels.arena_view import as_arenas
from kernels.backend import Backend
from kernels.sparse.attention import SparsePlan
from kernels.sparse.index import NOTHING, SparseIndex, num_distances
from kernels.sparse.patterns import AShape, BlockSparse, Pattern, VerticalSlash, distances_of_slashes, lower
from kernels.sparse.rows import SparseRows

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def vertical_slash_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    v_idx: torch.Tensor | int,
    s_idx: torch.Tensor | int,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend | str | None = None,
) -> Result:
    """Causal attention to some keys, *verticals*, and to those at some distances, *slashes*.

    ``q (B, H, Q, D)``, the last Q positions; ``k``, ``v (B, Hkv, N, D)``; ``v_idx (B, H, any)`` positions of keys;
    ``s_idx (B, H, any)`` distances of keys before the query, which become the 64 x 64 tiles that they run through.
    Indices may come in any order, and more than once; distance 0 is always in. Integers in place of both are budgets:
    so many are estimated from the last 64 queries. Returns ``(B, H, Q, D)``, with ``return_lse`` also ``(B, H, Q)``
    float32, natural log.

    Raises ValueError for tensors that do not fit together, and indices out of range (which waits for the device).
    """
    if type(v_idx) is int and type(s_idx) is int:
        return _of_pattern(q, k, v, VerticalSlash(v_idx, s_idx), scale, return_lse, backend)
    _check(q, k, v)
    N = k.shape[2]
    for name, indices in (("v_idx", v_idx), ("s_idx", s_idx)):
        _check_indices(name, indices, q, N)
    columns = v_idx.int().sort(-1).values
    again = columns[..., 1:] == columns[..., :-1]
    columns[..., 1:].masked_fill_(again, NOTHING)
    distances = torch.zeros(*q.shape[:2], num_distances(N), dtype=torch.bool, device=q.device)
    index = SparseIndex.of(distances_of_slashes(distances, s_idx.long()), columns)
    return _run(q, k, v, lambda *_: index, scale, return_lse, backend)


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    top_k: int,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend | str | None = None,
) -> Result:
    """Causal attention of each tile of 64 queries to ``top_k`` tiles of 64 keys: the diagonal's, the first, and those
    whose mean key has the largest product with the mean query. Shapes and errors as above."""
    return _of_pattern(q, k, v, BlockSparse(top_k), scale, return_lse, backend)


def streaming_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n_init: int,
    n_local: int,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend | str | None = None,
) -> Result:
    """Causal attention to the first ``n_init`` keys and to those less than ``n_local`` before the query, in whole tiles
    of 64 x 64: what else the tiles hold that these run through is seen too. Shapes and errors as above."""
    return _of_pattern(q, k, v, AShape(n_init, n_local), scale, return_lse, backend)


def _of_pattern(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None,
    return_lse: bool,
    backend: Backend | str | None,
) -> Result:
    _check(q, k, v)
    patterns = [pattern] * q.shape[1]
    return _run(q, k, v, lambda *packed: lower(patterns, *packed), scale, return_lse, backend)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    make_index: Callable[[torch.Tensor, torch.Tensor, SparseRows, float], SparseIndex],
    scale: float | None,
    return_lse: bool,
    backend: Backend | str | None,
) -> Result:
    B, H, Q, D = q.shape
    scale = D**-0.5 if scale is None else scale
    k_SHD, v_SHD, k_starts = as_arenas(k, v)
    rows = SparseRows.contiguous([Q] * B, k_starts, [k.shape[2]] * B)
    q_THD = q.transpose(1, 2).flatten(0, 1)
    plan = SparsePlan(rows, q.device, q.dtype, backend)
    out, lse = plan.run(q_THD, k_SHD, v_SHD, make_index(q_THD, k_SHD, rows, scale), scale)
    out = out.to(q.dtype).unflatten(0, (B, Q)).transpose(1, 2)
    return (out, lse.unflatten(0, (B, Q)).transpose(1, 2)) if return_lse else out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
    if any(x.dim() != 4 for x in (q, k, v)) or k.shape != v.shape:
        raise ValueError(f"{shapes}; accepted: q (B, H, Q, D), and k and v (B, Hkv, N, D)")
    (B, H, Q, D), (_, Hkv, N, _) = q.shape, k.shape
    if 0 in q.shape or 0 in k.shape or k.shape[0] != B or k.shape[3] != D or H % Hkv or Q > N:
        raise ValueError(
            f"{shapes}; accepted: equal batch and head dimension, heads a multiple of KV heads, no more queries than "
            "keys, and none of these 0"
        )
    if not q.is_floating_point():
        raise ValueError(f"q, k and v are {q.dtype}; accepted: floating-point numbers")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("sparse attention has no gradients; accepted: inference; call it in torch.no_grad()")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v are {found}; accepted: one dtype, on one device")


def _check_indices(name: str, indices: torch.Tensor, q: torch.Tensor, num_keys: int) -> None:
    if not isinstance(indices, torch.Tensor) or indices.dtype not in _INTEGERS or indices.shape[:-1] != q.shape[:2]:
        found = f"{tuple(indices.shape)} {indices.dtype}" if isinstance(indices, torch.Tensor) else repr(indices)
        raise ValueError(
            f"{name} is {found}; accepted: integers (batch, heads, any) = {tuple(q.shape[:2])} and any, or two "
            "integers in place of v_idx and s_idx"
        )
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_keys:
        raise ValueError(
            f"{name} goes from {int(indices.min())} to {int(indices.max())}; accepted: from 0 to {num_keys - 1}"
        )
