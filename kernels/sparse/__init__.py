"""Sparse attention for prompts: each head's queries look at some of the keys.

A pattern (``patterns.py``) becomes, with the queries and keys of a layer, an index (``index.py``): the one form in
which kernels take masks. ``reference.py`` writes an index out; every kernel is tested against that.
"""

from kernels.sparse.api import block_sparse_attention, streaming_forward, vertical_slash_sparse_attention
from kernels.sparse.attention import SparsePlan, available_sparse_backends
from kernels.sparse.density import num_pairs, num_seen
from kernels.sparse.estimate import LAST_QUERIES
from kernels.sparse.index import SparseIndex
from kernels.sparse.memory import predicted_index_bytes
from kernels.sparse.patterns import AShape, BlockSparse, Dense, Pattern, TriShape, VerticalSlash, lower
from kernels.sparse.rows import TILE, SparseRows

__all__ = [
    "LAST_QUERIES", "TILE", "AShape", "BlockSparse", "Dense", "Pattern", "SparseIndex", "SparsePlan", "SparseRows",
    "TriShape", "VerticalSlash", "available_sparse_backends", "block_sparse_attention", "lower", "num_pairs",
    "num_seen", "predicted_index_bytes", "streaming_forward", "vertical_slash_sparse_attention",
]  # fmt: skip
