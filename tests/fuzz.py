"""Random calls of everything public, judged by the formulas of this file alone.

    python tests/fuzz.py                               explores for a minute; the seed is printed
    python tests/fuzz.py --seed 7 --calls 1000000 --jobs 2
    python tests/fuzz.py --seed 7 --only 12345         one call again, described

Each number is one call, or a forward and its backward, or the life of one layer. Nothing is carried from one number
to the next, so any of them can be run alone. What may come out of a call:

- the right value, as near as docs/numerics.md promises, and no byte changed that is not an output;
- or a ValueError or TypeError that names an argument, and no byte changed at all.

Everything else is a finding: another exception, a warning (they are errors here), a wrong value, an input or a
neighbor in memory that was written, a call that had to be refused and was not, a crash. Memory around each array
holds NaN, so that what reads past an end shows it. The calls run in processes of their own, which write down the
number of the call they are about to make; so a crash is found too.

The truth is written here a second time, in long double and on arrays of shape (channels, values): `fastbn.reference`
is among the things that are tested.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import faulthandler
import json
import math
import mmap
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

try:
    import fastbn
except ModuleNotFoundError:  # run as a script in a clone
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import fastbn

from fastbn.dispatch import TABLE

try:
    from ml_dtypes import bfloat16
except ImportError:  # pragma: no cover
    bfloat16 = None

Array = np.ndarray[Any, Any]
LD = np.longdouble

# ---------------------------------------------------------------------------------------------------------------------
# The truth, on long doubles of shape (channels, values); vectors have shape (channels, 1).


class Format(NamedTuple):
    fraction: int  # bits
    smallest: int  # exponent of the smallest normal number
    largest: Any
    relative: float  # what is promised of y, of max(1, |y|)


FORMATS = {
    "float16": Format(10, -14, LD(65504), 5e-6),
    "bfloat16": Format(7, -126, LD(3.3895313892515355e38), 5e-6),
    "float32": Format(23, -126, LD(np.finfo(np.float32).max), 5e-6),
    "float64": Format(52, -1022, LD(np.finfo(np.float64).max), 1e-13),
}


def ulp(a: Array, name: str) -> Array:
    """Distance between neighbors of `a` in a storage type."""
    bits, smallest = FORMATS[name][:2]
    _, exponent = np.frexp(np.where(np.isfinite(a), a, 0))
    return np.ldexp(LD(1), np.maximum(exponent - 1, smallest) - bits)


def statistics(x: Array) -> tuple[Array, Array]:
    """Mean and population variance; of deviations from the first value, so that a constant has none."""
    if x.shape[1] == 0:
        return np.zeros((len(x), 1), LD), np.zeros((len(x), 1), LD)
    first = np.where(np.isfinite(x[:, :1]), x[:, :1], 0)
    mean = first + (x - first).mean(1, keepdims=True)
    rest = (x - mean).mean(1, keepdims=True)
    rest = np.where(np.isfinite(rest), rest, 0)
    return mean + rest, np.square(x - mean - rest).mean(1, keepdims=True)


def _sigmoid(z: Array) -> Array:
    small = np.exp(-np.abs(z))
    return np.where(z < 0, small, LD(1)) / (1 + small)


def _phi(z: Array) -> Array:
    return np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in z.astype(float).ravel().tolist()], LD).reshape(z.shape)


def _density(z: Array) -> Array:
    return np.exp(-z * z / 2) / np.sqrt(2 * LD(np.pi))


ROOT = np.sqrt(8 / LD(np.pi))


def _inner(z: Array) -> Array:
    return ROOT * (z + LD("0.044715") * z**3)


ACTIVATIONS: dict[str, tuple[Callable[[Array, Any], Array], Callable[[Array, Any], Array]]] = {
    "relu": (lambda z, a: np.where(z <= 0, 0, z), lambda z, a: np.where(z > 0, 1, 0)),
    "relu6": (lambda z, a: np.where(z <= 0, 0, np.where(z >= 6, 6, z)), lambda z, a: np.where((z > 0) & (z < 6), 1, 0)),
    "leaky_relu": (lambda z, a: np.where(z > 0, z, a * z), lambda z, a: np.where(z > 0, LD(1), a)),
    "hardswish": (
        lambda z, a: np.where(z <= -3, 0, np.where(z >= 3, z, z * (z + 3) / 6)),
        lambda z, a: np.where(z <= -3, 0, np.where(z >= 3, 1, (2 * z + 3) / 6)),
    ),
    "sigmoid": (lambda z, a: _sigmoid(z), lambda z, a: _sigmoid(z) * _sigmoid(-z)),
    "silu": (lambda z, a: z * _sigmoid(z), lambda z, a: _sigmoid(z) + z * _sigmoid(z) * _sigmoid(-z)),
    "tanh": (lambda z, a: np.tanh(z), lambda z, a: 4 * _sigmoid(2 * z) * _sigmoid(-2 * z)),
    "gelu": (lambda z, a: z * _phi(z), lambda z, a: _phi(z) + z * _density(z)),
    "gelu_tanh": (
        lambda z, a: z * _sigmoid(_inner(z)),
        lambda z, a: _sigmoid(_inner(z)) * (1 + z * _sigmoid(-_inner(z)) * ROOT * (1 + 3 * LD("0.044715") * z * z)),
    ),
}


# Functions of a user's, which Numba compiles: the same twice, for scalars and for the truth.
FUNCTIONS: dict[str, tuple[str, str]] = {
    "softsign": ("z / (1 + abs(z))", "1 / (1 + abs(z)) ** 2"),
    "hardtanh": ("min(max(z, -1.0), 1.0)", "1.0 if -1 < z < 1 else 0.0"),
    "sine": ("math.sin(z)", ""),  # without a derivative
}
ACTIVATIONS["softsign"] = (lambda z, a: z / (1 + np.abs(z)), lambda z, a: 1 / (1 + np.abs(z)) ** 2)
ACTIVATIONS["hardtanh"] = (lambda z, a: np.clip(z, -1, 1), lambda z, a: np.where(np.abs(z) < 1, 1, 0))
ACTIVATIONS["sine"] = (lambda z, a: np.sin(z), lambda z, a: np.cos(z))


@cache
def own_functions() -> tuple[Any, ...]:
    """The activations made of these functions; and one of them as it is."""
    import numba

    def compiled(name: str, formula: str) -> Any:
        scope: dict[str, Any] = {"math": math}
        exec(f"def {name}(z): return {formula}", scope)  # noqa: S102
        return numba.njit(scope[name])

    pairs = {name: [compiled(name, formula) for formula in formulas if formula] for name, formulas in FUNCTIONS.items()}
    return (*(fastbn.Activation(*pair) for pair in pairs.values()), pairs["sine"][0])


def activation_of(value: Any) -> tuple[str, float] | None:
    if value is None:
        return None
    if callable(value) or isinstance(value, fastbn.Activation):
        return getattr(value, "forward", value).__name__, 0.0
    if isinstance(value, str):
        return value, 0.01 if value == "leaky_relu" else 0.0
    name, parameter = value
    return ("gelu" if parameter == "none" else "gelu_tanh", 0.0) if name == "gelu" else (name, float(parameter))


class Z(NamedTuple):
    """A normalized array before the activation, and how exactly it can be known."""

    z: Array
    slack: Array


class WrongError(Exception):
    """A value that is not what it should be."""


def agree(what: str, actual: Any, truth: Array, bound: Array | float, name: str) -> None:
    """Raise WrongError unless `actual`, stored as `name`, is within `bound` of the truth."""
    a = np.asarray(actual).astype(LD)
    if a.shape != truth.shape:
        raise WrongError(f"{what} has the wrong shape: {a.shape} instead of {truth.shape}")
    good = np.abs(a - truth) <= bound
    if good.all():
        return
    good |= np.isnan(bound) & ~(np.isnan(truth) & np.isfinite(a))
    largest = FORMATS[name].largest
    good |= (np.isnan(a) & np.isnan(truth)) | (a == truth) | np.isinf(bound)
    good |= (np.abs(truth) + bound >= largest * (1 - 1e-5)) & ~(np.abs(a) < largest * (1 - 1e-4))
    good |= np.abs(a - truth) <= 256 * ulp(np.zeros_like(truth), name)  # of sums of the smallest numbers there are
    if good.all():
        return
    i = tuple(map(int, np.argwhere(~good)[0]))
    b = np.broadcast_to(bound, a.shape)
    kind = "NaN" if np.isnan(a[i]) else "infinite" if np.isinf(a[i]) else "not NaN" if np.isnan(truth[i]) else "off"
    raise WrongError(
        f"{what} is {kind}|{np.count_nonzero(~good)} of {a.size}; at {i}: {a[i]!s} instead of {truth[i]!s}, allowed {b[i]!s}, "
        f"{float(np.abs(a[i] - truth[i]) / b[i]) if b[i] > 0 else math.inf:.3g} times"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Drawing arguments.

PAD = 64  # bytes of NaN around each array; none where a sanitizer watches what lies there
POOL_SIZE = 4096


def _pool() -> dict[str, Array]:
    r = np.random.default_rng(20260101)
    n = POOL_SIZE
    normal = r.standard_normal(n)
    pool = {
        "normal": normal,
        "exponential": r.exponential(1, n),
        "lognormal": np.exp(1.5 * r.standard_normal(n)),
        "integers": r.integers(-8, 9, n).astype(float),
        "relu": np.maximum(normal, 0),
        "zeros": np.zeros(n),
        "constant": np.ones(n),
        "rare": np.where(r.random(n) < 0.01, 1.0, 0.0),
        "mixed": normal * 10.0 ** r.uniform(-20, 20, n),
    }
    for name, bad in (("nan", [np.nan]), ("infinite", [np.inf, -np.inf]), ("one infinity", [np.inf])):
        some = normal.copy()
        some[r.random(n) < 0.02] = r.choice(bad)
        pool[name] = some
    return pool


POOL = _pool()
# How often, and the same for values that leave the range in which accuracy is promised.
ORDINARY = ("normal",) * 10 + ("exponential", "lognormal", "integers", "integers", "relu", "constant", "offset", "offset", "near", "rare")
EXTREME = ("huge", "huge", "tiny", "subnormal", "mixed", "nan", "infinite", "one infinity", "zeros")
DTYPES: dict[str, Any] = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "float16": np.dtype(np.float16)}
if bfloat16 is not None:
    DTYPES["bfloat16"] = np.dtype(bfloat16)
COMPUTE = {name: DTYPES["float64" if name == "float64" else "float32"] for name in DTYPES}
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17)
LAYOUTS = {2: ("NC",), 3: ("NCL", "NLC"), 4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC")}
NAMES = tuple(name for name in ACTIVATIONS if name not in FUNCTIONS)


@cache
def name_of(dtype: Any) -> str:
    return str(dtype.name)  # which takes NumPy a while


class Draw(random.Random):
    """Random arguments, and the memory they lie in."""

    functions = False  # whether activations may be functions of the user's

    def begin(self, seed: int) -> None:
        self.seed(seed)
        self.roots: list[Array] = []
        self.notes: list[str] = []

    # --- values

    def kind(self) -> str:
        kind = self.choice(ORDINARY) if self.random() < 0.85 else self.choice(EXTREME)
        if kind in EXTREME:
            self.notes.append("extreme")
        return kind

    def values(self, shape: tuple[int, ...], dtype: Any, axis: int, kind: str | None = None) -> Array:
        kind = kind or self.kind()
        n = math.prod(shape)
        start = self.randrange(POOL_SIZE)
        base = POOL.get(kind, POOL["normal"])
        v = base[start : start + n] if start + n <= POOL_SIZE else np.resize(np.roll(base, -start), n)
        v = v.reshape(shape)
        name = name_of(dtype)
        if kind == "normal":
            if self.random() < 0.3:
                v = v * self.uniform(0.1, 5) + self.uniform(-3, 3)
        elif kind == "offset":
            v = v + 10.0 ** self.uniform(0, {"float16": 1.5, "bfloat16": 1, "float32": 6, "float64": 6}[name]) * self.choice((1, -1))
        elif kind == "near":  # a few steps of the storage type around a number
            step = 2.0 ** -FORMATS[name].fraction
            v = (1.25 + np.rint(v) * step) * 10.0 ** self.uniform(-2, 3)
        elif kind == "constant":
            v = v * self.choice((0.0, 1.0, -7.0, 0.1, 1e3, 3.14159e4 if name != "float16" else 1e4))
        elif kind == "huge":
            v = v * self.choice({"float16": (1e4, 3e4), "float64": (1e30, 1e100, 1e154, 1e200, 1e300)}.get(name, (1e15, 1e30, 1e37)))
        elif kind == "tiny":
            v = v * self.choice({"float16": (1e-3, 1e-4), "float64": (1e-30, 1e-100, 1e-170, 1e-290)}.get(name, (1e-15, 1e-20, 1e-30)))
        elif kind == "subnormal":
            v = v * 2.0 ** (FORMATS[name].smallest - 2)
        elif kind == "mixed" and name == "float16":
            v = np.clip(v, -6e4, 6e4)
        if len(shape) > axis and shape[axis] > 1 and self.random() < 0.25:  # channels that differ
            c = shape[axis]
            column = np.array([self.choice((1.0, 1.0, 0.5, 2.0, -1.0, 0.0, 4.0)) for _ in range(c)])
            v = v * column.reshape([c if i == axis else 1 for i in range(len(shape))])
        return v

    # --- places in memory

    def root(self, nbytes: int) -> Array:
        root = np.full(nbytes + 2 * PAD + (64 if PAD else 0), 0xFF, np.uint8)
        self.roots.append(root)
        return root

    def place(self, v: Array | None, shape: tuple[int, ...], dtype: Any, how: str = "C", order: tuple[int, ...] | None = None) -> Array:
        """An array in memory of its own, with `how` as its strides, that holds `v`."""
        ndim, item = len(shape), dtype.itemsize
        order = order or tuple(range(ndim))
        steps = [1] * ndim
        if how == "sliced":
            steps = [self.choice((1, 1, 2, 3)) for _ in shape]
        strides, size = [0] * ndim, item
        for i in reversed(order):
            strides[i] = size * steps[i]
            size *= max((shape[i] - 1) * steps[i] + 1, 1)
        offset, unaligned = PAD + item * self.randrange(0, 4 if PAD else 1), 0
        if how == "negative":
            for i in range(ndim):
                if self.random() < 0.5:
                    offset += strides[i] * max(shape[i] - 1, 0)
                    strides[i] = -strides[i]
        elif how == "unaligned":
            unaligned = self.choice((1, 1, item // 2))
        elif how == "broadcast":
            for i in range(ndim):
                if self.random() < 0.4:
                    strides[i] = 0
        a = np.ndarray(shape, dtype, self.root(size + unaligned), offset + unaligned, strides)
        if v is not None:
            a[...] = v
        return a

    def order(self, ndim: int, axis: int) -> tuple[int, ...]:
        p = self.random()
        if p < 0.6:
            return tuple(range(ndim))
        if p < 0.85:
            return (*(i for i in range(ndim) if i != axis), axis)  # channels last
        if p < 0.92:
            return tuple(reversed(range(ndim)))
        return tuple(self.sample(range(ndim), ndim))

    def like(self, p: Place, v: Array | None, same: float = 0.6, writable: bool = False) -> Array:
        """An array like x; with probability `same` contiguous as x is."""
        if self.random() < same:
            return self.place(v, p.shape, p.dtype, "C", p.order)
        how = self.choice(
            ("C", "C", "sliced", "negative", "unaligned") if writable else ("C", "sliced", "negative", "unaligned", "broadcast")
        )
        return self.place(v, p.shape, p.dtype, how, self.order(len(p.shape), p.axis))

    def array(self, p: Place, same: float = 0.6) -> Array:
        """An array like x, with values."""
        return self.like(p, self.values(p.shape, p.dtype, p.axis), same)

    def vector(self, c: int, compute: Any, kind: str, container: bool = True) -> Any:
        """Weights, biases, means, variances."""
        if kind == "positive":
            v = [self.uniform(0.3, 2.0) for _ in range(c)]
        elif kind == "any":
            v = [self.uniform(-2.0, 2.0) for _ in range(c)]
        else:
            v = [self.uniform(0.5, 2.0) * self.choice((1, 1, -1)) for _ in range(c)]
        p = self.random()
        if p < 0.08 and c:
            i = self.randrange(c)
            v[i] = self.choice((0.0, -0.0, 0.0, 1e-6, 1e3) if p < 0.05 else (math.inf, math.nan, 1e20, 1e-20, -1.0, 1e30, 1e-30))
            if p >= 0.05:
                self.notes.append("extreme")
        p = self.random()
        if p < 0.7:
            a = np.ndarray(c, compute, self.root(c * compute.itemsize), PAD)
            a[...] = v
            return a
        if container and p < 0.8:
            return self.choice((list, tuple, lambda s: [np.float32(t) for t in s], lambda s: [np.array(t) for t in s]))(v)
        others = (DTYPES["float64"], np.dtype(">f4"), np.dtype(">f8"), np.dtype(np.int32)) if container else ()
        dtype = self.choice((*DTYPES.values(), *others))
        if dtype.kind == "i":
            v = [round(t) if abs(t) < 1e6 else 1 for t in v]
        how = self.choice(("C", "sliced", "negative", "unaligned", "broadcast") if container else ("C", "sliced", "negative", "unaligned"))
        a = self.place(None, (c,), dtype, how)
        with np.errstate(all="ignore"):
            a[...] = np.array(v)
        if container and self.random() < 0.1:
            a.flags.writeable = False
        return a

    # --- numbers

    def eps(self) -> Any:
        return self.choice((1e-5, 1e-5, 1e-5, 1e-3, 1e-2, 0.1, 0.0, 1, np.float32(1e-5), np.float64(1e-4), 1e-12, 1e-30))

    def momentum(self) -> Any:
        return self.choice((0.1, 0.1, 0.1, 0.0, 1.0, 0.5, 1, 0.9, np.float32(0.25), np.float64(0.01)))

    def activation(self) -> Any:
        p = self.random()
        if p < 0.5:
            return self.choice(own_functions()) if self.functions else None
        if p < 0.9:
            return self.choice(NAMES)
        slopes = (0.2, 1, np.float32(0.5), 0.0, -0.5)
        return self.choice((*(("leaky_relu", slope) for slope in slopes), ("gelu", "tanh"), ("gelu", "none")))


class Place(NamedTuple):
    """Shape, dtype and channels of x."""

    shape: tuple[int, ...]
    dtype: Any
    axis: int
    keywords: dict[str, Any]  # layout or axis
    order: tuple[int, ...]

    @property
    def name(self) -> str:
        return name_of(self.dtype)

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def compute(self) -> Any:
        return COMPUTE[self.name]

    @property
    def rest(self) -> tuple[int, ...]:
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]


def draw_place(d: Draw, dtypes: tuple[str, ...], rank: int = 0, last: bool | None = None) -> Place:
    """Mostly small; now and then large enough for threads."""
    rank = rank or d.choice((2, 2, 3, 4, 4, 4, 5))
    last = d.random() < 0.45 if last is None else last
    axis, keywords = (rank - 1, {}) if last else (1, {})
    if last:
        keywords = {"layout": d.choice(("channels_last", *LAYOUTS[rank][1:]))}
    elif d.random() < 0.5:
        keywords = {"layout": d.choice(("channels_first", LAYOUTS[rank][0], None))}
    if d.random() < 0.2:
        axis = d.randrange(rank)
        keywords = {"axis": axis if d.random() < 0.5 else axis - rank}
    p = d.random()
    if p < 0.003:
        shape = [d.choice((1, 2, 3, 8)) for _ in range(rank)]
        shape[axis] = d.choice((3, 16, 64, 130))
        shape[0 if axis else -1] *= max(1, d.choice((70_000, 200_000)) // math.prod(shape))
    elif p < 0.1:
        shape = [d.choice((1, 2, 3, 5)) for _ in range(rank)]
        shape[d.randrange(rank)] = d.choice((31, 32, 33, 49, 63, 64, 65, 97, 100, 130, 257))
    else:
        big = 4 if rank > 3 else 12
        shape = [d.choice(SIZES[:big]) for _ in range(rank)]
        if d.random() < 0.25:
            shape[axis] = d.choice((1, 2, 4, 8, 16, 17, 33))
    if d.random() < 0.02:
        shape[d.randrange(rank)] = d.choice((0, 1))
    return Place(tuple(shape), DTYPES[d.choice(dtypes)], axis, keywords, d.order(rank, axis))


def draw_mask(d: Draw, p: Place) -> Array:
    shape = [n if d.random() < 0.8 else 1 for n in p.rest]
    if d.random() < 0.1:
        shape = shape[d.randrange(len(shape)) :]
    density = d.choice((0.7, 0.7, 0.7, 1.1, 0.2, 0.0))
    v = (
        np.array([d.random() < density for _ in range(math.prod(shape))], bool)
        if math.prod(shape) < 2000
        else np.resize([d.random() < density for _ in range(1999)], math.prod(shape)).astype(bool)
    )
    return d.place(v.reshape(shape), tuple(shape), np.dtype(bool), d.choice(("C", "C", "sliced", "negative")))


def draw_stats(d: Draw, p: Place, x: Array) -> Any:
    """Statistics of a batch that holds x; now and then of one that is too small for that."""
    held = math.prod(p.rest)
    if d.random() < 0.4:
        own = fastbn.batch_norm_stats(x, **p.keywords)
        return own if d.random() < 0.6 else own.merge(fastbn.batch_norm_stats(x, **p.keywords))
    mean, var = ([d.uniform(low, 2.0) for _ in range(p.channels)] for low in (-2.0, 0.3))
    return fastbn.Stats(max(held + d.choice((0, 0, 1, 7, 10**6, -1)), 1), mean, var)


class Call:
    """One call: how to make it, and what is to be said of what comes out."""

    def __init__(
        self, name: str, function: Any, arguments: dict[str, Any], judge: Callable[[Any], None] | None, writes: tuple[Any, ...] = ()
    ):
        self.name = name
        self.function = function
        self.arguments = arguments
        self.judge = judge
        self.expect = "value"  # or "error", or "either"
        self.blame: tuple[str, ...] = ()
        self.writes = tuple(a for a in writes if a is not None)
        self.out: Any = None
        self.refusals: tuple[type[Exception], ...] = (ValueError, TypeError)
        self.why = ""
        self.positional = False
        self.result: Any = None
        self.refused = False

    def into(self, out: Any) -> None:
        """Only `out` is written."""
        self.out, self.writes = out, (out,)


def flat(a: Array, p: Place) -> Array:
    """As long doubles of shape (channels, values)."""
    a = np.asarray(a)
    n = p.channels
    order = (p.axis, *(i for i in range(a.ndim) if i != p.axis))
    return a.transpose(order).astype(LD).reshape(n, math.prod(p.rest))


def column(v: Any, c: int, default: float) -> Array:
    if v is None:
        return np.full((c, 1), default, LD)
    return np.array(v).astype(LD).reshape(c, 1)


def counted(mask: Array | None, p: Place) -> Array | None:
    return None if mask is None else np.broadcast_to(np.asarray(mask), p.rest).flatten()


def slack_of(z: Array, terms: Array, unit: Array | int, name: str) -> Array:
    """How far z may be off, as an array of float32 or float64."""
    relative = FORMATS[name].relative
    return np.maximum(relative * np.maximum(np.maximum(1, np.abs(z)), unit / 10), (1e-15 if name == "float64" else 3e-7) * terms)


def normalized(x: Array, mean: Array, invstd: Array, arguments: dict[str, Any], p: Place, unit: Array | None = None) -> Z:
    """What comes before the activation; `unit` is what a whole deviation becomes, if the statistics are those of x.

    Nothing is promised where a step of the way is too large a number for the arithmetic.
    """
    w, b = column(arguments.get("weight"), p.channels, 1), column(arguments.get("bias"), p.channels, 0)
    scale = invstd * w
    product = (x - mean) * scale
    z = product + b
    terms = np.abs(product) + np.abs(b)
    if arguments.get("residual") is not None:
        r = flat(arguments["residual"], p)
        z, terms = z + r, terms + np.abs(r)
    steps = terms if unit is not None else np.maximum(np.maximum(terms, np.abs(x - mean)), np.abs(scale))
    return Z(z, np.where(steps > most(p), np.inf, slack_of(z, terms, 0 if unit is None else unit, p.name)))


def output(zs: Z, activation: Any, p: Place) -> tuple[Array, Array]:
    """y, and how far it may be off."""
    y, slack = zs
    f = activation_of(activation)
    if f is not None:
        y = ACTIVATIONS[f[0]][0](zs.z, LD(f[1]))
        slack = slack * max(1.2, abs(f[1]))
        slack = np.where(np.isinf(zs.z) & ~np.isinf(y), np.inf, slack)  # 0 times infinity: undefined at the end of the line
    if p.dtype.itemsize == 2:
        slack = np.maximum(ulp(y, p.name), slack * LD(0.2))
    return y, slack


def same_array(what: str, y: Any, p: Place, call: Call, d: Draw) -> Array:
    """Check that y is an array like x, and is `out`, or memory of its own."""
    if not isinstance(y, np.ndarray) or y.shape != p.shape or y.dtype != p.dtype:
        raise WrongError(f"{what} is not like x|{getattr(y, 'shape', None)} {getattr(y, 'dtype', None)}")
    if call.out is not None:
        if y is not call.out:
            raise WrongError(f"{what} is not out|")
    elif any(np.may_share_memory(y, root) for root in d.roots):
        raise WrongError(f"{what} shares memory with an argument|")
    return flat(y, p)


def own_memory(what: str, v: Any, d: Draw) -> None:
    if isinstance(v, np.ndarray) and any(np.may_share_memory(v, root) for root in d.roots):
        raise WrongError(f"{what} shares memory with an argument|")


def judge_running(what: str, actual: Any, old: Array, batch: Array, spread: Array | float, momentum: Any, p: Place) -> None:
    """Running statistics after an update, each rounded to its own type."""
    name = actual.dtype.name
    m = LD(float(momentum))
    truth = (1 - m) * old + m * batch
    near = 1e-13 if p.name == "float64" else 1e-6
    bound = near * np.abs(m) * (np.abs(batch) + spread) + 1e-14 * np.abs((1 - m) * old) + ulp(truth, name)
    agree(what, np.asarray(actual).astype(LD).reshape(-1, 1), truth, bound, name)


class Truth:
    """Everything about one forward, found before the call from its arguments."""

    def __init__(self, arguments: dict[str, Any], p: Place, training: bool, default_eps: float = 1e-5):
        self.p, self.a = p, arguments
        self.x = flat(arguments["x"], p)
        self.training = training
        self.eps = LD(float(arguments.get("eps", default_eps)))
        self.momentum = arguments.get("momentum", 0.1)
        self.mask = counted(arguments.get("mask"), p) if training else None
        xs = self.x if self.mask is None else self.x[:, self.mask]
        self.count = xs.shape[1]
        self.empty = self.x.size == 0
        self.old = [None if arguments.get(k) is None else column(arguments[k], p.channels, 0) for k in ("running_mean", "running_var")]
        correction = arguments.get("correction", 1)
        self.correction = 1 if correction is None else int(correction)
        self.given = arguments.get("stats") if training else None
        self.held = self.count
        if self.empty:
            self.mean = self.var = np.zeros((p.channels, 1), LD)
        elif self.given is not None:
            self.count = self.given.count
            mean, var, low, var_low = (column(v, p.channels, 0) for v in self.given.to_arrays()[1:])
            self.mean, self.var = mean + low, var + var_low
        elif training:
            self.mean, self.var = statistics(xs)
        else:
            self.mean, self.var = (np.zeros((p.channels, 1), LD) if o is None else o for o in self.old)
        self.invstd = 1 / np.sqrt(self.var + self.eps)
        self.weight, self.bias = column(arguments.get("weight"), p.channels, 1), column(arguments.get("bias"), p.channels, 0)
        self.activation = activation_of(arguments.get("activation"))
        self.zs = normalized(self.x, self.mean, self.invstd, arguments, p, np.abs(self.weight) if training and self.given is None else None)
        # Beyond a mean of a million deviations, the promise ends step by step.
        far = np.where(self.var > 0, np.abs(self.mean) / np.sqrt(self.var), 0) / 1e6
        self.far = np.where(far > 1, far, 1) if training else 1
        self.zs = Z(self.zs.z, np.where(np.asarray(self.far) > 1e3, np.inf, self.zs.slack * self.far))

    def judge_y(self, y: Any, call: Call, d: Draw) -> None:
        actual = same_array("y", y, self.p, call, d)
        agree("y", actual, *output(self.zs, self.a.get("activation"), self.p), self.p.name)

    def judge_updates(self) -> None:
        if not self.training:
            return
        for name, old, batch in (("running_mean", self.old[0], self.mean), ("running_var", self.old[1], self.var)):
            if old is None:
                continue
            if name == "running_var" and self.correction and self.count > 1:
                batch = batch * self.count / (self.count - 1)
            if self.empty:
                agree(name, np.asarray(self.a[name]).reshape(-1, 1), old, 0.0, np.asarray(self.a[name]).dtype.name)
            else:
                judge_running(name, self.a[name], old, batch, np.sqrt(self.var) if name == "running_mean" else 0.0, self.momentum, self.p)

    def judge_saved(self, saved: Any, d: Draw) -> None:
        p = self.p
        name = name_of(p.compute)
        if saved.count != self.count and not self.empty:
            raise WrongError(f"saved.count is off|{saved.count} instead of {self.count}")
        for field in ("mean", "invstd", "scale", "shift", "mean_lo"):
            own_memory(f"saved.{field}", getattr(saved, field), d)
        if self.empty:
            return
        mean = np.asarray(saved.mean).astype(LD).reshape(-1, 1)
        deviation = np.sqrt(self.var)
        agree("saved.mean", mean, self.mean, ulp(self.mean, name) + near_of(p) * deviation, name)
        agree(
            "saved.invstd",
            np.asarray(saved.invstd).reshape(-1, 1),
            self.invstd,
            near_of(p) * np.abs(self.invstd) + ulp(self.invstd, name),
            name,
        )


def most(p: Place) -> Any:
    """About the largest number that the arithmetic has."""
    return LD(0.99) * FORMATS[name_of(p.compute)].largest


def near_of(p: Place) -> float:
    return 1e-13 if p.name == "float64" else 1e-6


def short(v: Any) -> str:
    """An argument in a few words."""
    if isinstance(v, np.ndarray):
        flags = "".join(f for f, on in (("U", not v.flags.aligned), ("R", not v.flags.writeable)) if on)
        kind = type(v).__name__ if type(v) is not np.ndarray else ""
        text = f"{kind}<{v.dtype} {v.shape} {v.strides}{' ' + flags if flags else ''}>"
        return text + (f"={v.tolist()!r}" if v.size <= 8 else "")
    if isinstance(v, fastbn.Saved):
        return (
            f"Saved(count={v.count}, training={v.training}, activation={v.activation}, mask={short(v.mask)}, residual={short(v.residual)})"
        )
    text = repr(v)
    return text if len(text) < 200 else text[:200] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Spoiling a call: an argument that must be refused, or memory that overlaps.


class AskedError(Exception):
    """By what raises."""


class Hostile:
    """What raises whenever it is asked to be a number, an array or a sequence."""

    def _no(self, *_: Any) -> Any:
        raise AskedError

    __array__ = __float__ = __index__ = __len__ = __iter__ = __int__ = _no


class Callee:
    def __call__(self, z: Any) -> Any:
        return z


ANYTHING: tuple[Any, ...] = (
    "text", b"bytes", 1 + 2j, object(), {}, {"a": 1}, set(), [[1], [1, 2]], [None], ["a"], Hostile(), int, np.array(None), np.array("text"),
    np.array(["2020"], "M8[Y]"), np.zeros(2, [("a", "f4")]), np.zeros((2, 2), object), lambda z: z, range(0),
    Ellipsis, slice(1), NotImplemented
)  # fmt: skip
BAD_NUMBERS = (
    None, True, False, 10**400, -(10**400), [1.0], np.zeros(3), np.True_, np.array("x"), "0.1",
    np.datetime64("2020"), np.timedelta64(3, "s"),
)  # fmt: skip


def bad_vectors(c: int, dtype: Any) -> tuple[Any, ...]:
    """Vectors of other shapes, of no real numbers, or no vectors."""
    shapes = ((c + 1,), (c, 1), (1, c), (2, c), (c - 1,) if c > 1 else (c + 2,), ())
    kinds = (complex, bool, object, "U1", "S3", "V4", "M8[s]", "m8[s]", [("a", "f4")])
    lists = ([1.0] * (c + 1), ["1"] * c, [True] * c, [10**400] * c, [1j] * c, [[1.0]] * (c + 1), dict.fromkeys(range(c), 1.0))
    objects = (np.array([None] * c, object), np.array([10**400] * c, object))
    return (*(np.zeros(s, dtype) for s in shapes), *(np.zeros(c, k) for k in kinds), *lists, *objects, 5.0, True)


def bad_arrays(p: Place) -> tuple[Any, ...]:
    """What is no x, dy, residual or out."""
    z = np.zeros(p.shape, p.dtype)
    other = DTYPES["float64" if p.name == "float32" else "float32"]
    kinds = (int, bool, complex, object, "U3", "M8[s]", np.longdouble, other, [("a", p.dtype)], ("V", p.dtype.itemsize))
    foreign = np.zeros(p.shape, ">f4") if p.name == "bfloat16" else z.view(z.dtype.newbyteorder())
    shapes = (np.zeros((*p.shape[:-1], p.shape[-1] + 1), p.dtype), z[None], z.reshape(-1))
    others = (z.tolist(), z.tobytes(), memoryview(z.view(np.uint8).reshape(-1)), np.float32(1), 3.0, True, np.ma.masked_less(z, 1))
    return (*(np.zeros(p.shape, k) for k in kinds), foreign, *shapes, *others)


def bad_masks(p: Place) -> tuple[Any, ...]:
    n = p.rest
    more = np.zeros((*n, 3), bool) if n[-1:] != (3,) else np.zeros((*n, 4), bool)
    shapes = (np.zeros((*n[:-1], n[-1] + 2), bool), np.ones((2, *n), bool), more)
    return (*shapes, np.ones(n, np.complex64), np.ones(n, object), np.array(["a"]), 5, True)


def bad_layouts(rank: int) -> tuple[Any, ...]:
    """Unknown ones, and those of arrays with other numbers of axes."""
    return (
        "NHCW", "nchw", "", b"NCHW", ["NCHW"], {}, 5, True, np.array("NCHW"), ("NCHW",), 1.5, np.zeros(3), Hostile(), int,
        *(layout for r, layouts in LAYOUTS.items() if r != rank for layout in layouts),
    )  # fmt: skip


BAD_ACTIVATIONS = (
    "rleu", "", b"relu", ["relu"], {}, 5, True, (), ("relu", 1), ("leaky_relu", "x"), ("leaky_relu", 10**400), ("leaky_relu", True),
    ("leaky_relu", 0.1, 2), ("leaky_relu", None), ("leaky_relu", np.ones(2)), ("leaky_relu", math.nan), ("leaky_relu", 1j), ("gelu", "x"),
    ("gelu", np.ones(2)), np.tanh, Callee(), len, Callee, int, (1, 2), (["relu"],), ({},), np.array("relu"), Hostile()
)  # fmt: skip
BAD_EPS = (*BAD_NUMBERS, *ANYTHING, -1.0, -1e-30, math.nan, math.inf, -math.inf, np.float32("nan"))
BAD: dict[str, tuple[Any, ...]] = {
    "momentum": (*BAD_NUMBERS, *ANYTHING),
    "eps": BAD_EPS,
    "epsilon": tuple(v for v in BAD_EPS if v is not None),  # None is what the other framework has
    "module": (None, 5, "module", (), {}, np.zeros(3), object(), int, SimpleNamespace(running_mean=np.zeros(2))),
    "activation": BAD_ACTIVATIONS,
    "wrt": (None, "y", 5, True, ("x", "y"), ["x", 3], [["x"]], ("X",), {"z": 1}, np.zeros(3), b"x", Hostile(), ("x", None), object()),
    "training": (np.ones(2), np.zeros(0), Hostile(), np.array([True, False])),
    "from_output": (np.ones(2), np.zeros(0), Hostile(), np.array([True, False])),
    "count": (None, True, 1.5, "3", 0, -1, 10**400, [3], np.zeros(2), 3.0, Hostile(), np.float64(3), 1j, {}),
    "correction": (2, -1, "1", 0.5, True, [1], 10**400, np.zeros(2), Hostile(), math.nan, {}),
    "stats": (5, "stats", (), {}, np.zeros(3), object(), Hostile(), fastbn.Stats, fastbn.Stats(10**9, [1.0] * 999, [1.0] * 999)),
    "strict": (None, 2, "x", 0.0, np.ones(2), object(), Hostile()),
    "saved": (None, 5, "saved", (), {}, np.zeros(3), object(), Hostile(), fastbn.Saved),
}
ARRAYS = ("x", "dy", "residual", "out")
OPTIONAL = ("residual", "out", "weight", "bias", "gamma", "beta", "scale", "B")  # may be None
VECTORS = (
    "weight", "bias", "mean", "invstd", "sum_dy", "sum_dy_xmu", "running_mean", "running_var",
    "gamma", "beta", "moving_mean", "moving_variance", "scale", "B", "input_mean", "input_var"
)  # fmt: skip


def bad_values(name: str, call: Call, d: Draw, p: Place) -> tuple[Any, ...]:
    """What an argument must not be."""
    if name in BAD:
        return BAD[name]
    if name == "layout":
        return bad_layouts(len(p.shape))
    if name == "axis":
        return (len(p.shape), -len(p.shape) - 1, 1.0, "1", True, [1], 10**400, np.zeros(2), Hostile(), (1,))
    if name == "mask":
        return (*bad_masks(p), *ANYTHING[:8])
    none = () if name in OPTIONAL else (None,)
    if name in ARRAYS:
        return (*(bad_arrays(p) if d.random() < 0.7 else ANYTHING), *none)
    if name in ("running_mean", "running_var") and training(call):  # None is allowed, a list is not
        c = p.channels
        return (*bad_vectors(c, p.compute), *ANYTHING, [0.0] * c, np.zeros(c, int), read_only(np.zeros(c, p.compute)))
    return (*(bad_vectors(p.channels, p.compute) if d.random() < 0.7 else ANYTHING), *none)


def spoil(call: Call, d: Draw, p: Place) -> None:
    """Replace one argument by something that must be refused."""
    a = call.arguments
    name = d.choice([n for n in a if n in (*BAD, *ARRAYS, *VECTORS, "layout", "axis", "mask")])
    value = d.choice(bad_values(name, call, d, p))
    a[name] = value
    # Where there is another reason, the message may be about that.
    call.blame = tuple(a) if call.why or "stats" in a else (name,)
    call.expect, call.why, call.judge = "error", f"{name}={short(value)}", None
    if name == "activation":
        call.blame += ("leaky_relu",)
    elif name in ("layout", "axis"):
        call.blame += ("layout", "axis")
    elif name == "dy":
        call.blame += ("x",)
    elif name == "x":  # another x may be fine in itself, and then the rest does not fit it
        call.blame = tuple(a)
        if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray) and value.dtype.name in DTYPES:
            call.expect = "either"
    # Other truths and no channels or values at all may pass.
    if name in ("training", "from_output") or (name in VECTORS and p.channels == 0) or (name == "count" and 0 in p.shape):
        call.expect = "either"
    call.writes = tuple(a.get(n) for n in ("out", "running_mean", "running_var") if isinstance(a.get(n), np.ndarray))


def training(call: Call) -> bool:
    t = call.arguments.get("training", call.name == "layer.forward")
    return bool(t) if isinstance(t, (bool, int, np.bool_)) else True


def read_only(a: Array) -> Array:
    a.flags.writeable = False
    return a


def overlap(a: dict[str, Any], d: Draw, p: Place) -> bool:
    """Lay two arrays of the call into one piece of memory, one of them written; True where they may differ in place."""
    written = [n for n in ("out", "running_mean", "running_var") if isinstance(a.get(n), np.ndarray)]
    if not written:
        return False
    target = d.choice(written)
    victims = [n for n, v in a.items() if n != target and isinstance(v, np.ndarray)]
    if not victims:
        return False
    victim = d.choice(victims)
    t, v = a[target], a[victim]
    if 0 in t.shape or 0 in v.shape:
        return False
    total = t.nbytes + v.nbytes
    root = np.full(2 * total + 2 * PAD + 64, 0xFF, np.uint8)
    if v.dtype == bool:
        root[...] = 0
    d.roots.append(root)
    start = PAD + max(0, v.nbytes)
    item = min(t.dtype.itemsize, v.dtype.itemsize)
    rows = v.dtype.itemsize * v.shape[-1], t.dtype.itemsize * t.shape[-1]
    step = d.choice((0, 0, item, -item, 2 * item, *rows, -rows[0], d.randrange(-v.nbytes, t.nbytes), t.nbytes - item))
    step = max(-v.nbytes + 1, min(step, t.nbytes - 1))
    values = np.array(v)
    new_t = np.ndarray(t.shape, t.dtype, root, start)
    if v.dtype != bool:
        new_t[...] = t
    new_v = np.ndarray(v.shape, v.dtype, root, start + step)
    if v.dtype != bool:
        new_v[...] = values
    a[target], a[victim] = new_t, new_v
    for v in (new_t, new_v):  # half of one number and half of another may be any number
        sizes = np.abs(v[np.isfinite(v)].astype(LD)) if v.dtype != bool else np.zeros(0)
        if sizes.size < v.size or (sizes > 1e6).any() or ((sizes < 1e-6) & (sizes > 0)).any():
            d.notes.append("extreme")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The functions.


def draw_forward(d: Draw, dtypes: tuple[str, ...], name: str) -> tuple[Call, Place]:
    """batch_norm or batch_norm_forward, training or not."""
    p = draw_place(d, dtypes)
    x = d.array(p, 0.75)
    c = p.channels
    a: dict[str, Any] = {"x": x}
    training = d.random() < (0.75 if name == "forward" else 0.45)
    a["training"] = training if d.random() < 0.97 else d.choice((int(training), np.bool_(training)))
    if training:
        for k in ("running_mean", "running_var"):
            a[k] = d.vector(c, p.compute, "positive", container=False) if d.random() < 0.5 else None
    else:
        a["running_mean"], a["running_var"] = d.vector(c, p.compute, "any"), d.vector(c, p.compute, "positive")
    for k in ("weight", "bias"):
        if d.random() < 0.6:
            a[k] = d.vector(c, p.compute, "weight" if k == "weight" else "any")
    if d.random() < 0.5:
        a["eps"] = d.eps()
    if d.random() < 0.3:
        a["momentum"] = d.momentum()
    if d.random() < 0.5:
        a["activation"] = d.activation()
    if d.random() < 0.25:
        a["residual"] = d.array(p)
    if d.random() < 0.2:
        a["mask"] = draw_mask(d, p)
    if d.random() < 0.3:
        a["correction"] = d.choice((0, 1, np.int64(0)))
    if d.random() < (0.08 if training else 0.01) and 0 not in p.shape:
        a["stats"] = draw_stats(d, p, x)
    a.update(p.keywords)
    function = fastbn.batch_norm_forward if name == "forward" else fastbn.batch_norm
    call = Call(name, function, a, None)
    draw_out(call, d, p, ("x", "residual"))
    return call, p


def draw_out(call: Call, d: Draw, p: Place, inputs: tuple[str, ...]) -> None:
    """Where the result goes: nowhere given, memory of its own, an input, or something in between."""
    a = call.arguments
    q = d.random()
    if q < 0.55:
        return
    given = [n for n in inputs if isinstance(a.get(n), np.ndarray)]
    if q < 0.75 or not given:
        a["out"] = d.like(p, None, 0.6, writable=True)
    elif q < 0.92:
        a["out"] = a[d.choice(given)]
    else:
        a["out"] = d.like(p, None, 0.9, writable=True)
        if overlap(a, d, p):
            call.expect, call.why = "either", "arrays overlap"
            call.blame = tuple(a)
    out = a["out"]
    if any(s == 0 and n > 1 for s, n in zip(out.strides, out.shape, strict=True)) and out.size:
        call.expect, call.blame, call.why = "error", ("out",), "out has zero strides"


def finish_forward(call: Call, d: Draw, p: Place) -> Truth:
    """What the call should do, from its arguments as they are now."""
    a = call.arguments
    training = bool(a["training"])
    t = Truth(a, p, training)
    call.out = a.get("out")
    call.writes = tuple(
        v for v in (a.get("out"), *((a["running_mean"], a["running_var"]) if training else ())) if isinstance(v, np.ndarray)
    )
    bad: tuple[str, tuple[str, ...]] | None = None
    few = t.count < (2 if t.correction else 1)
    if "stats" in a and (not training or a["stats"].count < t.held or few):
        bad = "stats that do not fit", ("stats", "mask")
    elif training and not t.empty and few:
        bad = "too few values", ("x", "mask")
    elif training and any(isinstance(a[k], np.ndarray) and not writable(a[k]) for k in ("running_mean", "running_var")):
        bad = "read-only", ("running_mean", "running_var")
    if bad is not None:
        call.blame = (*call.blame, *bad[1])
        call.why, call.expect = call.why or bad[0], "error"

    def judge(result: Any) -> None:
        y, saved = result if call.name == "forward" else (result, None)
        t.judge_y(y, call, d)
        t.judge_updates()
        if saved is not None:
            t.judge_saved(saved, d)

    call.judge = judge
    return t


def writable(a: Array) -> bool:
    return bool(a.flags.writeable) and not (a.size > 1 and a.ndim and a.strides[0] == 0)


def scenario_forward(d: Draw, dtypes: tuple[str, ...], spoiled: float = 0.2) -> Iterator[Call]:
    call, p = draw_forward(d, dtypes, d.choice(("forward", "batch_norm", "batch_norm")))
    if d.random() < spoiled:
        if d.random() < 0.8:
            spoil(call, d, p)
            yield call
            return
        if "out" not in call.arguments:
            call.arguments["out"] = d.like(p, None, 0.9, writable=True)
        if overlap(call.arguments, d, p):
            call.expect, call.blame, call.why = "either", tuple(call.arguments), "arrays overlap"
    finish_forward(call, d, p)
    yield call


class Backward:
    """The truth of a backward, from that of its forward."""

    def __init__(self, t: Truth, dy: Array, wrt: tuple[str, ...], y: Array | None):
        p = t.p
        self.t, self.p, self.wrt = t, p, wrt
        dy = flat(dy, p)
        w = t.weight
        scale = t.invstd * w
        near = LD(1e-13 if p.name == "float64" else 1e-5)
        # The truth has its own rounding, too: that of a mean with few digits more than a float64's.
        xhat, blur = (t.x - t.mean) * t.invstd, near / 10 * t.far + 2 * np.finfo(LD).eps * np.abs(t.mean * t.invstd)
        f = t.activation
        z = t.zs
        if y is not None:  # from the output: x is what the stored y says
            stored = flat(y, p)
            before = stored if f is None else np.where(stored > 0, stored, stored / LD(f[1]))
            b = t.bias
            xhat = (before - b) / w
            blur = (
                np.where(w == 0, np.inf, 1) * (1e-15 if p.name == "float64" else 6e-7) * (np.abs(before) + np.abs(b)) / np.abs(w)
                + near / 10
            )
            z = Z(before, np.zeros_like(before))
            # A scale, or a slope of that, which is not a number of the arithmetic's range.
            undone = (w == 0) | ~((np.abs(scale) > 1e-30) & (np.abs(scale) < 1e30) & (t.invstd > 1e-30) & (t.invstd < 1e30))
        else:
            undone = t.far > 1e3  # far beyond what is promised
        undone = undone | (t.invstd > most(p)) | (np.abs(scale) > most(p))
        self.dz, unsure = dy, np.zeros_like(dy)
        if f is not None:
            slope = ACTIVATIONS[f[0]][1]
            g, k = slope(z.z, LD(f[1])), LD(f[1])
            low, high = slope(z.z - z.slack, k), slope(z.z + z.slack, k)
            unsure = np.abs(dy) * (np.maximum(np.abs(high - g), np.abs(low - g)) + near / 5)
            unsure = np.where(np.isinf(z.slack), np.inf, unsure)
            self.dz = np.where(g == 0, 0, dy * g)  # what is cut off counts as nothing, NaN too
            undone = undone | ~np.isfinite(z.z).all(1, keepdims=True)
        self.undefined = undone
        self.unsure = unsure
        n = max(t.count, 1)
        m = np.ones(dy.shape[1], bool) if t.mask is None else t.mask
        dz, xh = self.dz[:, m], xhat[:, m]
        un = unsure[:, m]
        self.dbias = dz.sum(1, keepdims=True)
        self.dweight = (dz * xh).sum(1, keepdims=True)
        # What is promised: of the largest, or of what a sum of so many terms usually is.
        usual = near * np.sqrt(LD(n)) * np.abs(dz).max(1, keepdims=True, initial=0)
        self.dbias_slack = un.sum(1, keepdims=True) + near / 2 * np.abs(dz).sum(1, keepdims=True) + near * np.abs(self.dbias) + usual
        bl = blur if np.ndim(blur) < 2 or blur.shape[1] == 1 else blur[:, m]
        self.dweight_slack = (
            (un * np.abs(xh)).sum(1, keepdims=True)
            + (np.abs(dz) * bl).sum(1, keepdims=True)
            + near / 2 * np.abs(dz * xh).sum(1, keepdims=True)
            + near * np.abs(self.dweight)
            + usual
        )
        # Sums whose terms together, or factors and products that are too large a number for the arithmetic.
        for sums in (dz, dz * (t.x - t.mean)[:, m]):
            lost = np.abs(sums).sum(1, keepdims=True) > most(p)
            self.dbias_slack, self.dweight_slack = (np.where(lost, np.inf, v) for v in (self.dbias_slack, self.dweight_slack))
        inner = self.dz
        slack = unsure + near * np.abs(self.dz)
        if t.training:
            inner = self.dz - np.where(m, (self.dbias + xhat * self.dweight) / n, 0)
            more = self.dbias_slack + np.abs(xhat) * self.dweight_slack + blur * np.abs(self.dweight)
            more = more + near / 5 * (np.abs(self.dbias) + np.abs(xhat * self.dweight))
            slack = slack + np.where(m, more / n, 0)
            factor = t.invstd if y is None else 1 / np.abs(w)
            steps = np.abs(self.dz) + (np.abs(self.dbias) + np.abs(xhat * self.dweight)) / n
            slack = np.where(m & (np.maximum(steps, np.abs(factor * self.dweight) / n) > most(p)), np.inf, slack)
            slack = slack + np.where(m, np.abs(xhat / factor) * ulp(np.zeros_like(xhat), name_of(p.compute)), 0)
        self.dx, self.dx_slack = scale * inner, np.abs(scale) * slack
        if p.dtype.itemsize == 2:
            self.dx_slack = self.dx_slack + ulp(self.dx, p.name)
        self.dx_slack = np.where(self.undefined, np.inf, self.dx_slack + ulp(self.dx, p.name))

    def judge(self, g: Any, call: Call, d: Draw, dy: Array) -> None:
        p, wrt = self.p, self.wrt
        for field in ("x", "weight", "bias", "residual"):
            if (getattr(g, f"d{field}") is not None) != (field in wrt):
                raise WrongError(f"d{field} is {'missing' if field in wrt else 'there though not asked for'}|{wrt}")
        if "x" in wrt:
            agree("dx", same_array("dx", g.dx, p, call, d), self.dx, self.dx_slack, p.name)
        name = name_of(p.compute)
        for field, truth, slack in (("weight", self.dweight, self.dweight_slack), ("bias", self.dbias, self.dbias_slack)):
            if field in wrt:
                v = getattr(g, f"d{field}")
                own_memory(f"d{field}", v, d)
                bound = np.where(self.undefined, np.inf, slack + ulp(truth, name))
                agree(f"d{field}", np.asarray(v).reshape(-1, 1), truth, bound, name)
        if "residual" in wrt:
            slack = self.unsure + ulp(self.dz, p.name) + LD(1e-6 if p.name != "float64" else 1e-14) * np.abs(self.dz)
            agree("dresidual", flat(g.dresidual, p), self.dz, np.where(self.undefined, np.inf, slack), p.name)
            if g.dx is not None and np.may_share_memory(g.dx, g.dresidual):
                raise WrongError("dx and dresidual share memory|")


def scenario_backward(d: Draw, dtypes: tuple[str, ...]) -> Iterator[Call]:
    call, p = draw_forward(d, dtypes, "forward")
    if call.expect != "value":
        return
    in_place = d.random() < 0.15
    a = call.arguments
    a.pop("out", None)
    call.expect = "value"
    if in_place:
        a.pop("residual", None)
        a["activation"] = d.choice((None, "leaky_relu", ("leaky_relu", 0.3)))
        a["out"] = d.choice((a["x"], None))
        if a["out"] is not None and not writable_nd(a["out"]):
            a["out"] = None
    t = finish_forward(call, d, p)
    if call.expect != "value":
        return
    yield call
    if call.result is None:
        return
    y, saved = call.result
    # What the caller does with its arrays afterwards is no business of the backward's; but for x and the residual.
    if d.random() < 0.2:
        for k in ("weight", "bias", "running_mean", "running_var", "mask"):
            v = a.get(k)
            if isinstance(v, np.ndarray) and v.flags.writeable:
                v.fill(True if v.dtype == bool else 77)
        d.notes.append("vectors or mask changed after the forward")
    for field in ("mean", "invstd", "scale", "shift", "mean_lo"):
        v = getattr(saved, field)
        if isinstance(v, np.ndarray) and v.size:
            d.roots.append(v.view(np.ndarray).reshape(-1).view(np.uint8))
    wrt = tuple(d.sample(("x", "weight", "bias"), d.choice((1, 2, 3, 3, 3, 3, 0)))) if d.random() < 0.4 else ("x", "weight", "bias")
    if saved.residual is not None and d.random() < 0.6:
        wrt = (*wrt, "residual")
    dy = d.array(p, 0.75)
    b: dict[str, Any] = {"dy": dy, "x": y if in_place else a["x"], "saved": saved}
    if wrt != ("x", "weight", "bias") or d.random() < 0.2:
        b["wrt"] = d.choice((list, tuple, tuple, dict.fromkeys, set))(wrt)
    back = Call("backward", fastbn.batch_norm_backward, b, None)
    if in_place:
        b["from_output"] = True
        weight = np.abs(t.weight)
        if (
            ~(weight > 1e-2 * np.fmax(np.maximum(1, np.abs(t.bias)), np.abs(t.zs.z).max(1, keepdims=True, initial=0)))
            | ~(t.invstd < FORMATS[p.compute.name].largest)
        ).any():  # the input cannot be had from the output
            back.expect, back.blame, back.why = "either", ("weight", "from_output"), "small weights"
    if in_place and not any(root is y for root in d.roots) and y.size and call.out is None:
        d.roots.append(np.frombuffer(memoryview_of(y), np.uint8))
    if "x" in wrt:
        small = back.blame
        draw_out(back, d, p, ("dy", "x"))
        back.blame += small
    impossible: tuple[str, ...] = ()
    if "x" in wrt and t.given is not None and t.count != t.held:
        impossible = ("x", "wrt", "stats")
    if t.activation is not None and t.activation[0] == "sine":
        impossible = (*impossible, "derivative")
    q = d.random()
    if q < 0.12:
        (spoil if q < 0.09 else spoil_saved)(back, d, p)
        back.blame = (*back.blame, *impossible)
        yield back
        return
    if impossible:
        back.expect, back.why, back.blame = "error", "no gradient", (*back.blame, *impossible)
    truth = Backward(t, back.arguments["dy"], wrt, y if in_place else None)
    back.into(back.arguments.get("out"))
    back.judge = lambda g: truth.judge(g, back, d, dy)
    yield back


def memoryview_of(y: Array) -> Any:
    """The bytes of an array of its own memory, whatever its strides."""
    base = y
    while isinstance(base.base, np.ndarray):
        base = base.base
    return base.reshape(-1, order="A").view(np.uint8) if base.flags.forc else np.empty(0, np.uint8)


def writable_nd(a: Array) -> bool:
    return bool(a.flags.writeable) and not any(s == 0 and n > 1 for s, n in zip(a.strides, a.shape, strict=True))


def spoil_saved(call: Call, d: Draw, p: Place) -> None:
    """A Saved that was put together wrongly, or belongs to another forward."""
    call.writes = (call.arguments.get("out"),)
    saved = call.arguments["saved"]
    c = p.channels
    field = d.choice([f.name for f in dataclasses.fields(saved)])
    wide = DTYPES["float64"] if p.compute == DTYPES["float32"] else DTYPES["float32"]
    vectors = (
        None, 5, "text", object(), [1.0] * c, np.zeros(c, wide), np.zeros(c, int), np.zeros(c, object),
        *(np.zeros(shape, p.compute) for shape in (c + 1, (c, 1))), np.zeros(2 * c, p.compute)[::2],
    )  # fmt: skip
    odd: dict[str, tuple[Any, ...]] = {
        "mean_lo": vectors[1:],
        "count": (None, 0, -1, "x", 1.5, 10**400, saved.count + 1, saved.count * 2 + 3),
        "training": (None, "x", np.ones(2)),
        "layout": ("text", 5, ["NCHW"], {}),
        "axis": (None, "1", 1.5, 7, -9, [1]),
        "shape": (None, 5, (1,), "x", [2, 3], (10**30, 2)),
        "dtype": (None, "float32", np.dtype(np.int32), 5),
        "has_residual": (None, not saved.has_residual, "x", np.ones(2)),
        "mask": (5, "text", np.ones(3), np.ones((7, 7, 7), bool), [True], np.ones(p.rest, int)),
        "activation": ("relu", 5, object(), np.tanh),
        "residual": (5, "text", np.zeros(3, p.dtype), np.zeros(p.shape, int), [1.0]),
    }
    value = d.choice(odd.get(field, vectors))
    call.arguments["saved"] = dataclasses.replace(saved, **{field: value})
    call.expect, call.why = "either", f"saved.{field}={short(value)}"
    call.blame = (
        "saved", "x", "dy", "mask", "layout", "residual", "activation", "training", "count", "wrt", "axis", "shape", "dtype", "from_output",
    )  # fmt: skip
    if (field in ("mean", "invstd", "scale") and (value is None or not isinstance(value, np.ndarray))) or (
        field == "count" and value in (None, 0, -1, "x")
    ):
        call.expect = "error"
    if 0 in p.shape or (field == "count" and value == 0 and not saved.training):
        call.expect = "either"
    call.judge = None


def scenario_stats(d: Draw, dtypes: tuple[str, ...]) -> Iterator[Call]:
    p = draw_place(d, dtypes)
    x = d.array(p, 0.6)
    a: dict[str, Any] = {"x": x, **p.keywords}
    if d.random() < 0.3:
        a["mask"] = draw_mask(d, p)
    call = Call("stats", fastbn.batch_norm_stats, a, None)
    if d.random() < 0.15:
        spoil(call, d, p)
        yield call
        return
    xs = flat(x, p)
    m = counted(a.get("mask"), p)
    xs = xs if m is None else xs[:, m]
    call.judge = lambda s: judge_stats(s, xs, p, d)
    yield call
    if p.shape[0] < 2 or p.axis == 0 or call.result is None or "mask" in a:
        return
    # The parts of the batch, merged.
    cuts = sorted({0, p.shape[0], *(d.randrange(p.shape[0] + 1) for _ in range(d.choice((1, 1, 2, 3))))})
    parts = [fastbn.batch_norm_stats(x[i:j], **p.keywords) for i, j in pairwise(cuts)]
    if d.random() < 0.3:
        parts.append(fastbn.batch_norm_stats(x[:0], **p.keywords))
    d.shuffle(parts)
    merge = Call(
        "merge", parts[0].merge, {f"other{i}": s for i, s in enumerate(parts[1:])}, lambda s: judge_stats(s, xs, p, d, merged=True)
    )
    merge.positional = True
    if d.random() < 0.05:
        others = fastbn.batch_norm_stats(np.zeros((2, p.channels + 1), p.dtype))
        bad = d.choice((3, None, "text", np.zeros(3), (1, 2, 3), others, object(), fastbn.Stats))
        merge.arguments["other9"] = bad
        merge.expect, merge.why, merge.judge = "error", f"merge({short(bad)})", None
        merge.blame = ("merge", "others", "other", "Stats", "stats")
    # The variance of a part may leave the range where that of the whole does not.
    if merge.expect == "error" or all(np.isfinite(part.var).all() for part in parts):
        yield merge


def judge_stats(s: Any, xs: Array, p: Place, d: Draw, merged: bool = False) -> None:
    name = name_of(p.compute)
    if s.count != xs.shape[1] * (xs.shape[0] > 0 or 1) and xs.size:
        raise WrongError(f"count is off|{s.count} instead of {xs.shape[1]}")
    if not merged:
        for field in ("mean", "var", "mean_lo"):
            own_memory(field, getattr(s, field), d)
    if s.mean.dtype != p.compute or s.var.dtype != p.compute:
        raise WrongError(f"statistics have the wrong dtype|{s.mean.dtype} {s.var.dtype}")
    if xs.shape[1] == 0:
        if s.count or s.mean.any() or s.var.any():
            raise WrongError("statistics of nothing are not zero|")
        return
    mean, var = statistics(xs)
    got = np.asarray(s.mean).astype(LD).reshape(-1, 1)
    agree("mean", got, mean, ulp(mean, name) + near_of(p) * np.sqrt(var), name)
    if s.mean_lo is not None:
        low = np.asarray(s.mean_lo).astype(LD).reshape(-1, 1)
        # With what was rounded away: a hundredth of the promise for y.
        bound = near_of(p) * np.sqrt(var) + (1e-19 if name == "float64" else 1e-13) * np.abs(mean) + ulp(np.zeros_like(mean), name)
        sane = np.isfinite(got) & np.isfinite(mean)
        agree("mean + mean_lo", np.where(sane, got + low, 0), np.where(sane, mean, 0), bound, name)
    near = 1e-6 if name == "float32" else 1e-13
    agree(
        "var",
        np.asarray(s.var).reshape(-1, 1),
        var,
        near * var + (ulp(var, name) if merged or not (var == 0).any() else np.where(var == 0, 0, ulp(var, name))),
        name,
    )


def scenario_elemt(d: Draw, dtypes: tuple[str, ...]) -> Iterator[Call]:
    p = draw_place(d, dtypes)
    c = p.channels
    a: dict[str, Any] = {"x": d.array(p, 0.75)}
    a["mean"], a["invstd"] = d.vector(c, p.compute, "any"), d.vector(c, p.compute, "positive")
    for k in ("weight", "bias"):
        if d.random() < 0.6:
            a[k] = d.vector(c, p.compute, "any")
    if d.random() < 0.4:
        a["activation"] = d.activation()
    if d.random() < 0.25:
        a["residual"] = d.array(p)
    a.update(p.keywords)
    call = Call("elemt", fastbn.batch_norm_elemt, a, None)
    draw_out(call, d, p, ("x", "residual"))
    if d.random() < 0.15:
        spoil(call, d, p)
        yield call
        return
    zs = normalized(flat(a["x"], p), column(a["mean"], c, 0), column(a["invstd"], c, 1), a, p)
    call.into(a.get("out"))
    call.judge = lambda y: agree("y", same_array("y", y, p, call, d), *output(zs, a.get("activation"), p), p.name)
    yield call


def scenario_reduce(d: Draw, dtypes: tuple[str, ...]) -> Iterator[Call]:
    p = draw_place(d, dtypes)
    c = p.channels
    a: dict[str, Any] = {"dy": d.array(p, 0.75), "x": d.array(p, 0.75)}
    a["mean"], a["invstd"] = d.vector(c, p.compute, "any"), d.vector(c, p.compute, "positive")
    a.update(p.keywords)
    near = LD(1e-13 if p.name == "float64" else 2e-6)

    def truth() -> tuple[Array, Array, Array, Array]:
        return flat(a["x"], p), flat(a["dy"], p), column(a["mean"], c, 0), column(a["invstd"], c, 1)

    x, dy, mean, invstd = truth()
    if d.random() < 0.5:
        call = Call("reduce", fastbn.batch_norm_backward_reduce, a, None)

        def judge(sums: Any) -> None:
            for what, v, terms in (("sum_dy", sums[0], dy), ("sum_dy_xmu", sums[1], dy * (x - mean))):
                own_memory(what, v, d)
                total, size = terms.sum(1, keepdims=True), np.abs(terms).sum(1, keepdims=True)
                bound = np.where(size > most(p), np.inf, near * size + ulp(total, v.dtype.name))
                agree(what, np.asarray(v).reshape(-1, 1), total, bound, v.dtype.name)

        call.judge = judge
        if d.random() < 0.15:
            spoil(call, d, p)
        yield call
        return
    a["weight"] = d.vector(c, p.compute, "any") if d.random() < 0.7 else None
    a["sum_dy"], a["sum_dy_xmu"] = d.vector(c, d.choice((p.compute, DTYPES["float64"])), "any"), d.vector(c, p.compute, "any")
    a["count"] = d.choice((1, 2, 7, 100, 10**6, np.int64(5), np.int32(9), 2**40))
    call = Call("backward_elemt", fastbn.batch_norm_backward_elemt, a, None)
    draw_out(call, d, p, ("dy", "x"))
    if d.random() < 0.15:
        spoil(call, d, p)
        yield call
        return
    x, dy, mean, invstd = truth()
    w, s1, s2 = column(a["weight"], c, 1), column(a["sum_dy"], c, 0), column(a["sum_dy_xmu"], c, 0)
    n = LD(int(a["count"]))
    scale, g0, g1 = invstd * w, s1 / n, invstd**2 * s2 / n
    dx = scale * (dy - g0 - (x - mean) * g1)
    size = np.abs(dy) + np.abs(g0) + np.abs((x - mean) * g1)
    bound = np.abs(scale) * size * (1e-13 if p.name == "float64" else 1e-5) + ulp(dx, p.name)
    bound = np.where(np.maximum(np.maximum(size, np.abs(x - mean)), np.maximum(np.abs(scale), np.abs(g1))) > most(p), np.inf, bound)
    call.into(a.get("out"))
    call.judge = lambda r: agree("dx", same_array("dx", r, p, call, d), dx, bound, p.name)
    yield call


# ---------------------------------------------------------------------------------------------------------------------
# Classes, and the rest of what is public.


def scenario_frozen(d: Draw, dtypes: tuple[str, ...]) -> Iterator[Call]:
    first = draw_place(d, dtypes)
    c = first.channels
    a: dict[str, Any] = {"running_mean": d.vector(c, first.compute, "any"), "running_var": d.vector(c, first.compute, "positive")}
    for k in ("weight", "bias"):
        if d.random() < 0.6:
            a[k] = d.vector(c, first.compute, "any")
    if d.random() < 0.3:
        a["eps"] = d.eps()
    if d.random() < 0.4:
        a["activation"] = d.activation()
    a.update(first.keywords)
    make = Call("FrozenBatchNorm", *frozen_constructor(d, a, first), None)
    if d.random() < 0.1:
        names = [*a, *make.arguments, "weight", "bias", "eps"]
        keep = dict(make.arguments)
        spoil(make, d, first)
        if make.blame[0] == "layout" and make.arguments["layout"] in [
            name for some in LAYOUTS.values() for name in some if isinstance(make.arguments["layout"], str)
        ]:
            make.arguments = keep  # good for another number of axes
            make.expect = "value"
        else:
            if "axis" in make.blame and isinstance(make.arguments.get("axis"), int):
                make.expect = "either"  # good for more axes
            # An array of another length may be the one that is believed.
            if make.blame[0] in (*VECTORS, "epsilon"):  # all constructors speak of the first one's arguments
                make.blame = tuple(names)
                v = make.arguments.get("running_mean", a["running_mean"])
                if (c == 0 or v is not a["running_mean"]) and isinstance(v, (np.ndarray, list)) and len(a) == 1:
                    make.expect = "either"
            yield make
            return
    yield make
    layer = make.result
    if layer is None:
        return
    mean, var = column(a["running_mean"], c, 0), column(a["running_var"], c, 1)
    invstd = 1 / np.sqrt(var + LD(float(a.get("eps", 1e-5))))
    if d.random() < 0.15:  # the layer keeps copies
        for k in ("running_mean", "running_var", "weight", "bias"):
            v = a.get(k)
            if isinstance(v, np.ndarray) and v.flags.writeable:
                a[k] = np.array(v)
                v.fill(55)
        d.notes.append("vectors changed after the construction")
    place = first
    for _ in range(d.choice((1, 2, 3, 4))):
        q = d.random()
        if q < 0.25:  # another batch
            shape = list(place.shape)
            shape[0 if place.axis else -1] = d.choice((1, 2, 5, 9))
            place = place._replace(shape=tuple(shape))
        elif q < 0.4:
            place = place._replace(dtype=DTYPES[d.choice(dtypes)])
        elif q < 0.5:
            layer = d.choice((copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))))(layer)  # noqa: S301
        elif q < 0.6:
            repr(layer)
        x = d.array(place, 0.85)
        b: dict[str, Any] = {"x": x}
        if d.random() < 0.25:
            b["residual"] = d.array(place, 0.8)
        call = Call("frozen", layer.__call__, b, None)
        draw_out(call, d, place, ("x", "residual"))
        if d.random() < 0.1:
            spoil(call, d, place)
            call.blame = ("x", "residual", "out")
            yield call
            continue
        if d.random() < 0.07:  # other channels than the layer has
            shape = list(place.shape)
            shape[place.axis] += d.choice((1, 2, -1))
            if shape[place.axis] >= 0:
                call.arguments = {"x": np.ones(shape, place.dtype)}
                call.expect, call.blame, call.why = "error", ("x",), "other channels"
                yield call
                continue
        p = place
        zs = normalized(flat(b["x"], p), mean, invstd, {**b, "weight": a.get("weight"), "bias": a.get("bias")}, p)
        call.into(b.get("out"))
        call.judge = frozen_judge(zs, a.get("activation"), p, call, d)
        yield call


FOREIGN = {"keras": ("gamma", "beta", "moving_mean", "moving_variance"), "onnx": ("scale", "B", "input_mean", "input_var")}


def frozen_constructor(d: Draw, a: dict[str, Any], p: Place) -> tuple[Any, dict[str, Any]]:
    """What makes the layer, and of which arguments: its own constructor, or one in another framework's words."""
    rest = {k: a[k] for k in ("layout", "axis", "activation") if k in a}
    vectors = {k: a.get(k) for k in ("weight", "bias", "running_mean", "running_var")}
    way = d.choice(("own",) * 5 + ("torch", "keras", "onnx"))
    if way == "own" or (way == "onnx" and (p.axis != 1 or len(a.keys() & vectors) < 4)):
        return fastbn.FrozenBatchNorm, dict(a)
    if way == "torch":
        return fastbn.FrozenBatchNorm.from_torch, {"module": SimpleNamespace(**vectors, eps=a.get("eps", 1e-5)), **rest}
    foreign = dict(zip(FOREIGN[way], vectors.values(), strict=True))
    foreign.update({name: a[k] for k, name in (("eps", "epsilon"), ("activation", "activation")) if k in a})
    if way == "keras":
        a.setdefault("eps", 1e-3)
        foreign["axis"] = p.axis if d.random() < 0.5 else p.axis - len(p.shape)
    return getattr(fastbn.FrozenBatchNorm, f"from_{way}"), foreign


