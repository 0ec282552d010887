"""The Numba kernels: textbook loops, for machines where the compiled ones cannot run.

a) Four loops over elements: the sums and the map, of planes and of columns. Without `dy` the sums are those of
   `stats` and the map is `normalize`; with it they are `grad_sums` and `grad_input`. An argument that is None, and
   the branch that needs it, are dropped when Numba compiles. So an activation costs nothing where there is none,
   and any function of the user's becomes part of the loop.

b) Sums are float64 for both dtypes: nothing overflows and no chain is too long. Statistics are sums of x - k and
   (x - k)^2, where k is an element of the channel, the median of three. So constant channels give exactly zero, and
   the error of M2 is about eps, in the worst case eps times the number of values. Chan, Golub and LeVeque, The
   American Statistician 37 (1983).

c) The sums of each tile, whose size depends on the shape alone, have a place of their own and are added up in a fixed
   order: the same bits for any number of threads.

d) Only sums may be reordered, and differences are computed outside of them: x - k must not become a sum of x less a
   multiple of k. NaN and infinity stay what they are.

e) Maps begin at the end: what the sums read last is still in the cache.

f) The threads are plain Python threads. They run the loops without the GIL and claim units of work from an atomic
   counter. Numba's own threads would save these few lines, but cannot be made safe from here: a launch through
   workqueue that meets one of the user's own code aborts the process, a launch through OpenMP in a forked child kills
   the child, and OpenMP waits for a thread that is preempted before it has begun.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from queue import SimpleQueue
from typing import Any

import numpy as np
from numba import config, njit
from numba.core import types
from numba.core.caching import NullCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.errors import NumbaError
from numba.extending import intrinsic

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

from fastbn.kernels.numba_math import FUNCTIONS, like

Array = np.ndarray[Any, Any]

TILE = 16384  # elements of a tile of planes
TILE_ROWS = 64  # rows of a tile of columns, at least
UNIT = 65536  # elements of a unit of work
RUN = 4096  # elements that a unit of planes reads one behind the other, where planes are small
BATCH = 8  # rows summed before they are added to the accumulators
COLUMNS = 2048  # columns of a unit of sums, whose accumulators stay in the cache
MANY_IMAGES = 16  # so many make columns of planes up to a number of bytes, and rows are gathered to a number of columns:
SUMMED = 256, COLUMNS
MAPPED = 64, 512

KEEPS = True  # a backward keeps dy before a costly activation, for both loops to read: `composed.Composed`


# ---- The loops ----


def _compiled(*flags: str, keep: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Compile on first use; keep the result on disk where there is a place for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = partial(njit, nogil=True, error_model="numpy", fastmath=set(flags))
        try:
            return compiled(cache=keep)(function)
        except RuntimeError:  # no directory can be written
            return compiled()(function)

    return decorate


def _next(typingctx: Any, counter: Any) -> Any:
    """Take the next number of a counter that threads share."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(counter)(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), generate


_claim: Any = intrinsic(_next)


@_compiled(keep=False)
def _deviation(x: float, k: float) -> Any:
    return np.float64(x) - k


@_compiled("contract", keep=False)
def _normalized(x: float, mean: float, scale: float, shift: float) -> Any:
    return (x - mean) * scale + shift


@_compiled("contract", keep=False)
def _input_gradient(dz: float, x: float, mean: float, scale: float, g0: float, g1: float) -> Any:
    return scale * (dz - g0 - (x - mean) * g1)


# Below, `dys` and `rs` are the arrays, or None: where there is none, the element of x stands for theirs.


@_compiled(keep=False)
def _through(
    dy: float, x: float, r: float, rs: Array | None, f: Any, parameter: float, undo: float | None, mean: float, scale: float, shift: float
) -> Any:  # fmt: skip
    """Take dy back through the activation, whose derivative is f."""
    z = x if undo is not None else _normalized(x, mean, scale, shift)
    slope = f(z if rs is None else z + r, parameter)
    return like(z, 0) if slope == 0 else dy * slope


