"""The algebra of batch normalization on vectors of C channels: eps, momentum, folding, and the order of the four operations.

The SIMD modules run a whole call (`inference`, `forward`, `backward`) as one C function with the same algebra, because a
dozen NumPy calls on C elements cost more than a small tensor; `ComposedKernel` does the same with NumPy for modules that only
have the four operations, and for channels at the ends of the range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn import extremes
from fastbn.activations import Epilogue
from fastbn.floating import default_mode
from fastbn.kernels.protocol import Affine, Running, Statistics
from fastbn.layout import Array

if TYPE_CHECKING:
    from fastbn.kernels.protocol import Operations


def split(mean: Array, mean_lo: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Round a mean to `dtype`; the second result, float64, is what that rounds away."""
    high = mean.astype(dtype)
    return high, np.where(np.isfinite(high), mean - high, 0.0) + mean_lo


def lost(mean_lo: Array, factor: Array) -> Array:
    """What means rounded away, times something; nothing where that is infinite: only its sign would be known."""
    return np.where(np.isfinite(factor), mean_lo * factor, 0.0)


def fold(mean_lo: Array | None, invstd: Array, weight: Array | None, bias: Array | None, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Scale and shift of ``y = (x - mean) * scale + shift``, computed in float64."""
    scale = invstd.astype(np.float64)
    if weight is not None:
        scale = scale * weight
    shift = np.zeros_like(scale) if bias is None else bias.astype(np.float64)
    if mean_lo is not None:
        shift = shift - lost(mean_lo, scale)
    # Where x is the mean, 0 times the scale must be 0: a finite one is none too large for the type.
    most = np.finfo(dtype).max
    return np.where(np.isinf(scale), scale, np.clip(scale, -most, most)).astype(dtype), shift.astype(dtype)


def update_running(running: Array, weighed: Array, momentum: float) -> None:
    """Move running statistics towards the batch's; these are weighed: times momentum, a number though they may be none."""
    running[...] = (1.0 - momentum) * running.astype(np.promote_types(running.dtype, np.float64)) + weighed


def deviation(var: Array, eps: float) -> Array:
    """One over the standard deviation, in float64."""
    return 1.0 / np.sqrt(var.astype(np.float64) + eps)


@default_mode
def input_gradient(
    module: Operations, arrays: tuple[Array, Array, Array], kept: Statistics, scale: Array, sums: tuple[Array, Array], count: int,
    threads: int, epilogue: Epilogue | None = None,
) -> None:  # fmt: skip
    """Gradient of x from the two sums; the arrays are dy, x and dx."""
    (mean, mean_lo, invstd, _), (sum_dy, sum_dy_xmu) = kept, sums
    wide = invstd.astype(np.float64)
    g1 = wide * (wide * sum_dy_xmu / count)  # the square alone may leave the range
    g0 = sum_dy / count
    if mean_lo is not None:
        g0 = g0 - lost(mean_lo, g1)
    module.grad_input(*arrays, mean, scale, (g0.astype(mean.dtype), g1.astype(mean.dtype)), threads, epilogue)


class ComposedKernel:
    """Whole calls made of the four operations of a kernel module that has no whole calls of its own.

    Parameters
    ----------
    module : Operations
    counted : ndarray of shape (rows, channels, 1), optional
        What counts in a forward's statistics, where that is not all of x.
    """

    def __init__(self, module: Operations, counted: Array | None = None):
        self.counted = counted
        self.module = module
        self.stats = module.stats
        self.normalize = module.normalize
        self.grad_sums = module.grad_sums
        self.grad_input = module.grad_input

    @default_mode
    def inference(
        self, x: Array, y: Array, given: Statistics, affine: Affine, threads: int, epilogue: Epilogue | None = None
    ) -> None:  # fmt: skip
        """Normalize with given statistics."""
        mean, mean_lo, spread, eps = given
        invstd = spread if eps is None else deviation(spread, eps)
        self.normalize(x, y, mean, *fold(mean_lo, invstd, *affine, mean.dtype), threads, epilogue)

    @default_mode
    def forward(
        self, x: Array, y: Array, affine: Affine, eps: float | Array, running: Running, compute: np.dtype[Any], threads: int,
        epilogue: Epilogue | None = None,
    ) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
        """Normalize with the batch's statistics; return the mean, what it rounds away, invstd, scale and shift.

        The running statistics, in the type of the arithmetic or in float64, are moved last.
        """
        (weight, bias), (running_mean, running_var, momentum, correction) = affine, running
        values = x if self.counted is None else self.counted
        count = values.shape[0] * values.shape[2]
        mean, mean_lo, m2 = self.stats(values, threads)
        weighed_mean, weighed_var = momentum * mean, momentum * (m2 / (count - correction))
        high, low = split(mean, mean_lo, compute)
        invstd = 1.0 / np.sqrt(m2 / count + eps)
        scale, shift = fold(low, invstd, weight, bias, compute)
        usual = extremes.are_usual(m2, m2 / count + eps, invstd if weight is None else invstd * weight, compute)
        part = extremes.unusual(values, usual, eps)
        # y may be x, or the residual
        again = None if part is None else (part, part.in_units(x), part.epilogue(epilogue), part.in_units(self.counted))
        self.normalize(x, y, high, scale, shift, threads, epilogue)
        if again is not None:
            part, rows, after, own_counted = again
            c, own_mean, own_var = part.channels, np.zeros(len(part.channels)), np.zeros(len(part.channels))
            own_eps = part.from_units(np.broadcast_to(eps, c.shape), -2)
            own_affine, own = Affine(part.of(weight), part.of(bias)), Running(own_mean, own_var, 1.0, correction)
            found = ComposedKernel(self.module, own_counted).forward(rows, rows, own_affine, own_eps, own, compute, threads, after)
            y[:, c] = rows
            weighed_mean[c], weighed_var[c] = part.from_units(momentum * own_mean), part.from_units(momentum * own_var, 2)
            for vector, v, power in zip((high, low, invstd, scale, shift), found, (1, 1, -1, -1, 0), strict=True):
                vector[c] = part.from_units(v.astype(np.float64), power)
        found = high, low.astype(compute), invstd.astype(compute), scale, shift
        if running_mean is not None:
            update_running(running_mean, weighed_mean, momentum)
        if running_var is not None:
            update_running(running_var, weighed_var, momentum)
        return found

    @default_mode
    def backward(
        self, dy: Array, x: Array, dx: Array | None, kept: Statistics, scale: Array | None, threads: int, epilogue: Epilogue | None = None
    ) -> tuple[Array, Array]:
        """Sums of dy and of dy (x - mean), and dx where it is asked for."""
        mean, mean_lo, invstd, _ = kept
        part = extremes.far_from_one(invstd)
        arrays = dy, x, dx
        if part is None:
            return self._backward(arrays, kept, scale, threads, epilogue)
        rows = part.of(dy), part.in_units(x), None if dx is None else part.of(x)
        own = Statistics(part.in_units(mean), part.in_units(mean_lo), part.in_units(invstd, -1))
        own_scale, after = part.in_units(scale, -1), part.epilogue(epilogue)
        sums = self._backward(arrays, kept, scale, threads, epilogue)  # dx may be dy or x
        sum_dy, sum_dy_xmu = self._backward(rows, own, own_scale, threads, after)
        sums[0][part.channels], sums[1][part.channels] = sum_dy, part.from_units(sum_dy_xmu)
        if dx is not None:
            dx[:, part.channels] = part.from_units(np.asarray(rows[2], np.float64), -1)
        if epilogue is not None and epilogue.dresidual is not None and after is not None:
            epilogue.dresidual[:, part.channels] = after.dresidual
        return sums

    def _backward(
        self, arrays: tuple[Array, Array, Array | None], kept: Statistics, scale: Array | None, threads: int, epilogue: Epilogue | None
    ) -> tuple[Array, Array]:
        (dy, x, dx), (mean, mean_lo, _, _) = arrays, kept
        sum_dy, sum_dy_xmu = self.grad_sums(dy, x, mean, threads, epilogue)
        if mean_lo is not None:
            sum_dy_xmu = sum_dy_xmu - lost(mean_lo, sum_dy)
        if dx is not None and scale is not None:
            count = x.shape[0] * x.shape[2]
            input_gradient(self, (dy, x, dx), kept, scale, (sum_dy, sum_dy_xmu), count, threads, epilogue)
        return sum_dy, sum_dy_xmu
