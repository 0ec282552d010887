"""The Numba kernels: whole calls, where nothing was compiled, and with functions of the user's.

a) A whole call is one C function, compiled once for each type of arithmetic: `run`. It is told what to do by a `Job`, numbers and
   addresses, and calls the loops over elements by their addresses. These are compiled for each storage type and activation, when
   they are first used, and are kept on disk. So nothing of Python's or NumPy's runs between the sums and the map.

b) Four loops: `sum_planes`, `sum_columns`, `map_planes`, `map_columns`. *Planes* are runs of `inner` elements that belong to one
   channel, *columns* rows of channels; short planes are rows of runs, and short rows are gathered to long ones (`repeats`). The
   loops are written in blocks of lanes (numba_lanes.py), and a condition on what they are made for is dropped by the compiler.

c) An activation is a function of one number, of the library's or the user's, which LLVM makes a function of a block's lanes, in
   registers, if it can do so at all (`on_lanes`).

d) The numerics are those of the SIMD kernels: float32 sums of x - k and (x - k)^2 in the lanes of a block, in short chains and
   tiles that depend on the shape alone, merged in float64 in a fixed order: the same bits for any number of threads. The pivot k
   is near the mean of a sample of the tile; a tile in which it is far from the mean is summed again around the mean. Channels
   whose sums leave the range of float32 are summed again in a copy of float64: the call is then made of operations.

e) The units of work run on the compiled pool, and where that was not built, on Python threads (numba_threads.py).

f) What a function of the user's raises in a thread must not end it: the loop keeps the values in question, the call ends, and
   the caller applies the function to them once more.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import re
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from math import gcd, isfinite, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import config, from_dtype, njit
from numba.core import types
from numba.core.errors import NumbaError
from numba.core.registry import cpu_target

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

if TYPE_CHECKING:
    from fastbn.kernels.protocol import Affine, Running, Statistics

from fastbn.kernels import numba_cache, numba_passes, numba_threads
from fastbn.kernels.numba_apart import apart
from fastbn.kernels.numba_function import on_lanes
from fastbn.kernels.numba_lanes import (
    BLOCK,
    MEMORY,
    NUMBERS,
    call1,
    call2,
    call3,
    call4,
    call5,
    claim,
    fence,
    fields_of,
    least,
    parallel,
    stack,
)
from fastbn.kernels.numba_math import FLAT, FUNCTIONS, like

Array = np.ndarray[Any, Any]

TILE = 16384  # elements of a tile of planes
TILE_ROWS = 256  # rows of a tile of columns
CHAIN = 64  # blocks, or images, added to one accumulator: long chains lose digits
BATCH = 8  # rows taken at once
MANY_ROWS = 32  # images from which planes of less than two blocks are columns
LONG_ROW = 2048  # rows are gathered up to this many columns
COLUMNS = 4096  # bytes of the accumulators of a unit's columns
PLANES = 32  # channels of a unit whose planes are summed
LINE = 64  # bytes of a cache line
STAGE = 2048  # bytes of a plane from which it is worth its lines' being whole
UNITS = 4  # units for each thread
LEAST, MOST = 1e-25, 3e38  # sums of squares in float32 between these keep their digits
FAR = 3  # arrays of more than this part of L3 do not stay in it
FEW_VALUES = 64  # values of a tile up to which its sums round so seldom that the pivot may be farther away
L2, L3 = 1 << 20, 32 << 20  # bytes that the units are cut for, and from which outputs are written past the caches

STATS, FORWARD, INFERENCE, NORMALIZE, GRAD_SUMS, GRAD_INPUT, BACKWARD = range(7)  # kinds of calls
SUMMING, MAPPING, BOTH = range(3)  # phases


# ---- A call, as compiled code sees it ----

_INTEGERS = (
    # What differs from call to call of a kind; _jobs.pyx knows these, and the numbers below.
    # Arrays like x, or 0; dz is what the map of a gradient reads: dy, or what its sums kept, dy before the activation.
    "x", "dy", "dz", "out", "residual", "dresidual", "kept",
    # Vectors of channels, in the type of the arithmetic, or 0.
    "weight", "bias", "mean_lo", "invstd", "var", "mean", "scale", "shift", "offset", "slope", "running_mean", "running_var",
    # The same, in float64: what sums are merged to. Memory of this call, whether running statistics are float64, and what came out.
    "batch_mean", "batch_m2", "batch_mean_lo", "sum_dy", "sum_dy_xmu", "scratch", "wide_mean", "wide_var", "unusual",
    # Sums of the tiles, in float64, and how many values of a channel each tile has.
    "pivots", "sums", "dots", "counts",
    # Vectors of columns, as those of channels from mean to slope; how often a function of the user's raised, and the
    # first block that it raised for.
    "columns_mean", "columns_scale", "columns_shift", "columns_offset", "columns_slope", "failures",
    # C functions.
    "sum", "map", "settle", "expand", "unit_of", "parallel",
    # The shape, the tiles, and the units of work.
    "outer", "channels", "inner", "images", "pieces", "piece", "tiles", "columns", "repeats", "run", "width", "rows", "tail_columns",
    "group", "sum_units", "sum_bytes", "map_group", "map_piece", "map_units", "map_bytes", "threads",
    # What to do, and whether a function raised; _jobs.pyx knows the last two, too.
    "kind", "phase", "by_columns", "together", "wide", "nontemporal", "raised",
)  # fmt: skip
FAILURES = 8 + BLOCK  # bytes
_NUMBERS = ("eps", "momentum", "correction", "parameter")


class Job(ctypes.Structure):
    """A call: all numbers that the compiled functions need."""

    _fields_ = [(name, ctypes.c_int64) for name in _INTEGERS] + [(name, ctypes.c_double) for name in _NUMBERS]


fields = fields_of(from_dtype(np.dtype(Job)))
get64, put64 = NUMBERS[types.float64].get, NUMBERS[types.float64].put
get_word, put_word = NUMBERS[types.intp].get, NUMBERS[types.intp].put
WORDS = len(_INTEGERS)
OF_CHANNELS, OF_COLUMNS = _INTEGERS.index("mean"), _INTEGERS.index("columns_mean")


# ---- Activations ----


def _known(activation: Any) -> Any:
    """The name of one of the library's, whose parameter differs from call to call; a user's as it is; or None."""
    return activation if activation is None or activation.custom else activation.name


def _functions(activation: Any) -> tuple[Any, Any]:
    """An activation, or the library's by its name, and its derivative, of the normalized value and a parameter."""
    return FUNCTIONS[activation] if isinstance(activation, str) else _custom(activation)


@cache
def _custom(activation: Any) -> tuple[Any, Any]:
    def with_parameter(function: Any) -> Any:
        if function is None:
            return None
        function = apart(function)
        return njit(nogil=True, **numba_passes.FUNCTION, fastmath={"contract"})(lambda z, _: like(z, function(z)))

    return with_parameter(activation.forward), with_parameter(activation.derivative)


def _helper(name: str, **options: Any) -> Callable[[Any], Any]:
    """Compile a part of a function, under a name unlike any other: what is read from disk is linked by names."""

    def decorate(function: Any) -> Any:
        function.__name__ = function.__qualname__ = f"{function.__name__}_{name}"
        return njit(**numba_passes.PART, **options)(function)

    return decorate