def frozen_judge(zs: Z, activation: Any, p: Place, call: Call, d: Draw) -> Callable[[Any], None]:
    return lambda y: agree("y", same_array("y", y, p, call, d), *output(zs, activation, p), p.name)


LAYERS = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d, 5: fastbn.BatchNorm3d}


def scenario_layer(d: Draw, dtypes: tuple[str, ...]) -> Iterator[Call]:
    rank = d.choice((2, 3, 4, 4, 5))
    p = draw_place(d, dtypes, rank)
    while p.channels == 0:
        p = draw_place(d, dtypes, rank)
    c = p.channels
    a: dict[str, Any] = {"num_features": c, "dtype": d.choice((p.dtype, p.dtype.type))}
    a.update(p.keywords)
    if d.random() < 0.4:
        a["eps"] = d.eps()
    if d.random() < 0.4:
        a["momentum"] = d.choice((d.momentum(), None))
    for k in ("affine", "track_running_stats"):
        if d.random() < 0.25:
            a[k] = False
    if d.random() < 0.4:
        a["activation"] = d.activation()
    if d.random() < 0.3:
        a["correction"] = d.choice((0, 1))
    if d.random() < 0.3:
        a["skip_nonfinite"] = True
    make = Call("layer", LAYERS[rank], a, None)
    if d.random() < 0.08:
        bad = {
            "num_features": (None, 0, -3, 1.5, "3", True, 10**400, [3], np.zeros(2), {}, 2**62, Hostile()),
            "dtype": (
                "int32", int, "float128", complex, "text", 5, [], {}, np.dtype("M8[s]"), ">f4", object(), Hostile(),
                np.dtype([("a", "f4")]), bool
            ),
            "eps": (*BAD_NUMBERS, -1.0, math.nan, math.inf, "x", 1j, object(), Hostile()),
            "momentum": (True, "x", 1j, 10**400, [1.0], np.zeros(3), object(), Hostile()),
            "layout": ("NHCW", "", ["NCHW"], {}, 5, True, "NC" if rank > 3 else "NCHW", Hostile(), np.zeros(2)),
            "activation": BAD_ACTIVATIONS,
            "affine": (np.ones(2), Hostile()),
            "communicator": (3, "x", object(), np.ones(2), {}, Hostile()),
        }  # fmt: skip
        k = d.choice(tuple(bad))
        make.arguments[k] = d.choice(bad[k])
        make.expect, make.blame, make.why = "error", (k,), f"{k}={short(make.arguments[k])}"
        yield make
        return
    yield make
    layer = make.result
    if layer is None:
        return
    tracks = a.get("track_running_stats", True)
    correction = a.get("correction", 1)
    for _ in range(d.choice((1, 2, 3, 5))):
        q = d.random()
        if layer.weight is not None and d.random() < 0.3:
            layer.weight[...] = [d.uniform(0.5, 2) * d.choice((1, -1)) for _ in range(c)]
            layer.bias[...] = [d.uniform(-2, 2) for _ in range(c)]
        if q < 0.12:
            layer.train(d.random() < 0.5)
        elif q < 0.2 and tracks:
            layer.freeze(d.random() < 0.6)
        elif q < 0.28:
            layer = d.choice((copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))))(layer)  # noqa: S301
        elif q < 0.36:
            yield from state_of(d, layer, a, rank)
        elif q < 0.4:
            repr(layer)
        elif q < 0.43:
            layer.reset_running_stats()
            if tracks and (layer.running_mean.any() or (layer.running_var != 1).any() or layer.num_batches_tracked):
                raise WrongError("reset_running_stats left something|")
        if d.random() < 0.5:
            shape = list(p.shape)
            shape[0 if p.axis else -1] = d.choice((1, 2, 3, 5))
            p = p._replace(shape=tuple(shape))
        x = d.array(p, 0.8)
        b: dict[str, Any] = {"x": x}
        if d.random() < 0.2:
            b["residual"] = d.array(p, 0.8)
        if d.random() < 0.15:
            b["mask"] = draw_mask(d, p)
        call = Call("layer.forward", d.choice((layer, layer.forward)), b, None)
        draw_out(call, d, p, ("x", "residual"))
        uses_batch = not tracks or (layer.training and not layer.frozen)
        own = [v for v in (layer.weight, layer.bias, layer.running_mean, layer.running_var) if v is not None]
        d.roots.extend(v.view(np.uint8) for v in own if not any(np.may_share_memory(v, r) for r in d.roots))
        if d.random() < 0.06:
            spoil(call, d, p)
            call.blame = (*call.blame, "x")
            call.writes = (call.arguments.get("out"), layer.running_mean, layer.running_var)
            yield call
            continue
        seen = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
        track = uses_batch and tracks
        full = {
            **b, "weight": layer.weight, "bias": layer.bias, "activation": layer.activation, "eps": layer.eps, "correction": correction,
            "momentum": layer.momentum if layer.momentum is not None else 1.0 / ((seen or 0) + 1),
            "running_mean": layer.running_mean if track or not uses_batch else None,
            "running_var": layer.running_var if track or not uses_batch else None,
        }  # fmt: skip
        if not uses_batch:
            full.pop("mask", None)
        t = Truth(full, p, uses_batch)
        call.out = b.get("out")
        call.writes = (call.out, *((layer.running_mean, layer.running_var) if track else ()))
        if uses_batch and not t.empty and t.count < 2 - (correction == 0):
            call.expect, call.blame = "error", (*call.blame, "x", "mask", "out")
            call.why = "too few values"
        want = None if seen is None else seen + (1 if track and not t.empty else 0)
        skips = track and a.get("skip_nonfinite", False)
        call.judge = layer_judge(t, call, d, layer, want, (layer.running_mean.copy(), layer.running_var.copy()) if skips else None)
        yield call
        if call.result is None or call.why:
            continue
        # And back. From the output where the input was overwritten, which is another truth: left to the functions.
        if d.random() < 0.6:
            in_place = call.out is not None and p.shape and np.may_share_memory(call.out, x)
            dy = d.array(p, 0.8)
            e: dict[str, Any] = {"dy": dy}
            wrt = (
                "x",
                *(("weight", "bias") if a.get("affine", True) and not layer.frozen else ()),
                *(("residual",) if "residual" in b else ()),
            )
            if d.random() < 0.3:
                wrt = tuple(d.sample(wrt, d.randrange(len(wrt) + 1)))
                e["wrt"] = wrt
            back = Call("layer.backward", layer.backward, e, None)
            back.refusals = (ValueError, TypeError, RuntimeError) if in_place else (ValueError, TypeError)
            if "x" in wrt:
                draw_out(back, d, p, ("dy",))
            if "residual" in b and call.out is not None and np.may_share_memory(call.out, b["residual"]):
                continue  # the documentation says that the residual must not be changed
            if in_place:
                back.expect, back.blame, back.why = "either", ("backward", "weight", "out", "eps"), "from the output"
                if (t.activation is not None and t.activation[0] != "leaky_relu") or "residual" in b:
                    back.expect = "error"
            elif t.activation is not None and t.activation[0] == "sine":
                back.expect, back.blame, back.why = "error", ("derivative",), "no derivative"
            back.into(back.arguments.get("out"))
            if not in_place and back.expect == "value":
                truth = Backward(t, back.arguments["dy"], wrt, None)
                back.judge = back_judge(truth, back, d, dy)
            yield back


