"""The kernel of our own CPU attention: FlashAttention-2's loop (arXiv:2307.08691) over a table of tasks.

A task is some queries of one row and one KV head against the row's keys, which may lie in several ranges. Its query
heads of one group are so many more rows of the same products, so keys are read once for all of them. Keys and values
pass in blocks that fit the nearest cache, where keys are laid down transposed; scores of ``R`` rows by a few vectors of
keys stay in registers.

Products of bfloat16 use the CPU's own instruction for pairs where it has one, and round the probabilities to bfloat16;
everything else is float32. Few queries a key leave a task bound by memory: it asks for keys and values to come while it
works on those that are there.

Shapes: T queries, Hq query heads, G of them for each KV head, D head dimension, M rows of a task (its queries times G).
"""

import math
from enum import IntEnum
from functools import cache

import torch

from kernels import simd
from kernels.simd import Kernel, Pointer, Target, Value, Variable

_BLOCK_KEYS = 64
# Where memory decides, small blocks: keys and values that are on their way must not drive each other, or what is being
# worked on, out of the nearest cache. Of 16, 32, 48 and 64 keys, and 1 to 4 blocks ahead, these read fastest (Zen 5).
_MEMORY_BOUND_BLOCK_KEYS = 16
_BLOCKS_AHEAD = 2
# Words that a tile's loops take at a time: fewer branches and address computations.
_UNROLL = 4
_SUMS_AT_ONCE = 12


class Argument(IntEnum):
    """The kernel's arguments, in order. Strides are in elements; the last dimension's is 1."""

    TASKS = 0
    Q = 1
    K = 2
    V = 3
    OUT = 4  # (parts, T, Hq, D) float32
    LSE = 5  # (parts, T, Hq) float32
    MERGE = 6  # whether OUT and LSE hold a state, over other keys, that the new one is merged with
    Q_STRIDE = 7  # from token to token
    K_STRIDE = 8
    V_STRIDE = 9
    K_HEAD_STRIDE = 10
    V_HEAD_STRIDE = 11
    GROUP = 12  # G
    NUM_HEADS = 13  # Hq
    NUM_RANGES = 14  # of keys, that each task has
    SCALE = 15  # the softmax's, times log2(e)


class Task(IntEnum):
    """Columns of the task table, whose rows are the ranges of keys: a task's ranges follow each other."""

    QUERY = 0  # first query
    NUM_QUERIES = 1
    HEAD = 2  # KV head
    KEY = 3  # first key
    NUM_KEYS = 4
    VISIBLE = 5  # of these keys, how many the first query sees
    VISIBLE_STEP = 6  # how many more each further query sees: 1 under a causal mask
    OUT_ROW = 7  # row of OUT and LSE for the first query: T times the part, and the query
    COUNT = 8


