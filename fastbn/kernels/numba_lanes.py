"""Blocks of lanes for the Numba kernels: 128 bytes of arithmetic as one value, and the memory they come from and go to.

Numba has no vectors, and what LLVM makes of a loop over numbers is not ours to choose. So a block is a type of Numba's here,
an LLVM vector of 32 float32 or 16 float64 lanes: a few registers on every processor, whose lanes are the same everywhere.
Loads convert from the storage type, stores convert to it. Memory is given by its address, an integer, and an index.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

BLOCK = 128  # bytes of arithmetic

WORD = ir.IntType(64)
_SHORT = ir.IntType(16)
FLOATS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


def _features() -> dict[str, bool]:
    """What Numba compiles for: this processor, or another one that NUMBA_CPU_NAME or NUMBA_CPU_FEATURES says."""
    *_, listed = cpu_target.target_context.codegen().magic_tuple()
    return {feature[1:]: feature.startswith("+") for feature in listed.split(",")}


def _has(feature: str) -> bool:
    """Whether there is an instruction, which on x86-64 needs AVX."""
    return not llvm.get_process_triple().startswith("x86_64") or (FEATURES.get("avx", False) and FEATURES.get(feature, False))


FEATURES = _features()
HAS_FMA, HAS_HALF = _has("fma"), _has("f16c")
REGISTER = 64 if FEATURES.get("avx512f", False) else 32 if FEATURES.get("avx", False) else 16  # bytes


class Lanes(types.Type):
    """A block of numbers."""

    def __init__(self, number: Any):
        self.number = number
        self.count = BLOCK // (number.bitwidth // 8)
        super().__init__(name=f"Lanes({number}, {self.count})")

    @property
    def vector(self) -> Any:
        """LLVM's type of it."""
        return ir.VectorType(FLOATS[self.number], self.count)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Lanes):
        super().__init__(dmm, fe_type, fe_type.vector)


BLOCKS = {number: Lanes(number) for number in FLOATS}


def _register(operation: Any, instruction: str) -> None:
    """Let an operator of Python's be an instruction on blocks."""

    class Template(ConcreteTemplate):  # type: ignore[misc]
        key = operation
        cases = [signature(block, block, block) for block in BLOCKS.values()]  # noqa: RUF012

    infer_global(operation)(Template)
    for block in BLOCKS.values():
        lower_builtin(operation, block, block)(lambda context, builder, signature, arguments: getattr(builder, instruction)(*arguments))


_register(operator.add, "fadd")
_register(operator.sub, "fsub")
_register(operator.mul, "fmul")


class Storage(NamedTuple):
    """How elements lie in memory, and the type of the arithmetic on them."""

    name: str
    size: int
    number: Any
    kind: Any  # LLVM's type of an element


STORAGE = {
    "float32": Storage("float32", 4, types.float32, ir.FloatType()),
    "float64": Storage("float64", 8, types.float64, ir.DoubleType()),
    "bfloat16": Storage("bfloat16", 2, types.float32, _SHORT),
    "float16": Storage("float16", 2, types.float32, ir.HalfType()),
}


