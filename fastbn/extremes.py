"""Channels whose values are so large or so small that their squares, differences or factors leave the range of a number.

The results of batch normalization do not: multiplied by a power of two, such a channel has the same output. So it is
computed once more, from a copy in a unit of its own. That takes longer, and is rare.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastbn.activations import Epilogue
from fastbn.layout import Array


class Part(NamedTuple):
    """Some channels, and the units in which their values are near 1.

    Attributes
    ----------
    channels : ndarray of int
    exponents : ndarray of int
        Binary logarithms of the units.
    """

    channels: Array
    exponents: Array

    def of(self, a: Array | None) -> Any:
        """A copy of what an array (outer, channels, inner) or a vector has of these channels."""
        return None if a is None else np.ascontiguousarray(a[:, self.channels] if a.ndim > 1 else a[self.channels])

    def in_units(self, a: Array | None, power: int = 1) -> Any:
        """The same, in units: those of x, or a power of these."""
        return None if a is None else self.from_units(self.of(a).astype(np.float64), -power).astype(a.dtype)

    def from_units(self, a: Array, power: int = 1) -> Array:
        """What is of these channels alone, back from units."""
        exponents = power * self.exponents
        return np.asarray(np.ldexp(a, exponents[:, None] if a.ndim > 1 else exponents))

    def epilogue(self, epilogue: Epilogue | None) -> Epilogue | None:
        """What follows the normalization of this part."""
        return epilogue and epilogue._replace(
            residual=self.of(epilogue.residual),
            scale=self.in_units(epilogue.scale, -1),
            shift=self.of(epilogue.shift),
            dresidual=self.of(epilogue.dresidual),
        )


def are_usual(m2: Array, spread: Array, scale: Array, compute: np.dtype[Any]) -> Array:
    """Whether channels can do without units: by their sums of squared deviations, variances plus eps, and scales."""
    largest = float(np.finfo(compute).max)
    deviation = min(largest / 4, 2.0**500)
    return np.asarray((m2 < deviation**2) & (spread > 2.0**-900) & (np.abs(scale) <= largest))


def unusual(x: Array, usual: Array, eps: float | Array = 0.0) -> Part | None:
    """The other channels, in units of their largest value or of the root of eps; None where units help none of them."""
    if usual.all():
        return None
    channels = np.flatnonzero(~usual)
    values = np.abs(x[:, channels].astype(np.float64)).max((0, 2))
    values = np.maximum(values, np.sqrt(np.broadcast_to(eps, usual.shape)[channels]))
    exponents = np.frexp(values)[1]
    helps = np.isfinite(values) & (values > 0) & (exponents != 0)
    return Part(channels[helps], exponents[helps]) if helps.any() else None


def far_from_one(invstd: Array) -> Part | None:
    """The channels with a standard deviation that is far from 1, in units of about that."""
    exponents = -np.frexp(invstd)[1]
    far = (np.abs(exponents) > (400 if invstd.dtype == np.float64 else 100)) & np.isfinite(invstd) & (invstd > 0)
    return Part(np.flatnonzero(far), exponents[far]) if far.any() else None


def means(values: Array) -> Array:
    """Of some parts (number, outer, group, inner), to the last digit; infinite where a value is."""
    mean = values.mean((1, 2, 3), keepdims=True)
    rest = (values - mean).mean((1, 2, 3), keepdims=True)
    return np.asarray(mean + np.where(np.isfinite(rest), rest, 0.0))