class _Emitter:
    """Writes the kernel for one dtype, head dimension and tile of ``R`` rows.

    ``num_tiles``: of how many tiles a memory-bound task consists; 0 when tasks are bound by arithmetic. ``max_rows``:
    of a task.
    """

    def __init__(
        self, target: Target, dtype: torch.dtype, head_dim: int, tile_rows: int, num_tiles: int, max_rows: int
    ):
        self.kernel = k = Kernel("attention", target)
        self.W, self.D, self.R, self.num_tiles = target.lanes, head_dim, tile_rows, num_tiles
        self.block_keys = _MEMORY_BOUND_BLOCK_KEYS if num_tiles else _BLOCK_KEYS
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
        self.visible = k.array(simd.I32, rows)  # keys that a row sees

    def emit(self) -> Kernel:
        k = self.kernel
        self.group, self.scale = k.integer(Argument.GROUP), k.real(Argument.SCALE)
        tasks, num_ranges = k.pointer(Argument.TASKS, simd.I64), k.integer(Argument.NUM_RANGES)
        with k.tasks() as index:
            task = tasks + index * num_ranges * int(Task.COUNT)
            rows_end = (task[Task.NUM_QUERIES] * self.group + (self.R - 1)) // self.R * self.R
            self._start(task, rows_end)
            with k.range(0, num_ranges) as number:
                self._attend(task + number * int(Task.COUNT), rows_end)
            # Most often the next task is this thread's, too: its first keys come while this one's results are written.
            following = tasks + (index + 1).minimum(k.num_tasks - 1) * num_ranges * int(Task.COUNT)
            for argument in (Argument.K, Argument.V):
                _Rows(self, argument, following, following[Task.NUM_KEYS]).prefetch_first()
            self._finish(task)
        return k

    def _attend(self, keys: Pointer, rows_end: Value) -> None:
        """Takes the keys of one range, a row of the task table, into the task's sums."""
        k = self.kernel
        last_visible = keys[Task.VISIBLE] + keys[Task.VISIBLE_STEP] * (keys[Task.NUM_QUERIES] - 1)
        num_keys = keys[Task.NUM_KEYS].minimum(last_visible)
        k_rows, v_rows = (_Rows(self, argument, keys, num_keys) for argument in (Argument.K, Argument.V))
        k_rows.prefetch_first()
        v_rows.prefetch_first()
        self._see(keys)
        with k.range(0, num_keys, self.block_keys) as first_key:
            block_keys = (num_keys - first_key).minimum(self.block_keys)
            block_words = (block_keys + (self.per_word - 1)) // self.per_word
            self._lay_down_keys(k_rows, first_key, block_keys)
            self._lay_down_values(v_rows, first_key, block_words)
            with k.range(0, rows_end, self.R) as first_row:
                scores = self._scores(k_rows, first_key, first_row)
                rescale = self._softmax(scores, first_key, first_row)
                self._accumulate(rescale, v_rows, first_key, first_row, block_words)

    def _load_words(self, source: Pointer, word: int) -> Value:
        """A vector of words of one row from word ``word`` on, zero past the head dimension."""
        count = min(self.D_words - word, self.W)
        if not self.in_pairs:
            return source.load_floats(word, count)
        lanes = 2 * self.W
        return source.of(simd.I16).load_padded(2 * word, min(self.D - 2 * word, lanes), lanes).reinterpret(simd.I32)

    def _multiply_add(self, x: Value, y: Value, z: Value) -> Value:
        return self.kernel.dot_pairs(z, x, y) if self.in_pairs else self.kernel.fma(x, y, z)

    def _start(self, task: Pointer, rows_end: Value) -> None:
        """Copies the task's queries, and begins with the empty state."""
        k = self.kernel
        q = k.pointer(Argument.Q, self.element) + task[Task.HEAD] * self.group * self.D
        with k.range(0, rows_end) as row:
            self.visible[row] = 0  # the rows that fill the last tile see nothing
            self.max[row] = -math.inf
            self.sum.store(row * self.W, k.constant(0, simd.F32, self.W))
            for d in range(0, self.D_row, self.W):
                self.out.store(row * self.D_row + d, k.constant(0, simd.F32, self.W))
        with k.range(0, task[Task.NUM_QUERIES]) as query:
            token = q + (task[Task.QUERY] + query) * k.integer(Argument.Q_STRIDE)
            with k.range(0, self.group) as head:
                row = query * self.group + head
                for word in range(0, self.D_words_row, self.W):
                    self.queries.store(row * self.D_words_row + word, self._load_words(token + head * self.D, word))

    def _see(self, keys: Pointer) -> None:
        """Notes how many keys of a range each row sees."""
        k = self.kernel
        with k.range(0, keys[Task.NUM_QUERIES]) as query:
            visible = keys[Task.VISIBLE] + keys[Task.VISIBLE_STEP] * query
            visible = visible.maximum(0).minimum(keys[Task.NUM_KEYS])
            with k.range(0, self.group) as head:
                self.visible[query * self.group + head] = visible.convert(simd.I32)

    def _lay_down_keys(self, rows: "_Rows", first_key: Value, block_keys: Value) -> None:
        """A block of keys, transposed: its words of dimension ``d`` side by side. Past the last one anything may lie:
        the scores there are masked."""
        with self.kernel.range(0, block_keys, self.W) as key:
            sources = [rows.at(first_key + key + lane) for lane in range(self.W)]
            rows.prefetch_next(first_key + key, self.W)
            for word in range(0, self.D_words_row, self.W):
                square = [self._load_words(source, word).reinterpret(simd.I32) for source in sources]
                for i, column in enumerate(self.kernel.transpose(square)):
                    self.keys.store(key + (word + i) * self.block_keys, column.reinterpret(self.word))

    def _lay_down_values(self, rows: "_Rows", first_key: Value, block_words: Value) -> None:
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

    def _scores(self, k_rows: "_Rows", first_key: Value, first_row: Value) -> list[list[Value]]:
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
        self, rescale: list[Value], v_rows: "_Rows", first_key: Value, first_row: Value, block_words: Value
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

    def _finish(self, task: Pointer) -> None:
        """Writes the state: ``out / sum``, and the natural logarithm of ``sum * 2 ** max``."""
        k = self.kernel
        out, lse = k.pointer(Argument.OUT, simd.F32), k.pointer(Argument.LSE, simd.F32)
        with k.range(0, task[Task.NUM_QUERIES]) as query, k.range(0, self.group) as head:
            row = query * self.group + head
            place = (task[Task.OUT_ROW] + query) * k.integer(Argument.NUM_HEADS) + task[Task.HEAD] * self.group + head
            total = k.variable(self.sum.load(row * self.W, self.W).reduce(Value.__add__))
            best = k.variable(self.max[row])
            with k.when(k.integer(Argument.MERGE) > 0):
                self._merge(row, total, best, out + place * self.D, lse[place])
            is_empty = total.value.equals(0.0)
            inverse = is_empty.choose(total.value, 1.0 / total.value).spread()
            for d in range(0, self.D_row, self.W):
                normalised = self.out.load(row * self.D_row + d, self.W) * inverse
                (out + place * self.D).store(d, normalised, min(self.D - d, self.W))
            natural = best.value * math.log(2) + k.log(total.value)
            lse[place] = is_empty.choose(k.constant(-math.inf, simd.F32), natural)

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


