"""Normalization of parts: each image's groups of channels, or each row, have statistics of their own.

The algebra is that of `composed`, with one difference: a part's channels share statistics, but not weights. Memory is
(batch, outer, channels, inner), of which outer or inner is 1, and `group` channels of an image are a part:

- planes (outer is 1): a part is one run of memory. To the four operations each part is a channel where they reduce, and
  each plane is one where they map;
- columns (inner is 1): each image is an array of columns, whose statistics are merged by groups;
- rows (both are 1): what a layer normalization has. Statistics are a row's, weights a column's: a map of its own.

A module of kernels that has `parts_forward` runs whole calls by itself; the functions here make them of the operations.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastbn import extremes, memory, reference
from fastbn.activations import Epilogue
from fastbn.composed import fold, split
from fastbn.floating import default_mode
from fastbn.kernels.protocol import Affine, Grouping
from fastbn.layout import Array, View, view

if TYPE_CHECKING:
    from fastbn.kernels.protocol import Operations
    from fastbn.results import Function


class Shape(NamedTuple):
    """How an array divides into parts, and how it lies in memory.

    Attributes
    ----------
    batch, outer, channels, inner : int
        Of the memory; outer or inner is 1.
    group : int
        Channels that share statistics.
    order : tuple of int or None
        Order of the axes in memory; None if that is the array's own.
    direct : bool
        False where the array must be copied first, in this order.
    """

    batch: int
    outer: int
    channels: int
    inner: int
    group: int
    order: tuple[int, ...] | None = None
    direct: bool = True

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Of the memory."""
        return self.batch, self.outer, self.channels, self.inner

    @property
    def parts(self) -> int:
        """Parts of one image."""
        return self.channels // max(self.group, 1)

    @property
    def values(self) -> int:
        """Of a part."""
        return self.outer * self.group * self.inner

    @property
    def is_rows(self) -> bool:
        """Whether weights run along a part's memory."""
        return self.outer == 1 and self.inner == 1

    def of(self, a: Array) -> Array:
        """A direct array as (batch, outer, channels, inner), without a copy."""
        return (a if self.order is None else a.transpose(self.order)).reshape(self.dims)


class Vectors(NamedTuple):
    """Mean, what it rounds away, and one over the deviation: of shape (batch, parts), in the type of the arithmetic."""

    mean: Array
    low: Array
    invstd: Array


class Norm(NamedTuple):
    """What is computed, besides the array: parameters in the type of the arithmetic, one for each channel, or None."""

    weight: Array | None
    bias: Array | None
    eps: float
    centered: bool  # False: the mean is taken to be 0
    compute: np.dtype[Any]
    threads: int

    @property
    def affine(self) -> Affine:
        """The parameters alone."""
        return Affine(self.weight, self.bias)


def shape_of(x: Array, axis: int, group: int) -> Shape:
    """How an array with images on axis 0 and channels on another one divides into parts."""
    return _shape_of(x.shape, view(x, axis), axis, group)


@lru_cache(maxsize=4096)
def _shape_of(sizes: tuple[int, ...], v: View, axis: int, group: int) -> Shape:
    order = tuple(range(len(sizes))) if v.perm is None else v.perm
    long = [i for i in order if sizes[i] != 1]
    batch, channels = sizes[0], sizes[axis]
    at = order.index(axis)
    outer, inner = prod(sizes[i] for i in order[:at] if i != 0), prod(sizes[i] for i in order[at + 1 :] if i != 0)
    direct = v.dense and (batch == 1 or long[:1] == [0])
    if channels == 1:
        outer, inner = 1, outer * inner
    if not direct or (outer > 1 and inner > 1):
        rest = tuple(i for i in range(len(sizes)) if i not in (0, axis))
        return Shape(batch, 1, channels, prod(sizes[i] for i in rest), group, (0, axis, *rest), False)
    return Shape(batch, outer, channels, inner, group, None if v.perm is None else order)


def rows_of(x: Array, ndim: int) -> Shape:
    """How an array divides into parts that are its last `ndim` axes."""
    at = x.ndim - ndim
    long = prod(x.shape[at:])
    return Shape(prod(x.shape[:at]), 1, long, 1, long, None, x.flags.c_contiguous and x.flags.aligned)


def repeated(v: Array, shape: Shape) -> Array:
    """Vectors of parts as vectors of channels, of shape (batch, channels)."""
    return v if shape.group == 1 else np.repeat(v, shape.group, 1)


def tiled(v: Array | None, batch: int) -> Array | None:
    """A vector of channels once for each image."""
    return None if v is None else np.tile(v, batch)


def images(a: Array | None, b: int) -> Any:
    """One image, as (outer, channels, inner)."""
    return None if a is None else a[b]


