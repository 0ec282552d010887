"""Arrays that end where memory ends, or begin where it begins: one element too far is a fault.

Each array of a call lies in pages of its own, between two that nobody may touch. The calls are made in another
process, because a fault ends it; its last line of output then tells which call it was.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import core
from fastbn.activations import Epilogue, lookup
from fastbn.dispatch import KERNELS, TABLE
from fastbn.dtypes import DTYPES
from fastbn.kernels.protocol import Affine, Running, Statistics

Array = np.ndarray[Any, Any]

PAGE = mmap.PAGESIZE
TAILS = range(1, 41)


class Region:
    """Pages between two that must not be touched."""

    def __init__(self, pages: int = 20):
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        self._size = pages * PAGE
        libc = ctypes.CDLL(None, use_errno=True)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for address in (start, start + PAGE + self._size):
            if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], at_end: bool, value: float = 1.0) -> Array:
        """An array that touches the page behind it, or the one before it."""
        count = prod(shape)
        offset = PAGE + (self._size - count * dtype.itemsize if at_end else 0)
        a = np.frombuffer(self._map, np.uint8, count * dtype.itemsize, offset).view(dtype).reshape(shape)
        a[...] = value
        return a


class Places:
    """A region for each role, so that no array has another as its neighbor."""

    def __init__(self, dtype: np.dtype[Any], at_end: bool):
        self.dtype, self.at_end = dtype, at_end
        self._regions: dict[str, Region] = {}

    def __call__(self, role: str, shape: tuple[int, ...], dtype: np.dtype[Any] | None = None) -> Array:
        region = self._regions.setdefault(role, Region())
        return region.array(shape, self.dtype if dtype is None else dtype, self.at_end, 0.5 if role in ("var", "invstd") else 1.0)


def shapes() -> Iterator[tuple[int, int, int]]:
    """As (outer, channels, inner): tails of a plane, of a row of channels, and of their numbers."""
    for tail in TAILS:
        yield 2, 3, tail
        yield 5, tail, 1
        yield tail, 2, 3
        yield tail, 17, 1
    yield from ((33, 3, 17), (64, 2, 5), (2, 3, 515), (130, 67, 1), (3, 260, 1))


def operations(module: Any, place: Places, n: int, c: int, s: int, compute: np.dtype[Any]) -> None:
    """The four operations and the whole calls of one kernel."""
    x, dy, y = (place(role, (n, c, s)) for role in ("x", "dy", "y"))
    mean, var, w, b, g = (place(role, (c,), compute) for role in ("mean", "var", "weight", "bias", "g"))
    x[0] = 3.0
    module.stats(x, 1)
    module.normalize(x, y, mean, w, b, 1)
    module.grad_sums(dy, x, mean, 1)
    module.grad_input(dy, x, y, mean, w, (b, g), 1)
    whole = module if hasattr(module, "forward") else core.ComposedKernel(module)
    whole.inference(x, y, Statistics(mean, None, var, 1e-5), Affine(w, b), 1)
    if n * s > 1:
        whole.forward(x, y, Affine(w, b), 1e-5, Running(mean, var, 0.1, 1), compute, 1)
    kept = Statistics(mean, g, var)
    whole.backward(dy, x, y, kept, w, 1)
    whole.backward(dy, x, None, kept, None, 1)
    residual, dresidual = place("residual", (n, c, s)), place("dresidual", (n, c, s))
    for activation, with_residual in (("relu", True), ("silu", True), ("gelu", False), (None, True)):
        r, d = (residual, dresidual) if with_residual else (None, None)
        after = Epilogue(lookup(activation) if activation else None, r, w, b, d)
        module.normalize(x, y, mean, w, b, 1, after)
        if activation:
            whole.backward(dy, x, y, kept, w, 1, after)
            whole.backward(dy, x, None, kept, w, 1, after._replace(dresidual=None))


def calls(place: Places, n: int, c: int, s: int, compute: np.dtype[Any], frozen: dict[int, Any]) -> None:
    """What a user calls: arrays in both memory orders, in place, strided, and by the shortest way there is."""
    shape = (n, s, c) if s > 1 else (n, c)
    x, dy, y, residual = (place(role, shape) for role in ("x", "dy", "y", "residual"))
    x[0] = 3.0
    mean, var, w, b = (place(role, (c,), compute) for role in ("mean", "var", "weight", "bias"))
    layout = "channels_last" if s > 1 else None
    fastbn.batch_norm_stats(x, layout=layout)
    fastbn.batch_norm_stats(np.moveaxis(x, -1, 1) if s > 1 else x[::-1])
    fastbn.batch_norm(x, mean, var, w, b, layout=layout, out=y)
    fastbn.batch_norm_elemt(x, mean, var, w, b, layout=layout, out=y, activation="relu", residual=residual)
    fastbn.batch_norm_backward_reduce(dy, x, mean, var, layout=layout)
    fastbn.batch_norm_backward_elemt(dy, x, mean, var, w, mean, mean, 7, layout=layout, out=y)
    if n * s > 1:
        for activation in (None, "silu"):
            _, saved = fastbn.batch_norm_forward(x, w, b, mean, var, layout=layout, out=y, activation=activation)
            fastbn.batch_norm_backward(dy, x, saved, out=y)
    if c not in frozen:
        frozen[c] = [fastbn.FrozenBatchNorm(np.ones(c), np.ones(c), layout="channels_last", activation=a) for a in (None, "relu")]
    for layer in frozen[c]:
        layer(x, out=y)
        layer(x, residual, y)
        layer(x, out=x)


def norms(place: Places, n: int, c: int, s: int, compute: np.dtype[Any]) -> None:
    """The normalizations whose statistics are those of parts: of an image's channels, and of rows."""
    for shape, layout in (((n, c, s), "channels_first"), ((n, s, c), "channels_last")):
        x, dy, y, residual = (place(role, shape) for role in ("x", "dy", "y", "residual"))
        x[0] = 3.0
        w, b = (place(role, (c,), compute) for role in ("weight", "bias"))
        v, d = (place(role, (shape[-1],), compute) for role in ("mean", "g"))
        for activation, r in ((None, None), ("silu", residual)):
            options: dict[str, Any] = {"activation": activation, "residual": r, "out": y}
            of_channels = [(fastbn.group_norm_forward, fastbn.group_norm_backward, (groups,)) for groups in {1, c} if n * c * s > groups]
            if s > 1:
                of_channels.append((fastbn.instance_norm_forward, fastbn.instance_norm_backward, (None, None)))
            for forward, backward, first in of_channels:
                backward(dy, x, forward(x, *first, w, b, layout=layout, **options)[1], out=y)
            fastbn.layer_norm_backward(dy, x, fastbn.layer_norm_forward(x, shape[-1], v, d, **options)[1], out=y)
            fastbn.rms_norm_backward(dy, x, fastbn.rms_norm_forward(x, shape[-1], v, **options)[1], wrt=("x", "weight"), out=y)


