"""The Numba kernels: textbook loops, for machines where the compiled ones cannot run.

a) Four loops over elements: the sums and the map, of planes and of columns. Without `dy` the sums are those of
   `stats` and the map is `normalize`; with it they are `grad_sums` and `grad_input`. Numba drops the branch that is
   not taken when it compiles.

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
from numba.extending import intrinsic

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

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
def _input_gradient(dy: float, x: float, mean: float, scale: float, g0: float, g1: float) -> Any:
    return scale * (dy - g0 - (x - mean) * g1)


@_compiled("reassoc", "contract")
def _sum_planes(
    x: Array, dy: Array | None, k: Array, sums: Array, squares: Array, images: int, piece: int, group: int, units: int, counter: Array
) -> None:
    """Add up tiles of `images` planes, or of a piece of one; a unit is one tile of a group of channels."""
    outer, channels, inner = x.shape
    groups, pieces = (channels + group - 1) // group, (inner + piece - 1) // piece
    unit = _claim(counter)
    while unit < units:
        tile, first = unit // groups, unit % groups * group
        start = tile % pieces * piece
        for n in range(tile // pieces * images, min((tile // pieces + 1) * images, outer)):
            for c in range(first, min(first + group, channels)):
                plane = x[n, c, start : min(start + piece, inner)]
                gradient = plane if dy is None else dy[n, c, start : min(start + piece, inner)]
                total = square = 0.0
                for i in range(len(plane)):
                    d = _deviation(plane[i], k[c])
                    g = d if dy is None else np.float64(gradient[i])
                    total += g
                    square += g * d
                sums[tile, c] += total
                squares[tile, c] += square
        unit = _claim(counter)


@_compiled("reassoc", "contract")
def _sum_columns(
    x: Array, dy: Array | None, k: Array, sums: Array, squares: Array, tile_rows: int, units: int, counter: Array
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
        for r in range(row, whole, BATCH):
            for j in group:
                total = square = 0.0
                for b in range(BATCH):
                    d = _deviation(x[r + b, j], k[j])
                    g = d if dy is None else np.float64(dy[r + b, j])
                    total += g
                    square += g * d
                sums[tile, j] += total
                squares[tile, j] += square
        for r in range(whole, end):
            for j in group:
                d = _deviation(x[r, j], k[j])
                g = d if dy is None else np.float64(dy[r, j])
                sums[tile, j] += g
                squares[tile, j] += g * d
        unit = _claim(counter)


@_compiled()
def _map_planes(
    x: Array, dy: Array | None, y: Array, mean: Array, scale: Array, shift: Array, slope: Array,
    group: int, piece: int, units: int, counter: Array,
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
            for i in range(len(source)):
                if dy is None:
                    target[i] = _normalized(source[i], mean[c], scale[c], shift[c])
                else:
                    target[i] = _input_gradient(gradient[i], source[i], mean[c], scale[c], shift[c], slope[c])
        unit = units - 1 - _claim(counter)


@_compiled()
def _map_columns(
    x: Array, dy: Array | None, y: Array, mean: Array, scale: Array, shift: Array, slope: Array,
    batch: int, units: int, counter: Array,
) -> None:  # fmt: skip
    """Map rows, the last ones first; a unit is `batch` of them."""
    rows, columns = x.shape
    unit = units - 1 - _claim(counter)
    while unit >= 0:
        for r in range(unit * batch, min((unit + 1) * batch, rows)):
            for j in range(columns):
                if dy is None:
                    y[r, j] = _normalized(x[r, j], mean[j], scale[j], shift[j])
                else:
                    y[r, j] = _input_gradient(dy[r, j], x[r, j], mean[j], scale[j], shift[j], slope[j])
        unit = units - 1 - _claim(counter)


# ---- Threads ----

_jobs: SimpleQueue[tuple[Callable[[], Any], threading.Lock]] = SimpleQueue()
_busy = threading.Lock()
_workers = 0


def _help(run: Callable[[], Any], ticket: threading.Lock) -> None:
    if ticket.acquire(blocking=False):  # else the work is done already
        try:
            run()
        finally:
            ticket.release()


def _work(jobs: SimpleQueue[tuple[Callable[[], Any], threading.Lock]]) -> None:
    while True:
        _help(*jobs.get())


def _share(run: Callable[[], Any], helpers: int) -> None:
    """Call `run` here and, at the same time, in other threads; return when all that began have ended."""
    global _workers
    if helpers < 1 or not _busy.acquire(blocking=False):  # the other threads work for someone else
        run()
        return
    tickets = [threading.Lock() for _ in range(helpers)]
    try:
        while _workers < helpers:
            threading.Thread(target=_work, args=(_jobs,), name=f"fastbn-numba-{_workers}", daemon=True).start()
            _workers += 1
    except RuntimeError:  # too many threads, or the interpreter is shutting down: those there are will do
        pass
    try:
        for ticket in tickets:
            _jobs.put((run, ticket))
        run()
    finally:
        for ticket in tickets:
            ticket.acquire()
        _busy.release()


def _after_fork() -> None:
    """Forget the threads, which are the parent's."""
    global _jobs, _busy, _workers
    _jobs, _busy, _workers = SimpleQueue(), threading.Lock(), 0
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles could never compile.
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=global_compiler_lock.release, after_in_child=_after_fork)


# ---- Launching ----

PATIENCE = 1.0  # seconds of compiling before the user is told
_ready: set[tuple[Any, np.dtype[Any], bool]] = set()


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


def _sealed(a: Array) -> Array:
    """Take a view that cannot be written, so that Numba sees one type, whether `a` can be written or not."""
    view = a.view()
    view.flags.writeable = False
    return view