def planes(a: Array | None, shape: Shape) -> Any:
    """All images as planes of so many channels."""
    return None if a is None else a.reshape(1, shape.batch * shape.channels, shape.inner)


@default_mode
def statistics(module: Operations, x: Array, shape: Shape, threads: int) -> tuple[Array, Array, Array]:
    """Mean, what it rounds away, and M2 of each part, of shape (batch, parts), in float64."""
    if shape.outer == 1:
        whole = module.stats(x.reshape(1, shape.batch * shape.parts, shape.group * shape.inner), threads)
        mean, low, m2 = (v.reshape(shape.batch, shape.parts) for v in whole)
        return mean, low, m2
    each = [module.stats(image, threads) for image in x]
    means, lows, m2s = (np.array(v) for v in zip(*each, strict=True))
    if shape.group == 1:
        return means, lows, m2s
    means, lows, m2s = (v.reshape(shape.batch, shape.parts, shape.group) for v in (means, lows, m2s))
    first = means[:, :, :1]
    first = np.where(np.isfinite(first), first, 0.0)
    offsets = (means - first) + lows
    offset = offsets.mean(2, keepdims=True)
    mean = first + offset
    low = offset - (mean - first)
    m2 = (m2s + shape.outer * np.square(offsets - offset)).sum(2)
    return mean[:, :, 0], np.where(np.isfinite(low), low, 0.0)[:, :, 0], m2


@default_mode
def forward(module: Any, x: Array, y: Array, shape: Shape, norm: Norm, activation: Function, residual: Array | None) -> Vectors:
    """Normalize the parts of x, (batch, outer, channels, inner); y may be x or the residual."""
    epilogue = None if activation is None and residual is None else Epilogue(activation, residual)
    if hasattr(module, "parts_forward"):
        grouping = Grouping(shape.group, norm.centered)
        made = module.parts_forward(x, y, norm.affine, norm.eps, grouping, norm.threads, epilogue)
        if made is not None:
            found = Vectors(*(v.reshape(shape.batch, shape.parts) for v in made[0]))
            if made[1]:
                finish(module, x, y, shape, norm, found, epilogue)
            return found
    mean, low, m2 = statistics(module, x, shape, norm.threads)
    if not norm.centered:
        m2 = m2 + shape.values * np.square(mean + low)
        mean, low = np.zeros_like(mean), np.zeros_like(low)
    high, rest = split(mean, low, norm.compute)
    invstd, usual = _deviations(m2, shape, norm)
    apart = None if usual.all() else _Apart.of(module, x, shape, norm, np.nonzero(~usual), epilogue)
    found = Vectors(high, rest.astype(norm.compute), invstd.astype(norm.compute))
    _normalize(module, x, y, shape, norm, (high, rest, invstd), epilogue)
    if apart is not None:
        apart.finish(y, found)
    return found


def _deviations(m2: Array, shape: Shape, norm: Norm) -> tuple[Array, Array]:
    """One over the deviation of each part, and whether the part can do without units."""
    spread = m2 / shape.values + norm.eps
    invstd = scale = 1.0 / np.sqrt(spread)
    if norm.weight is not None:  # of which one that is infinite makes none of its part unusual
        weight = norm.weight.reshape(shape.parts, shape.group).astype(np.float64)
        scale = invstd * np.where(np.isfinite(weight), np.abs(weight), 0.0).max(1)
    return invstd, extremes.are_usual(m2, spread, scale, norm.compute)


@default_mode
def finish(module: Any, x: Array, y: Array, shape: Shape, norm: Norm, found: Vectors, epilogue: Epilogue | None) -> None:
    """Compute the parts that a kernel has left: their invstd is -1, and nothing of them was written.

    All that it had at once with one at the ends of the range are left: of planes, a few parts, which alone are as they always are;
    of columns, an image, whose other parts are as they always are in a copy that has usual numbers in place of these.
    """
    if shape.outer > 1:
        for b in np.flatnonzero((found.invstd == -1).any(1)):
            _finish_image(module, int(b), (x, y), shape, norm, found, epilogue)
    elif not shape.is_rows:
        for b, g in zip(*np.nonzero(found.invstd == -1), strict=True):
            own = slice(g * shape.group, (g + 1) * shape.group)
            part = x[b : b + 1, :, own].copy()
            affine = Affine(*(None if v is None else v[own] for v in (norm.weight, norm.bias)))
            after = _epilogue_of(epilogue, (slice(b, b + 1), slice(None), own))
            made, left = module.parts_forward(part, part, affine, norm.eps, Grouping(shape.group, norm.centered), 1, after)
            if not left:
                y[b, :, own] = part[0]
                for vector, value in zip(found, made, strict=True):
                    vector[b, g] = value[0]
    _Apart.of(module, x, shape, norm, np.nonzero(found.invstd == -1), epilogue).finish(y, found)


