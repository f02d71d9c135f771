"""The language of the kernels: vector code and loops are recorded as they are written down in Python, whose own loops
unroll.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from kernels.simd.compiled import NUM_HIDDEN, CompiledKernel
from kernels.simd.target import Target

try:
    import llvmlite.ir as ir
except ImportError:
    ir = None

if ir is not None:
    I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
    F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
    _POINTER = ir.PointerType()

    class _BFloatType(ir.types._BaseFloatType):
        """LLVM has it, llvmlite does not name it."""

        null = "0.0"
        intrinsic_name = "bf16"

        def __str__(self) -> str:
            return "bfloat"

    _BFloatType._create_instance()
    BF16 = _BFloatType()
    FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
    _NUM_BYTES = {I8: 1, I16: 2, I32: 4, I64: 8, F16: 2, F32: 4, F64: 8, BF16: 2}

Number = "Value | int | float"


class Value:
    """A scalar or a vector of the kernel. Operators emit instructions; Python numbers join as constants."""

    def __init__(self, kernel: "Kernel", ir_value: "ir.Value"):
        self.kernel, self.ir = kernel, ir_value
        self.type = ir_value.type
        self.lanes = self.type.count if isinstance(self.type, ir.VectorType) else None
        self.element = self.type.element if self.lanes else self.type

    def _like(self, other: Number) -> "Value":
        return other if isinstance(other, Value) else self.kernel.constant(other, self.element, self.lanes)

    def _binary(self, other: Number, for_ints: str, for_floats: str | None) -> "Value":
        name = for_ints if isinstance(self.element, ir.IntType) else for_floats
        return Value(self.kernel, getattr(self.kernel.builder, name)(self.ir, self._like(other).ir))

    def __add__(self, other: Number) -> "Value":
        return self._binary(other, "add", "fadd")

    def __radd__(self, other: Number) -> "Value":
        return self._like(other) + self

    def __sub__(self, other: Number) -> "Value":
        return self._binary(other, "sub", "fsub")

    def __rsub__(self, other: Number) -> "Value":
        return self._like(other) - self

    def __mul__(self, other: Number) -> "Value":
        return self._binary(other, "mul", "fmul")

    def __rmul__(self, other: Number) -> "Value":
        return self._like(other) * self

    def __truediv__(self, other: Number) -> "Value":
        return self._binary(other, "", "fdiv")

    def __rtruediv__(self, other: Number) -> "Value":
        return self._like(other) / self

    def __floordiv__(self, other: Number) -> "Value":
        return self._binary(other, "sdiv", None)

    def __mod__(self, other: Number) -> "Value":
        return self._binary(other, "srem", None)

    def __lshift__(self, other: Number) -> "Value":
        return self._binary(other, "shl", None)

    def __rshift__(self, other: Number) -> "Value":
        return self._binary(other, "lshr", None)

    def __and__(self, other: Number) -> "Value":
        return self._binary(other, "and_", None)

    def __or__(self, other: Number) -> "Value":
        return self._binary(other, "or_", None)

    def _compare(self, operator: str, other: Number) -> "Value":
        builder = self.kernel.builder
        compare = builder.icmp_signed if isinstance(self.element, ir.IntType) else builder.fcmp_ordered
        return Value(self.kernel, compare(operator, self.ir, self._like(other).ir))

    def __lt__(self, other: Number) -> "Value":
        return self._compare("<", other)

    def __gt__(self, other: Number) -> "Value":
        return self._compare(">", other)

    def equals(self, other: Number) -> "Value":
        return self._compare("==", other)

    def choose(self, yes: "Value", no: Number) -> "Value":
        """``yes`` where this condition holds, else ``no``."""
        return Value(self.kernel, self.kernel.builder.select(self.ir, yes.ir, yes._like(no).ir))

    def maximum(self, other: Number) -> "Value":
        other = self._like(other)
        return (self > other).choose(self, other)

    def minimum(self, other: Number) -> "Value":
        other = self._like(other)
        return (self < other).choose(self, other)

    def convert(self, element: "ir.Type") -> "Value":
        """To another element type, by value; integers are widened without sign."""
        was_int, is_int = isinstance(self.element, ir.IntType), isinstance(element, ir.IntType)
        if was_int and is_int:
            name = "zext" if element.width > self.element.width else "trunc"
        elif was_int or is_int:
            name = "sitofp" if was_int else "fptosi"
        else:
            name = "fpext" if _NUM_BYTES[element] > _NUM_BYTES[self.element] else "fptrunc"
        type_ = ir.VectorType(element, self.lanes) if self.lanes else element
        return Value(self.kernel, getattr(self.kernel.builder, name)(self.ir, type_))

    def reinterpret(self, element: "ir.Type") -> "Value":
        """The same bits as elements of another type, of another number when it is wider or narrower."""
        lanes = self.lanes * _NUM_BYTES[self.element] // _NUM_BYTES[element]
        return Value(self.kernel, self.kernel.builder.bitcast(self.ir, ir.VectorType(element, lanes)))

    def shuffle(self, other: "Value", lanes: Sequence[int]) -> "Value":
        """Lanes of both, those of ``other`` counted on from this one's; -1 leaves a lane undefined."""
        mask = ir.Constant(
            ir.VectorType(I32, len(lanes)),
            [ir.Constant(I32, ir.Undefined) if lane < 0 else ir.Constant(I32, lane) for lane in lanes],
        )
        return Value(self.kernel, self.kernel.builder.shuffle_vector(self.ir, other.ir, mask))

    def __getitem__(self, lane: int) -> "Value":
        return Value(self.kernel, self.kernel.builder.extract_element(self.ir, ir.Constant(I32, lane)))

    def with_lane(self, lane: int, scalar: "Value") -> "Value":
        return Value(self.kernel, self.kernel.builder.insert_element(self.ir, scalar.ir, ir.Constant(I32, lane)))

    def spread(self) -> "Value":
        """This scalar in every lane of a vector."""
        undefined = Value(self.kernel, ir.Constant(ir.VectorType(self.type, self.kernel.lanes), ir.Undefined))
        return undefined.with_lane(0, self).shuffle(undefined, [0] * self.kernel.lanes)

    def reduce(self, operation: Callable[["Value", "Value"], "Value"]) -> "Value":
        """All lanes combined, in halves."""
        value, lanes = self, self.lanes
        while lanes > 1:
            lanes //= 2
            value = operation(
                value.shuffle(value, range(lanes)), value.shuffle(value, range(lanes, 2 * lanes))
            )
        return value[0]