def layer_judge(t: Truth, call: Call, d: Draw, layer: Any, want: int | None, before: tuple[Array, Array] | None) -> Callable[[Any], None]:
    """For a layer; `before` are the running statistics of one that skips what is not finite."""

    def judge(y: Any) -> None:
        t.judge_y(y, call, d)
        seen = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
        if before is not None and want is not None and seen == want - 1 and not t.empty:
            # Skipped: nothing was updated, and there was a reason. Numbers near the end of the range may or may not be one.
            if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, (layer.running_mean, layer.running_var), strict=True)):
                raise WrongError("a batch that is not finite was skipped in part|")
            largest = FORMATS[t.p.compute.name].largest * LD(0.4)
            if (np.abs(t.mean) < largest).all() and (t.var < largest).all() and all(np.isfinite(v).all() for v in before):
                raise WrongError("a finite batch was skipped|")
            return
        if before is not None and not all(np.isfinite(v).all() for v in (layer.running_mean, layer.running_var)):
            raise WrongError("a batch that is not finite was not skipped|")
        t.judge_updates()
        if want is not None and seen != want:
            raise WrongError(f"num_batches_tracked is off|{seen} instead of {want}")

    return judge


def back_judge(truth: Backward, call: Call, d: Draw, dy: Array) -> Callable[[Any], None]:
    return lambda g: truth.judge(g, call, d, dy)