def _finish_image(
    module: Any, b: int, arrays: tuple[Array, Array], shape: Shape, norm: Norm, found: Vectors, epilogue: Epilogue | None
) -> None:  # fmt: skip
    """Compute those parts of an image of columns that are not at the ends of the range."""
    (x, y), one = arrays, shape._replace(batch=1)
    image, after = x[b : b + 1].copy(), _epilogue_of(epilogue, (slice(b, b + 1),))
    usual = _deviations(statistics(module, image, one, 1)[2], one, norm)[1][0]
    channels = np.repeat(usual, shape.group)
    image[0][:, ~channels] = np.where(np.arange(shape.outer) % 2, -1.0, 1.0)[:, None, None]
    made, left = module.parts_forward(image, image, norm.affine, norm.eps, Grouping(shape.group, norm.centered), 1, after)
    if not left:
        y[b][:, channels] = image[0][:, channels]
        for vector, value in zip(found, made, strict=True):
            vector[b, usual] = value[usual]


def _epilogue_of(epilogue: Epilogue | None, at: tuple[slice, ...]) -> Epilogue | None:
    """What follows the normalization, with a copy of a part of the residual."""
    if epilogue is None or epilogue.residual is None:
        return epilogue
    return epilogue._replace(residual=epilogue.residual[at].copy())


def _normalize(
    module: Operations, x: Array, y: Array, shape: Shape, norm: Norm, vectors: tuple[Array, Array, Array], epilogue: Epilogue | None
) -> None:
    """Normalize with given statistics of parts."""
    high, rest, invstd = vectors
    compute, n = norm.compute, norm.threads
    residual = None if epilogue is None else epilogue.residual
    if shape.is_rows:
        scale, shift = fold(rest.ravel(), invstd.ravel(), None, None, compute)
        if norm.weight is None and norm.bias is None and epilogue is None:
            module.normalize(as_rows(x, shape), as_rows(y, shape), high.ravel(), scale, shift, n)
            return
        wide = x if x.dtype == compute else x.astype(compute)
        z = y if y.dtype == compute and residual is None else memory.empty_like(wide)
        module.normalize(as_rows(wide, shape), as_rows(z, shape), high.ravel(), scale, shift, n)
        after = None if epilogue is None else epilogue._replace(residual=as_columns(residual, shape, compute))
        done = z if y.dtype != compute else y
        module.normalize(as_columns(z, shape), as_columns(done, shape), *affine_of(shape, norm), n, after)
        if done is not y:
            y[...] = done
        return
    means = repeated(high, shape)
    rests, invstds = repeated(rest, shape).ravel(), repeated(invstd, shape).ravel()
    weight, bias = tiled(norm.weight, shape.batch), tiled(norm.bias, shape.batch)
    normalize(module, x, y, shape, (means.ravel(), *fold(rests, invstds, weight, bias, compute)), n, epilogue)


def normalize(
    module: Operations, x: Array, y: Array, shape: Shape, vectors: tuple[Array, Array, Array], threads: int, epilogue: Epilogue | None
) -> None:
    """Map with a mean, a scale and a shift of each channel of each image."""
    residual = None if epilogue is None else epilogue.residual
    if shape.outer == 1:
        after = None if epilogue is None else epilogue._replace(residual=planes(residual, shape))
        module.normalize(planes(x, shape), planes(y, shape), *vectors, threads, after)
        return
    each = [v.reshape(shape.batch, shape.channels) for v in vectors]
    for b in range(shape.batch):
        after = None if epilogue is None else epilogue._replace(residual=images(residual, b))
        module.normalize(x[b], y[b], each[0][b], each[1][b], each[2][b], threads, after)


def as_rows(a: Array, shape: Shape) -> Array:
    """Each part as a channel of one run."""
    return a.reshape(1, shape.batch * shape.parts, shape.group)


def as_columns(a: Array | None, shape: Shape, dtype: np.dtype[Any] | None = None) -> Any:
    """Each image as a row of channels."""
    return None if a is None else a.reshape(shape.batch, shape.channels, 1).astype(dtype or a.dtype, copy=False)


def affine_of(shape: Shape, norm: Norm) -> tuple[Array, Array, Array]:
    """Mean 0, the weight and the bias of each channel."""
    zero = np.zeros(shape.channels, norm.compute)
    return zero, np.ones_like(zero) if norm.weight is None else norm.weight, zero if norm.bias is None else norm.bias