CUSTOM = 1000  # from here on, as _jobs.pyx knows
_customs: dict[Any, int] = {}  # the numbers of functions of the user's
_numbers = itertools.count(CUSTOM)


def _name(activation: Any) -> str:
    if activation is None or isinstance(activation, str):
        return activation or "plain"
    return f"custom{_customs.setdefault(activation, next(_numbers))}"


class Loop(NamedTuple):
    """What a loop over elements is compiled for.

    Attributes
    ----------
    pattern : str
        "planes" or "columns".
    operation : str
        "stats", "grad_sums", "normalize" or "grad_input".
    storage : str
    activation : str, Activation or None
        The name of one of the library's, or a user's.
    residual : bool
    second : bool
        Whether a gradient before the activation is written, too.
    undone : bool
        Whether the activation, leaky_relu, was applied to x, and is undone.
    """

    pattern: str
    operation: str
    storage: str
    activation: Any = None
    residual: bool = False
    second: bool = False
    undone: bool = False

    @property
    def name(self) -> str:
        """A name unlike that of any other loop."""
        flags = [_name(self.activation), *(f for f in ("residual", "second", "undone") if getattr(self, f))]
        return "_".join((self.operation, self.pattern, self.storage, *flags))


def _evaluator(loop: Loop) -> Any:
    """What gives the activation, or its derivative, of the first n lanes of a block; None where there is nothing to do."""
    m = MEMORY[loop.storage]
    if loop.activation is None:
        return None
    apply = on_lanes(_functions(loop.activation)[loop.operation.startswith("grad")], m.number)
    if isinstance(loop.activation, str):

        @_helper(loop.name)
        def evaluate(j: Any, v: Any, n: int) -> Any:
            return apply(v, j.parameter)

        return evaluate

    own = MEMORY[str(m.number)]
    lanes, store, fill = m.lanes, own.store, own.fill

    @_helper(loop.name)
    def apply_custom(v: Any, parameter: float) -> Any:
        return apply(v, parameter)

    @_helper(loop.name)
    def evaluate_caught(j: Any, v: Any, n: int) -> Any:
        if n < lanes:
            v = fill(v, n)
        try:
            return apply_custom(v, j.parameter)
        except Exception:
            j.raised = 1
            if claim(j.failures) == 0:
                store(j.failures + 8, 0, v)
        return v

    return evaluate_caught


# ---- The loops ----


def _judge(loop: Loop) -> tuple[Any, Any]:
    """Whether the pivot of a tile is near its mean, and whether its sums left the range of their type."""
    element, narrow, statistics = MEMORY[loop.storage].element, MEMORY[loop.storage].number is types.float32, loop.operation == "stats"

    @_helper(loop.name)
    def is_near(summed: float, squared: float, count: int) -> bool:
        # Within a deviation, or sqrt(2) of one for few values. NaN is as near as it can be.
        return not summed * summed > squared * (count / 2 if count > FEW_VALUES else count * 2 / 3)

    @_helper(loop.name)
    def out_of_range(x: int, start: int, runs: int, stride: int, n: int, squared: float, summed: float) -> bool:
        if not narrow or LEAST < abs(squared) < MOST:
            return False
        if not statistics or squared != 0:
            return squared != 0
        if summed != 0:
            return True
        for r in range(runs):  # all numbers are the same, or are too small
            for i in range(n):
                if element(x, start + r * stride + i) != element(x, start):
                    return True
        return False

    return is_near, out_of_range


def _passing(loop: Loop) -> Any:
    """What multiplies a gradient and the slope. Functions of the user's may be flat somewhere."""
    flat = loop.activation in FLAT or not isinstance(loop.activation, str)
    return MEMORY[loop.storage].through if flat else operator.mul


def _terms(loop: Loop) -> Any:
    """What gives, for one block, x - k and what is added up: that itself, or the gradient at x."""
    evaluate = _evaluator(loop)
    m = MEMORY[loop.storage]
    read, write, fma, through, activation_inverse, first_lanes, lanes = (
        m.read, m.write, m.fma, _passing(loop), m.activation_inverse, m.first, m.lanes,
    )  # fmt: skip
    statistics, active, residual, second, undone = (
        loop.operation == "stats", evaluate is not None, loop.residual, loop.second, loop.undone
    )  # fmt: skip

    @_helper(loop.name, forceinline=True)
    def terms(j: Any, at: int, rest: int, k: Any, scale: Any, shift: Any, undo: Any) -> Any:
        v = read(j.x, at, rest)
        if undone:
            v = activation_inverse(v, undo)
        d = v - k
        g = d
        if not statistics:
            g = read(j.dy, at, rest)
            if active:
                if not undone:
                    v = fma(d, scale, shift)
                if residual:
                    v = v + read(j.residual, at, rest)
                g = through(g, evaluate(j, v, rest))
            if second:
                write(j.kept, at, g, rest, 0)
        if rest < lanes:
            d, g = first_lanes(d, rest), first_lanes(g, rest)
        return d, g

    return terms


def _map_block(loop: Loop) -> Any:
    """What writes one block of an output."""
    evaluate = _evaluator(loop)
    m = MEMORY[loop.storage]
    read, write, fma, through, counted, activation_inverse = m.read, m.write, m.fma, _passing(loop), m.counted, m.activation_inverse
    gradient, active, residual, second, undone = (
        loop.operation == "grad_input", evaluate is not None, loop.residual, loop.second, loop.undone
    )  # fmt: skip

    @_helper(loop.name, forceinline=True)
    def map_block(j: Any, at: int, rest: int, mean: Any, scale: Any, shift: Any, offset: Any, slope: Any, undo: Any) -> None:
        v = read(j.x, at, rest)
        if undone:
            v = activation_inverse(v, undo)
        d = v - mean
        if active or not gradient:
            if not undone:
                v = fma(d, scale, shift)
            if residual:
                v = v + read(j.residual, at, rest)
            if active:
                v = evaluate(j, v, rest)
        if gradient:
            g = read(j.dz, at, rest)
            if active:
                g = through(g, v)
            if second:
                write(j.dresidual, at, g, rest, j.nontemporal)
            v = scale * fma(counted(d, slope), slope, g - offset)
        write(j.out, at, v, rest, j.nontemporal)

    return map_block


