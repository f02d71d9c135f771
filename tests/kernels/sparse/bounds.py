"""Runs a sparse kernel on tables and tensors with forbidden pages around them: ``bounds.py BACKEND``. It ends well, or
by a signal, after the case that did it."""

import sys
from dataclasses import fields, replace

import torch
from guarded import guarded
from sparse_rows import make_rows, make_sparse_inputs, random_index

from kernels.sparse import AShape, BlockSparse, Dense, SparsePlan, TriShape, VerticalSlash, lower

# Triton's interpreter takes a millisecond for each block: as few as there can be.
HISTORIES = [[(1, [1])], [(70, [5, 70])], [(1, [70, 1]), (66, [3, 0, 150])]]
PATTERNS = {
    "a_shape": [AShape(3, 20), TriShape(3, 1, 5)],
    "vertical_slash": [VerticalSlash(9, 101)] * 2,
    "block_sparse": [BlockSparse(2)] * 2,
    "mixed": [VerticalSlash(9, 101), BlockSparse(2), Dense(), AShape(0, 1)],
}


def main(backend: str) -> None:
    for at_end in (False, True):
        for histories in HISTORIES:
            rows, arena = make_rows(*histories)
            for name, patterns in (PATTERNS | {"random": [None] * 4}).items():
                print(backend, "at the end" if at_end else "at the beginning", histories, name, flush=True)
                H = len(patterns)
                q, k, v = make_sparse_inputs(rows, arena, H, H // 2, 24, torch.float32)
                index = random_index(rows, H) if name == "random" else lower(patterns, q, k, rows, 0.2)
                expected = SparsePlan(rows, q.device, q.dtype, "aten").run(q, k, v, index, 0.2)
                tables = {f.name: guarded(getattr(index, f.name), at_end=at_end) for f in fields(index)}
                tensors = (guarded(x, at_end=at_end) for x in (q, k, v))
                found = SparsePlan(rows, q.device, q.dtype, backend).run(*tensors, replace(index, **tables), 0.2)
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, other)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
