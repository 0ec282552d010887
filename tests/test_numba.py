"""The Numba kernels: vector loops, same bits for any threads, and no abort, no hang, whatever Numba's own threads do."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from truth import of_whole_calls
from ways import is_direct, take_the_checked_way

import fastbn
from fastbn import core, dispatch
from fastbn.activations import NAMES, lookup

if reason := dispatch.KERNELS["numba"].unusable():
    pytest.skip(reason, allow_module_level=True)

import numba
from numba import cfunc, types

from fastbn.kernels import numba as kernel
from fastbn.kernels import numba_cache, numba_lanes, numba_threads
from fastbn.kernels.numba_math import exp, like
from fastbn.kernels.protocol import Affine, Running, Statistics

LAYERS = ("workqueue", "omp", "tbb")
# Planes: of several tiles, small ones of few and of many images. Columns: few, gathered with a rest, more than a group.
SHAPES = [(1, 2, 40000), (3, 5, 17000), (2, 3, 7), (40, 3, 100), (50, 7, 20), (17, 3, 49), (1000, 1, 1), (5000, 3, 1), (300, 2500, 1)]
X = np.random.default_rng(0).normal(3, 2, (16, 32, 30, 30)).astype(np.float32)  # enough for threads


DTYPES = ["float32", "float64", "float16", "bfloat16"]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


@pytest.fixture(params=["pool", "threads"])
def door(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The compiled pool, and Python threads as where it was not built."""
    if request.param == "pool" and numba_threads._pool is None:
        pytest.skip("the pool was not built")
    if request.param == "threads":
        monkeypatch.setattr(numba_threads, "_pool", None)
    for cached in (numba_threads.address, kernel._template):
        cached.cache_clear()
    yield request.param
    monkeypatch.undo()
    for cached in (numba_threads.address, kernel._template):
        cached.cache_clear()


