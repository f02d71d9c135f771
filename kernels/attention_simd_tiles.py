"""What our CPU attention kernels do with keys: FlashAttention-2's loop (arXiv:2307.08691), a block of them at a time.

A task is some queries against keys of one KV head. The query heads of one group may be so many more rows of the same
products. Blocks of keys and values fit the nearest cache, where keys are laid down transposed; scores of ``R`` rows by
a few vectors of keys stay in registers.

Products of bfloat16 use the CPU's own instruction for pairs where it has one, and round the probabilities to bfloat16;
everything else is float32.

Which tasks there are and which keys each has, is the kernels' own: ranges in ``attention_simd_kernel.py``, what a mask
picks in ``sparse/simd_kernel.py``.

Shapes: D head dimension, M rows of a task, R of them in a tile.
"""

import math
from typing import Protocol

import torch

from kernels import simd
from kernels.simd import Kernel, Pointer, Value, Variable

# Words that a tile's loops take at a time: fewer branches and address computations.
_UNROLL = 4
_SUMS_AT_ONCE = 12


class Rows(Protocol):
    """Keys or values of one KV head, in the order in which a task takes them."""

    def at(self, row: Value) -> Pointer:
        """Row ``row``; past the last one any that may be read, as its scores are masked."""

    def prefetch_next(self, row: Value, count: int) -> None:
        """Asks for what stands in the next block where the ``count`` rows from ``row`` on stand in this one."""

    def ahead(self, first_key: Value, first_row: Value, num_steps: int) -> "Ahead | None":
        """Requests for a later block, to be made in a tile's ``num_steps`` steps; None where memory does not decide."""


class Ahead(Protocol):
    def prefetch(self, step: Value) -> None:
        """What is due in this step."""