class _Rows:
    """The rows of the arena that a task reads, of one KV head."""

    def __init__(self, emitter: _Emitter, argument: Argument, task: Pointer, count: Value):
        k = emitter.kernel
        stride, head_stride = {
            Argument.K: (Argument.K_STRIDE, Argument.K_HEAD_STRIDE),
            Argument.V: (Argument.V_STRIDE, Argument.V_HEAD_STRIDE),
        }[argument]
        self._emitter, self._stride = emitter, k.integer(stride)
        start = task[Task.HEAD] * k.integer(head_stride) + task[Task.KEY] * self._stride
        self._base = k.pointer(argument, emitter.element) + start
        self._last = count - 1

    def at(self, row: Value) -> Pointer:
        """Row ``row``; the last one in place of those past it, which may not be read, and whose scores are masked."""
        return self._base + row.minimum(self._last) * self._stride

    def prefetch_first(self) -> None:
        """Asks for the task's first blocks."""
        e = self._emitter
        if e.num_tiles:
            with e.kernel.range(0, (self._last + 1).minimum(_BLOCKS_AHEAD * e.block_keys)) as row:
                for line in range(self._lines):
                    (self._base + row * self._stride).prefetch(line * self._line, once=True)

    def prefetch_next(self, row: Value, count: int) -> None:
        """Where arithmetic decides: asks for the same rows of the next block. Many tiles' work lies before it."""
        e = self._emitter
        if not e.num_tiles:
            for i in range(count):
                next_row = self._base + (row + (i + e.block_keys)) * self._stride
                for line in range(self._lines):
                    next_row.prefetch(line * self._line, once=False)

    def ahead(self, first_key: Value, first_row: Value, num_steps: int) -> "_Ahead | None":
        """Requests for a later block, made in a tile's ``num_steps`` steps; None where memory does not decide."""
        return _Ahead(self, first_key, first_row, num_steps) if self._emitter.num_tiles else None

    @property
    def _line(self) -> int:
        """Elements of a cache line."""
        return 64 // self._emitter.dtype.itemsize

    @property
    def _lines(self) -> int:
        """Cache lines of a row."""
        return -(-self._emitter.D // self._line)


class _Ahead:
    """Requests for the rows of the block after the next, spread evenly over the steps of a task's tiles."""

    def __init__(self, rows: _Rows, first_key: Value, first_row: Value, num_steps: int):
        e = rows._emitter
        self._rows = rows
        all_steps = num_steps * e.num_tiles
        # A step asks for some rows, or for some of a row's lines.
        self._rows_per_step = -(-e.block_keys // all_steps)
        self._steps_per_row = max(1, all_steps // e.block_keys)
        self._first_step = first_row // e.R * num_steps
        self._base = rows._base + (first_key + _BLOCKS_AHEAD * e.block_keys) * rows._stride

    def prefetch(self, step: Value) -> None:
        rows, step = self._rows, self._first_step + step
        if self._steps_per_row == 1:
            for i in range(self._rows_per_step):
                row = self._base + (step * self._rows_per_step + i) * rows._stride
                for line in range(rows._lines):
                    row.prefetch(line * rows._line, once=True)
            return
        lines = -(-rows._lines // self._steps_per_row)
        part = self._base + step // self._steps_per_row * rows._stride
        part = part + step % self._steps_per_row * (lines * rows._line)
        for line in range(lines):
            part.prefetch(line * rows._line, once=True)


@cache
def compiled(
    target: Target, dtype: torch.dtype, head_dim: int, tile_rows: int, num_tiles: int, max_rows: int
) -> simd.CompiledKernel:
    return _Emitter(target, dtype, head_dim, tile_rows, num_tiles, max_rows).emit().compile()