class Pointer:
    """An address of elements of one type. Vectors are read and written at any alignment."""

    def __init__(self, kernel: "Kernel", address: "ir.Value", element: "ir.Type"):
        self.kernel, self.address, self.element = kernel, address, element

    def __add__(self, index: Number) -> "Pointer":
        index = self.kernel.constant(index, I64) if isinstance(index, int) else index
        moved = self.kernel.builder.gep(self.address, [index.ir], source_etype=self.element)
        return Pointer(self.kernel, moved, self.element)

    def of(self, element: "ir.Type") -> "Pointer":
        """The same address, of elements of another type."""
        return Pointer(self.kernel, self.address, element)

    def __getitem__(self, index: Number) -> Value:
        return Value(self.kernel, self.kernel.builder.load((self + index).address, typ=self.element))

    def __setitem__(self, index: Number, value: Number) -> None:
        value = value if isinstance(value, Value) else self.kernel.constant(value, self.element)
        self.kernel.builder.store(value.ir, (self + index).address)

    def load(self, index: Number, lanes: int) -> Value:
        """The vector of ``lanes`` elements from ``index`` on."""
        return Value(
            self.kernel,
            self.kernel.builder.load(
                (self + index).address, typ=ir.VectorType(self.element, lanes), align=_NUM_BYTES[self.element]
            ),
        )

    def load_padded(self, index: Number, count: int, lanes: int) -> Value:
        """``count`` elements, and zeros up to ``lanes``, a power of two; nothing past ``count`` is read."""
        if count == lanes:
            return self.load(index, lanes)
        half = lanes // 2
        lower = self.load_padded(index, min(count, half), half) if half > 1 else self.load(index, 1)
        if count <= half:
            upper = self.kernel.constant(0, self.element, half)
        else:
            upper = (self + index).load_padded(half, count - half, half)
        return lower.shuffle(upper, range(lanes))

    def store(self, index: Number, vector: Value, count: int | None = None) -> None:
        """Writes the vector's lanes, or the first ``count`` of them."""
        count = vector.lanes if count is None else count
        if count == vector.lanes:
            self.kernel.builder.store(vector.ir, (self + index).address, align=_NUM_BYTES[self.element])
            return
        done = 0
        while done < count:
            piece = 1 << (count - done).bit_length() - 1
            (self + index).store(done, vector.shuffle(vector, range(done, done + piece)))
            done += piece

    def load_floats(self, index: Number, count: int | None = None) -> Value:
        """A full vector of float32 from ``count`` elements of any float type, padded with zeros."""
        lanes = self.kernel.lanes
        elements = self.load_padded(index, lanes if count is None else count, lanes)
        if self.element == BF16:  # a bfloat16 is the upper half of a float32
            return (elements.reinterpret(I16).convert(I32) << 16).reinterpret(F32)
        return elements if self.element == F32 else elements.convert(F32)

    def store_floats(self, index: Number, vector: Value, count: int | None = None) -> None:
        """Writes float32 lanes, or the first ``count`` of them, rounded to the element type."""
        if self.element == BF16:
            self.of(I16).store(index, self.kernel.round_to_bf16(vector), count)
        else:
            self.store(index, vector if self.element == F32 else vector.convert(self.element), count)

    def prefetch(self, index: Number, once: bool) -> None:
        """Asks for the cache line of an element, to be read ``once`` or often; the address need not exist."""
        read, locality, data = (ir.Constant(I32, code) for code in (0, 0 if once else 3, 1))
        self.kernel.intrinsic("llvm.prefetch.p0", ir.VoidType(), [(self + index).address, read, locality, data])