def state_of(d: Draw, layer: Any, a: dict[str, Any], rank: int) -> Iterator[Call]:
    """state_dict and load_state_dict, into another layer."""
    state = layer.state_dict()
    for k, v in state.items():
        if np.may_share_memory(v, getattr(layer, k)):
            raise WrongError(f"state_dict()['{k}'] is the layer's own memory|")
    other = type(layer)(**a)
    before = {k: v.copy() for k, v in other.state_dict().items()}
    c = layer.num_features
    loaded = dict(state)
    load = Call("load_state_dict", other.load_state_dict, {"state_dict": loaded}, None)
    load.positional = True
    load.refusals = (ValueError, TypeError, KeyError)
    strict = d.random() < 0.7
    if not strict or d.random() < 0.2:
        load.arguments["strict"] = d.choice((strict, int(strict), np.bool_(strict)))
    error = "error" if strict else "value"
    q = d.random()
    if q < 0.4 and loaded:
        k = d.choice(tuple(loaded))
        n = k == "num_batches_tracked"
        counts = (2.7, -1, 10**30, "x", None, True, [1, 2], 1j, np.zeros(3), object(), {}, math.nan)
        loaded[k] = d.choice(counts if n else bad_vectors(c, DTYPES["float32"]))
        load.expect, load.blame, load.why = "error", (k,), f"state[{k!r}]={short(loaded[k])}"
    elif q < 0.5 and loaded:
        k = d.choice(tuple(loaded))
        del loaded[k]
        load.expect, load.blame, load.why = ("value" if k == "num_batches_tracked" else error), (k,), f"without {k}"
    elif q < 0.55:
        loaded["extra"] = np.zeros(3)
        load.expect, load.blame, load.why = error, ("extra",), "an unknown key"
    elif q < 0.6:
        load.arguments["state_dict"] = d.choice((None, 5, "text", [], [("weight", 1)], np.zeros(3), Hostile(), {1: 2}))
        load.expect, load.blame = "error", ("state_dict", "weight", "running_mean")
        load.why = f"state_dict={short(load.arguments['state_dict'])}"
        if not state or (not strict and isinstance(load.arguments["state_dict"], dict)):
            load.expect = "either"
    elif q < 0.65:
        load.arguments["strict"] = d.choice(BAD["strict"])
        load.expect, load.blame, load.why = "error", ("strict",), f"strict={short(load.arguments['strict'])}"
    elif q < 0.8:
        loaded.update({k: v.tolist() for k, v in loaded.items()})

    def judge(keys: Any) -> None:
        if {*keys.missing_keys} != {*state} - {*loaded} - {"num_batches_tracked"} or {*keys.unexpected_keys} != {*loaded} - {*state}:
            raise WrongError(f"keys are off|{keys}")
        for k, v in state.items():
            if k in loaded and not np.array_equal(getattr(other, k), v, equal_nan=True):
                raise WrongError(f"{k} is not what was loaded|")

    load.judge = judge if load.arguments["state_dict"] is loaded else None
    yield load
    if load.result is None and load.refused:
        for k, v in before.items():
            if not np.array_equal(getattr(other, k), v):
                raise WrongError(f"load_state_dict refused and changed {k}|{load.why}")