def _launch(loop: Any, x: Array, dy: Array | None, arguments: Iterable[Any], units: int, threads: int) -> None:
    """Run all units of a loop."""
    given = _sealed(x), None if dy is None else _sealed(dy), *arguments
    key = loop, x.dtype, dy is None
    if key not in _ready:
        _prepare(loop, given)
        _ready.add(key)
    _share(partial(loop, *given, units, np.zeros(1, np.int64)), min(threads, units) - 1)


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


def _by_planes(x: Array, short: int) -> bool:
    outer, _, inner = x.shape
    return bool(inner > 1 and (outer < MANY_IMAGES or inner * x.itemsize > short))


def _as_columns(x: Array, longest: int) -> list[tuple[slice, int]]:
    """Cut `x` into images whose columns are gathered, so many to a row, and the rest; each a slice and a number."""
    outer, channels, inner = x.shape
    repeats = max(1, longest // (channels * inner))
    full = outer - outer % repeats
    return [part for part in ((slice(0, full), repeats), (slice(full, outer), 1)) if part[0].start < part[0].stop]


def _spread(v: Array, inner: int, repeats: int) -> Array:
    """Make a vector of columns from one of channels."""
    return np.tile(np.repeat(v, inner), repeats) if inner * repeats > 1 else v


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _sums(x: Array, dy: Array | None, k: Array, threads: int) -> Array:
    """Both sums of each channel."""
    outer, channels, inner = x.shape
    short, longest = SUMMED
    if _by_planes(x, short):
        piece, images = min(TILE, inner), max(1, TILE // inner)
        group = max(1, UNIT // (min(images, outer) * piece), _ceil(RUN, inner))
        tiles = _ceil(outer, images) * _ceil(inner, piece)
        sums = np.zeros((2, tiles, channels))
        _launch(_sum_planes, x, dy, (k, *sums, images, piece, group), tiles * _ceil(channels, group), threads)
        total: Array = sums.sum(1)
        return total
    total = np.zeros((2, channels))
    for part, repeats in _as_columns(x, longest):
        columns = repeats * channels * inner
        rows = x[part].reshape(-1, columns)
        gradient = None if dy is None else dy[part].reshape(-1, columns)
        tile_rows = max(TILE_ROWS, UNIT // columns)
        tiles = _ceil(len(rows), tile_rows)
        sums = np.zeros((2, tiles, columns))
        units = tiles * _ceil(columns, COLUMNS)
        _launch(_sum_columns, rows, gradient, (_spread(k, inner, repeats), *sums, tile_rows), units, threads)
        total += sums.sum(1).reshape(2, repeats, channels, inner).sum((1, 3))
    return total


def _map(x: Array, dy: Array | None, y: Array, vectors: tuple[Array, ...], threads: int) -> None:
    """Write what becomes of each element; the vectors are those of the channels."""
    _, channels, inner = x.shape
    short, longest = MAPPED
    if _by_planes(x, short):
        planes = x.reshape(-1, inner)
        gradient = None if dy is None else dy.reshape(-1, inner)
        piece, group = min(UNIT, inner), max(1, UNIT // inner)
        units = _ceil(len(planes), group) * _ceil(inner, piece)
        _launch(_map_planes, planes, gradient, (y.reshape(-1, inner), *vectors, group, piece), units, threads)
        return
    for part, repeats in _as_columns(x, longest):
        columns = repeats * channels * inner
        rows = x[part].reshape(-1, columns)
        gradient = None if dy is None else dy[part].reshape(-1, columns)
        spread = (_spread(v, inner, repeats) for v in vectors)
        batch = max(1, UNIT // columns)
        _launch(_map_columns, rows, gradient, (y[part].reshape(-1, columns), *spread, batch), _ceil(len(rows), batch), threads)


@np.errstate(all="ignore")
def stats(x: Array, threads: int = 1) -> tuple[Array, Array, Array]:
    """Mean, what it rounds away, and M2 of each channel; see `fastbn.reference.stats`."""
    outer, _, inner = x.shape
    a, b, c = (x[n * outer // 6, :, n * inner // 6].astype(np.float64) for n in (1, 3, 5))
    k = np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))
    k = np.where(np.isfinite(k), k, 0.0)
    total, square = _sums(x, None, k, threads)
    offset = total / (outer * inner)
    mean = k + offset
    high = mean - k
    low = (k - (mean - high)) + (offset - high)
    return mean, np.where(np.isfinite(low), low, 0.0), np.maximum(square - total * offset, 0.0)


def normalize(x: Array, y: Array, mean: Array, scale: Array, shift: Array, threads: int = 1) -> None:
    """Write ``(x - mean) * scale + shift`` to `y`; see `fastbn.reference.normalize`."""
    _map(x, None, y, (mean, scale, shift, shift), threads)


@np.errstate(all="ignore")
def grad_sums(dy: Array, x: Array, mean: Array, threads: int = 1) -> tuple[Array, Array]:
    """Sum `dy` and ``dy * (x - mean)`` over each channel; see `fastbn.reference.grad_sums`."""
    sum_dy, sum_dy_xmu = _sums(x, dy, mean.astype(np.float64), threads)
    return sum_dy, sum_dy_xmu


def grad_input(dy: Array, x: Array, dx: Array, mean: Array, scale: Array, g0: Array, g1: Array, threads: int = 1) -> None:
    """Write ``scale * (dy - g0 - (x - mean) * g1)`` to `dx`; see `fastbn.reference.grad_input`."""
    _map(x, dy, dx, (mean, scale, g0, g1), threads)