def everything(x: np.ndarray, dy: np.ndarray, n: int, in_place: bool = False) -> list[bytes]:
    """All operations and whole calls, on n threads; outputs start as NaN."""
    compute = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    v, w, b, u = (np.linspace(low, low + 2, x.shape[1], dtype=compute) for low in (0.5, -1, 2, 0.1))

    def fresh(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = a.copy() if in_place else np.full_like(a, np.nan)
        return (out if in_place else a), out

    found = [*kernel.stats(x, n), *kernel.grad_sums(dy, x, v, n)]
    source, y = fresh(x)
    kernel.normalize(source, y, v, w, b, n)
    source, dx = fresh(dy)
    kernel.grad_input(source, x, dx, v, w, (b, u), n)
    source, z = fresh(x)
    running = u.copy(), v.copy()
    saved = kernel.forward(source, z, Affine(w, b), 1e-5, Running(*running, 0.1, 1), compute, n)
    source, dz = fresh(dy)
    sums = kernel.backward(source, x, dz, Statistics(*saved[:3]), saved[3], n)
    return [a.tobytes() for a in (*found, y, dx, z, *saved, *running, dz, *sums)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_same_bits(shape: tuple[int, int, int], dtype: str, door: str) -> None:
    """1, 2, 3 and 7 threads, in place or not, writable or not, on the pool or without it."""
    rng = np.random.default_rng(sum(shape))
    x, dy = (rng.normal(3, 2, shape).astype(dtype_of(dtype)) for _ in range(2))
    expected = everything(x, dy, 1)
    for n in (2, 3, 7):
        assert everything(x, dy, n) == expected, n
    assert everything(x, dy, 3, in_place=True) == expected
    x.flags.writeable = dy.flags.writeable = False
    compiled = set(numba_cache.made)
    assert everything(x, dy, 3) == expected
    assert set(numba_cache.made) == compiled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_whole_calls_equal_composed_ones(shape: tuple[int, int, int], dtype: str) -> None:
    """The algebra compiled by Numba and the one in NumPy give the same bits."""
    storage = np.dtype(dtype_of(dtype))
    assert of_whole_calls(kernel, shape, storage) == of_whole_calls(core.ComposedKernel(kernel), shape, storage)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_exact(shape: tuple[int, int, int]) -> None:
    """Sums of these are exact in any order, so that a wrong cut shows as a wrong bit; so is a constant far from zero."""
    pairs = np.random.default_rng(0).integers(-8, 8, shape)
    pairs[1::2] = -pairs[: shape[0] // 2 * 2 : 2]  # a pivot that is moved to the mean of its rows stays an integer
    pairs += np.arange(shape[1])[:, np.newaxis] % 5
    x = (1000 + pairs).astype(np.float32)
    mean, low, m2 = kernel.stats(x, 3)
    exact = pairs.sum((0, 2)) / (shape[0] * shape[2])
    np.testing.assert_allclose(mean + low, 1000 + exact, rtol=1e-15)
    np.testing.assert_allclose(m2, np.square(pairs).sum((0, 2)) - pairs.sum((0, 2)) * exact, rtol=2e-15)
    sum_dy, sum_dy_xmu = kernel.grad_sums(pairs.astype(np.float32), x, np.full(shape[1], 1000, np.float32), 3)
    np.testing.assert_array_equal(sum_dy, pairs.sum((0, 2)))
    np.testing.assert_array_equal(sum_dy_xmu, np.square(pairs).sum((0, 2)))
    mean, low, m2 = kernel.stats(np.full(shape, 123456.7, np.float64), 2)
    assert set(mean) == {123456.7}
    assert not low.any()
    assert not m2.any()


@pytest.mark.parametrize("instruction", [True, False], ids=["converted by the processor", "converted by integers"])
def test_half_precision(instruction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of it, and what lies around and half way between two, in blocks and alone."""
    monkeypatch.setattr(numba_lanes, "HAS_HALF", instruction and numba_lanes.HAS_HALF)
    half, single = numba_lanes.Memory("float16"), numba_lanes.MEMORY["float32"]
    load, store, element, load_single, store_single = half.load, half.store, half.element, single.load, single.store
    put = numba_lanes.NUMBERS[types.float64].put

    @numba.njit
    def widen(source: int, to: int, n: int) -> None:
        for i in range(0, n, 32):
            store_single(to, i, load(source, i))

    @numba.njit
    def narrow(source: int, to: int, n: int) -> None:
        for i in range(0, n, 32):
            store(to, i, load_single(source, i))

    @numba.njit
    def widen_one_by_one(source: int, to: int, n: int) -> None:
        for i in range(n):
            put(to, i, element(source, i))

    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for convert, dtype in ((widen, np.float32), (widen_one_by_one, np.float64)):
        wide = np.empty(every.size, dtype)
        convert(every.ctypes.data, wide.ctypes.data, every.size)
        np.testing.assert_array_equal(wide, every.astype(dtype))
        np.testing.assert_array_equal(np.signbit(wide), np.signbit(every))
    finite = every[np.isfinite(every)]
    step = np.sort(finite.astype(np.float32))
    numbers = np.concatenate([step, (step[1:] + step[:-1]) / 2, [65519.9, 65520, 65536, 1e30, 1e-40, -0.0, np.inf, -np.inf]])
    numbers = np.concatenate([np.nextafter(numbers, low, dtype=np.float32) for low in (-np.inf, np.inf)] + [numbers]).astype(np.float32)
    numbers = np.concatenate([numbers, np.full(-numbers.size % 32 + 32, np.nan, np.float32)])
    found = np.empty(numbers.size, np.float16)
    narrow(numbers.ctypes.data, found.ctypes.data, numbers.size)
    with np.errstate(over="ignore"):
        wanted = numbers.astype(np.float16)
    assert np.isnan(found[-32:]).all()
    np.testing.assert_array_equal(found[:-64].view(np.uint16), wanted[:-64].view(np.uint16))


@pytest.mark.parametrize("features", ["", "+f16c,-avx"])
def test_code_for_a_plainer_processor_converts_half_precision_itself(features: str) -> None:
    """What LLVM would call is nowhere, which ends the process."""
    code = "print(fastbn.batch_norm_elemt(np.array([[1.0], [3.0]], np.float16), [2.0], [0.5]).ravel())"
    assert python(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=features) == "[-0.5  0.5]\n"


def test_every_dtype_is_taken() -> None:
    """Half precision and bfloat16, too: with a function of the user's, no other kernel would."""
    row = dispatch.KERNELS["numba"]
    assert {dtype: row.declines(dtype, custom=True) for dtype in DTYPES} == dict.fromkeys(DTYPES)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("shape", [(40, 17, 1), (500, 2, 1), (64, 3, 7), (50, 7, 20), (6, 5, 900)], ids=str)
def test_what_is_infinite_stays_in_its_channel(shape: tuple[int, int, int], value: float) -> None:
    """Wherever it lies: some rows are in the sample that a pivot is made of."""
    for row in range(0, shape[0], max(1, shape[0] // 40)):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        x[row, 0, shape[2] // 3] = value
        mean, _, m2 = kernel.stats(x, 2)
        np.testing.assert_array_equal(mean[0], value)
        assert np.isnan(m2[0])
        assert np.isfinite(mean[1:]).all()
        assert np.isfinite(m2[1:]).all()


# ---- Threads ----


@pytest.mark.parametrize("door", ["threads"], indirect=True)
def test_a_busy_thread_is_not_waited_for(door: str) -> None:
    expected = kernel.stats(X.reshape(16, 32, -1), 1)[0]
    begun, end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        end.wait()

    others = [threading.Thread(target=numba_threads._share, args=(work, 1)) for _ in range(2)]
    for other in others:
        other.start()
    begun.wait()
    np.testing.assert_array_equal(kernel.stats(X.reshape(16, 32, -1), 4)[0], expected)
    end.set()
    for other in others:
        other.join()


@pytest.mark.parametrize("door", ["threads"], indirect=True)
def test_no_more_threads(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    expected = kernel.stats(X.reshape(16, 32, -1), 1)
    monkeypatch.setattr(threading.Thread, "start", fail)
    monkeypatch.setattr(numba_threads, "_workers", 0)
    for got, want in zip(kernel.stats(X.reshape(16, 32, -1), 4), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert numba_threads._tickets.empty()


def test_threads_keep_no_array(door: str) -> None:
    x = X.reshape(16, 32, -1).copy()
    kernel.stats(x, 4)
    gone = weakref.ref(x)
    del x
    for _ in range(100):  # a thread that woke up late drops what it was given at once
        if gone() is None:
            break
        threading.Event().wait(0.01)
    assert gone() is None


class TooLargeError(Exception):
    pass


def in_both(where: str) -> Callable[[], None]:
    """Work that two threads begin, and that raises in one or in both."""
    caller, both = threading.current_thread(), threading.Barrier(2)

    def work() -> None:
        both.wait()
        if where in ("both", "caller" if threading.current_thread() is caller else "helper"):
            raise TooLargeError(where)

    return work


@pytest.mark.parametrize("where", ["caller", "helper", "both"])
def test_what_a_thread_raises_reaches_the_caller(where: str) -> None:
    numba_threads._share(in_both("none"), 1)
    threads = threading.active_count()
    for _ in range(5):  # the threads go on
        with pytest.raises(TooLargeError, match=where):
            numba_threads._share(in_both(where), 1)
    assert threading.active_count() == threads
    with pytest.raises(TooLargeError):
        numba_threads._share(lambda: numba_threads._share(in_both(where), 1), 0)
    numba_threads._share(in_both("none"), 1)


def test_an_exception_keeps_no_array() -> None:
    work = in_both("helper")
    gone = weakref.ref(work)
    with pytest.raises(TooLargeError) as caught:
        numba_threads._share(work, 1)
    del work, caught
    assert gone() is None


def test_shared_work_may_share_work() -> None:
    """And raise from within it, in whichever thread."""
    count = []

    def inner() -> None:
        count.append(1)
        raise TooLargeError

    def outer() -> None:
        with pytest.raises(TooLargeError):
            numba_threads._share(inner, 3)

    for _ in range(20):
        count.clear()
        numba_threads._share(outer, 3)
        assert count


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
@pytest.mark.parametrize("also", [None, TooLargeError])
def test_an_interrupt_waits_for_the_other_threads(also: type[Exception] | None) -> None:
    """They still write to arrays of the caller's; and the pool is as good as before."""
    caller, both, ended = threading.current_thread(), threading.Barrier(2), []

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        both.wait()
        if threading.current_thread() is caller:
            return
        for _ in range(3):
            time.sleep(0.01)  # the caller is waiting by now
            signal.pthread_kill(caller.ident or 0, signal.SIGUSR1)
        time.sleep(0.01)
        ended.append(1)
        if also is not None:
            raise also

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            numba_threads._share(work, 1)
        assert ended
    finally:
        signal.signal(signal.SIGUSR1, before)
    numba_threads._share(in_both("none"), 1)


# As where the pool was not built.
WITHOUT_POOL = """
from fastbn.kernels import numba_threads
numba_threads._pool = None
"""
DOORS = [pytest.param("", id="pool"), pytest.param(WITHOUT_POOL, id="threads")]


def python(code: str, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """Run a script with Numba pinned; what it prints. A hang ends as a failure."""
    prelude = "import os, sys, threading, time, numpy as np, fastbn\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code, *arguments],
        env=os.environ | {"FASTBN_KERNEL": "numba"} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


# Right results are those of one thread; `user` is a parallel function of the user's own, on Numba's threads.
COMMON = """
import numba

@numba.njit(parallel=True)
def double(a):
    for i in numba.prange(len(a)):
        a[i] *= 2

def user():
    a = np.ones(100000)
    double(a)
    return a.sum() == 200000

try:
    user()
except ValueError as error:
    print(error)
    sys.exit(77)
assert numba.threading_layer() == os.environ["NUMBA_THREADING_LAYER"]

x = np.random.default_rng(0).normal(3, 2, (16, 32, 30, 30)).astype(np.float32)

def results():
    y, saved = fastbn.batch_norm_forward(x)
    z, _ = fastbn.batch_norm_forward(x, layout="NHWC")
    return [a.tobytes() for a in (y, z, *fastbn.batch_norm_backward(x, x, saved)[:3])]

with fastbn.num_threads(1):
    expected = results()
fastbn.set_num_threads(4)
wrong = []

def check(times):
    for _ in range(times):
        if results() != expected:
            wrong.append(1)
"""


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_many_threads(layer: str, door: str) -> None:
    """Eight Python threads, and parallel code of the user's own at the same time."""
    code = """
threads = [threading.Thread(target=check, args=(8,)) for _ in range(8)]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    assert user()
assert not wrong
"""
    python(door + COMMON + code, NUMBA_THREADING_LAYER=layer)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_many_forks(layer: str, door: str) -> None:
    """Fifty children, forked while other threads use fastbn, after Numba's own threads were started."""
    code = """
stop = threading.Event()

def busy():
    while not stop.is_set():
        check(1)

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(50):
    pid = os.fork()
    if pid == 0:
        check(1)
        os._exit(bool(wrong))
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
check(2)
assert not wrong and user()
"""
    python(door + COMMON + code, NUMBA_THREADING_LAYER=layer)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_fork_while_another_thread_compiles(tmp_path: Path) -> None:
    """The child compiles too: it does not wait for a thread that it does not have."""
    code = """
from numba.core.compiler_lock import global_compiler_lock
fastbn.warmup(["float32"])
held = threading.Event()

def compile():
    with global_compiler_lock:
        held.set()
        time.sleep(0.5)

threading.Thread(target=compile).start()
held.wait()
pid = os.fork()
if pid == 0:
    fastbn.batch_norm_stats(np.ones((2, 3)))
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
fastbn.batch_norm_stats(np.ones((2, 3)))
"""
    python(code, NUMBA_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_an_activation_that_raises(door: str) -> None:
    """In whichever thread, every time, before a fork and after: the call never returns what was not written."""
    code = """
import numba

@numba.njit
def positive(z):
    if z < 0:
        raise ValueError("negative")
    return z

x = np.ones((16, 32, 30, 30), np.float32)
x[3, 5, 0, 0] = -1
zero, one = np.zeros(32, np.float32), np.ones(32, np.float32)

def check():
    for threads in (1, 2, 4) * 5:
        out = np.full_like(x, np.nan)
        with fastbn.num_threads(threads):
            try:
                fastbn.batch_norm(x, zero, one, activation=positive, out=out)
                return 1
            except ValueError as error:
                assert str(error) == "negative"
            assert not np.isnan(fastbn.batch_norm(abs(x), zero, one, activation=positive, out=out)).any()
    return 0

assert check() == 0
pid = os.fork()
if pid == 0:
    os._exit(check())
assert os.waitpid(pid, 0)[1] == 0
"""
    python(door + code)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 1), (70, 3, 2), (2, 3, 45)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_sees_values_of_the_array_alone(dtype: str, shape: tuple[int, int, int]) -> None:
    """Not what fills the last lanes of a block, for which it could raise."""

    @numba.njit
    def far(z: float) -> Any:
        if z < 50:
            raise ValueError("near")
        return z

    x = np.random.default_rng(0).uniform(60, 70, shape).astype(dtype_of(dtype))
    one = np.ones(shape[1], np.float64 if dtype == "float64" else np.float32)
    activation = fastbn.Activation(far, far)
    for _ in range(2):
        y = fastbn.batch_norm(x, 0 * one, one, eps=0.0, activation=activation)
        np.testing.assert_array_equal(y, x)
        assert fastbn.batch_norm_forward(x, one, one + 100, activation=activation)[1] is not None
        with pytest.raises(ValueError, match="near"):
            fastbn.batch_norm_forward(x, one, one, activation=activation)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp(dtype: Any) -> None:
    """To 2 units in the last place, over its range, and at the ends."""
    ends = np.log(np.finfo(dtype).max) - 1e-3
    z = np.concatenate([np.linspace(-ends, ends, 200001), np.random.default_rng(0).normal(0, 2, 100000)]).astype(dtype)
    extreme = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, 0, -0.0], dtype)

    @numba.njit
    def apply(z: np.ndarray, y: np.ndarray) -> None:
        for i in range(z.size):
            y[i] = exp(z[i])

    y, at_ends = np.empty_like(z), np.empty_like(extreme)
    apply(z, y)
    apply(extreme, at_ends)
    truth = np.exp(z.astype(np.longdouble))
    assert (abs(y - truth) <= 2 * np.spacing(truth.astype(dtype))).all()
    np.testing.assert_array_equal(at_ends, np.array([np.inf, 0, np.nan, np.inf, 0, 1, 1], dtype))


def test_numba_starts_no_threads() -> None:
    code = """
import numba
fastbn.set_num_threads(4)
fastbn.batch_norm_forward(np.ones((16, 32, 30, 30), np.float32))
try:
    print(numba.threading_layer())
except ValueError:
    print("none")
"""
    assert python(code) == "none\n"


def test_calls_at_exit() -> None:
    code = """
import atexit
import numba  # Python 3.12 and newer let nobody import it at their end
fastbn.set_num_threads(4)
x = np.ones((16, 32, 30, 30), np.float32)
atexit.register(lambda: print(fastbn.batch_norm_stats(x).mean[0]))
"""
    assert python(code) == "1.0\n"


# ---- Compiling ----


def test_warmup_compiles_everything() -> None:
    """Nothing is left to compile for plain calls, nor for those with a built-in function or one of the user's."""
    code = """
import numba
from fastbn.kernels import numba_cache

square = fastbn.Activation(numba.njit(lambda z: z * z), numba.njit(lambda z: z + z))
fastbn.warmup(["float32", "float16"], ["NCHW", "NHWC"], activations=[None, "relu", square])
made = set(numba_cache.made)
for dtype in ("float32", "float16"):
    for layout in ("NCHW", "NHWC"):
        for shape in ((2, 50, 8, 8), (64, 5, 3, 3)):
            x = np.ones(shape, dtype)
            for activation in (None, "relu", square):
                y, saved = fastbn.batch_norm_forward(x, layout=layout, activation=activation)
                fastbn.batch_norm_backward(x, x, saved)
assert set(numba_cache.made) == made, set(numba_cache.made) - made
"""
    python(code)


@pytest.mark.parametrize(("dtypes", "layouts"), [(["float8"], ["NCHW"]), (["float32"], ["NWHC"])])
def test_wrong_warmup(dtypes: list[str], layouts: list[str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        fastbn.warmup(dtypes, layouts)


def test_warmup_without_numba() -> None:
    with fastbn.use_kernel("reference"):
        fastbn.warmup()


USE = "print(fastbn.batch_norm_stats(np.array([[1.0], [3.0]])).mean[0])"


def test_no_directory_to_write(tmp_path: Path) -> None:
    """As in a container with read-only files and no home: nothing is kept, everything works."""
    package = tmp_path / "fastbn"
    shutil.copytree(Path(fastbn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (package, package / "kernels"):
        (folder / "__pycache__").write_text("a file in the place of the directory")
    code = "from fastbn.kernels import numba as kernel; print(kernel.__file__)\n" + USE
    nowhere = str(package / "__pycache__" / "home")
    environment = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "NUMBA_CACHE_DIR": nowhere, "PYTHONPATH": str(tmp_path)}
    assert python(code, cwd=tmp_path, **environment) == f"{package / 'kernels' / 'numba.py'}\n2.0\n"


INTERRUPTED = """
import numpy as np
import fastbn
from fastbn.kernels import numba_cache

compile, times = numba_cache.CFunc._compile_uncached, [0]


def interrupted(self):
    times[0] += 1
    if times[0] == 1:  # as a signal's handler does
        raise TimeoutError("time is over")
    return compile(self)


numba_cache.CFunc._compile_uncached = interrupted
x = np.array([[1.0], [3.0]])
with fastbn.use_kernel("numba"):
    try:
        fastbn.batch_norm(x, None, None, training=True)
    except TimeoutError as error:
        print(error, times[0])
    print(fastbn.batch_norm(x, None, None, training=True, eps=0.0).ravel())
"""


def test_what_interrupts_the_compiler_is_the_callers(tmp_path: Path) -> None:
    assert python(INTERRUPTED, NUMBA_CACHE_DIR=str(tmp_path)) == "time is over 1\n[-1.  1.]\n"


def test_a_damaged_cache_is_left_alone(tmp_path: Path) -> None:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert python(USE, **environment) == "2.0\n"
    for suffix in ("nbc", "nbi"):  # code, then the index that leads to it
        files = list(tmp_path.rglob(f"*.{suffix}"))
        assert files
        for file in files:
            file.write_bytes(b"")
        assert python(USE, **environment) == "2.0\n"


def test_what_a_signals_handler_raises_while_code_is_compiled_ends_the_call(tmp_path: Path) -> None:
    """It is no fault of the files, for which code would be compiled once more, however long that takes."""
    code = """
from fastbn.kernels import numba_cache
compile, arrives = numba_cache.CFunc._compile_uncached, [TimeoutError("late")]
def interrupted(self):
    if arrives: raise arrives.pop()
    return compile(self)
numba_cache.CFunc._compile_uncached = interrupted
for _ in range(2):
    try: print(fastbn.batch_norm_stats(np.array([[1.0], [3.0]])).mean[0])
    except TimeoutError as error: print(error)
"""
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path)) == "late\n2.0\n"


NAMES_READ = """
from fastbn.kernels import numba_cache
x = np.arange(24.0).reshape(4, 6)
y, saved = fastbn.batch_norm_forward(x)
fastbn.batch_norm_backward(x, x, saved)
print(y.tobytes().hex(), len(numba_cache.compiled_here), len(numba_cache.read_here))
"""


def test_the_cache_is_used(tmp_path: Path) -> None:
    first, second = (python(NAMES_READ, NUMBA_CACHE_DIR=str(tmp_path)).split() for _ in range(2))
    assert first[0] == second[0]
    assert (first[2], second[1]) == ("0", "0")
    assert first[1] == second[2] != "0"


def test_the_cache_is_that_of_one_python_and_one_processor() -> None:
    """Several may share a directory: installations from one checkout do."""
    stamp = "sys.implementation.cache_tag = sys.argv[1]\nfrom fastbn.kernels import numba_cache\nprint(numba_cache._stamp())"
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    found = [python(stamp, "cpython-311"), python(stamp, "cpython-312"), python(stamp, "cpython-311", **generic)]
    found.append(python(stamp, "cpython-311", NUMBA_OPT="0"))  # slow code, for who debugs
    assert len(set(found)) == 4
    assert python(stamp, "cpython-311") == found[0]


def test_processes_may_race_for_the_cache(tmp_path: Path) -> None:
    """Four that write the same files at the same time are right, and so is one that reads what they wrote."""
    found: list[str] = []
    together = [
        threading.Thread(target=lambda: found.append(python(NAMES_READ, NUMBA_CACHE_DIR=str(tmp_path)).split()[0])) for _ in range(4)
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    y, compiled, _ = python(NAMES_READ, NUMBA_CACHE_DIR=str(tmp_path)).split()
    assert found == [y] * 4
    assert compiled == "0"


TERMINAL = """
import io
class Screen(io.StringIO):
    def isatty(self): return terminal
sys.stderr = Screen()
from fastbn.kernels import numba_cache
for terminal, numba_cache.PATIENCE, dtype in ((False, 0.001, "f2"), (True, 1000, "f4"), (True, 0.001, "f8")):
    before = len(numba_cache.compiled_here)
    fastbn.batch_norm_stats(np.ones((2, 3), dtype))
    print(len(numba_cache.compiled_here) > before, sys.stderr.getvalue(), end="|")
"""


def test_slow_compiling_is_announced(tmp_path: Path) -> None:
    """On a terminal, and not where it is not slow."""
    assert python(TERMINAL, NUMBA_CACHE_DIR=str(tmp_path)) == "True |True |True fastbn: compiling Numba kernels, once ...\n|"


LOG = "sys.stderr = type('Log', (), {'write': print, 'flush': lambda self: None})()"


@pytest.mark.parametrize("change", ["sys.stderr = None", "sys.stderr.close()", LOG])
def test_a_service_may_have_no_standard_error(change: str) -> None:
    assert python(f"{change}; print(fastbn.batch_norm_stats(np.ones((2, 3))).count)") == "2\n"


def test_disabled_compiler() -> None:
    code = "print(fastbn.dispatch.KERNELS['numba'].unusable())"
    assert python(code, NUMBA_DISABLE_JIT="1") == "it cannot be imported: NUMBA_DISABLE_JIT is set\n"


def test_whole_calls_equal_the_reference() -> None:
    dy: Any = X[::-1]
    with fastbn.use_kernel("numba"):
        assert core.whole_calls(dispatch.select("float32")) is kernel
        y, saved = fastbn.batch_norm_forward(X)
        dx = fastbn.batch_norm_backward(dy, X, saved).dx
    with fastbn.use_kernel("reference"):
        want_y, saved = fastbn.batch_norm_forward(X)
        want_dx = fastbn.batch_norm_backward(dy, X, saved).dx
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-6)


def test_without_anything_compiled(tmp_path: Path) -> None:
    """The package of a machine without a compiler: Numba is chosen, on threads of Python's."""
    shutil.copytree(
        Path(fastbn.__file__).parent, tmp_path / "fastbn", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.dylib")
    )
    code = """
import warnings
warnings.simplefilter("ignore", RuntimeWarning)
fastbn.set_num_threads(3)
x = np.random.default_rng(0).normal(3, 2, (8, 32, 40, 40)).astype(np.float32)
y, saved = fastbn.batch_norm_forward(x, activation="relu")
dx = fastbn.batch_norm_backward(x, x, saved).dx
assert any(thread.name.startswith("fastbn-numba") for thread in threading.enumerate())
with fastbn.use_kernel("reference"):
    z, saved = fastbn.batch_norm_forward(x, activation="relu")
    np.testing.assert_allclose(dx, fastbn.batch_norm_backward(x, x, saved).dx, rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)
print(fastbn.dispatch.select("float32").name, fastbn.__file__)
"""
    environment = {"PYTHONPATH": str(tmp_path), "FASTBN_KERNEL": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert python(code, cwd=tmp_path, **environment) == f"numba {tmp_path / 'fastbn' / '__init__.py'}\n"


# ---- The generated code ----


def vector_instructions(code: str) -> list[str]:
    """The instructions of an x86 listing that work on vectors of floats, in wide registers where the machine has them."""
    width = "[yz]" if numba_lanes.FEATURES.get("avx") else "x"
    return re.findall(rf"^\s+v?((?:fn?m(?:add|sub)\d*|add|sub|mul|div|max|min|cmp\w*)p[sd])\s.*%{width}mm", code, re.MULTILINE)


def listing(loop: Any) -> str:
    sums = loop.operation in ("stats", "grad_sums")
    signature = types.void(*[types.intp] * (4 if sums else 5))
    made = cfunc(signature, error_model="numpy")(kernel._LOOPS[loop.pattern, sums](loop))
    return str(made._library.get_asm_str())


x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the listing is read as one for x86")
# What the arithmetic on one block takes, for each of its registers.
ARITHMETIC = {"stats": 3, "grad_sums": 3, "normalize": 2, "grad_input": 4}


@x86
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ARITHMETIC)
@pytest.mark.parametrize("pattern", ["planes", "columns"])
def test_loops_are_vectorized(pattern: str, operation: str, dtype: str) -> None:
    """On this machine, whatever Numba and LLVM it has."""
    registers = 128 // (64 if numba_lanes.FEATURES.get("avx512f") else 32 if numba_lanes.FEATURES.get("avx") else 16)
    assert len(vector_instructions(listing(kernel.Loop(pattern, operation, dtype)))) >= ARITHMETIC[operation] * registers


@numba.njit
def mish(z: float) -> Any:
    e = exp(-abs(z))
    n = like(z, 1) + like(z, 2) * e if z > 0 else e * (e + like(z, 2))
    return z * n / (n + like(z, 2) * (e * e if z > 0 else like(z, 1)))


@numba.njit
def square(z: float) -> Any:
    return z * z


@numba.njit
def twice(z: float) -> Any:
    return z + z


@numba.njit
def one_by_one(z: float) -> Any:
    return like(z, math.lgamma(z))


@x86
@pytest.mark.parametrize("activation", [*NAMES, fastbn.Activation(mish), fastbn.Activation(one_by_one)], ids=str)
def test_activations_are_vectorized(activation: Any) -> None:
    """Those of the library and a function of the user's made of its parts; not one that calls the C library."""
    found = kernel._known(lookup(activation))
    plain, active = (vector_instructions(listing(kernel.Loop("planes", "normalize", "float32", f))) for f in (None, found))
    assert bool(set(active) - set(plain)) == (activation != fastbn.Activation(one_by_one))


def test_a_job_begins_as_the_doors_enter_it() -> None:
    """Two files name its first fields, and their order."""
    jobs = pytest.importorskip("fastbn.kernels._jobs", reason="built without a compiler")
    names = [name for name, _ in kernel.Job._fields_]
    assert tuple(names[: len(jobs.HEAD)]) == jobs.HEAD
    assert names[-4:] == ["eps", "momentum", "correction", "parameter"]


@pytest.mark.skipif(numba_threads._pool is None, reason="built without a compiler")
def test_the_doors_refuse_calls_that_the_kernels_do_not_have() -> None:
    """Others are made of operations; C would jump to nowhere."""
    x, w, rows = np.ones((2, 3, 4), np.float32), np.ones(3, np.float32), np.ones((2, 1, 3, 4), np.float32)
    core.whole_calls(dispatch.KERNELS["numba"])
    calls = kernel.direct_calls
    for call in (
        lambda: calls.grad_sums(x, x, w, 1),
        lambda: calls.grad_input(x, x, x.copy(), w, w, (w, w), 1),
        lambda: calls.parts_forward(rows, rows.copy(), (None, None), 1e-5, (1, True), 1),
    ):
        with pytest.raises(NotImplementedError):
            call()
    with fastbn.use_kernel("numba"):
        assert not is_direct(fastbn.group_norm, x, 3)
        assert not is_direct(fastbn.group_norm_backward, x, x, fastbn.group_norm_forward(x, 3)[1])


@pytest.mark.skipif(numba_threads._pool is None, reason="built without a compiler")
def test_what_is_no_job_is_not_run() -> None:
    code = """
from fastbn.kernels import _calls, _jobs
for made in (None, (), (b"", 1, 0), (b"x" * 8, 1, 0), (b"x" * 100_000, 1, 0), (bytes(1000), 0, 0)):
    calls = _calls.Calls(_jobs.kernels(lambda *_: made, print))
    try: calls.stats(np.ones((2, 3, 4)))
    except (TypeError, ValueError): print("refused")
"""
    assert python(code) == "refused\n" * 6


@pytest.mark.skipif(numba_threads._pool is None, reason="built without a compiler")
@pytest.mark.parametrize("activation", [None, "silu", fastbn.Activation(square, twice)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_plain_calls_have_the_bits_of_checked_ones(training: bool, activation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients through given statistics too, in place or not, and for x alone."""
    rng = np.random.default_rng(1)
    x, dy = (rng.normal(1, 3, (6, 5, 4, 6)).astype(np.float32) for _ in range(2))
    x[:, 2] *= np.float32(1e30)  # sums that leave the range of float32
    m, v, w, b = (rng.uniform(0.5, 2, 5).astype(np.float32) for _ in range(4))

    def step() -> list[bytes]:
        running = m.copy(), v.copy()
        y, saved = fastbn.batch_norm_forward(x, w, b, *running, training=training, activation=activation)
        found = [y, *running, saved.mean, saved.invstd, saved.scale, saved.shift]
        for wrt in (("x", "weight", "bias"), ("x",), ("weight",)):
            found += [g for g in fastbn.batch_norm_backward(dy, x, saved, wrt=wrt) if g is not None]
        return [np.asarray(a).tobytes() for a in (*found, fastbn.batch_norm_backward(dy.copy(), x, saved, out=np.empty_like(x)).dx)]

    with fastbn.use_kernel("numba"):
        step()  # what a function of the user's is called by is known from its first call on
        assert fastbn.batch_norm_forward(x, w, b, activation=activation)[1].made is not None
        plain = step()
        take_the_checked_way(monkeypatch)
        assert step() == plain


@pytest.mark.skipif(numba_threads._pool is None, reason="built without a compiler")
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_what_compiling_raises_reaches_the_caller_of_a_plain_call(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise error

    x, v = np.ones((3, 7, 1), np.float32), np.ones(7, np.float32)
    with fastbn.use_kernel("numba"):
        expected = fastbn.batch_norm(x, v, v)
        kernel._jobs.forget()
        monkeypatch.setattr(kernel, "_template", broken)
        with pytest.raises(type(error)):
            fastbn.batch_norm(x, v, v)
        monkeypatch.undo()
        assert np.array_equal(fastbn.batch_norm(x, v, v), expected)
