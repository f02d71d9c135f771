"""Attention of a tile of rows as sums that grow with each block of keys (FlashAttention-2, arXiv:2307.08691): how they
begin, take a block, and end. Both attention kernels are made of these.

Shapes: M rows of a tile, N keys of a block, D head dimension.
"""

import triton
import triton.language as tl


def cut_head_dim(head_dim: int) -> tuple[int, int]:
    """Two powers of two, the second possibly 0, that hold a head dimension: 80 is 64 and 16, 128 is 128 and 0."""
    main = 16
    while 2 * main <= head_dim:
        main *= 2
    rest = head_dim - main
    if rest <= 0:
        return main, 0
    rest = max(16, 1 << (rest - 1).bit_length())
    return (main, rest) if rest < main else (2 * main, 0)


@triton.jit
def begin_sums(
    q_rows, is_query,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``(q_main, q_rest, best, total, out_main, out_rest)`` before the first block: the queries that ``q_rows (M, 1)``
    point to, where ``is_query (M,)``; the best score so far, in base 2, and the sums of ``exp2(score - best)`` and of
    values that it weighs."""
    main = tl.arange(0, MAIN)
    q_main = tl.load(q_rows + main[None, :], mask=is_query[:, None] & (main < HEAD_DIM)[None, :], other=0.0)
    out_main = tl.zeros([BLOCK_M, MAIN], tl.float32)
    q_rest, out_rest = q_main, out_main
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        q_rest = tl.load(q_rows + rest[None, :], mask=is_query[:, None] & (rest < HEAD_DIM)[None, :], other=0.0)
        out_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    return q_main, q_rest, best, total, out_main, out_rest


@triton.jit
def _load(pointers, is_row, is_column, ROWS_MASKED: tl.constexpr, COLUMNS_MASKED: tl.constexpr):
    """A block, 0 where it is masked. Loads without a mask are the faster ones."""
    if ROWS_MASKED and COLUMNS_MASKED:
        return tl.load(pointers, mask=is_row & is_column, other=0.0)
    elif ROWS_MASKED:
        return tl.load(pointers, mask=is_row, other=0.0)
    elif COLUMNS_MASKED:
        return tl.load(pointers, mask=is_column, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def take_block(
    q_main, q_rest, best, total, out_main, out_rest,
    k_rows, v_rows, is_key, sees, scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes a block of keys into the sums of all rows of a tile. ``k_rows (1, N)`` and ``v_rows (N, 1)`` point to their
    rows. With ``MASKED`` only those of ``is_key (N,)`` are read, and a row takes those of ``sees (M or 1, N)``."""
    main = tl.arange(0, MAIN)
    is_main = main < HEAD_DIM
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        is_rest = rest < HEAD_DIM
    k_main = _load(k_rows + main[:, None], is_key[None, :], is_main[:, None], MASKED, MAIN > HEAD_DIM)
    # In float32 by float32's own products, not by TF32's.
    scores = tl.dot(q_main, k_main, input_precision="ieee")
    if REST > 0:
        k_rest = _load(k_rows + rest[:, None], is_key[None, :], is_rest[:, None], MASKED, MAIN + REST > HEAD_DIM)
        scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
    if MASKED:
        scores = tl.where(sees, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    # A row that has seen no key yet: any finite shift makes its probabilities 0.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    probs = tl.exp2(scores * scale - shift[:, None])
    rescale = tl.exp2(best - shift)
    best, total = new_best, total * rescale + tl.sum(probs, 1)
    v_main = _load(v_rows + main[None, :], is_key[:, None], is_main[None, :], MASKED, MAIN > HEAD_DIM)
    probs = probs.to(v_main.dtype)
    out_main = tl.dot(probs, v_main, out_main * rescale[:, None], input_precision="ieee")
    if REST > 0:
        v_rest = _load(v_rows + rest[None, :], is_key[:, None], is_rest[None, :], MASKED, MAIN + REST > HEAD_DIM)
        out_rest = tl.dot(probs, v_rest, out_rest * rescale[:, None], input_precision="ieee")
    return best, total, out_main, out_rest


@triton.jit
def store_sums(
    out_rows, out_main, out_rest, total, is_stored,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Writes the means of the values to ``out_rows (M, 1)``, where ``is_stored (M, 1)``. No ``total`` is 0."""
    inverse = (1.0 / total)[:, None]
    element = out_rows.dtype.element_ty
    main = tl.arange(0, MAIN)
    is_main = (main < HEAD_DIM)[None, :]
    tl.store(out_rows + main[None, :], (out_main * inverse).to(element), mask=is_stored & is_main)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        is_rest = (rest < HEAD_DIM)[None, :]
        tl.store(out_rows + rest[None, :], (out_rest * inverse).to(element), mask=is_stored & is_rest)
