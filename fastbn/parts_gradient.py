"""The gradient of parts, made of the four operations: `parts` says what parts are, and how they lie in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastbn.activations import Epilogue
from fastbn.composed import fold, lost
from fastbn.floating import default_mode
from fastbn.kernels.protocol import Grouping, Statistics
from fastbn.layout import Array
from fastbn.parts import Norm, Shape, Vectors, affine_of, as_columns, as_rows, images, planes, repeated, tiled


class Sums(NamedTuple):
    """Gradients of weight and bias."""

    dweight: Array
    dbias: Array


@default_mode
def backward(
    module: Any, dy: Array, x: Array, dx: Array | None, shape: Shape, norm: Norm, vectors: Vectors, epilogue: Epilogue | None
) -> Sums:
    """Gradients through the statistics of parts; dx may be dy or x."""
    if hasattr(module, "parts_backward"):
        mean, low, invstd = (np.ascontiguousarray(v).reshape(-1) for v in vectors)
        grouping = Grouping(shape.group, norm.centered)
        made = module.parts_backward(dy, x, dx, Statistics(mean, low, invstd), norm.affine, grouping, norm.threads, epilogue)
        if made is not None:
            return Sums(*made)
    if shape.is_rows:
        return _backward_of_rows(module, (dy, x, dx), shape, norm, vectors, epilogue)
    low, invstd = (v.astype(np.float64) for v in vectors[1:])
    weight = np.ones(shape.channels) if norm.weight is None else norm.weight.astype(np.float64)
    wide = repeated(low, shape).ravel(), repeated(invstd, shape).ravel()
    scale, shift = fold(*wide, tiled(norm.weight, shape.batch), tiled(norm.bias, shape.batch), norm.compute)
    means = np.ascontiguousarray(repeated(vectors.mean, shape)).ravel()
    lay = Maps(module, shape, norm, means, scale, shift, epilogue)
    first, second = lay.sums(dy, x)
    second = second - lost(repeated(low, shape), first)
    by_parts = (shape.batch, shape.parts, shape.group)
    g0 = (weight * first).reshape(by_parts).sum(2) / shape.values
    g1 = invstd * (invstd * ((weight * second).reshape(by_parts).sum(2) / shape.values))
    if dx is not None:
        lay.gradient(dy, x, dx, (lost(low, g1) - g0, -g1, invstd), weight)
    return Sums((second * repeated(invstd, shape)).sum(0).astype(norm.compute), first.sum(0).astype(norm.compute))


class Maps(NamedTuple):
    """The operations of a backward, over planes or over the columns of each image."""

    module: Any
    shape: Shape
    norm: Norm
    means: Array  # these vectors have an element for each channel of each image
    scale: Array
    shift: Array
    epilogue: Epilogue | None

    def _each(self) -> list[tuple[Any, slice]]:
        """How to see an array, and which of the vectors go with it."""
        s, c = self.shape, self.shape.channels
        if s.outer == 1:
            return [(lambda a: planes(a, s), slice(None))]
        return [(lambda a, b=b: images(a, b), slice(b * c, (b + 1) * c)) for b in range(s.batch)]

    def _epilogue(self, see: Any, at: slice, dresidual: Array | None) -> Epilogue | None:
        after = self.epilogue
        return after and after._replace(residual=see(after.residual), scale=self.scale[at], shift=self.shift[at], dresidual=see(dresidual))

    def sums(self, dy: Array, x: Array) -> tuple[Array, Array]:
        """Sums of each channel of each image, of shape (batch, channels)."""
        found = [
            self.module.grad_sums(see(dy), see(x), self.means[at], self.norm.threads, self._epilogue(see, at, None))
            for see, at in self._each()
        ]
        first, second = (np.concatenate(v).reshape(self.shape.batch, self.shape.channels) for v in zip(*found, strict=True))
        return first, second

    def gradient(self, dy: Array, x: Array, dx: Array, of_parts: tuple[Array, Array, Array], weight: Array) -> None:
        """``dx = scale * dz + factor * (offset + slope * (x - mean))``; offset, slope and factor are those of the parts.

        A deviation far from 1 is in the slope and in the factor: their product may leave the range of a number.
        """
        offset, slope, factor = (repeated(v, self.shape)[:, None, :, None] for v in of_parts)
        scale, mean = (v.reshape(offset.shape).astype(np.float64) for v in (self.scale, self.means))
        share = factor / scale
        line = -offset * share, -slope * share
        finite = np.isfinite(offset) & np.isfinite(slope) & np.isfinite(scale)  # what is not cannot be helped
        epilogue, outside = self.epilogue, (finite & (np.abs(line) > np.finfo(self.norm.compute).max)).any()
        if not (np.abs(weight) <= 2.0**-40).any() and scale.all() and not outside:
            self._map(dy, x, dx, line, None if epilogue is None else epilogue.dresidual)
            return
        # A kernel's line is in units of the scale: where that is nearly 0, kernels give dz alone.
        dz = dy if epilogue is None else self._of_activation(dy, x, epilogue)
        dx[...] = scale * dz + factor * (offset + slope * (x - mean))
        if epilogue is not None and epilogue.dresidual is not None:
            epilogue.dresidual[...] = dz

    def _map(self, dy: Array, x: Array, dx: Array, line: tuple[Array, Array], dresidual: Array | None) -> None:
        """``dx = scale * (dz - line[0] - line[1] * (x - mean))``."""
        g0, g1 = (v.ravel().astype(self.norm.compute) for v in line)
        for see, at in self._each():
            after = self._epilogue(see, at, dresidual)
            self.module.grad_input(see(dy), see(x), see(dx), self.means[at], self.scale[at], (g0[at], g1[at]), self.norm.threads, after)

    def _of_activation(self, dy: Array, x: Array, epilogue: Epilogue) -> Array:
        """The gradient of what the activation was given, in the type of the arithmetic."""
        compute, zero = self.norm.compute, np.zeros_like(self.means)
        residual = None if epilogue.residual is None else epilogue.residual.astype(compute, copy=False)
        dz = np.empty(x.shape, compute)
        wide = self._replace(epilogue=epilogue._replace(residual=residual))
        wide._map(dy.astype(compute, copy=False), x.astype(compute, copy=False), np.empty_like(dz), (zero, zero), dz)
        return dz


def _backward_of_rows(
    module: Any, arrays: tuple[Array, Array, Array | None], shape: Shape, norm: Norm, vectors: Vectors, epilogue: Epilogue | None
) -> Sums:
    """Gradients where weights run along the parts."""
    (dy, x, dx), compute, n = arrays, norm.compute, norm.threads
    mean, low, invstd = (v.ravel() for v in vectors)
    scale, shift = fold(low.astype(np.float64), invstd, None, None, compute)
    wide = x.astype(compute, copy=False)
    z, zero = np.empty(x.shape, compute), np.zeros(shape.batch * shape.parts, compute)
    module.normalize(as_rows(wide, shape), as_rows(z, shape), mean, scale, shift, n)  # normalized, without weight and bias
    none, weight, bias = affine_of(shape, norm)
    columns = as_columns(z, shape)
    d = as_columns(dy, shape, compute)
    dresidual = None if epilogue is None else epilogue.dresidual
    target = None if dresidual is None else dresidual if dresidual.dtype == compute else np.empty(x.shape, compute)
    after = epilogue and epilogue._replace(
        residual=as_columns(epilogue.residual, shape, compute), scale=weight, shift=bias, dresidual=None
    )
    first, second = module.grad_sums(d, columns, none, n, after)
    if dx is not None:
        g = np.empty(x.shape, compute)
        map_after = None if after is None else after._replace(dresidual=as_columns(target, shape))
        module.grad_input(d, columns, as_columns(g, shape), none, weight, (none, none), n, map_after)
        if target is not None and target is not dresidual and dresidual is not None:
            dresidual[...] = target
        rows, normal = as_rows(g, shape), as_rows(z, shape)
        sums, dots = module.grad_sums(rows, normal, zero, n, None)
        g0 = sums / shape.values if norm.centered else np.zeros_like(sums)
        g1 = dots / shape.values
        out = dx if dx.dtype == compute else g
        line = g0.astype(compute), g1.astype(compute)
        module.grad_input(rows, normal, as_rows(out, shape), zero, invstd, line, n, None)
        if out is not dx:
            dx[...] = out
    return Sums(second.astype(compute), first.astype(compute))