def scenario_rest(d: Draw, dtypes: tuple[str, ...]) -> Iterator[Call]:
    q = d.random()
    if q < 0.35:
        p = draw_place(d, dtypes)
        x = d.array(p, 0.5)
        a: dict[str, Any] = {"op": d.choice(("stats", "normalize", "forward", "backward")), "x": x}
        a.update(p.keywords)
        call = Call("explain", fastbn.explain, a, None)
        if d.random() < 0.5:
            bad: dict[str, tuple[Any, ...]] = {
                "op": ("Forward", "", None, 5, [], ["forward"], {}, Hostile(), np.zeros(2), b"forward"),
                "x": (
                    None, 5, [[1.0]], np.zeros(3, np.float32), np.zeros((2, 3), int), np.float32(1), "text", object(), Hostile(),
                    np.zeros(p.shape, ">f4"), np.zeros(p.shape, object), np.zeros((), np.float32)
                ),
                "layout": ("NHCW", ["NCHW"], {}, 5, True, Hostile(), np.zeros(2)),
            }  # fmt: skip
            k = d.choice(tuple(bad))
            a[k] = d.choice(bad[k])
            a = call.arguments
            call.expect, call.blame, call.why = "error", (k,), f"{k}={short(a[k])}"
            if k == "layout" and "axis" in a:
                call.blame = ("layout", "axis")
        yield call
    elif q < 0.7:
        bad_n = (0, -1, 1.5, "2", None, True, 10**400, 2**31, 2**63, [1], np.zeros(2), 1j, {}, Hostile(), 2**29, 2**30, math.nan)
        n = d.choice((1, 2, 3, 7, np.int64(2), np.int32(1))) if d.random() < 0.5 else d.choice(bad_n)
        good = isinstance(n, (int, np.integer)) and not isinstance(n, bool) and 1 <= n <= 1024
        before = fastbn.get_num_threads()

        def enter(n: Any) -> int:
            with fastbn.num_threads(n):
                inside = fastbn.get_num_threads()
                if good or d.random() < 0.2:
                    fastbn.batch_norm_stats(LARGE)
                return inside

        def settle(n: Any) -> int:
            try:
                fastbn.set_num_threads(n)
                fastbn.batch_norm_stats(LARGE)
                return int(n)  # which a block of num_threads around it may hide
            finally:
                fastbn.set_num_threads(before)

        def judge(inside: Any) -> None:
            if good and inside != n:
                raise WrongError(f"get_num_threads is off|{inside} instead of {n}")
            if fastbn.get_num_threads() != before:
                raise WrongError("the number of threads was not set back|")

        call = Call("num_threads", d.choice((enter, settle)), {"n": n}, judge)
        if not good:
            call.expect = "either" if type(n) is int and n in (2**29, 2**30) else "error"
            call.blame, call.why = ("n", "num_threads", "threads"), f"n={short(n)}"
        yield call
    elif q < 0.85:
        name = d.choice((None, "reference", "avx2", "", 5, [], {}, True, Hostile(), b"reference", np.zeros(2), "simd_v99"))
        good = name is None or (isinstance(name, str) and name == "reference")

        def use(name: Any) -> Any:
            with fastbn.use_kernel(name):
                return fastbn.batch_norm_stats(SMALL)

        call = Call("use_kernel", use, {"name": name}, None)
        if not good:
            call.expect, call.blame, call.why = "error", ("kernel", "name"), f"name={short(name)}"
        yield call
    elif q < 0.95:
        a = {
            "dtypes": d.choice((["float32"], ["float64", "float16"], ("bfloat16",), [])),
            "layouts": d.choice((["NCHW"], ["NHWC", "NC"], [])),
        }
        call = Call("warmup", fastbn.warmup, a, None)
        if d.random() < 0.6:
            k = d.choice(("dtypes", "layouts"))
            a[k] = d.choice((None, 5, "text", ["x"], [5], [None], [[]], {}, Hostile(), True, b"x", [b"float32"]))
            call.expect, call.blame, call.why = ("either" if isinstance(a[k], dict) else "error"), (k, k[:-1]), f"{k}={short(a[k])}"
        with fastbn.use_kernel("reference"):
            yield call
    else:
        yield Call("release_memory", fastbn.release_memory, {}, None)