@_compiled(keep=False)
def _restored(x: float, undo: float | None) -> Any:
    """The element or, where it is the output of leaky_relu, whose slope is `undo`, its input."""
    if undo is None:
        return x
    return x if x > 0 else x / like(x, undo)


@_compiled("reassoc", "contract", keep=False)
def _summed(
    x: float, dy: float, r: float, dys: Array | None, rs: Array | None, f: Any, parameter: float, undo: float | None,
    k: float, scale: float, shift: float,
) -> tuple[float, float]:  # fmt: skip
    """What one element adds to both sums."""
    v = _restored(x, undo)
    d = _deviation(v, k)
    if dys is None:
        return d, d * d
    if f is not None:
        dy = _through(dy, v, r, rs, f, parameter, undo, like(v, k), scale, shift)
    return np.float64(dy), dy * d


@_compiled(keep=False)
def _mapped(
    x: float, dy: float, r: float, dys: Array | None, rs: Array | None, f: Any, parameter: float, undo: float | None,
    mean: float, scale: float, shift: float, slope: float, factor: float, bias: float,
) -> tuple[float, float]:  # fmt: skip
    """What becomes of one element, and the gradient of its residual; the last two are scale and shift of the forward."""
    if dys is None:
        z = _normalized(x, mean, scale, shift)
        z = z if rs is None else z + r
        if f is not None:
            z = f(z, parameter)
        return z, z
    v = _restored(x, undo)
    if f is not None:
        dy = _through(dy, v, r, rs, f, parameter, undo, mean, factor, bias)
    return _input_gradient(dy, v, mean, scale, shift, slope), dy


class _Loop:
    """A loop over elements: as it is kept on disk, and for activations, which cannot be."""

    def __init__(self, function: Callable[..., Any], *flags: str):
        self.plain = _compiled(*flags)(function)
        self.active = _compiled(*flags, keep=False)(function)


def _loop(*flags: str) -> Callable[[Callable[..., Any]], _Loop]:
    return lambda function: _Loop(function, *flags)