def _emit(result: Any, arguments: tuple[Any, ...], body: Callable[..., Any]) -> Any:
    """An intrinsic of fixed types, from what writes its instructions: body(builder, *values)."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        found = body(builder, *values)
        return context.get_dummy_value() if result is types.none else found

    def typed(typingctx: Any, *_: Any) -> Any:
        return result(*arguments), generate

    names = ", ".join(f"a{i}" for i in range(len(arguments)))
    scope: dict[str, Any] = {"typed": typed}
    exec(f"def f(typingctx{', ' if names else ''}{names}): return typed(typingctx)", scope)  # noqa: S102  Numba counts arguments
    return intrinsic(scope["f"])


def _at(builder: Any, address: Any, index: Any, kind: Any, size: int) -> Any:
    byte = ir.IntType(8)
    start, offset = builder.inttoptr(address, byte.as_pointer()), builder.mul(index, WORD(size))
    return builder.bitcast(builder.gep(start, [offset], source_etype=byte), kind.as_pointer())


def _constant(vector: Any, value: Any) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _first(builder: Any, n: Any, count: int) -> Any:
    """A mask of the first n lanes."""
    words = ir.VectorType(ir.IntType(32), count)
    wanted = builder.insert_element(ir.Constant(words, ir.Undefined), builder.trunc(n, ir.IntType(32)), ir.IntType(32)(0))
    wanted = builder.shuffle_vector(wanted, ir.Constant(words, ir.Undefined), _constant(words, 0))
    return builder.icmp_signed("<", ir.Constant(words, list(range(count))), wanted)


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def local(builder: Any, kind: Any) -> Any:
    """Room on the stack, made once in a function."""
    with builder.goto_entry_block():
        room = builder.alloca(kind)
        room.align = BLOCK
        return room


def _vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count) if count else kind


def _widened(builder: Any, storage: Storage, v: Any, count: int) -> Any:
    """From what lies in memory to numbers; a count of 0 is one number."""
    if storage.name == "bfloat16":
        words = _vector(ir.IntType(32), count)
        sixteen = _constant(words, 16) if count else words(16)
        return builder.bitcast(builder.shl(builder.zext(v, words), sixteen), _vector(ir.FloatType(), count))
    if storage.name == "float16":
        return builder.fpext(v, _vector(ir.FloatType(), count)) if HAS_HALF else _widened_half(builder, v, count)
    return v


def _narrowed(builder: Any, storage: Storage, v: Any, count: int) -> Any:
    """From numbers to what lies in memory: rounded to nearest, ties to even."""
    if storage.name == "float16":
        return builder.fptrunc(v, ir.VectorType(ir.HalfType(), count)) if HAS_HALF else _narrowed_half(builder, v, count)
    if storage.name != "bfloat16":
        return v
    words = ir.VectorType(ir.IntType(32), count)
    bits = builder.bitcast(v, words)
    high = builder.lshr(bits, _constant(words, 16))
    tie = builder.and_(high, _constant(words, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(tie, _constant(words, 0x7FFF))), _constant(words, 16))
    quiet = builder.or_(high, _constant(words, 0x40))  # NaN stays NaN
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", v, v), quiet, rounded), ir.VectorType(_SHORT, count))


# Half precision where the processor cannot convert it: LLVM would call functions that nothing here provides.


def _widened_half(builder: Any, v: Any, count: int) -> Any:
    words, floats = _vector(ir.IntType(32), count), _vector(ir.FloatType(), count)

    def number(kind: Any, value: Any) -> Any:
        return _constant(kind, value) if count else kind(value)

    bits = builder.zext(builder.bitcast(v, _vector(_SHORT, count)), words)
    magnitude = builder.shl(builder.and_(bits, number(words, 0x7FFF)), number(words, 13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, floats), number(floats, 2.0**112)), words)  # exact
    endless = builder.icmp_unsigned(">=", magnitude, number(words, 0x0F800000))
    scaled = builder.select(endless, builder.or_(magnitude, number(words, 0x7F800000)), scaled)
    sign = builder.shl(builder.and_(bits, number(words, 0x8000)), number(words, 16))
    return builder.bitcast(builder.or_(scaled, sign), floats)


def _narrowed_half(builder: Any, v: Any, count: int) -> Any:
    words, floats = ir.VectorType(ir.IntType(32), count), ir.VectorType(ir.FloatType(), count)

    def number(value: int) -> Any:
        return _constant(words, value)

    bits = builder.bitcast(v, words)
    magnitude = builder.and_(bits, number(0x7FFFFFFF))
    tie = builder.and_(builder.lshr(magnitude, number(13)), number(1))
    normal = builder.lshr(builder.add(builder.sub(magnitude, number(0x38000000 - 0x0FFF)), tie), number(13))
    # Where half precision is subnormal, a sum with 0.5 rounds at its last bit.
    added = builder.fadd(builder.bitcast(magnitude, floats), _constant(floats, 0.5))
    small = builder.sub(builder.bitcast(added, words), number(0x3F000000))
    nan = builder.or_(builder.and_(builder.lshr(magnitude, number(13)), number(0x3FF)), number(0x7E00))
    large = builder.select(builder.icmp_unsigned(">", magnitude, number(0x7F800000)), nan, number(0x7C00))
    half = builder.select(builder.icmp_unsigned("<", magnitude, number(0x38800000)), small, normal)
    half = builder.select(builder.icmp_unsigned(">=", magnitude, number(0x47800000)), large, half)
    half = builder.or_(half, builder.and_(builder.lshr(bits, number(16)), number(0x8000)))
    return builder.bitcast(builder.trunc(half, ir.VectorType(_SHORT, count)), ir.VectorType(ir.HalfType(), count))


class Memory:
    """Loads and stores of one storage type, and the arithmetic of its type: functions for compiled code, as the end of `__init__` says."""

    def __init__(self, name: str):
        storage = STORAGE[name]
        number = storage.number
        block = BLOCKS[number]
        count, size, kind = block.count, storage.size, storage.kind
        raw = ir.VectorType(kind, count)
        lanes = block.vector
        zero = ir.Constant(lanes, None)
        i64 = types.intp
        masked = size >= 4 or (bool(FEATURES.get("avx512bw", False)) and bool(FEATURES.get("avx512vl", False)))
        # Masks know integers of 16 bits, and half precision not everywhere.
        plain = ir.VectorType(_SHORT if size == 2 else kind, count)
        suffix = f"v{count}{'i16' if size == 2 else 'f32' if size == 4 else 'f64'}.p0"

        def load(builder: Any, address: Any, index: Any) -> Any:
            return _widened(builder, storage, builder.load(_at(builder, address, index, raw, size), align=size), count)

        def store(builder: Any, address: Any, index: Any, v: Any) -> None:
            builder.store(_narrowed(builder, storage, v, count), _at(builder, address, index, raw, size), align=size)

        def stream(builder: Any, address: Any, index: Any, v: Any) -> None:
            pointer = _at(builder, address, index, raw, size)
            done = builder.store(_narrowed(builder, storage, v, count), pointer, align=64)
            done.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))

        def read(builder: Any, address: Any, index: Any, n: Any) -> Any:
            room = local(builder, lanes)
            with builder.if_else(builder.icmp_signed(">=", n, WORD(count)), likely=True) as (whole, part):
                with whole:
                    builder.store(load(builder, address, index), room)
                with part:
                    builder.store(load_part(builder, address, index, n), room)
            return builder.load(room)

        def write(builder: Any, address: Any, index: Any, v: Any, n: Any, nontemporal: Any) -> None:
            with builder.if_else(builder.icmp_signed(">=", n, WORD(count)), likely=True) as (whole, part):
                with whole, builder.if_else(builder.icmp_signed("!=", nontemporal, WORD(0))) as (past, through):
                    with past:
                        stream(builder, address, index, v)
                    with through:
                        store(builder, address, index, v)
                with part:
                    store_part(builder, address, index, v, n)

        def copy(builder: Any, to: Any, source: Any, n: Any) -> None:
            nbytes = builder.mul(n, WORD(size))
            _call(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), to, source, nbytes, ir.IntType(1)(0))

        def load_part(builder: Any, address: Any, index: Any, n: Any) -> Any:
            if masked:
                pointer = _at(builder, address, index, plain, size)
                mask, rest = _first(builder, n, count), ir.Constant(plain, None)
                v = _call(builder, f"llvm.masked.load.{suffix}", plain, pointer, ir.IntType(32)(size), mask, rest)
                return _widened(builder, storage, builder.bitcast(v, raw), count)
            room = local(builder, raw)
            builder.store(ir.Constant(raw, None), room)
            copy(builder, room, _at(builder, address, index, raw, size), n)
            return _widened(builder, storage, builder.load(room), count)

        def store_part(builder: Any, address: Any, index: Any, v: Any, n: Any) -> None:
            v = _narrowed(builder, storage, v, count)
            if masked:
                pointer = _at(builder, address, index, plain, size)
                mask = _first(builder, n, count)
                _call(builder, f"llvm.masked.store.{suffix}", ir.VoidType(), builder.bitcast(v, plain), pointer, ir.IntType(32)(size), mask)
            else:
                room = local(builder, raw)
                builder.store(v, room)
                copy(builder, _at(builder, address, index, raw, size), room, n)

        def element(builder: Any, address: Any, index: Any) -> Any:
            v = _widened(builder, storage, builder.load(_at(builder, address, index, kind, size), align=size), 0)
            return v if number is types.float64 else builder.fpext(v, ir.DoubleType())

        def splat(builder: Any, value: Any) -> Any:
            value = value if number is types.float64 else builder.fptrunc(value, ir.FloatType())
            v = builder.insert_element(ir.Constant(lanes, ir.Undefined), value, ir.IntType(32)(0))
            return builder.shuffle_vector(v, ir.Constant(lanes, ir.Undefined), _constant(ir.VectorType(ir.IntType(32), count), 0))

        def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
            if HAS_FMA:
                return _call(builder, f"llvm.fma.v{count}f{number.bitwidth}", lanes, a, b, c)
            return builder.fadd(builder.fmul(a, b), c)

        def first(builder: Any, v: Any, n: Any) -> Any:
            return builder.select(_first(builder, n, count), v, zero)

        def fill(builder: Any, v: Any, n: Any) -> Any:
            words = ir.VectorType(ir.IntType(32), count)
            return builder.select(_first(builder, n, count), v, builder.shuffle_vector(v, v, ir.Constant(words, None)))

        def total(builder: Any, v: Any) -> Any:
            n = count
            while n > 1:
                n //= 2
                halves = (ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(low, low + n))) for low in (0, n))
                v = builder.fadd(*(builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), half) for half in halves))
            value = builder.extract_element(v, ir.IntType(32)(0))
            return value if number is types.float64 else builder.fpext(value, ir.DoubleType())

        def through(builder: Any, dy: Any, slope: Any) -> Any:
            return builder.select(builder.fcmp_ordered("==", slope, zero), zero, builder.fmul(dy, slope))

        def counted(builder: Any, v: Any, slope: Any) -> Any:
            return builder.select(builder.fcmp_ordered("==", slope, zero), zero, v)

        def activation_inverse(builder: Any, v: Any, slope: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", v, zero), v, builder.fdiv(v, slope))

        def coarse(builder: Any, v: Any) -> Any:
            bits, dropped = number.bitwidth, 16 if number is types.float32 else 45
            words = ir.VectorType(ir.IntType(bits), count)
            kept = builder.and_(builder.bitcast(v, words), _constant(words, (1 << bits) - (1 << dropped)))
            return builder.bitcast(kept, lanes)

        def finite(builder: Any, v: Any) -> Any:
            return builder.select(builder.fcmp_ordered("==", builder.fsub(v, v), zero), v, zero)

        self.lanes = count
        self.size = size  # bytes of an element
        self.number = number
        # A block at an address and an index of elements; the same of n elements, if it has more: its other lanes are read as zero.
        # `write` is told whether to write past the caches, which needs whole cache lines.
        self.load = _emit(block, (i64, i64), load)
        self.store = _emit(types.none, (i64, i64, block), store)
        self.read = _emit(block, (i64, i64, i64), read)
        self.write = _emit(types.none, (i64, i64, block, i64, i64), write)
        self.element = _emit(types.float64, (i64, i64), element)  # one element
        self.splat = _emit(block, (types.float64,), splat)  # a block of one number
        self.fma = _emit(block, (block, block, block), fma)  # a * b + c
        self.first = _emit(block, (block, i64), first)  # the first n lanes; the others are zero
        self.fill = _emit(block, (block, i64), fill)  # the same; the others are as the first one
        self.total = _emit(types.float64, (block,), total)  # the sum of all lanes
        self.through = _emit(block, (block, block), through)  # dy times a slope, and 0 where that is 0
        self.counted = _emit(block, (block, block), counted)  # a block, and 0 where a slope is 0
        self.activation_inverse = _emit(block, (block, block), activation_inverse)  # x, or x / slope where it is not positive
        self.coarse = _emit(block, (block,), coarse)  # a block of few digits
        self.finite = _emit(block, (block,), finite)  # zero where a block is infinite or NaN


MEMORY = {name: Memory(name) for name in STORAGE}


# ---- One number, and what is not arithmetic ----


class Numbers:
    """Single numbers of one type in memory: get(address, index), and put(address, index, value)."""

    def __init__(self, number: Any):
        kind, size = FLOATS.get(number, WORD), number.bitwidth // 8

        def get(builder: Any, address: Any, index: Any) -> Any:
            return builder.load(_at(builder, address, index, kind, size), align=size)

        def put(builder: Any, address: Any, index: Any, value: Any) -> None:
            builder.store(value, _at(builder, address, index, kind, size), align=size)

        self.get = _emit(number, (types.intp, types.intp), get)
        self.put = _emit(types.none, (types.intp, types.intp, number), put)


NUMBERS = {number: Numbers(number) for number in (*FLOATS, types.intp)}


def fields_of(record: Any) -> Any:
    """An intrinsic that gives the fields of a structure at an address."""

    def typed(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(record))

        return record(types.intp), generate

    return intrinsic(typed)


def _invoke(builder: Any, function: Any, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    builder.call(builder.inttoptr(function, kind.as_pointer()), arguments)


def _parallel(builder: Any, function: Any, unit: Any, job: Any, units: Any, threads: Any, reverse: Any, nbytes: Any) -> None:
    threads, reverse = builder.trunc(threads, ir.IntType(32)), builder.trunc(reverse, ir.IntType(32))
    _invoke(builder, function, unit, job, units, threads, reverse, nbytes, WORD(0))


def _least(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", b, a), b, a)


def _stack(builder: Any) -> Any:
    with builder.goto_entry_block():
        room = builder.alloca(ir.ArrayType(ir.IntType(8), STACK))
        room.align = BLOCK
    return builder.ptrtoint(room, WORD)


def _next(builder: Any, address: Any) -> Any:
    return builder.atomic_rmw("add", builder.inttoptr(address, WORD.as_pointer()), WORD(1), "monotonic")


def _fence(builder: Any) -> None:
    builder.fence("seq_cst")


STACK = 8192  # bytes of the buffer that `stack` gives, for as long as the function runs
_i = types.intp
# Call the C function at an address, of so many integers.
call1, call2, call3, call4, call5 = (_emit(types.none, (_i,) * (n + 1), _invoke) for n in (1, 2, 3, 4, 5))
parallel = _emit(types.none, (_i,) * 7, _parallel)  # function(unit, job, units, threads, reverse, nbytes, no host)
least = _emit(_i, (_i, _i), _least)  # of two integers; Numba compiles a function for `min`
stack = _emit(_i, (), _stack)
claim = _emit(_i, (_i,), _next)  # takes the next number of a counter that threads share
fence = _emit(types.none, (), _fence)  # what was streamed is written before what comes after