LARGE = np.ones((64, 4, 40, 40), np.float32)
SMALL = np.array([[1.0], [3.0]])


# ---------------------------------------------------------------------------------------------------------------------
# Making the calls.

SCENARIOS: tuple[tuple[float, Any], ...] = (
    (0.36, scenario_forward), (0.24, scenario_backward), (0.08, scenario_stats), (0.09, scenario_elemt), (0.08, scenario_reduce),
    (0.07, scenario_frozen), (0.065, scenario_layer), (0.015, scenario_rest)
)  # fmt: skip


@cache
def kernels(numba: bool) -> tuple[str, ...]:
    return tuple(k.name for k in TABLE if not k.unusable() and (numba or k.name != "numba"))


class Finding(NamedTuple):
    kind: str  # the same for findings that are likely one fault
    text: str


def memory_of(roots: list[Array]) -> list[bytes]:
    return [root.tobytes() for root in roots]


def expected_bytes(root: Array, before: bytes, writes: tuple[Any, ...]) -> bytes:
    """What a piece of memory should hold after the call: what it held, and the outputs."""
    after = np.frombuffer(bytearray(before), np.uint8)
    start = root.ctypes.data
    for a in writes:
        if a is not None and a.size and np.may_share_memory(a, root):
            np.ndarray(a.shape, a.dtype, after.data, a.ctypes.data - start, a.strides)[...] = a
    return after.tobytes()


