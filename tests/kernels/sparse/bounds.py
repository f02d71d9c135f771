"""Runs a sparse kernel on tables and tensors with forbidden pages around them: ``bounds.py BACKEND``. It ends well, or
by a signal, after the case that did it."""

import sys
from dataclasses import fields, replace

import torch
from guarded import guarded
from sparse_rows import make_rows, make_sparse_inputs, random_index

from kernels.sparse import AShape, BlockSparse, Dense, SparsePlan, TriShape, VerticalSlash, lower

HISTORIES = [
    [(1, [1])], [(70, [70])], [(150, [70, 150]), (150, [70, 150])], [(1, [70, 1]), (64, [128]), (65, [3, 0, 400])],
]  # fmt: skip
PATTERNS = {
    "a_shape": [AShape(3, 20)] * 4,
    "tri_shape": [TriShape(3, 20, 5)] * 4,
    "vertical_slash": [VerticalSlash(9, 101)] * 4,
    "block_sparse": [BlockSparse(2)] * 4,
    "dense": [Dense()] * 4,
    "mixed": [VerticalSlash(9, 101), BlockSparse(2), Dense(), AShape(0, 1)],
}


def main(backend: str) -> None:
    for at_end in (False, True):
        for histories in HISTORIES:
            rows, arena = make_rows(*histories)
            q, k, v = make_sparse_inputs(rows, arena, 4, 2, 24, torch.float32)
            indices = {name: lower(patterns, q, k, rows, 0.2) for name, patterns in PATTERNS.items()}
            for name, index in (indices | {"random": random_index(rows, 4)}).items():
                print(backend, "at the end" if at_end else "at the beginning", histories, name, flush=True)
                plan = SparsePlan(rows, q.device, q.dtype, backend)
                expected = plan.run(q, k, v, index, 0.2)
                tables = {f.name: guarded(getattr(index, f.name), at_end=at_end) for f in fields(index)}
                found = plan.run(*(guarded(x, at_end=at_end) for x in (q, k, v)), replace(index, **tables), 0.2)
                assert all(map(torch.equal, found, expected))
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