class _Apart(NamedTuple):
    """Parts at the ends of the range, computed in float64 from a copy in units of their own, as `extremes` says."""

    at: tuple[Array, ...]
    y: Array
    mean: Array
    low: Array
    invstd: Array

    @classmethod
    def of(
        cls, module: Operations, x: Array, shape: Shape, norm: Norm, at: tuple[Array, ...], epilogue: Epilogue | None
    ) -> _Apart:  # fmt: skip
        """The parts at some places: numbers of images, and of parts in these."""
        values = _gather(x, shape, at)
        largest = np.maximum(np.abs(values).max((1, 2, 3)), np.sqrt(norm.eps))
        e = np.where(np.isfinite(largest), np.frexp(largest)[1], 0)
        values = np.ldexp(values, -e[:, None, None, None])
        mean = extremes.means(values) if norm.centered else np.zeros((len(e), 1, 1, 1))
        own = 1.0 / np.sqrt(np.square(values - mean).mean((1, 2, 3)) + np.ldexp(norm.eps, -2 * e))
        z = (values - mean) * own[:, None, None, None]
        for vector, times in ((norm.weight, True), (norm.bias, False)):
            if vector is not None:
                v = vector.astype(np.float64).reshape(shape.parts, shape.group)[at[1]][:, None, :, None]
                z = z * v if times else z + v
        if epilogue is not None:
            residual = None if epilogue.residual is None else _gather(epilogue.residual, shape, at)
            z = _finished(module, z, epilogue._replace(residual=residual), norm.compute)
        return cls(at, z, *split(np.ldexp(mean[:, 0, 0, 0], e), np.zeros(1), norm.compute), np.ldexp(own, -e))

    def finish(self, y: Array, vectors: Vectors) -> None:
        """Write them."""
        b, g = self.at
        group = self.y.shape[2]
        for i in range(len(b)):
            y[b[i], :, g[i] * group : (g[i] + 1) * group] = self.y[i]
        for vector, own in zip(vectors, (self.mean, self.low, self.invstd), strict=True):
            vector[b, g] = own


def _finished(module: Operations, z: Array, epilogue: Epilogue, compute: np.dtype[Any]) -> Array:
    """What follows the normalization, of some parts in float64; a function of the user's gets the type of the arithmetic."""
    if epilogue.activation is None or not epilogue.activation.custom:
        return reference.finish(z, epilogue)
    rows = reference.finish(z, epilogue._replace(activation=None)).astype(compute).reshape(1, len(z), -1)
    zero = np.zeros(len(z), compute)
    module.normalize(rows, rows, zero, np.ones_like(zero), zero, 1, Epilogue(epilogue.activation))
    return rows.reshape(z.shape)


def _gather(a: Array, shape: Shape, at: tuple[Array, ...]) -> Array:
    """Some parts, in float64: of shape (number, outer, group, inner)."""
    k = shape.group
    return np.array([a[b, :, g * k : (g + 1) * k] for b, g in zip(*at, strict=True)], np.float64)


@default_mode
def moments(module: Operations, x: Array, shape: Shape, eps: float, threads: int) -> tuple[Array, Array, Array, Array]:
    """Mean, what it rounds away, and variance of each part, in units of its own; and these' binary logarithms.

    A unit is 1, and its logarithm 0, but at the ends of the range. A variance that is too small a number matters only where eps is, too.
    """
    mean, low, m2 = statistics(module, x, shape, threads)
    var, units = m2 / shape.values, np.zeros(mean.shape, np.int64)
    at = np.nonzero(~((m2 < 2.0**1000) & (np.abs(mean) < 2.0**1000) & (var + eps > 2.0**-900)))
    if len(at[0]):
        values = _gather(x, shape, at)
        largest = np.abs(values).max((1, 2, 3), keepdims=True)
        e = np.where(np.isfinite(largest), np.frexp(largest)[1], 0)
        values = np.ldexp(values, -e)
        center = extremes.means(values)
        mean[at], var[at], units[at] = center[:, 0, 0, 0], np.square(values - center).mean((1, 2, 3)), e[:, 0, 0, 0]
        low[at] = 0.0
    return mean, low, var, units


@default_mode
def running(module: Operations, x: Array, shape: Shape, momentum: float, threads: int) -> tuple[Array, Array]:
    """Mean and unbiased variance of each channel, averaged over the images and times momentum; of parts that are single channels."""
    mean, low, var, units = moments(module, x, shape, 1.0, threads)
    most = units.max(0)
    mean = np.ldexp(mean + low, units - most).mean(0)
    var = np.ldexp(var, 2 * (units - most)).mean(0) * (shape.values / (shape.values - 1))
    return np.ldexp(momentum * mean, most), np.ldexp(momentum * var, 2 * most)