def names(error: Exception, call: Call) -> bool:
    words = call.blame or tuple(call.arguments)
    return any(re.search(rf"(?<![A-Za-z]){re.escape(w)}(?![A-Za-z])", str(error)) for w in words)


def clean(text: str) -> str:
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    return re.sub(r"-?\d[\d.e+-]*", "#", text)[:150]


def perform(call: Call, d: Draw, loud: bool) -> Finding | None:
    """Make one call, and judge it."""
    call.result, call.refused = None, False
    before = memory_of(d.roots)
    extreme = "".join(f" ({note})" for note in dict.fromkeys(d.notes))

    def described() -> str:
        return ", ".join(f"{k}={short(v)}" for k, v in call.arguments.items())

    if loud:
        print(f"{call.name}({described()})  -- expected: {call.expect} {call.why} {d.notes}", flush=True)
    spoiled = f" [{re.sub('=.*', '', call.why)}]" if call.why else ""
    try:
        result = call.function(*call.arguments.values()) if call.positional else call.function(**call.arguments)
    except call.refusals as error:
        call.refused = True
        if loud:
            print(f"  {type(error).__name__}: {error}")
        if isinstance(error, np.exceptions.ComplexWarning):
            return Finding(f"{call.name}{spoiled}: warning {clean(str(error))}", described())
        for root, bytes_before in zip(d.roots, before, strict=True):
            if root.tobytes() != bytes_before:
                return Finding(
                    f"{call.name}{spoiled}: something was modified before the refusal", f"{type(error).__name__}: {error}; {described()}"
                )
        if call.expect == "value":
            return Finding(f"{call.name}: a good call is refused: {clean(str(error))}", f"{type(error).__name__}: {error}; {described()}")
        if not names(error, call):
            return Finding(
                f"{call.name}{spoiled}: the error names no argument: {type(error).__name__} {clean(str(error))}",
                f"{error}; {call.why}; {described()}",
            )
        return None
    except Exception as error:
        changed = any(root.tobytes() != b for root, b in zip(d.roots, before, strict=True))
        if isinstance(error, AskedError) and not changed:
            return None  # what an argument itself raises may come through
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        if loud:
            traceback.print_exc()
        return Finding(
            f"{call.name}{spoiled}: {type(error).__name__} {clean(str(error))} at {where}"
            f"{', something modified' if changed else ''}{extreme}",
            f"{error}; {call.why}; {described()}",
        )
    call.result = result
    if call.expect == "error":
        return Finding(f"{call.name}{spoiled}: accepted {clean(re.sub('^.*?=', '', call.why))}", f"{call.why}; {described()}")
    for root, bytes_before in zip(d.roots, before, strict=True):
        now = root.tobytes()
        if now != bytes_before and now != expected_bytes(root, bytes_before, call.writes):
            return Finding(f"{call.name}{spoiled}: memory that is no output was written", described())
    if call.judge is not None:
        try:
            with np.errstate(all="ignore"):
                call.judge(result)
        except WrongError as wrong:
            head, _, tail = str(wrong).partition("|")
            return Finding(f"{call.name}{spoiled}: {head}{extreme}{context(call)}", f"{tail}; {described()}; {d.notes}")
        if loud:
            print("  right")
    return None


