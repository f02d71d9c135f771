"""What each pattern lets through, and that estimates find what was planted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sparse_rows import make_rows, make_sparse_inputs, random_index

from kernels.sparse import (
    AShape,
    BlockSparse,
    Dense,
    SparseIndex,
    SparseRows,
    TriShape,
    VerticalSlash,
    lower,
    num_pairs,
    num_seen,
)
from kernels.sparse.estimate import FIRST_KEYS, NEAREST, estimate_tiles, estimate_vertical_slash
from kernels.sparse.index import NOTHING, num_distances
from kernels.sparse.reference import expanded_mask


def masks(patterns, q_lens_and_pieces, D=16, dense_rows=None, seed=0):
    rows, arena = make_rows(*q_lens_and_pieces)
    q, k, _ = make_sparse_inputs(rows, arena, len(patterns), 1, D, torch.float32, seed)
    index = lower(patterns, q, k, rows, D**-0.5, dense_rows)
    return rows, index, [expanded_mask(index, rows, row) for row in range(rows.num_rows)]


def positions(rows, row=0):
    first = int(rows.q_positions[row])
    return torch.arange(first, first + int(rows.q_lens[row]))[:, None], torch.arange(int(rows.num_keys[row]))


@pytest.mark.parametrize("n_local", [1, 2, 64, 65, 66, 128, 129, 500])
@pytest.mark.parametrize("n_init", [0, 1, 70])
def test_a_shape(n_init, n_local):
    """All of what it names, and of the rest only what lies in a tile with some of it."""
    rows, _, (mask,) = masks([AShape(n_init, n_local)], [(200, [150, 200])])
    query, key = positions(rows)
    named = (key <= query) & ((query - key < n_local) | (key < n_init))
    assert (mask[0] | ~named).all()
    least = (query // 64 - key // 64 - 1) * 64 + 1  # between a query and a key of two tiles
    in_tile = (key <= query) & ((least < n_local) | (query // 64 == key // 64) | (key < n_init))
    assert torch.equal(mask[0], in_tile)


def test_tri_shape_has_its_last_rows_dense():
    rows, _, (a, t) = masks([TriShape(3, 10, 70)], [(300, [300]), (100, [300, 100])])
    for row, mask in ((0, a), (1, t)):
        query, key = positions(rows, row)
        num_keys = int(rows.num_keys[row])
        dense = query >= (num_keys - 70) // 64 * 64
        assert (mask[0] == (key <= query))[dense.squeeze(1)].all()
        assert not mask[0][~dense.squeeze(1)][:, 70].all()


def test_dense_and_rows_that_are_to_be():
    patterns = [Dense(), AShape(1, 1), BlockSparse(1), VerticalSlash(1, 1), BlockSparse(2)]
    rows, index, (sparse, dense) = masks(patterns, [(400, [400]), (90, [300, 90])], dense_rows=[False, True])
    query, key = positions(rows, 1)
    assert (dense == (key <= query)).all()
    assert sparse[0].sum() == 400 * 401 // 2 > sparse[1:].sum((1, 2)).max()


class TestVerticalSlash:
    def test_budgets_are_each_heads_own(self):
        g = torch.Generator().manual_seed(0)
        q, k = torch.randn(300, 4, 32, generator=g), torch.randn(300, 2, 32, generator=g)
        columns, distances = estimate_vertical_slash(q, [k], [3, 0], [40, 35], [150, 120], 0.2)
        assert [(row >= 0).sum().item() for row in columns] == [40, 35]
        assert [(row >= 0).sum().item() for row in distances] == [150, 120]
        for row in columns:
            assert set(range(FIRST_KEYS)) <= set(row.tolist())
        for row in distances:
            assert set(range(NEAREST)) <= set(row.tolist())
        other, _ = estimate_vertical_slash(q, [k], [3], [40], [150], 0.2)
        assert torch.equal(columns[:1].sort().values, other.sort().values)

    def test_sums_are_those_of_the_last_queries(self):
        """Against the softmax written out, in float64."""
        g = torch.Generator().manual_seed(1)
        q, k = torch.randn(90, 2, 16, generator=g), torch.randn(200, 1, 16, generator=g)
        columns, distances = estimate_vertical_slash(q, [k], [0, 1], [200, 199], [200, 199], 0.25)
        for head in range(2):
            position = torch.arange(136, 200)[:, None]
            scores = q[-64:, head].double() @ k[:, 0].double().T * 0.25
            p = scores.masked_fill(torch.arange(200) > position, float("-inf")).softmax(-1)
            by_column = p.sum(0)
            by_column[:FIRST_KEYS] = float("inf")
            by_distance = torch.zeros(200, dtype=torch.float64)
            by_distance.index_add_(0, (position - torch.arange(200)).clamp(min=0).flatten(), p.flatten())
            by_distance[:NEAREST] = float("inf")
            for found, sums in ((columns[head], by_column), (distances[head], by_distance)):
                found = found[found >= 0]
                assert len(set(found.tolist())) == len(found) == 200 - head
                assert (sums[found].diff()[~sums[found].diff().isnan()] <= 1e-6).all()

    @pytest.mark.parametrize(("verticals", "slashes"), [([700, 1500, 2100], [400, 1111]), ([999], [])])
    def test_finds_planted_lines(self, verticals, slashes):
        """Keys that all queries like, and distances at which queries and keys are alike: at the true budget at least
        95% of the attention mass is kept."""
        N, D = 2560, 64
        g = torch.Generator().manual_seed(0)
        q, k = torch.randn(N, D, generator=g) * 0.1, torch.randn(N, D, generator=g) * 0.1
        common = torch.randn(D, generator=g)
        q += common / common.norm() * 8
        k[verticals] += common / common.norm() * 16
        for distance in slashes:
            codes = torch.randn(N, D, generator=g)
            codes -= (codes @ common)[:, None] * common / common.square().sum()
            codes *= 11 / codes.norm(dim=-1, keepdim=True)
            q[distance:] += codes[distance:]
            k[:-distance] += codes[distance:]
        rows = SparseRows.contiguous([N], [0], [N])
        pattern = VerticalSlash(FIRST_KEYS + len(verticals), NEAREST + len(slashes))
        index = lower([pattern], q[:, None], k[:, None], rows, 1.0)
        mask = expanded_mask(index, rows, 0)[0]
        causal = torch.ones(N, N, dtype=torch.bool).tril()
        p = (q @ k.T).masked_fill(~causal, float("-inf")).softmax(-1)[2200:]
        assert (p * mask[2200:]).sum(-1).mean() >= 0.95
        assert int(num_seen(index, rows)[0]) < 0.3 * num_pairs(rows)


@pytest.mark.parametrize("cuts", [[100], [64, 64], [1, 2, 200], [299]])
def test_keys_may_come_in_pieces(cuts):
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(130, 4, 16, generator=g), torch.randn(300, 2, 16, generator=g)
    pieces = list(k.tensor_split([sum(cuts[: i + 1]) for i in range(len(cuts))]))
    assert len(pieces) == len(cuts) + 1
    whole, parts = (estimate_tiles(q, keys, [0, 3], [3, 2]) for keys in ([k], pieces))
    assert torch.equal(whole, parts)
    for one, other in zip(
        *(estimate_vertical_slash(q, keys, [1, 2], [40, 35], [120, 110], 0.25) for keys in ([k], pieces)), strict=True
    ):
        assert torch.equal(one.sort(-1).values, other.sort(-1).values)


@pytest.mark.parametrize("pattern", [VerticalSlash(300, 1), VerticalSlash(1, 300), BlockSparse(5)])
def test_what_covers_everything_is_not_estimated(pattern, monkeypatch):
    for name in ("estimate_vertical_slash", "estimate_tiles"):
        monkeypatch.setattr(f"kernels.sparse.patterns.{name}", None)
    rows, index, (mask,) = masks([pattern, Dense()], [(300, [300])])
    query, key = positions(rows)
    assert (mask == (key <= query)).all()


class TestBlocks:
    def test_keeps_the_most_alike_the_first_and_the_diagonal(self):
        g = torch.Generator().manual_seed(2)
        q, k = torch.randn(330, 2, 16, generator=g), torch.randn(500, 1, 16, generator=g)
        tiles = estimate_tiles(q, [k], [1, 0], [4, 2])
        assert tiles.shape == (2, 6, 3)  # positions 170 to 499 stand in tiles 2 to 7
        means_k = torch.stack([k[64 * j : 64 * j + 64, 0].mean(0) for j in range(8)])
        for number, (head, size) in enumerate(((1, 3), (0, 1))):
            for place in range(6):
                tile = 2 + place
                positions = range(max(170, 64 * tile), min(500, 64 * tile + 64))
                scores = torch.stack([q[p - 170, head] for p in positions]).mean(0) @ means_k.T
                best = [0, *(j for j in scores[:tile].argsort(descending=True).tolist() if j)][: min(size, tile)]
                found = tiles[number, place]
                assert sorted(found[found != NOTHING].tolist()) == sorted(best)

    def test_a_budget_of_one_keeps_the_first_and_the_diagonal(self):
        rows, _, (mask,) = masks([BlockSparse(1)], [(300, [300])])
        query, key = positions(rows)
        assert torch.equal(mask[0], (key <= query) & ((key < 64) | (key // 64 == query // 64)))


@pytest.mark.parametrize("histories", [[(300, [300])], [(70, [100, 41, 59]), (1, [130])], [(5, [5]), (0, [64])]])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_the_mask(histories, seed):
    rows, _ = make_rows(*histories)
    index = random_index(rows, 9, seed)
    expected = sum(expanded_mask(index, rows, row).sum((1, 2)) for row in range(rows.num_rows))
    assert num_seen(index, rows).tolist() == expected.tolist()
    causal = sum(int(n) * (int(p) + 1) + int(n) * (int(n) - 1) // 2 for n, p in zip(rows.q_lens, rows.q_positions))
    assert num_pairs(rows) == causal


def test_small_budgets_are_the_first_keys_and_the_nearest_distances():
    """Whatever the scores: these come before all others, in order."""
    g = torch.Generator().manual_seed(2)
    q, k = torch.randn(70, 1, 16, generator=g), torch.randn(500, 1, 16, generator=g)
    columns, distances = estimate_vertical_slash(q, [k], [0], [7], [9], 0.25)
    assert (sorted(columns[0].tolist()), sorted(distances[0].tolist())) == (list(range(7)), list(range(9)))


@pytest.mark.parametrize("histories", [[(150, [150])], [(5, [40, 200]), (64, [64]), (0, [3])]])
def test_every_index_that_is_made_can_be_used(histories):
    patterns = [Dense(), AShape(3, 70), TriShape(0, 1, 5), VerticalSlash(40, 110), BlockSparse(2), VerticalSlash(0, 1)]
    rows, index, _ = masks(patterns, histories)
    index.check()
    random_index(rows, 6).check()


@pytest.mark.parametrize(
    ("table", "value", "problem"),
    [
        ("columns", [[[5, 5]]], "columns do not rise, or one is negative"),
        ("columns", [[[-1, 5]]], "columns do not rise, or one is negative"),
        ("columns", [[[NOTHING, 5]]], "columns do not rise"),
        ("tiles", [[[[1, 1]]]], "tiles do not rise"),
        ("tiles_of_head", [0], "a head has columns and tiles"),
        ("tiles_of_head", [1], "tiles_of_head names lists that there are not"),
        ("tiles_of_head", [-5], "tiles_of_head names lists that there are not"),
        ("dense_from", [[-1]], "dense_from is negative"),
        ("ranges", [[[0, 2], [5, 9]]], "ranges do not rise from 0 to the last distance"),
        ("ranges", [[[-3, 2], [4, 4]]], "ranges do not rise from 0 to the last distance"),
        ("ranges", [[[0, 1], [3, 4]]], "ranges are not those of the distances"),
        ("ranges", [[[1, 2], [0, 1]]], "ranges do not rise"),
        ("distances", [[[False, True, False, False]]], "distance 0 is not in"),
    ],
)
def test_an_index_made_by_hand_is_checked(table, value, problem):
    distances = torch.tensor([[[True, True, False, False]]])
    good = SparseIndex.of(distances, torch.tensor([[[2, 4]]]), None, torch.tensor([[[[0, 1]]]]), torch.tensor([-1]))
    good.check()
    wrong = torch.tensor(value, dtype=getattr(good, table).dtype)
    wrong = wrong[None] if table == "ranges" else wrong
    with pytest.raises(ValueError, match=f"a sparse index cannot be used: {problem}"):
        replace(good, **{table: wrong}).check()


def test_an_index_is_small():
    """The published budgets, 32 heads, a million tokens: less than 1 GB. The estimate itself is not made here."""
    K = num_distances(2**20)
    g = torch.Generator().manual_seed(0)
    distances = torch.rand(1, 32, K, generator=g) < 0.2
    columns = torch.randint(2**20, (1, 32, 3500), generator=g)
    tiles = torch.zeros(1, 4, K, 100, dtype=torch.int32)
    index = SparseIndex.of(distances, columns, None, tiles, torch.arange(32) % 4)
    assert index.num_bytes < 60e6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AShape(-1, 1), "AShape: n_init is -1; accepted: an integer from 0 up"),
        (lambda: AShape(1, 0), "AShape: n_local is 0; accepted: an integer from 1 up"),
        (lambda: TriShape(1, 1, -1), "n_last is -1"),
        (lambda: VerticalSlash(1.5, 1), "num_vertical is 1.5"),
        (lambda: BlockSparse(0), "num_blocks is 0"),
    ],
)
def test_numbers_that_mean_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ranges_of_any_distances():
    g = torch.Generator().manual_seed(0)
    for K in (1, 2, 7, 64):
        index = SparseIndex.of(torch.rand(2, 3, K, generator=g) < 0.5)
        for row, head in np.ndindex(2, 3):
            listed = [d for first, last in index.ranges[row, head].tolist() for d in range(first, last)]
            assert listed == index.distances[row, head].nonzero().flatten().tolist() and listed[0] == 0