@_loop("reassoc", "contract")
def _sum_planes(
    x: Array, dy: Array | None, r: Array | None, f: Any, parameter: float, undo: float | None, k: Array, scale: Array, shift: Array,
    sums: Array, squares: Array, images: int, piece: int, group: int, units: int, counter: Array,
) -> None:  # fmt: skip
    """Add up tiles of `images` planes, or of a piece of one; a unit is one tile of a group of channels."""
    outer, channels, inner = x.shape
    groups, pieces = (channels + group - 1) // group, (inner + piece - 1) // piece
    unit = _claim(counter)
    while unit < units:
        tile, first = unit // groups, unit % groups * group
        start = tile % pieces * piece
        stop = min(start + piece, inner)
        for n in range(tile // pieces * images, min((tile // pieces + 1) * images, outer)):
            for c in range(first, min(first + group, channels)):
                plane = x[n, c, start:stop]
                gradient = plane if dy is None else dy[n, c, start:stop]
                extra = plane if r is None else r[n, c, start:stop]
                total = square = 0.0
                for i in range(len(plane)):
                    g, s = _summed(plane[i], gradient[i], extra[i], dy, r, f, parameter, undo, k[c], scale[c], shift[c])
                    total += g
                    square += s
                sums[tile, c] += total
                squares[tile, c] += square
        unit = _claim(counter)


@_loop("reassoc", "contract")
def _sum_columns(
    x: Array, dy: Array | None, r: Array | None, f: Any, parameter: float, undo: float | None, k: Array, scale: Array, shift: Array,
    sums: Array, squares: Array, tile_rows: int, units: int, counter: Array,
) -> None:  # fmt: skip
    """Add up tiles of `tile_rows` rows; a unit is a group of the columns of one."""
    rows, columns = x.shape
    groups = (columns + COLUMNS - 1) // COLUMNS
    unit = _claim(counter)
    while unit < units:
        tile, first = unit // groups, unit % groups * COLUMNS
        group = range(np.uintp(first), np.uintp(min(first + COLUMNS, columns)))  # what may be negative is not vectorized
        row, end = tile * tile_rows, min((tile + 1) * tile_rows, rows)
        whole = end - (end - row) % BATCH
        for top in range(row, whole, BATCH):
            for j in group:
                total = square = 0.0
                for b in range(BATCH):
                    v = x[top + b, j]
                    dy_j, r_j = v if dy is None else dy[top + b, j], v if r is None else r[top + b, j]
                    g, s = _summed(v, dy_j, r_j, dy, r, f, parameter, undo, k[j], scale[j], shift[j])
                    total += g
                    square += s
                sums[tile, j] += total
                squares[tile, j] += square
        for low in range(whole, end):
            for j in group:
                v = x[low, j]
                dy_j, r_j = v if dy is None else dy[low, j], v if r is None else r[low, j]
                g, s = _summed(v, dy_j, r_j, dy, r, f, parameter, undo, k[j], scale[j], shift[j])
                sums[tile, j] += g
                squares[tile, j] += s
        unit = _claim(counter)


@_loop()
def _map_planes(
    x: Array, dy: Array | None, r: Array | None, f: Any, parameter: float, undo: float | None, y: Array, dr: Array | None,
    mean: Array, scale: Array, shift: Array, slope: Array, factor: Array, bias: Array, group: int, piece: int, units: int, counter: Array,
) -> None:  # fmt: skip
    """Map planes, the last ones first; a unit is a group of them, or a piece of one."""
    planes, inner = x.shape
    channels, pieces = len(mean), (inner + piece - 1) // piece
    unit = units - 1 - _claim(counter)
    while unit >= 0:
        first, start = unit // pieces * group, unit % pieces * piece
        stop = min(start + piece, inner)
        for p in range(first, min(first + group, planes)):
            c = p % channels
            source, target = x[p, start:stop], y[p, start:stop]
            gradient = source if dy is None else dy[p, start:stop]
            extra = source if r is None else r[p, start:stop]
            through = target if dr is None else dr[p, start:stop]
            for i in range(len(source)):
                target[i], dz = _mapped(
                    source[i], gradient[i], extra[i], dy, r, f, parameter, undo,
                    mean[c], scale[c], shift[c], slope[c], factor[c], bias[c],
                )  # fmt: skip
                if dr is not None:
                    through[i] = dz
        unit = units - 1 - _claim(counter)


@_loop()
def _map_columns(
    x: Array, dy: Array | None, r: Array | None, f: Any, parameter: float, undo: float | None, y: Array, dr: Array | None,
    mean: Array, scale: Array, shift: Array, slope: Array, factor: Array, bias: Array, batch: int, units: int, counter: Array,
) -> None:  # fmt: skip
    """Map rows, the last ones first; a unit is `batch` of them."""
    rows, columns = x.shape
    unit = units - 1 - _claim(counter)
    while unit >= 0:
        for row in range(unit * batch, min((unit + 1) * batch, rows)):
            for j in range(columns):
                v = x[row, j]
                dy_j, r_j = v if dy is None else dy[row, j], v if r is None else r[row, j]
                y[row, j], dz = _mapped(
                    v, dy_j, r_j, dy, r, f, parameter, undo, mean[j], scale[j], shift[j], slope[j], factor[j], bias[j]
                )
                if dr is not None:
                    dr[row, j] = dz
        unit = units - 1 - _claim(counter)


# ---- Threads ----

class _Ticket:
    """A share in a job, for one other thread: who holds the lock runs the job, or ends it."""

    def __init__(self, run: Callable[[], Any], errors: list[BaseException]):
        self._run: Callable[[], Any] | None = run
        self._errors = errors
        self._lock = threading.Lock()

    def help(self) -> None:
        with self._lock:
            try:
                if self._run is not None:
                    self._run()
            except BaseException as error:  # the caller's to handle: this thread goes on
                self._errors.append(error)

    def end(self) -> None:
        """Wait for a thread that has begun; one that has not will do nothing. Twice is as good as once."""
        with self._lock:
            self._run = None


_tickets: SimpleQueue[_Ticket] = SimpleQueue()
_hiring = threading.Lock()
_workers = 0


def _work(tickets: SimpleQueue[_Ticket]) -> None:
    while True:
        tickets.get().help()


def _hire(wanted: int) -> int:
    """Start threads until there are as many as are wanted; how many of these there are."""
    global _workers
    if _workers < wanted:
        with _hiring:
            try:
                while _workers < wanted:
                    threading.Thread(target=_work, args=(_tickets,), name=f"fastbn-numba-{_workers}", daemon=True).start()
                    _workers += 1
            except RuntimeError:  # too many threads, or the interpreter is shutting down: those there are will do
                pass
    return min(_workers, wanted)


def _share(run: Callable[[], Any], helpers: int) -> None:
    """Call `run` here and, at the same time, in other threads; return or raise when all that began have ended.

    Threads that work for someone else come later, or not at all. What one of them raises is raised here.
    """
    if helpers < 1:
        run()
        return
    errors: list[BaseException] = []
    pending: list[_Ticket] = []
    try:
        for _ in range(_hire(helpers)):
            pending.append(_Ticket(run, errors))
            _tickets.put(pending[-1])
        run()
    except BaseException as error:  # raised below, when no thread writes to the caller's arrays any more
        errors.append(error)
    while pending:
        try:
            pending[-1].end()
            pending.pop()
        except BaseException as interrupt:  # noqa: PERF203  what a signal's handler raises; few tickets
            errors.append(interrupt)
    if errors:
        try:
            raise next((error for error in errors if not isinstance(error, Exception)), errors[0])
        finally:
            errors.clear()  # else the traceback and this list keep each other, and the arrays


def _after_fork() -> None:
    """Forget the threads, which are the parent's."""
    global _tickets, _hiring, _workers
    _tickets, _hiring, _workers = SimpleQueue(), threading.Lock(), 0
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles could never compile.
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=global_compiler_lock.release, after_in_child=_after_fork)