def context(call: Call) -> str:
    """Which kind of array the wrong value belongs to."""
    x = call.arguments.get("x", call.arguments.get("dy"))
    return f" [{x.dtype.name}]" if isinstance(x, np.ndarray) else ""


def one(d: Draw, seed: int, number: int, numba: bool, pinned: str | None, loud: bool = False) -> list[Finding]:
    """The call, or the few that belong together, of one number."""
    d.begin(seed * (1 << 40) + number)
    p, total = d.random(), 0.0
    scenario = SCENARIOS[-1][1]
    for weight, candidate in SCENARIOS:
        total += weight
        if p < total:
            scenario = candidate
            break
    kernel = pinned
    if kernel is None and d.random() < 0.35:
        kernel = d.choice(kernels(numba))
    dtypes = tuple(DTYPES)
    if d.functions:
        kernel, dtypes = d.choice((None, "numba")), ("float32", "float64")
    if d.random() < 0.5:
        dtypes = ("float32",)
    strict = d.random() < 0.25
    threads = d.choice((1, 2, 3, 5)) if d.random() < 0.2 else 0
    found: list[Finding] = []
    with ExitStack() as stack:
        if kernel is not None:
            stack.enter_context(fastbn.use_kernel(kernel))
        if threads:
            stack.enter_context(fastbn.num_threads(threads))
        if loud:
            print(
                f"seed {seed} number {number}: kernel {kernel}, threads {threads or 'as they are'}, "
                f"errstate {'raise' if strict else 'warn'}"
            )
        with np.errstate(all="ignore"):
            calls = scenario(d, dtypes)
        while True:
            try:
                with np.errstate(all="ignore"):
                    call = next(calls)
            except StopIteration:
                break
            except WrongError as wrong:
                found.append(Finding(str(wrong).partition("|")[0], str(wrong)))
                break
            except Exception as error:
                place = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "fuzz.py" in f.filename), None)
                if loud:
                    traceback.print_exc()
                found.append(
                    Finding(
                        f"between calls: {type(error).__name__} {clean(str(error))} "
                        f"({place.name if place else ''}: {place.line if place else ''})",
                        str(error),
                    )
                )
                break
            with np.errstate(all="raise" if strict else "warn"):
                finding = perform(call, d, loud)
            if finding is not None:
                tag = f" <{kernel}>" if kernel in ("reference", "numba") else ""
                found.append(Finding(finding.kind + tag, f"kernel={kernel} threads={threads} strict={strict}; {finding.text}"))
                if loud:
                    print("  FINDING", finding.kind, "\n   ", finding.text)
                break
    return found


def prepare(options: argparse.Namespace) -> None:
    """Set this process up for calls: every warning is an error, and what the options say."""
    global PAD
    faulthandler.enable()
    warnings.simplefilter("error")
    PAD = 0 if options.tight else 64
    Draw.functions = options.functions
    for kernel in TABLE:
        if options.caches and kernel.level is not None and not kernel.unusable():
            kernel.module()  # which sets them
            import_module("fastbn.kernels._plan").set_caches(*options.caches)


def work(options: argparse.Namespace) -> None:
    """Make calls in this process, write the number of each before it, and each finding as a line."""
    prepare(options)
    d = Draw()
    with Path(options.record).open("r+b") as file, Path(options.findings).open("a") as findings:
        record = np.frombuffer(mmap.mmap(file.fileno(), 16), np.int64)
        end, number, made = time.monotonic() + options.seconds, options.start, 0
        while made < options.calls and (made % 64 or time.monotonic() < end):
            record[0] = number
            for finding in one(d, options.seed, number, options.numba, options.kernel):
                more = f"--caches {' '.join(map(str, options.caches))}; " if options.caches else ""
                findings.write(json.dumps({"number": number, "kind": finding.kind, "text": more + finding.text}) + "\n")
                findings.flush()
            number += options.stride
            made += 1
            record[1] += 1
        record[0] = -1


class Worker:
    """A process that makes calls, started again behind the call that ended it."""

    def __init__(self, folder: Path, index: int, jobs: int, options: argparse.Namespace):
        self.folder, self.index, self.jobs, self.options = folder, index, jobs, options
        self.record, self.findings, self.errors = (folder / f"{kind}{index}" for kind in ("record", "findings", "errors"))
        self.record.write_bytes(bytes(16))
        self.findings.touch()
        self.start, self.left = index, -(-options.calls // jobs)
        self.last, self.since = -2, time.monotonic()
        self.end = time.monotonic() + options.seconds
        self.process = self._launch()

    def _launch(self) -> subprocess.Popen[bytes]:
        o = self.options
        self.left_before = self.left
        command = [
            sys.executable,
            __file__,
            "--worker",
            "--seed",
            o.seed,
            "--start",
            self.start,
            "--stride",
            self.jobs,
            "--calls",
            self.left,
        ]
        command += ["--seconds", max(self.end - time.monotonic(), 0.1), "--record", self.record, "--findings", self.findings]
        command += (
            ["--numba"] * o.numba + ["--tight"] * o.tight + ["--functions"] * o.functions + (["--kernel", o.kernel] if o.kernel else [])
        )
        caches = o.caches or ([512, 2048, 4096] if self.index % 2 and not o.kernel else None)
        command += ["--caches", *caches] if caches else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with self.errors.open("wb") as errors:
            return subprocess.Popen([str(c) for c in command], stderr=errors, env=environment)

    def numbers(self) -> tuple[int, int]:
        current, made = np.frombuffer(self.record.read_bytes(), np.int64)
        return int(current), int(made)

    def poll(self) -> bool:
        """Whether it is still at work; a crash or a call that never ends becomes a finding."""
        code = self.process.poll()
        current, _ = self.numbers()
        if code is None:
            if current != self.last:
                self.last, self.since = current, time.monotonic()
            if time.monotonic() - self.since < self.options.patience:
                return True
            self.process.kill()
            self.process.wait()
            code, reason = -9, f"no end after {self.options.patience} s"
        elif code == 0 and current == -1:
            return False
        else:
            stack = self.errors.read_text(errors="replace")
            frames = [f"{Path(f).name}:{n}" for f, n in re.findall(r'File "([^"]+)", line (\d+)', stack) if "/fastbn/" in f]
            reason = f"exit status {code}, {' '.join(frames[:2]) or stack[-300:]}"
        with self.findings.open("a") as file:
            file.write(
                json.dumps({"number": current, "kind": f"CRASH: {reason}", "text": self.errors.read_text(errors="replace")[:1500]}) + "\n"
            )
        done = (current - self.start) // self.jobs + 1
        self.start, self.left = current + self.jobs, self.left_before - done
        if self.left <= 0 or time.monotonic() > self.end:
            return False
        self.last, self.since = -2, time.monotonic()
        self.process = self._launch()
        return True


def report(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """The findings by kind, most frequent first, with examples."""
    lines = []
    for kind, examples in sorted(found.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(examples)} x {kind}")
        lines += [f"    --seed {options.seed} --only {e['number']}: {e['text'][:1200]}" for e in examples[: options.examples]]
    rate = options.made / max(options.took, 0.1)
    return "\n".join([*lines, f"{options.made} numbers in {options.took:.0f} s ({rate:.0f}/s), {len(found)} kinds of findings"])


def explore(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run the workers; return the findings by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(Path(folder), i, options.jobs, options) for i in range(options.jobs)]
        started, busy = time.monotonic(), list(workers)
        try:
            while busy:
                busy = [w for w in busy if w.poll()]
                time.sleep(0.1)
        finally:
            for w in workers:
                if w.process.poll() is None:
                    w.process.kill()
                    w.process.wait()
        options.made = sum(w.numbers()[1] for w in workers)
        options.took = time.monotonic() - started
        for w in workers:
            for line in w.findings.read_text().splitlines():
                finding = json.loads(line)
                found.setdefault(finding["kind"], []).append(finding)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Random calls of everything public, judged by formulas of their own.")
    parser.add_argument("--seed", type=int, help="the same seed makes the same calls (default: random, printed)")
    parser.add_argument("--calls", type=int, default=1 << 60, help="how many numbers (default: as many as the time allows)")
    parser.add_argument("--seconds", type=float, help="how long (default: 60, or no limit where --calls is given)")
    parser.add_argument("--only", type=int, help="make one numbered call again, and describe it")
    parser.add_argument("--jobs", type=int, default=1, help="processes; every second one pretends that caches are tiny")
    parser.add_argument("--kernel", help="pin one kernel")
    parser.add_argument("--numba", action="store_true", help="the Numba kernels too, which compile for minutes")
    parser.add_argument("--functions", action="store_true", help="activations that are functions of the user's, too: Numba compiles these")
    parser.add_argument("--tight", action="store_true", help="nothing around the arrays: for a sanitizer, which sees the ends of memory")
    parser.add_argument("--caches", type=int, nargs=3, metavar="BYTES", help="what the kernels are told of L1, L2 and L3")
    parser.add_argument("--examples", type=int, default=2, help="how many of each kind to print")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a call counts as endless")
    for name in ("--start", "--stride"):
        parser.add_argument(name, type=int, default=name == "--stride", help=argparse.SUPPRESS)
    for name in ("--record", "--findings"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(4), "little")
    if options.seconds is None:
        options.seconds = 60.0 if options.calls == 1 << 60 else 1e9
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker:
        work(options)
        return 0
    if options.only is not None:
        prepare(options)
        return int(bool(one(Draw(), options.seed, options.only, options.numba, options.kernel, loud=True)))
    print(f"seed {options.seed}", flush=True)
    found = explore(options)
    print(report(found, options))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