class Kernel:
    """A function under construction. Its arguments are numbered from 0, in the order in which a launch gives them."""

    def __init__(self, name: str, target: Target):
        self.name, self.target, self.lanes = name, target, target.lanes
        self.module = ir.Module(name)
        self._function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
        self._entry = self._function.append_basic_block("entry")
        self.builder = ir.IRBuilder(self._entry)
        self._arguments = Pointer(self, self._function.args[0], I64)

    def constant(self, number: int | float, element: "ir.Type", lanes: int | None = None) -> Value:
        number = number if isinstance(element, ir.IntType) else float(number)
        if lanes is None:
            return Value(self, ir.Constant(element, number))
        return Value(self, ir.Constant(ir.VectorType(element, lanes), [number] * lanes))

    def lane_indices(self) -> Value:
        """Vector of int32: 0, 1, 2 and so on."""
        return Value(self, ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes))))

    def integer(self, argument: int) -> Value:
        return self._arguments[NUM_HIDDEN + argument]

    @property
    def num_tasks(self) -> Value:
        """Of the launch."""
        return self._arguments[1]

    def thread(self) -> Value:
        """A number for the thread that runs this: below the number of threads, and no other's."""
        counter = Pointer(self, self.builder.inttoptr(self._arguments[0].ir, _POINTER), I64) + 1
        one = self.constant(1, I64)
        return Value(self, self.builder.atomic_rmw("add", counter.address, one.ir, "monotonic"))

    def real(self, argument: int) -> Value:
        """A float argument, as float32."""
        return self._arguments.of(F64)[NUM_HIDDEN + argument].convert(F32)

    def pointer(self, argument: int, element: "ir.Type") -> Pointer:
        """A tensor argument: the address of its first element."""
        return Pointer(self, self.builder.inttoptr(self.integer(argument).ir, _POINTER), element)

    def array(self, element: "ir.Type", count: int) -> Pointer:
        """Uninitialised room on the stack of each thread, aligned to a cache line."""
        with self.builder.goto_block(self._entry):
            address = self.builder.alloca(element, size=ir.Constant(I64, count))
            address.align = 64
            address.type = _POINTER
        return Pointer(self, address, element)

    def variable(self, value: Value) -> "Variable":
        return Variable(self, value)

    def intrinsic(self, name: str, result: "ir.Type", arguments: Sequence["ir.Value"]) -> "ir.Value":
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.builder.call(function, arguments)

    def _elementwise(self, name: str, *arguments: Value) -> Value:
        first = arguments[0]
        suffix = f"v{first.lanes}f32" if first.lanes else "f32"
        return Value(self, self.intrinsic(f"llvm.{name}.{suffix}", first.type, [a.ir for a in arguments]))

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """``x * y + z``, rounded once."""
        return self._elementwise("fma", x, y, z)

    def log(self, x: Value) -> Value:
        return self._elementwise("log", x)

    def sqrt(self, x: Value) -> Value:
        return self._elementwise("sqrt", x)

    def exp2(self, x: Value) -> Value:
        """``2 ** x`` of float32 to two units in the last place; 0 from -127 down.

        ``2 ** x = 2 ** n * exp(f * ln 2)`` with ``n`` the nearest integer: Taylor's series of degree 6 for |f| <= 1/2
        leaves 1.2e-7, and ``n`` is added to the exponent's bits.
        """
        x = (x < -127.0).choose(x._like(-127.0), x)  # this way round, NaN stays NaN
        whole = self._elementwise("nearbyint", x)
        fraction = x - whole
        power = self.constant(math.log(2) ** 6 / 720, F32, x.lanes)
        for degree in range(5, -1, -1):
            coefficient = math.log(2) ** degree / math.factorial(degree)
            power = self.fma(power, fraction, self.constant(coefficient, F32, x.lanes))
        return (power.reinterpret(I32) + (whole.convert(I32) << 23)).reinterpret(F32)

    def round_to_bf16(self, x: Value) -> Value:
        """Vector of int16: the bits of the nearest bfloat16, ties to even."""
        if self.target.has_bf16_pairs:  # the same extension rounds, too
            return x.convert(BF16).reinterpret(I16)
        bits = x.reinterpret(I32)
        nearest = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return x.equals(x).choose(nearest, quiet_nan).convert(I16)

    def dot_pairs(self, accumulator: Value, x: Value, y: Value) -> Value:
        """``accumulator + x0 * y0 + x1 * y1`` in each lane, of 32-bit lanes that hold two bfloat16 each."""
        pairs = [accumulator.ir, x.reinterpret(BF16).ir, y.reinterpret(BF16).ir]
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}"
        return Value(self, self.intrinsic(name, accumulator.type, pairs))

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """A square of 32-bit lanes, transposed, by shuffles that every CPU has as one instruction each."""
        size = len(rows)
        quads = range(0, size, 4)  # registers are made of parts of 4 lanes, which shuffles cross less easily

        def weave(x: Value, y: Value, width: int, upper: bool) -> Value:
            """The lower or upper halves of both's parts, ``width`` lanes of each in turn."""
            i, j = 2 * upper, 2 * upper + size
            order = (i, j, i + 1, j + 1) if width == 1 else (i, i + 1, j, j + 1)
            return x.shuffle(y, [part + lane for part in quads for lane in order])

        def gather(vectors: list[Value]) -> list[Value]:
            """Part ``p`` of all vectors, for every ``p``."""
            if len(vectors) == 1:
                return vectors
            even = [lane + i for lane in range(0, 2 * size, 8) for i in range(4)]
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            evens = gather([x.shuffle(y, even) for x, y in pairs])
            odds = gather([x.shuffle(y, [lane + 4 for lane in even]) for x, y in pairs])
            return [vector for both in zip(evens, odds, strict=True) for vector in both]

        columns: list[list[Value]] = [[] for _ in range(4)]  # by column within its part, then by quad of rows
        for quad in quads:
            a, b, c, d = rows[quad : quad + 4]
            for upper in (False, True):
                ab, cd = weave(a, b, 1, upper), weave(c, d, 1, upper)
                columns[2 * upper].append(weave(ab, cd, 2, False))
                columns[2 * upper + 1].append(weave(ab, cd, 2, True))
        gathered = [gather(column) for column in columns]
        return [gathered[i % 4][i // 4] for i in range(size)]

    @contextmanager
    def range(self, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
        """A loop of the compiled code; ``with`` its index as the body."""
        builder = self.builder
        start, stop = (x if isinstance(x, Value) else self.constant(x, I64) for x in (start, stop))
        origin = builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(start.ir, origin)
        builder.cbranch(builder.icmp_signed("<", index, stop.ir), body, done)
        builder.position_at_end(body)
        yield Value(self, index)
        index.add_incoming(builder.add(index, ir.Constant(I64, step)), builder.block)
        builder.branch(head)
        builder.position_at_end(done)

    def unrolled(self, count: int, times: int, body: Callable[[Value, int], None]) -> None:
        """Calls ``body(index, i)`` for every index below ``count``, for ``times`` of them in each turn of a loop, which
        ``i`` numbers."""
        whole = count // times * times
        with self.range(0, whole, times) as index:
            for i in range(times):
                body(index + i, i)
        for i in range(whole, count):
            body(self.constant(i, I64), i - whole)

    def each_vector(self, length: int, body: Callable[[Number, int], None]) -> None:
        """Calls ``body(index, count)`` for all of ``length`` elements, a vector at a time: in a loop of the compiled
        code, and once for what is left."""
        whole = length // self.lanes * self.lanes
        if whole:
            with self.range(0, whole, self.lanes) as index:
                body(index, self.lanes)
        if whole < length:
            body(whole, length - whole)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """The body runs where a scalar condition holds."""
        with self.builder.if_then(condition.ir):
            yield

    @contextmanager
    def rows(self, num_rows: int, rows_per_task: int) -> Iterator[Value]:
        """The loop over rows that a launch of ``split_rows`` shares out, by the arguments that hold these numbers."""
        size = self.integer(rows_per_task)
        with self.tasks() as task, self.range(task * size, (task * size + size).minimum(self.integer(num_rows))) as row:
            yield row

    @contextmanager
    def tasks(self) -> Iterator[Value]:
        """The loop over a launch's tasks that its threads share: the next few go to the thread that asks next."""
        builder = self.builder
        counter = Pointer(self, builder.inttoptr(self._arguments[0].ir, _POINTER), I64)
        count, at_once = self.num_tasks, self._arguments[2]
        claim, body, done = (builder.append_basic_block(name) for name in ("claim", "body", "done"))
        builder.branch(claim)
        builder.position_at_end(claim)
        first = Value(self, builder.atomic_rmw("add", counter.address, at_once.ir, "monotonic"))
        builder.cbranch((first < count).ir, body, done)
        builder.position_at_end(body)
        with self.range(first, (first + at_once).minimum(count)) as index:
            yield index
        builder.branch(claim)
        builder.position_at_end(done)

    def compile(self) -> CompiledKernel:
        self.builder.ret_void()
        return CompiledKernel(self.name, self.target, str(self.module))


class Variable:
    """A value that loops change; LLVM keeps it in a register."""

    def __init__(self, kernel: Kernel, value: Value):
        self._cell = kernel.array(value.type, 1)
        self.value = value

    @property
    def value(self) -> Value:
        return self._cell[0]

    @value.setter
    def value(self, value: Value) -> None:
        self._cell[0] = value