def _sum_planes(loop: Loop) -> Any:
    terms = _terms(loop)
    is_near, out_of_range = _judge(loop)
    m, number = MEMORY[loop.storage], NUMBERS[MEMORY[loop.storage].number]
    element, splat, fma, first_lanes, total, coarse, get = m.element, m.splat, m.fma, m.first, m.total, m.coarse, number.get
    lanes, chunk = m.lanes, CHAIN * m.lanes
    statistics, shifted = loop.operation == "stats", loop.activation is not None and not loop.undone

    def sum_planes(job: int, tile: int, first: int, last: int) -> None:
        """The sums of one tile of channels first ... last."""
        j = fields(job)
        if j.raised:
            return
        stride = j.channels * j.inner
        image = tile // j.pieces * j.images
        images = least(j.images, j.outer - image)
        start = tile % j.pieces * j.piece
        length = least(j.piece, j.inner - start)
        count = images * length
        put64(j.counts, tile, count)
        zero, undo = splat(0.0), splat(j.parameter)
        for c in range(first, last):
            index = tile * j.channels + c
            begin = image * stride + c * j.inner + start
            pivot = 0.0
            if statistics:
                lowest, mean = element(j.x, begin), 0.0
                for i in range(8):
                    place = (2 * i + 1) * count // 16
                    sample = element(j.x, begin + place // length * stride + place % length)
                    lowest = sample if sample < lowest else lowest
                for i in range(8):
                    place = (2 * i + 1) * count // 16
                    mean += (element(j.x, begin + place // length * stride + place % length) - lowest) / 8
                pivot = total(first_lanes(splat(lowest) + coarse(splat(mean)), 1))
                pivot = pivot if isfinite(pivot) else 0.0
            else:
                pivot = np.float64(get(j.mean, c))
            scale, shift = zero, zero
            if shifted:
                scale, shift = splat(get(j.scale, c)), splat(get(j.shift, c))
            summed, squared = 0.0, 0.0
            for attempt in range(2):
                k = splat(pivot)
                sums, dots = zero, zero
                for n in range(images):
                    at = begin + n * stride
                    done = 0
                    while done < length:  # a chain
                        end = least(done + chunk, length)
                        t, q = zero, zero
                        i = done
                        while i < end:
                            d, g = terms(j, at + i, end - i, k, scale, shift, undo)
                            t = t + g
                            q = fma(g, d, q)
                            i += lanes
                        sums, dots = sums + t, dots + q
                        done = end
                summed, squared = total(sums), total(dots)
                if not statistics or attempt == 1 or is_near(summed, squared, count):
                    break
                closer = total(first_lanes(splat(pivot + summed / count), 1))
                if not isfinite(closer):
                    break
                pivot = closer
            put64(j.pivots, index, pivot)
            put64(j.sums, index, summed)
            put64(j.dots, index, squared)
            if out_of_range(j.x, begin, images, stride, length, squared, summed):
                put64(j.dots, index, np.nan)
                j.unusual = 1

    return sum_planes


def _unsure(loop: Loop) -> Any:
    """What stores the sums of single columns, and says whether one of them must be looked at: without a branch, for vectors."""
    number, statistics = MEMORY[loop.storage].number, loop.operation == "stats"
    get, narrow = NUMBERS[number].get, number is types.float32

    @_helper(loop.name)
    def unsure(sums: int, dots: int, pivots: int, columns: int, count: int, to_sums: int, to_dots: int, to_pivots: int) -> bool:
        limit, bad = (count / 2 if count > FEW_VALUES else count * 2 / 3), 0
        for w in range(columns):
            summed, squared = np.float64(get(sums, w)), np.float64(get(dots, w))
            put64(to_sums, w, summed)
            put64(to_dots, w, squared)
            if statistics:
                put64(to_pivots, w, np.float64(get(pivots, w)))
                bad += int(summed * summed > squared * limit)
            if narrow:
                bad += int((abs(squared) <= LEAST) | (abs(squared) >= MOST))
        return bad > 0

    return unsure


def _sum_columns(loop: Loop) -> Any:
    terms, unsure = _terms(loop), _unsure(loop)
    is_near, out_of_range = _judge(loop)
    m, number = MEMORY[loop.storage], NUMBERS[MEMORY[loop.storage].number]
    own = MEMORY[str(m.number)]
    read, element, splat, fma, coarse, finite = m.read, m.element, m.splat, m.fma, m.coarse, m.finite
    load, store, get, put, lanes = own.load, own.store, number.get, number.put, m.lanes
    statistics, shifted = loop.operation == "stats", loop.activation is not None and not loop.undone

    def sum_columns(job: int, tile: int, first: int, last: int) -> None:
        """The sums of columns first ... last of one tile."""
        j = fields(job)
        if j.raised:
            return
        stride, run = j.columns, j.run
        row, rows = tile * TILE_ROWS, 1
        if row < j.rows:
            rows, last = least(TILE_ROWS, j.rows - row), least(last, stride)
        else:
            row, last = j.rows, least(last, j.tail_columns)
        begin, columns, count = row * stride + first, last - first, rows * run
        at = (tile * j.width + first // run) * 8  # of these columns' sums, in bytes
        put64(j.counts, tile, count)
        zero, undo = splat(0.0), splat(j.parameter)
        pivots, sums, dots = stack(), stack(), stack()
        i = 0
        while statistics and run == 1 and i < columns:
            lowest, mean = read(j.x, begin + i, columns - i), zero
            for n in range(8):
                mean = mean + (read(j.x, begin + (2 * n + 1) * rows // 16 * stride + i, columns - i) - lowest)
            store(pivots, i, finite(lowest + coarse(mean * splat(0.125))))
            i += lanes
        while statistics and i < columns:
            lowest, mean = element(j.x, begin + i), 0.0
            for n in range(8):
                mean += (element(j.x, begin + (2 * n + 1) * rows // 16 * stride + i + (2 * n + 1) * run // 16) - lowest) / 8
            pivot = finite(splat(lowest) + coarse(splat(mean)))
            n = 0
            while n < run:
                store(pivots, i + n, pivot)
                n += lanes
            i += run
        for attempt in range(2):
            i = 0
            while i < columns:
                store(sums, i, zero)
                store(dots, i, zero)
                i += lanes
            for top in range(0, rows, BATCH):
                batch = least(BATCH, rows - top)
                i = 0
                while i < columns:
                    rest, begun = columns - i, begin + top * stride + i
                    k = load(pivots, i) if statistics else load(j.columns_mean, first + i)
                    scale, shift = zero, zero
                    if shifted:
                        scale, shift = load(j.columns_scale, first + i), load(j.columns_shift, first + i)
                    t, q = zero, zero
                    for n in range(batch):
                        d, g = terms(j, begun + n * stride, rest, k, scale, shift, undo)
                        t = t + g
                        q = fma(g, d, q)
                    store(sums, i, load(sums, i) + t)
                    store(dots, i, load(dots, i) + q)
                    i += lanes
            if run == 1 and not unsure(sums, dots, pivots, columns, count, j.sums + at, j.dots + at, j.pivots + at):
                break
            near = True
            for w in range(columns // run):
                summed, squared = 0.0, 0.0
                for i in range(run):
                    summed += get(sums, w * run + i)
                    squared += get(dots, w * run + i)
                index = tile * j.width + first // run + w
                pivot = np.float64(get(pivots, w * run)) if statistics else 1.0
                if statistics and attempt == 0 and not is_near(summed, squared, count):
                    closer = pivot + summed / count
                    if isfinite(closer):
                        near = False
                        for i in range(run):
                            put(pivots, w * run + i, closer)
                put64(j.pivots, index, pivot)
                put64(j.sums, index, summed)
                put64(j.dots, index, squared)
                if out_of_range(j.x, begin + w * run, rows, stride, run, squared, summed):
                    put64(j.dots, index, np.nan)
                    j.unusual = 1
            if near:
                break

    return sum_columns


def _map_planes(loop: Loop) -> Any:
    map_block = _map_block(loop)
    m, number = MEMORY[loop.storage], NUMBERS[MEMORY[loop.storage].number]
    splat, get, lanes, size = m.splat, number.get, m.lanes, m.size
    gradient, shifted = loop.operation == "grad_input", loop.activation is not None and not loop.undone

    def map_planes(job: int, first: int, last: int, start: int, stop: int) -> None:
        """Elements start ... stop of planes first ... last."""
        j = fields(job)
        if j.raised:
            return
        zero, undo = splat(0.0), splat(j.parameter)
        for p in range(first, last):
            c, at = p % j.channels, p * j.inner
            mean, scale, shift, offset, slope = splat(get(j.mean, c)), splat(get(j.scale, c)), zero, zero, zero
            if gradient:
                offset, slope = splat(get(j.offset, c)), splat(get(j.slope, c))
            if shifted or not gradient:
                shift = splat(get(j.shift, c))
            i = start
            head = (-(j.out + (at + start) * size) & 63) // size if j.nontemporal else 0  # elements before the first cache line
            step = head if head > 0 else lanes
            while i < stop:
                map_block(j, at + i, least(step, stop - i), mean, scale, shift, offset, slope, undo)
                i += step
                step = lanes
        if j.nontemporal:
            fence()

    return map_planes


def _map_columns(loop: Loop) -> Any:
    map_block = _map_block(loop)
    m = MEMORY[loop.storage]
    load, splat, lanes, size = MEMORY[str(m.number)].load, m.splat, m.lanes, m.size
    gradient, shifted = loop.operation == "grad_input", loop.activation is not None and not loop.undone

    def map_columns(job: int, first: int, last: int, start: int, stop: int) -> None:
        """Columns start ... stop of rows first ... last; the row behind the whole ones is a short one."""
        j = fields(job)
        if j.raised:
            return
        zero, undo = splat(0.0), splat(j.parameter)
        stride, row = j.columns, first
        while row < last:
            batch = least(BATCH, (last if row == j.rows else least(last, j.rows)) - row)
            end = least(stop, j.tail_columns) if row == j.rows else stop
            i = start
            head = (-(j.out + (row * stride + i) * size) & 63) // size if j.nontemporal else 0  # elements before the first cache line
            step = head if head > 0 else lanes
            while i < end:
                at, rest = row * stride + i, least(step, end - i)
                mean, scale, shift, offset, slope = load(j.columns_mean, i), load(j.columns_scale, i), zero, zero, zero
                if gradient:
                    offset, slope = load(j.columns_offset, i), load(j.columns_slope, i)
                if shifted or not gradient:
                    shift = load(j.columns_shift, i)
                for n in range(batch):
                    map_block(j, at + n * stride, rest, mean, scale, shift, offset, slope, undo)
                i += step
                step = lanes
            row += batch
        if j.nontemporal:
            fence()

    return map_columns


_LOOPS = {
    ("planes", True): _sum_planes, ("planes", False): _map_planes, ("columns", True): _sum_columns, ("columns", False): _map_columns,
}  # fmt: skip


# ---- Around the loops: the same for all storage types and activations ----


@_helper("of_means")
def _lost(low: float, factor: float) -> float:
    """What the mean rounded away, times something; nothing where that is infinite: only its sign would be known."""
    return low * factor if isfinite(factor) else 0.0


@cache
def _fold(number: Any) -> tuple[Any, Any]:
    """What gives an element of a vector that there may be, and what makes the scale and the shift of a channel."""
    get, put = NUMBERS[number].get, NUMBERS[number].put
    largest = _largest(number)

    @_helper(str(number))
    def optional(vector: int, c: int, otherwise: float) -> Any:
        return np.float64(get(vector, c)) if vector else otherwise

    @_helper(str(number))
    def fold(j: Any, c: int, low: float, invstd: float) -> Any:
        """Scale and shift of one channel; the result is the scale before it is rounded."""
        scale = invstd * optional(j.weight, c, 1.0)
        shift = optional(j.bias, c, 0.0)
        # Where x is the mean, 0 times the scale must be 0: a finite one is none too large for the type.
        too_large = isfinite(scale) and abs(scale) > largest
        put(j.scale, c, scale if not too_large else largest if scale > 0 else -largest)
        put(j.shift, c, shift - _lost(low, scale))
        return scale

    return optional, fold


def _largest(number: Any) -> float:
    return float(np.finfo(str(number)).max)


@_helper("of_tiles")
def _tile_end(j: Any, tile: int, repeat: int, last: int) -> Any:
    """The channel behind the last one, up to `last`, of a repeat in a tile, which may be that of the rest."""
    return least(last, j.tail_columns // j.run - repeat * j.channels) if j.by_columns and tile * TILE_ROWS >= j.rows else last


# From what is given, or the sums of tiles, of channels first ... last to the parameters of the map.


def _settle_given(number: Any) -> Any:
    get = NUMBERS[number].get
    optional, fold = _fold(number)

    def settle(job: int, first: int, last: int) -> None:
        """The parameters of an inference."""
        j = fields(job)
        for c in range(first, last):
            invstd = 1 / sqrt(get(j.var, c) + j.eps) if j.var else np.float64(get(j.invstd, c))
            fold(j, c, optional(j.mean_lo, c, 0.0), invstd)

    return settle


def _settle_statistics(number: Any) -> Any:
    get, put = NUMBERS[number].get, NUMBERS[number].put
    fold, largest = _fold(number)[1], _largest(number)
    most_m2 = min(largest / 4, 2.0**500) ** 2

    def settle(job: int, first: int, last: int) -> None:
        """Statistics, and the parameters of a forward."""
        j = fields(job)
        count = np.float64(j.outer * j.inner)
        # Addresses of their own, which no store can change: so LLVM makes vectors of the loops over channels.
        pivots, sums, dots, lows, squares = j.pivots, j.sums, j.dots, j.batch_mean_lo, j.batch_m2
        for c in range(first, last):
            put64(squares, c, 0.0)
            put64(lows, c, 0.0)
        for merged in range(2):  # first the means, then what lies around them
            for tile in range(j.tiles):
                n = get64(j.counts, tile)
                for repeat in range(j.repeats):
                    end, skip = _tile_end(j, tile, repeat, last), 8 * (tile * j.width + repeat * j.channels)
                    # Of the mean from the first pivot; two near numbers have an exact difference.
                    if merged:
                        for c in range(first, end):
                            e = get64(lows, c) - (get64(pivots + skip, c) - get64(pivots, c))
                            m2 = get64(dots + skip, c) + e * (n * e - 2 * get64(sums + skip, c))
                            put64(squares, c, get64(squares, c) + m2)
                    else:
                        for c in range(first, end):
                            moved = get64(pivots + skip, c) - get64(pivots, c)
                            put64(lows, c, get64(lows, c) + (get64(sums + skip, c) + n * moved))
            if not merged:
                for c in range(first, last):
                    put64(lows, c, get64(lows, c) / count)
        for c in range(first, last):
            m2, offset, pivot = get64(j.batch_m2, c), get64(j.batch_mean_lo, c), get64(j.pivots, c)
            m2 = 0.0 if m2 < 0 else m2
            mean = pivot + offset
            high = mean - pivot
            low = (pivot - (mean - high)) + (offset - high)
            low = low if isfinite(low) else 0.0
            put64(j.batch_mean, c, mean)
            put64(j.batch_m2, c, m2)
            put64(j.batch_mean_lo, c, low)
            if j.kind == FORWARD:
                spread = m2 / count + j.eps
                invstd = 1 / sqrt(spread)
                put(j.mean, c, mean)
                high = np.float64(get(j.mean, c))
                low += mean - high if isfinite(high) else 0.0
                scale = fold(j, c, low, invstd)
                put(j.mean_lo, c, low)
                put(j.invstd, c, invstd)
                if not (m2 < most_m2 and spread > 2.0**-900 and abs(scale) <= largest):
                    j.unusual = 1

    return settle


def _settle_gradient(number: Any) -> Any:
    get, put = NUMBERS[number].get, NUMBERS[number].put
    optional = _fold(number)[0]

    def settle(job: int, first: int, last: int) -> None:
        """Sums of a gradient, and the parameters of a backward."""
        j = fields(job)
        count = np.float64(j.outer * j.inner)
        sums, dots, sum_dy, sum_dy_xmu = j.sums, j.dots, j.sum_dy, j.sum_dy_xmu
        for c in range(first, last):
            put64(sum_dy, c, 0.0)
            put64(sum_dy_xmu, c, 0.0)
        for tile in range(j.tiles):
            for repeat in range(j.repeats):
                end, skip = _tile_end(j, tile, repeat, last), 8 * (tile * j.width + repeat * j.channels)
                for c in range(first, end):
                    put64(sum_dy, c, get64(sum_dy, c) + get64(sums + skip, c))
                    put64(sum_dy_xmu, c, get64(sum_dy_xmu, c) + get64(dots + skip, c))
        for c in range(first, last):
            low = optional(j.mean_lo, c, 0.0)
            put64(j.sum_dy_xmu, c, get64(j.sum_dy_xmu, c) - _lost(low, get64(j.sum_dy, c)))
            if j.kind == BACKWARD:
                invstd = np.float64(get(j.invstd, c))
                slope = invstd * (invstd * get64(j.sum_dy_xmu, c) / count)  # the square alone may leave the range
                put(j.offset, c, get64(j.sum_dy, c) / count - _lost(low, slope))
                put(j.slope, c, -slope)

    return settle


_SETTLE = {
    STATS: _settle_statistics, FORWARD: _settle_statistics, INFERENCE: _settle_given, GRAD_SUMS: _settle_gradient,
    BACKWARD: _settle_gradient,
}  # fmt: skip


def _unit(_: Any) -> Any:
    def unit(job: int, number: int) -> None:
        """One unit of work: sums of a tile, a part of the map, or all of some channels."""
        j = fields(job)
        channels = j.channels
        if j.phase == SUMMING:
            if j.by_columns:  # all groups of a tile, so that a thread has the rows that it maps
                groups = (j.columns + j.group - 1) // j.group
                tile, first, last = number // groups, number % groups * j.group, j.columns
            else:
                tile, first, last = number % j.tiles, number // j.tiles * j.group, channels
            call4(j.sum, job, tile, first, least(first + j.group, last))
        elif j.phase == BOTH:
            first = number * j.group
            last = least(first + j.group, channels)
            for tile in range(j.tiles):
                call4(j.sum, job, tile, first, last)
            call3(j.settle, job, first, last)
            if not (j.unusual or j.raised):
                for n in range(j.outer - 1, -1, -1):
                    call5(j.map, job, n * channels + first, n * channels + last, 0, j.inner)
        else:
            pieces = ((j.columns if j.by_columns else j.inner) + j.map_piece - 1) // j.map_piece
            first, start = number // pieces * j.map_group, number % pieces * j.map_piece
            last = least(first + j.map_group, j.rows + (j.tail_columns > 0) if j.by_columns else j.outer * channels)
            call5(j.map, job, first, last, start, least(start + j.map_piece, j.columns if j.by_columns else j.inner))

    return unit


def _expand(number: Any) -> Any:
    get, put = NUMBERS[number].get, NUMBERS[number].put

    def expand(job: int) -> None:
        """Vectors of columns, from those of channels: mean, scale and shift, or offset and slope, which the sums of a gradient bring."""
        j = fields(job)
        settled = j.kind >= GRAD_SUMS and j.phase == MAPPING
        for vector in range(3 if settled else 0, 5 if settled else 3):
            source, to = get_word(job, OF_CHANNELS + vector), get_word(job, OF_COLUMNS + vector)
            if source:
                at = 0
                for _ in range(j.repeats):
                    for c in range(j.channels):
                        value = get(source, c)
                        for i in range(at, at + j.run):
                            put(to, i, value)
                        at += j.run

    return expand


def _run(number: Any) -> Any:
    get, put = NUMBERS[number].get, NUMBERS[number].put
    far = 2.0**400 if number is types.float64 else 2.0**100  # as extremes.py has it

    @_helper(str(number))
    def units(j: Any, job: int, number: int, nbytes: int) -> None:
        reverse = 1 if j.phase == MAPPING and j.sum else 0
        if j.threads > 1 and number > 1:
            parallel(j.parallel, j.unit_of, job, number, j.threads, reverse, nbytes)
            return
        for i in range(number):
            call2(j.unit_of, job, number - 1 - i if reverse else i)

    @_helper(str(number))
    def move(running: int, wide: int, source: int, divisor: float, channels: int, momentum: float) -> None:
        for c in range(channels if running else 0):
            moved = momentum * (get64(source, c) / divisor)
            if wide:
                put64(running, c, (1 - momentum) * get64(running, c) + moved)
            else:
                put(running, c, (1 - momentum) * get(running, c) + moved)

    def run(job: int) -> None:
        """A whole call."""
        j = fields(job)
        gradient = j.kind >= GRAD_SUMS
        for i in range(WORDS):
            word = get_word(job, i)
            if word < 0:  # from an offset to an address
                put_word(job, i, j.scratch - 1 - word)
        if j.failures:
            put_word(j.failures, 0, 0)
        if gradient and j.invstd:
            for c in range(j.channels):
                invstd = get(j.invstd, c)
                if (invstd >= far or invstd < 0.5 / far) and invstd > 0 and isfinite(invstd):
                    j.unusual = 1
                    return
        if j.kind == INFERENCE:
            call3(j.settle, job, 0, j.channels)
        if j.together:
            j.phase = BOTH
            units(j, job, j.sum_units, j.sum_bytes)
        else:
            j.phase = SUMMING
            if j.by_columns and gradient:
                call1(j.expand, job)
            if j.sum:
                units(j, job, j.sum_units, j.sum_bytes)
                if not j.raised:
                    call3(j.settle, job, 0, j.channels)
            if j.map and not (j.unusual or j.raised):
                j.phase = MAPPING
                if j.by_columns:
                    call1(j.expand, job)
                units(j, job, j.map_units, j.map_bytes)
        if j.kind == FORWARD and not (j.unusual or j.raised):
            move(j.running_mean, j.wide_mean, j.batch_mean, 1.0, j.channels, j.momentum)
            move(j.running_var, j.wide_var, j.batch_m2, j.outer * j.inner - j.correction, j.channels, j.momentum)

    return run


# ---- Compiling ----


_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _compile(function: Any, name: str, arguments: int, keep: bool = True) -> int:
    function.__name__ = function.__qualname__ = name
    return numba_cache.compiled(function, types.void(*[types.intp] * arguments), name, keep)


def _uncolored(error: Exception) -> str:
    """What an error of Numba's says, without its colors: they are for a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def _check(activation: Any, role: str, number: Any) -> None:
    """Look at a function of the user's alone: of the loops around it, an error would be pages long."""
    failed = f"activation cannot be compiled by Numba for {number}: {role}:"
    try:
        function = types.Dispatcher(apart(getattr(activation, role)))
        found = function.get_call_type(cpu_target.typing_context, (number,), {})
    except (NumbaError, NotImplementedError) as error:
        raise TypeError(f"{failed} {_uncolored(error) if isinstance(error, NumbaError) else repr(error)}") from error
    if found is None:
        raise TypeError(f"{failed} numba.njit made no code of it that takes {number}")
    given = found.return_type
    one: Any = given.type if isinstance(given, types.misc.Optional) else given  # None is refused when it comes
    if isinstance(one, types.Complex) or not isinstance(one, types.Number | types.Boolean):
        raise TypeError(f"{failed} it must give one real number, not {one}")


@cache
def _loop(loop: Loop) -> int:
    """The address of a loop."""
    sums = loop.operation in ("stats", "grad_sums")
    custom = loop.activation is not None and not isinstance(loop.activation, str)
    number = MEMORY[loop.storage].number
    if custom:
        _check(loop.activation, "derivative" if loop.operation.startswith("grad") else "forward", number)
    try:
        return _compile(_LOOPS[loop.pattern, sums](loop), loop.name, 4 if sums else 5, not custom)
    except NumbaError as error:
        if not custom:
            raise
        raise TypeError(f"activation cannot be compiled by Numba for {number}: {_uncolored(error)}") from error


@cache
def _around(number: Any, kind: int, by_columns: bool) -> tuple[int, ...]:
    """Addresses of `settle` and `expand`, 0 where such a call needs none, of `unit` and of `run`."""

    def address(make: Any, arguments: int) -> int:
        return _compile(make(number), f"{make.__name__}_{number}", arguments) if make else 0

    return address(_SETTLE.get(kind), 3), address(_expand if by_columns else None, 1), address(_unit, 2), address(_run, 1)


@cache
def _entry(run: int) -> Any:
    """A `run` as a function of Python's."""
    return _ENTRY(run)


# ---- How a call is cut ----


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _even(n: int, most: int, step: int) -> int:
    """The size of equal parts of n, of at most `most` each, in whole steps."""
    return _up(_up(n, _up(n, most)), step) * step


def set_caches(l1: int, l2: int, l3: int) -> None:
    """Set the sizes of the caches, in bytes, that the units of work are cut for."""
    global L2, L3
    L2, L3 = l2, min(l3, 32 << 20)
    _template.cache_clear()
    if _jobs is not None:
        _jobs.forget()


def by_columns(shape: tuple[int, int, int], lanes: int) -> bool:
    """Whether the loops take the memory as columns: also planes of less than two blocks, of many images."""
    outer, _, inner = shape
    return inner == 1 or (inner < 2 * lanes and inner % lanes != 0 and outer >= MANY_ROWS)


def _cut(job: Job, shape: tuple[int, int, int], size: int, threads: int, reads: int, arrays: int, fresh: bool) -> None:
    """Tiles, which decide the bits and depend on the shape alone, and units of work, which do not.

    The sums read so many arrays, and the map reads and writes so many; `fresh` is an output of its own.
    """
    job.outer, job.channels, job.inner = outer, channels, inner = shape
    lanes, total = BLOCK // max(size, 4), outer * channels * inner
    enough = UNITS * threads
    job.images = job.pieces = job.repeats = job.run = 1
    job.piece, job.columns, job.width = inner, channels, channels
    job.by_columns = columns = by_columns(shape, lanes)
    if columns:
        repeats = lanes // gcd(channels, lanes)
        if inner == 1 and repeats * channels <= LONG_ROW and outer >= 4 * repeats:
            job.repeats = repeats
        job.run, job.width = inner, job.repeats * channels
        job.columns = job.width * inner
        job.rows, job.tail_columns = outer // job.repeats, outer % job.repeats * channels
        job.tiles = _up(job.rows, TILE_ROWS) + (job.tail_columns > 0)
        room, groups = COLUMNS // (BLOCK // lanes), _up(enough, job.tiles)
        if inner > 1:
            job.group = max(1, min(room // inner, _up(channels, groups))) * inner
        else:
            job.group = _even(job.columns, min(room, _up(job.columns, groups)), lanes)
        job.sum_units = job.tiles * _up(job.columns, job.group)
    else:
        if inner > TILE:
            job.piece = _even(inner, TILE, lanes)
            job.pieces = _up(inner, job.piece)
        else:
            job.images = max(1, min(CHAIN, TILE // inner))
        job.tiles = _up(outer, job.images) * job.pieces
        job.group = max(1, min(PLANES, channels // _up(enough, job.tiles)))
        job.sum_units = job.tiles * _up(channels, job.group)
    job.sum_bytes, job.map_bytes = reads * total * size, arrays * total * size
    if arrays == 0:
        return
    job.nontemporal = fresh and total * size * arrays > L3 and (job.columns * size % LINE == 0 if columns else inner * size > STAGE)
    part = max(lanes, min(L2 // 2 // (arrays * size), _up(total, enough)))
    if columns:
        job.map_piece = _even(job.columns, part, lanes)
        job.map_group = _up(max(1, part // job.columns), BATCH) * BATCH
        job.map_units = _up(job.rows + (job.tail_columns > 0), job.map_group) * _up(job.columns, job.map_piece)
    else:
        job.map_group, job.map_piece = max(1, part // inner), inner if part >= inner else _even(inner, part, lanes)
        job.map_units = _up(outer * channels, job.map_group) * _up(inner, job.map_piece)
    if reads == 0 or columns or not fresh or (threads > 1 and channels < enough):
        return
    channel, all_of_it = reads * outer * inner * size, arrays * total * size
    if outer > 1 and L3 // FAR < all_of_it <= L3:
        return  # long runs from L3 take less time than short ones
    job.together = 1
    job.group = max(1, min(L2 // 2 // channel, channels // enough))
    job.sum_units, job.sum_bytes = _up(channels, job.group), job.sum_bytes + job.map_bytes


# ---- From arrays to a job ----


_SUMMING = (STATS, FORWARD, GRAD_SUMS, BACKWARD)
_NAMES: dict[Any, str] = {}
_PADDING = 64  # elements behind a vector of columns: a block is read at its last ones


class _Template(NamedTuple):
    """All of a call that does not depend on the arrays; an address in its scratch memory is -1 less the offset."""

    job: Job
    run: int
    scratch: int


def _storage(dtype: np.dtype[Any]) -> str:
    if dtype not in _NAMES:
        _NAMES[dtype] = dtype.name
    return _NAMES[dtype]


@lru_cache(maxsize=512)
def _template(
    kind: int, shape: tuple[int, int, int], storage: str, threads: int, fresh: bool, kept: bool,
    activation: Any, residual: bool, dresidual: bool, undone: bool,
) -> _Template:  # fmt: skip
    job, m = Job(), MEMORY[storage]
    gradient, sums, maps = kind >= GRAD_SUMS, kind in _SUMMING, kind not in (STATS, GRAD_SUMS)
    reads = (1 + gradient + (residual and gradient)) if sums else 0
    arrays = (2 + gradient + residual + dresidual) if maps else 0
    _cut(job, shape, m.size, threads, reads, arrays, fresh)
    pattern = "columns" if job.by_columns else "planes"
    if sums and gradient:
        job.sum = _loop(Loop(pattern, "grad_sums", storage, activation, residual, kept, undone))
    elif sums:
        job.sum = _loop(Loop(pattern, "stats", storage))
    if maps and gradient:
        after = () if kept else (activation, residual, dresidual, undone)
        job.map = _loop(Loop(pattern, "grad_input", storage, *after))
    elif maps:
        job.map = _loop(Loop(pattern, "normalize", storage, activation, residual))
    job.settle, job.expand, job.unit_of, run = _around(m.number, kind, bool(job.by_columns))
    job.parallel, job.threads, job.kind = numba_threads.address(), threads, kind
    job.wide = m.number is types.float64
    columns, vector = (job.columns + _PADDING) * 8 if job.by_columns else 0, 8 * shape[1]
    partials = job.tiles * job.width * 8 if sums else 0
    size = 0
    for names, length in (
        (("columns_mean", "columns_scale", "columns_shift", "columns_offset", "columns_slope"), columns),
        (("pivots", "sums", "dots"), partials),
        (("counts",), job.tiles * 8 if sums else 0),
        (("batch_mean", "batch_m2", "batch_mean_lo", "sum_dy", "sum_dy_xmu", "offset", "slope", "scale", "shift"), vector),
        (("failures",), 0 if activation is None or isinstance(activation, str) else FAILURES),
    ):  # fmt: skip
        for name in names if length else ():
            setattr(job, name, -1 - size)
            size += length
    return _Template(job, run, size)


_POINTER = object.__basicsize__  # where NumPy's ABI has the address of an array's memory
_pointer_at = ctypes.c_void_p.from_address


def _address(a: Array | None) -> int:
    """Of an array's memory, or 0; a fifth of the time that `__array_interface__` takes."""
    return 0 if a is None else _pointer_at(id(a) + _POINTER).value or 0


class _Call:
    """One call: its job, and what must live as long."""

    def __init__(self, kind: int, x: Array, dy: Array | None, out: Array | None, threads: int, epilogue: Any):
        activation = residual = dresidual = None
        undone = False
        if epilogue is not None:
            activation, residual, dresidual, undone = epilogue.activation, epilogue.residual, epilogue.dresidual, epilogue.from_output
        source, to = _address(x), _address(out)
        gradient, other, after, second = _address(dy), _address(residual), 0, 0
        fresh = bool(to) and to not in (source, gradient, other)
        if dresidual is not None:
            second = _address(dresidual)
            fresh = fresh and (second - to) % 64 == 0 and second not in (source, gradient, other)
        if kind == BACKWARD and x.itemsize >= 4 and activation is not None and activation.costly and fresh:
            after = second or to
        template = _template(
            kind, x.shape, _storage(x.dtype), threads, fresh, bool(after), _known(activation), residual is not None,
            dresidual is not None, bool(undone),
        )  # fmt: skip
        self.job = job = Job.from_buffer_copy(template.job)
        self.activation, self.function = activation, _entry(template.run)
        self.scratch = scratch = np.empty(template.scratch, np.uint8)
        job.x, job.dy, job.dz, job.out, job.residual, job.dresidual = source, gradient, after or gradient, to, other, second
        job.kept, job.parameter = after, 0.0 if activation is None else activation.parameter
        job.scratch = _address(scratch)

    def run(self) -> bool:
        """Run it; whether it had only channels that it can do."""
        self.function(ctypes.byref(self.job))
        numba_threads.raise_interrupt()
        if self.job.raised:
            _raise(self.activation, self.job.kind, self.scratch[-BLOCK:].view(np.float64 if self.job.wide else np.float32))
        return not self.job.unusual


def _raise(activation: Any, kind: int, block: Array) -> None:
    """Raise here what a function of the user's raised in some thread."""
    function = _functions(activation)[kind >= GRAD_SUMS]
    own = activation.derivative if kind >= GRAD_SUMS else activation.forward
    for z in block:
        if apart(own)(z) is None:
            raise TypeError(f"activation: {own.__name__} must give one real number, but gave None for {z}")
        function(z, activation.parameter)
    raise RuntimeError("the activation raised an exception, but not when it was called again")


# ---- The four operations ----


def stats(x: Array, threads: int = 1) -> tuple[Array, Array, Array]:
    """Mean, what it rounds away, and M2 of each channel; see `fastbn.reference.stats`."""
    call = _Call(STATS, x, None, None, threads, None)
    found = np.empty((3, x.shape[1]))
    address, step = _address(found), 8 * x.shape[1]
    call.job.batch_mean, call.job.batch_mean_lo, call.job.batch_m2 = address, address + step, address + 2 * step
    if not call.run() and x.dtype != np.float64 and (lost := np.isnan(found[2])).any():
        found[:, lost] = stats(_wide(x, lost), threads)
    mean, low, m2 = found
    return mean, low, m2


def normalize(x: Array, y: Array, mean: Array, scale: Array, shift: Array, threads: int = 1, epilogue: Any = None) -> None:
    """Write ``(x - mean) * scale + shift`` and what follows to `y`; see `fastbn.reference.normalize`."""
    call = _Call(NORMALIZE, x, None, y, threads, epilogue)
    call.job.mean, call.job.scale, call.job.shift = _address(mean), _address(scale), _address(shift)
    call.run()


def grad_sums(dy: Array, x: Array, mean: Array, threads: int = 1, epilogue: Any = None) -> tuple[Array, Array]:
    """Sum dy and ``dy * (x - mean)`` over each channel; see `fastbn.reference.grad_sums`."""
    sums, usual = _backward(GRAD_SUMS, (dy, x, None), (mean, None, None), None, threads, epilogue)
    if not usual and x.dtype != np.float64 and (lost := np.isnan(sums[1])).any():
        if epilogue is not None:
            names = ("residual", "scale", "shift")
            epilogue = epilogue._replace(dresidual=None, **{name: _wide(getattr(epilogue, name), lost) for name in names})
        sums[0][lost], sums[1][lost] = grad_sums(_wide(dy, lost), _wide(x, lost), _wide(mean, lost), threads, epilogue)
    return sums


def _wide(a: Array | None, channels: Array) -> Any:
    """Some channels of an array or a vector in float64."""
    return None if a is None else np.ascontiguousarray(a[:, channels] if a.ndim > 1 else a[channels], np.float64)


def grad_input(
    dy: Array, x: Array, dx: Array, mean: Array, scale: Array, line: tuple[Array, Array], threads: int = 1, epilogue: Any = None
) -> None:
    """Write ``scale * (dy - g0 - (x - mean) * g1)`` to `dx`; see `fastbn.reference.grad_input`."""
    (g0, g1), call = line, _Call(GRAD_INPUT, x, dy, dx, threads, epilogue)
    slope = -g1
    call.job.mean, call.job.scale, call.job.offset, call.job.slope = _address(mean), _address(scale), _address(g0), _address(slope)
    if epilogue is not None:
        call.job.shift = _address(epilogue.shift)
    call.run()


# ---- Whole calls ----

_composed: Any = None  # what computes channels at the ends of the range, from the operations


def connect(**known: Any) -> None:
    """Bring what the calls need of the library: kernels know nothing of it."""
    global _composed
    _composed = known["composed"]
    if _jobs is not None:
        direct_calls.connect(**known)


# The direct path is that of the SIMD kernels, whose calls run jobs here.


def _job_for(
    kind: int, dtype: int, outer: int, channels: int, inner: int, threads: int, activation: int, fresh: bool, kept: bool, residual: bool,
    dresidual: bool, undone: bool,
) -> tuple[bytes, int, int]:  # fmt: skip
    after = _of_code(activation)
    shape, flags = (outer, channels, inner), map(bool, (residual, dresidual, undone))
    found = _template(kind, shape, _calls.STORAGES[dtype], threads, bool(fresh), bool(kept), after, *flags)
    return bytes(found.job), found.run, found.scratch


def _of_code(code: int) -> Any:
    if code < CUSTOM:
        return tuple(FUNCTIONS)[code - 1] if code else None
    return next(activation for activation, number in list(_customs.items()) if number == code)


def _blame(code: int, kind: int, dtype: int, block: bytes) -> None:
    _raise(_of_code(code), kind, np.frombuffer(block, np.float64 if _calls.STORAGES[dtype] == "float64" else np.float32))


try:
    from fastbn.kernels import _calls, _jobs
except ImportError:  # built without a compiler
    _jobs = None
else:
    direct_calls = _calls.Calls(_jobs.kernels(_job_for, _blame), _customs)

    def prepared(mean: Array, scale: Array, shift: Array, activation: Any, sample: Array, axis: int) -> Any:
        """A call of `normalize` with fixed parameters; None for a function of the user's."""
        return None if activation is not None and activation.custom else direct_calls.prepared(mean, scale, shift, activation, sample, axis)


def inference(x: Array, y: Array, given: Statistics, affine: Affine, threads: int, epilogue: Any = None) -> None:
    """Normalize with given statistics; see `composed.ComposedKernel.inference`."""
    call = _Call(INFERENCE, x, None, y, threads, epilogue)
    job, (mean, mean_lo, spread, eps), (weight, bias) = call.job, given, affine
    job.mean, job.mean_lo, job.weight, job.bias = _address(mean), _address(mean_lo), _address(weight), _address(bias)
    if eps is None:
        job.invstd = _address(spread)
    else:
        job.var, job.eps = _address(spread), eps
    call.run()


def forward(
    x: Array, y: Array, affine: Affine, eps: float, running: Running, compute: np.dtype[Any], threads: int, epilogue: Any = None
) -> tuple[Array, Array, Array, Array, Array]:
    """Normalize with the batch's statistics; see `composed.ComposedKernel.forward`."""
    call = _Call(FORWARD, x, None, y, threads, epilogue)
    job, made = call.job, np.empty((5, x.shape[1]), compute)
    (weight, bias), (running_mean, running_var, momentum, correction) = affine, running
    address, step = _address(made), made.strides[0]
    job.mean, job.mean_lo, job.invstd, job.scale, job.shift = range(address, address + 5 * step, step)
    job.weight, job.bias = _address(weight), _address(bias)
    job.running_mean, job.running_var = _address(running_mean), _address(running_var)
    job.wide_mean = running_mean is not None and running_mean.itemsize == 8
    job.wide_var = running_var is not None and running_var.itemsize == 8
    job.eps, job.momentum, job.correction = eps, momentum, correction
    if not call.run():  # x and the running statistics are as they were
        made = _composed.forward(x, y, affine, eps, running, compute, threads, epilogue)
    mean, low, invstd, scale, shift = made
    return mean, low, invstd, scale, shift


def backward(
    dy: Array, x: Array, dx: Array | None, kept: Statistics, scale: Array | None, threads: int, epilogue: Any = None
) -> tuple[Array, Array]:
    """Sums of dy and of dy (x - mean), and dx unless it is None; see `composed.ComposedKernel.backward`."""
    kind = GRAD_SUMS if dx is None else BACKWARD
    sums, usual = _backward(kind, (dy, x, dx), kept[:3], scale, threads, epilogue)
    if not usual:
        sums = _composed.backward(dy, x, dx, kept, scale, threads, epilogue)
    return sums


def _backward(
    kind: int, arrays: tuple[Array, Array, Array | None], kept: tuple[Array | None, ...], scale: Array | None, threads: int, epilogue: Any
) -> tuple[tuple[Array, Array], bool]:
    dy, x, dx = arrays
    call = _Call(kind, x, dy, dx, threads, epilogue)
    job, (mean, mean_lo, invstd) = call.job, kept
    sums = np.empty((2, x.shape[1]))
    job.sum_dy = _address(sums)
    job.sum_dy_xmu = job.sum_dy + 8 * x.shape[1]
    job.mean, job.mean_lo, job.invstd = _address(mean), _address(mean_lo), _address(invstd)
    job.scale = _address(scale)
    if epilogue is not None:
        job.scale, job.shift = job.scale or _address(epilogue.scale), _address(epilogue.shift)
    usual = call.run()
    sum_dy, sum_dy_xmu = sums
    return (sum_dy, sum_dy_xmu), usual


def warmup(storage: str, patterns: Iterable[str], activation: Any = None) -> None:
    """Compile what whole calls need, from the disk or anew.

    Parameters
    ----------
    storage : str
        Name of the dtype.
    patterns : iterable of str
        "ncsp", "nspc" or both.
    activation : Builtin, Activation or None
    """
    for kind in _SETTLE:
        _around(MEMORY[storage].number, kind, True)
    loops = {"ncsp": ("planes", "columns"), "nspc": ("columns",)}  # small planes of many images are columns
    known = _known(activation)
    for pattern in sorted({p for given in patterns for p in loops[given]}):
        _loop(Loop(pattern, "stats", storage))
        _loop(Loop(pattern, "normalize", storage, known))
        if activation is None or not activation.custom or activation.derivative is not None:
            keeps = activation is not None and activation.costly and MEMORY[storage].size >= 4
            _loop(Loop(pattern, "grad_sums", storage, known, second=keeps))
            _loop(Loop(pattern, "grad_input", storage, None if keeps else known))


if TYPE_CHECKING:  # not in protocol.py: packers follow every import, and would take Numba into each application
    from fastbn.kernels import numba, protocol

    _as_operations: protocol.Operations = numba
    _as_whole_calls: protocol.WholeCalls = numba
    _as_warmable: protocol.Warmable = numba