# ---- Launching ----

PATIENCE = 1.0  # seconds of compiling before the user is told
_ready: set[tuple[Any, ...]] = set()


@cache
def _tell() -> None:
    print("fastbn: compiling Numba kernels, once ...", file=sys.stderr, flush=True)


@contextmanager
def _announced() -> Iterator[None]:
    """Say what takes so long, once, and to a terminal only."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(PATIENCE, _tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _prepare(loop: Any, arguments: tuple[Any, ...]) -> None:
    """Compile a loop by running none of its units."""
    run = partial(loop, *arguments, 0, np.zeros(1, np.int64))
    with _announced():
        try:
            run()
        except Exception:  # the cache on disk may be full, or damaged
            loop._cache = NullCache()
            run()


def _sealed(a: Array | None) -> Array | None:
    """Take a view that cannot be written, so that Numba sees one type, whether `a` can be written or not."""
    if a is None:
        return None
    view = a.view()
    view.flags.writeable = False
    return view


def _functions(activation: Any) -> tuple[Any, Any]:
    """An activation and its derivative, of the normalized value and a parameter."""
    return _custom(activation) if activation.custom else FUNCTIONS[activation.name]


@cache
def _custom(activation: Any) -> tuple[Any, Any]:
    def with_parameter(function: Any) -> Any:
        return None if function is None else _compiled(keep=False)(lambda z, _: like(z, function(z)))

    return with_parameter(activation.forward), with_parameter(activation.derivative)


def _given(epilogue: Any, backward: bool) -> tuple[Any, ...]:
    """The arguments of the loops that an epilogue stands for: function, parameter, and what undoes the activation."""
    if epilogue is None or epilogue.activation is None:
        return None, 0.0, None
    activation = epilogue.activation
    function = _functions(activation)[backward]
    return function, activation.parameter, activation.parameter if epilogue.from_output else None


def _launch(
    loop: _Loop, x: Array, dy: Array | None, r: Array | None, given: tuple[Any, ...], arguments: Iterable[Any], units: int, threads: int
) -> None:  # fmt: skip
    """Run all units of a loop."""
    arguments = _sealed(x), _sealed(dy), _sealed(r), *given, *arguments
    compiled = loop.plain if given[0] is None and r is None else loop.active
    key = compiled, x.dtype, given[0], *(a is None for a in arguments[:8])
    if key not in _ready:
        try:
            _prepare(compiled, arguments)
        except NumbaError as error:
            raise TypeError(f"activation cannot be compiled by Numba for {x.dtype}: {error}") from error
        _ready.add(key)
    _share(partial(compiled, *arguments, units, np.zeros(1, np.int64)), min(threads, units) - 1)


def warmup(dtype: np.dtype[Any], patterns: Iterable[str]) -> None:
    """Compile what the four operations need.

    Parameters
    ----------
    dtype : numpy.dtype
        float32 or float64.
    patterns : iterable of str
        "ncsp", "nspc" or both.
    """
    shapes = {"ncsp": [(1, 1, 2), (MANY_IMAGES, 1, 2)], "nspc": [(1, 1, 1)]}  # small planes of many images are columns
    with _announced():
        for shape in (shape for pattern in patterns for shape in shapes[pattern]):
            x, v = np.zeros(shape, dtype), np.zeros(1, dtype)
            stats(x)
            normalize(x, x, v, v, v)
            grad_sums(x, x, v)
            grad_input(x, x, x, v, v, v, v)


# ---- The four operations ----


def _by_planes(a: _Arrays, short: int) -> bool:
    outer, _, inner = a.shape
    return bool(inner > 1 and (outer < MANY_IMAGES or inner * a.item > short))


def _as_columns(a: _Arrays, longest: int) -> list[tuple[slice, int]]:
    """Cut the arrays into images whose columns are gathered, so many to a row, and the rest; each a slice and a number."""
    outer, channels, inner = a.shape
    repeats = max(1, longest // (channels * inner))
    full = outer - outer % repeats
    return [part for part in ((slice(0, full), repeats), (slice(full, outer), 1)) if part[0].start < part[0].stop]


def _spread(v: Array, inner: int, repeats: int) -> Array:
    """Make a vector of columns from one of channels."""
    return np.tile(np.repeat(v, inner), repeats) if inner * repeats > 1 else v


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class _Arrays:
    """The arrays of a call that are laid out as x, and what the loops are given besides."""

    def __init__(self, x: Array, dy: Array | None, y: Array | None, epilogue: Any):
        self.shape = x.shape
        self.item = x.itemsize
        self.given = _given(epilogue, dy is not None)
        r, dr = (None, None) if epilogue is None else (epilogue.residual, epilogue.dresidual)
        self._all = x, dy, r, y, dr

    def of(self, part: slice, *shape: int) -> list[Any]:
        """Some of the images, in another shape."""
        return [None if a is None else a[part].reshape(shape) for a in self._all]


def _sums(a: _Arrays, vectors: tuple[Array, Array, Array], threads: int) -> Array:
    """Both sums of each channel."""
    outer, channels, inner = a.shape
    short, longest = SUMMED
    if _by_planes(a, short):
        piece, images = min(TILE, inner), max(1, TILE // inner)
        group = max(1, UNIT // (min(images, outer) * piece), _ceil(RUN, inner))
        tiles = _ceil(outer, images) * _ceil(inner, piece)
        sums = np.zeros((2, tiles, channels))
        x, dy, r, _, _ = a.of(slice(None), outer, channels, inner)
        _launch(_sum_planes, x, dy, r, a.given, (*vectors, *sums, images, piece, group), tiles * _ceil(channels, group), threads)
        total: Array = sums.sum(1)
        return total
    total = np.zeros((2, channels))
    for part, repeats in _as_columns(a, longest):
        columns = repeats * channels * inner
        x, dy, r, _, _ = a.of(part, -1, columns)
        tile_rows = max(TILE_ROWS, UNIT // columns)
        tiles = _ceil(len(x), tile_rows)
        sums = np.zeros((2, tiles, columns))
        spread = (_spread(v, inner, repeats) for v in vectors)
        _launch(_sum_columns, x, dy, r, a.given, (*spread, *sums, tile_rows), tiles * _ceil(columns, COLUMNS), threads)
        total += sums.sum(1).reshape(2, repeats, channels, inner).sum((1, 3))
    return total


def _map(a: _Arrays, vectors: tuple[Array, ...], threads: int) -> None:
    """Write what becomes of each element; the vectors are those of the channels."""
    outer, channels, inner = a.shape
    short, longest = MAPPED
    if _by_planes(a, short):
        x, dy, r, y, dr = a.of(slice(None), -1, inner)
        piece, group = min(UNIT, inner), max(1, UNIT // inner)
        units = _ceil(outer * channels, group) * _ceil(inner, piece)
        _launch(_map_planes, x, dy, r, a.given, (y, dr, *vectors, group, piece), units, threads)
        return
    for part, repeats in _as_columns(a, longest):
        columns = repeats * channels * inner
        x, dy, r, y, dr = a.of(part, -1, columns)
        spread = (_spread(v, inner, repeats) for v in vectors)
        batch = max(1, UNIT // columns)
        _launch(_map_columns, x, dy, r, a.given, (y, dr, *spread, batch), _ceil(len(x), batch), threads)


@np.errstate(all="ignore")
def stats(x: Array, threads: int = 1) -> tuple[Array, Array, Array]:
    """Mean, what it rounds away, and M2 of each channel; see `fastbn.reference.stats`."""
    outer, _, inner = x.shape
    a, b, c = (x[n * outer // 6, :, n * inner // 6].astype(np.float64) for n in (1, 3, 5))
    k = np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))
    k = np.where(np.isfinite(k), k, 0.0)
    total, square = _sums(_Arrays(x, None, None, None), (k, k, k), threads)
    offset = total / (outer * inner)
    mean = k + offset
    high = mean - k
    low = (k - (mean - high)) + (offset - high)
    return mean, np.where(np.isfinite(low), low, 0.0), np.maximum(square - total * offset, 0.0)


def normalize(x: Array, y: Array, mean: Array, scale: Array, shift: Array, threads: int = 1, epilogue: Any = None) -> None:
    """Write ``(x - mean) * scale + shift`` and what follows to `y`; see `fastbn.reference.normalize`."""
    _map(_Arrays(x, None, y, epilogue), (mean, scale, shift, shift, scale, shift), threads)


@np.errstate(all="ignore")
def grad_sums(dy: Array, x: Array, mean: Array, threads: int = 1, epilogue: Any = None) -> tuple[Array, Array]:
    """Sum dy and ``dy * (x - mean)`` over each channel; see `fastbn.reference.grad_sums`."""
    k = mean.astype(np.float64)
    scale, shift = (k, k) if epilogue is None else (epilogue.scale, epilogue.shift)
    sum_dy, sum_dy_xmu = _sums(_Arrays(x, dy, None, epilogue), (k, scale, shift), threads)
    return sum_dy, sum_dy_xmu


def grad_input(
    dy: Array, x: Array, dx: Array, mean: Array, scale: Array, g0: Array, g1: Array, threads: int = 1, epilogue: Any = None
) -> None:  # fmt: skip
    """Write ``scale * (dy - g0 - (x - mean) * g1)`` to `dx`; see `fastbn.reference.grad_input`."""
    forward = (scale, g0) if epilogue is None else (epilogue.scale, epilogue.shift)
    _map(_Arrays(x, dy, dx, epilogue), (mean, scale, g0, g1, *forward), threads)