def run(name: str, dtypes: list[str], plain: bool) -> None:
    """All shapes in all dtypes with one kernel: its operations, and the calls of a user with it pinned, or with none."""
    faulthandler.enable()
    kernel = KERNELS[name]
    for dtype_name in dtypes:
        if dtype_name == "bfloat16":
            import ml_dtypes

            dtype = np.dtype(ml_dtypes.bfloat16)
        else:
            dtype = np.dtype(dtype_name)
        compute = DTYPES[dtype_name].compute
        for at_end in (True, False):
            place, frozen = Places(dtype, at_end), {}
            for n, c, s in shapes():
                print(name, dtype_name, "at the end" if at_end else "at the start", (n, c, s), flush=True)
                if plain:
                    calls(place, n, c, s, compute, frozen)
                    norms(place, n, c, s, compute)
                else:
                    operations(kernel.module(), place, n, c, s, compute)
                    with fastbn.use_kernel(name):
                        calls(place, n, c, s, compute, frozen)
                        if kernel.level is not None:  # the others have no loops of their own for these
                            norms(place, n, c, s, compute)
    print("done")


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment)


def names(kernel: Any) -> list[str]:
    dtypes = [dtype for dtype in DTYPES if not kernel.declines(dtype)]
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        dtypes = [dtype for dtype in dtypes if dtype != "bfloat16"]
    return dtypes


linux = pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")


def passes(result: subprocess.CompletedProcess[str]) -> None:
    lines = result.stdout.splitlines()
    assert result.returncode == 0, (lines[-1:], result.stderr[-3000:])
    assert lines[-1] == "done"


@linux
@pytest.mark.parametrize(
    "name",
    # Numba compiles for a minute what is checked here in a second, and the reference is NumPy.
    [pytest.param(k.name, marks=() if k.level else pytest.mark.slow) for k in TABLE if not k.unusable()],
)
def test_no_kernel_touches_what_lies_beside_its_arrays(name: str) -> None:
    passes(child(name, ",".join(names(KERNELS[name]))))


@linux
def test_the_shortest_way_of_a_call_touches_nothing_beside_its_arrays() -> None:
    passes(child("", ",".join(names(TABLE[-1]))))


@linux
def test_a_read_beyond_an_end_would_be_seen() -> None:
    for end in ("-1", "1"):
        result = child("touch", end)
        assert result.returncode < 0
        assert "Segmentation fault" in result.stderr or "Bus error" in result.stderr


def touch(beyond: int) -> None:
    """Read one byte beyond an array."""
    faulthandler.enable()
    a = Region().array((PAGE,), np.dtype(np.uint8), at_end=beyond > 0)
    ctypes.c_char.from_address(a.ctypes.data + (PAGE if beyond > 0 else -1)).value  # noqa: B018


if __name__ == "__main__":
    first, second = sys.argv[1:]
    if first == "touch":
        touch(int(second))
    else:
        run(first or TABLE[-1].name, second.split(","), plain=not first)