class TileEmitter:
    """Writes the parts of a kernel for one dtype, head dimension, tile of ``R`` rows and size of a block of keys.

    ``max_rows``: of a task. ``scale``: the softmax's, times log2(e).
    """

    def __init__(
        self,
        kernel: Kernel,
        dtype: torch.dtype,
        head_dim: int,
        tile_rows: int,
        block_keys: int,
        max_rows: int,
        scale: Value,
    ):
        self.kernel, self.scale = kernel, scale
        k, target = kernel, kernel.target
        self.W, self.D, self.R, self.block_keys = target.lanes, head_dim, tile_rows, block_keys
        # Vectors side by side in a tile: R rows of them, what they are made of, and one more fill the registers.
        self.columns = 4 if target.num_registers == 32 else 2
        self.dtype, self.element = dtype, simd.FLOATS[dtype]
        # A word is what one lane multiplies: a float32, or two neighbouring bfloat16.
        self.in_pairs = dtype == torch.bfloat16 and target.has_bf16_pairs
        self.word, self.per_word = (simd.I32, 2) if self.in_pairs else (simd.F32, 1)
        self.D_words = -(-head_dim // self.per_word)
        self.D_row = -(-head_dim // self.W) * self.W  # padded to whole vectors
        self.D_words_row = -(-self.D_words // self.W) * self.W
        self.block_words = self.block_keys // self.per_word
        rows = max_rows + tile_rows  # the last tile may not be full
        self.queries = k.array(self.word, rows * self.D_words_row)  # (M, words of D)
        self.keys = k.array(self.word, self.D_words_row * self.block_keys)  # (words of D, keys)
        self.values = k.array(self.word, self.block_words * self.D_row)  # (words of keys, D)
        self.probs = k.array(self.word, tile_rows * self.block_words)  # (R, words of keys)
        self.out = k.array(simd.F32, rows * self.D_row)  # (M, D): the sum of exp2(score - max) * value
        self.max = k.array(simd.F32, rows)  # of the scores so far, in base 2
        self.sum = k.array(simd.F32, rows * self.W)  # of exp2(score - max), lane by lane
        self.visible = k.array(simd.I32, rows)  # how many of the keys a row sees: the first so many

    def whole_tiles(self, num_rows: Value) -> Value:
        """So many rows, rounded up to whole tiles."""
        return (num_rows + (self.R - 1)) // self.R * self.R

    def start(self, rows_end: Value) -> None:
        """Begins with the empty state, of rows that see nothing, up to ``rows_end``, in whole tiles."""
        k = self.kernel
        with k.range(0, rows_end) as row:
            self.visible[row] = 0
            self.max[row] = -math.inf
            self.sum.store(row * self.W, k.constant(0, simd.F32, self.W))
            for d in range(0, self.D_row, self.W):
                self.out.store(row * self.D_row + d, k.constant(0, simd.F32, self.W))

    def copy_query(self, row: Value, query: Pointer) -> None:
        for word in range(0, self.D_words_row, self.W):
            self.queries.store(row * self.D_words_row + word, self._load_words(query, word))

    def attend(self, k_rows: Rows, v_rows: Rows, num_keys: Value, rows_end: Value) -> None:
        """Takes the first ``num_keys`` keys into the sums of all rows, as far as each sees them."""
        k = self.kernel
        with k.range(0, num_keys, self.block_keys) as first_key:
            block_keys = (num_keys - first_key).minimum(self.block_keys)
            block_words = (block_keys + (self.per_word - 1)) // self.per_word
            self._lay_down_keys(k_rows, first_key, block_keys)
            self._lay_down_values(v_rows, first_key, block_words)
            with k.range(0, rows_end, self.R) as first_row:
                scores = self._scores(k_rows, first_key, first_row)
                rescale = self._softmax(scores, first_key, first_row)
                self._accumulate(rescale, v_rows, first_key, first_row, block_words)

    def finish(self, row: Value, out: Pointer, lse: Pointer, merges: Value | None = None) -> None:
        """Writes a row's state: ``out / sum``, and the natural logarithm of ``sum * 2 ** max``. Where ``merges`` holds,
        together with the state, over other keys, that is there."""
        k = self.kernel
        total = k.variable(self.sum.load(row * self.W, self.W).reduce(Value.__add__))
        best = k.variable(self.max[row])
        if merges is not None:
            with k.when(merges):
                self._merge(row, total, best, out, lse[0])
        is_empty = total.value.equals(0.0)
        inverse = is_empty.choose(total.value, 1.0 / total.value).spread()
        for d in range(0, self.D_row, self.W):
            normalised = self.out.load(row * self.D_row + d, self.W) * inverse
            out.store(d, normalised, min(self.D - d, self.W))
        natural = best.value * math.log(2) + k.log(total.value)
        lse[0] = is_empty.choose(k.constant(-math.inf, simd.F32), natural)

    def _load_words(self, source: Pointer, word: int) -> Value:
        """A vector of words of one row from word ``word`` on, zero past the head dimension."""
        count = min(self.D_words - word, self.W)
        if not self.in_pairs:
            return source.load_floats(word, count)
        lanes = 2 * self.W
        return source.of(simd.I16).load_padded(2 * word, min(self.D - 2 * word, lanes), lanes).reinterpret(simd.I32)

    def _multiply_add(self, x: Value, y: Value, z: Value) -> Value:
        return self.kernel.dot_pairs(z, x, y) if self.in_pairs else self.kernel.fma(x, y, z)

    def _lay_down_keys(self, rows: Rows, first_key: Value, block_keys: Value) -> None:
        """A block of keys, transposed: its words of dimension ``d`` side by side. Past the last one anything may lie:
        the scores there are masked."""
        with self.kernel.range(0, block_keys, self.W) as key:
            sources = [rows.at(first_key + key + lane) for lane in range(self.W)]
            rows.prefetch_next(first_key + key, self.W)
            for word in range(0, self.D_words_row, self.W):
                square = [self._load_words(source, word).reinterpret(simd.I32) for source in sources]
                for i, column in enumerate(self.kernel.transpose(square)):
                    self.keys.store(key + (word + i) * self.block_keys, column.reinterpret(self.word))

    def _lay_down_values(self, rows: Rows, first_key: Value, block_words: Value) -> None:
        """A block of values: as they are, or the rows of two keys woven into pairs."""
        with self.kernel.range(0, block_words) as word:
            sources = [rows.at(first_key + word * self.per_word + i) for i in range(self.per_word)]
            rows.prefetch_next(first_key + word * self.per_word, self.per_word)
            target = self.values + word * self.D_row
            step = self.W * self.per_word
            for d in range(0, self.D_row, step):
                count = min(self.D - d, step)
                if not self.in_pairs:
                    target.store(d, sources[0].load_floats(d, count))
                    continue
                first, second = (source.of(simd.I16).load_padded(d, count, step) for source in sources)
                woven = [lane + key * step for lane in range(step) for key in range(2)]
                for half in range(min(2, (self.D_row - d) // self.W)):
                    pairs = first.shuffle(second, woven[half * step : (half + 1) * step])
                    target.store(d + half * self.W, pairs.reinterpret(simd.I32))

    def _scores(self, k_rows: Rows, first_key: Value, first_row: Value) -> list[list[Value]]:
        """Queries times keys of one tile: for each of R rows, the block's vectors of keys."""
        k = self.kernel
        num_vectors = self.block_keys // self.W
        scores: list[list[Value]] = [[] for _ in range(self.R)]
        for first in range(0, num_vectors, self.columns):
            num_columns = min(self.columns, num_vectors - first)
            zero = k.constant(0, simd.F32, self.W)
            # Sums that are added to in turn, so that few of them do not wait for each other's results.
            turns = min(_UNROLL, max(1, _SUMS_AT_ONCE // (self.R * num_columns)))
            sums = [[[k.variable(zero) for _ in range(num_columns)] for _ in range(self.R)] for _ in range(turns)]
            queries = [self.queries + (first_row + r) * self.D_words_row for r in range(self.R)]
            keys = self.keys + first * self.W
            ahead = k_rows.ahead(first_key, first_row, self.D_words) if first == 0 else None

            def multiply(word, turn, sums=sums, queries=queries, keys=keys, ahead=ahead):
                if ahead:
                    ahead.prefetch(word)
                own = sums[turn % len(sums)]
                columns = [keys.load(word * self.block_keys + c * self.W, self.W) for c in range(len(own[0]))]
                for r in range(self.R):
                    query = queries[r][word].spread()
                    for total, column in zip(own[r], columns, strict=True):
                        total.value = self._multiply_add(query, column, total.value)

            k.unrolled(self.D_words, _UNROLL, multiply)
            for r in range(self.R):
                scores[r] += [sum((other[r][c].value for other in sums[1:]), s.value) for c, s in enumerate(sums[0][r])]
        return scores

    def _softmax(self, scores: list[list[Value]], first_key: Value, first_row: Value) -> list[Value]:
        """Writes the tile's probabilities relative to the new maxima; returns what older sums of a row are worth."""
        k = self.kernel
        first_key = first_key.convert(simd.I32)
        scale = self.scale.spread()
        shifts, old = [], k.constant(0, simd.F32, self.W)
        for r in range(self.R):
            row = first_row + r
            visible = (self.visible[row] - first_key).spread()
            for c, score in enumerate(scores[r]):
                scores[r][c] = (k.lane_indices() + c * self.W < visible).choose(score * scale, -math.inf)
            best = scores[r][0]
            for score in scores[r][1:]:
                best = best.maximum(score)
            best = best.reduce(Value.maximum).maximum(self.max[row])
            # A row that has seen no key yet: any finite shift makes its probabilities 0.
            shift = best.equals(-math.inf).choose(k.constant(0, simd.F32), best)
            shifts.append(shift)
            old = old.with_lane(r, self.max[row] - shift)
            self.max[row] = best
        old = k.exp2(old)
        rescale = [old[r].spread() for r in range(self.R)]
        for r in range(self.R):
            shift = shifts[r].spread()
            total = self.sum.load((first_row + r) * self.W, self.W) * rescale[r]
            for c, score in enumerate(scores[r]):
                prob = k.exp2(score - shift)
                total = total + prob
                if self.in_pairs:
                    self.probs.of(simd.BF16).store_floats(r * self.block_keys + c * self.W, prob)
                else:
                    self.probs.store(r * self.block_keys + c * self.W, prob)
            self.sum.store((first_row + r) * self.W, total)
        return rescale

    def _accumulate(
        self, rescale: list[Value], v_rows: Rows, first_key: Value, first_row: Value, block_words: Value
    ) -> None:
        """``out = out * rescale + probabilities times values``, for one tile."""
        k = self.kernel
        for first in range(0, self.D_row // self.W, self.columns):
            columns = range(first, min(first + self.columns, self.D_row // self.W))
            places = [[(first_row + r) * self.D_row + c * self.W for c in columns] for r in range(self.R)]
            sums = [
                [k.variable(self.out.load(place, self.W) * rescale[r]) for place in places[r]] for r in range(self.R)
            ]
            ahead = v_rows.ahead(first_key, first_row, self.block_words) if first == 0 else None
            with k.range(0, block_words) as word:
                if ahead:
                    ahead.prefetch(word)
                values = [self.values.load(word * self.D_row + c * self.W, self.W) for c in columns]
                for r in range(self.R):
                    prob = self.probs[word + r * self.block_words].spread()
                    for total, value in zip(sums[r], values, strict=True):
                        total.value = self._multiply_add(prob, value, total.value)
            for r in range(self.R):
                for place, total in zip(places[r], sums[r], strict=True):
                    self.out.store(place, total.value)

    def _merge(self, row: Value, total: Variable, best: Variable, out: Pointer, lse: Value) -> None:
        """Adds a state over other keys to a row's sums: one key more, of score ``lse`` and value ``out``."""
        k = self.kernel
        score = lse * math.log2(math.e)
        shift = best.value.maximum(score)
        shift = shift.equals(-math.inf).choose(k.constant(0, simd.F32), shift)
        own, other = (k.exp2((x - shift).spread()) for x in (best.value, score))
        for d in range(0, self.D_row, self.W):
            merged = self.out.load(row * self.D_row + d, self.W) * own
            merged = k.fma(out.load_padded(d, min(self.D - d, self.W), self.W), other, merged)
            self.out.store(row * self.D_row + d, merged)
        total.value = total.value * own[0] + other[0]
        best.value = shift
