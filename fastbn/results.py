"""What calls return: statistics, what a backward needs, and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastbn.activations import Activation, Builtin
from fastbn.layout import Array

Function = Builtin | Activation | None  # an activation


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of a batch, mergeable with those of other batches.

    Two are equal where all their numbers are.

    Attributes
    ----------
    count : int
        Number of values per channel.
    mean, var : ndarray of shape (C,)
        Mean and population variance; float64 for float64 input, else float32.
    mean_lo : ndarray of shape (C,) or None
        What `mean` rounds away, so that merging and centering lose no digits; None means zero.

    Examples
    --------
    >>> from fastbn import batch_norm_stats
    >>> x = np.array([[1.0], [3.0], [5.0]])
    >>> batch_norm_stats(x[:1]).merge(batch_norm_stats(x[1:]))
    Stats(count=3, mean=array([3.]), var=array([2.66666667]))
    """

    count: int
    mean: Array
    var: Array
    mean_lo: Array | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stats) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, str, bytes, bytes, bytes]:
        low = np.zeros_like(self.mean) if self.mean_lo is None else self.mean_lo
        # -0.0 + 0.0 is 0.0: zeros of either sign are one number.
        return (self.count, self.mean.dtype.str, *((a + 0.0).tobytes() for a in (self.mean, self.var, low)))

    @np.errstate(all="ignore")
    def merge(self, *others: Stats) -> Stats:
        """Statistics of all the batches together.

        Parameters
        ----------
        *others : Stats
            Statistics of other batches with the same channels.

        Returns
        -------
        Stats

        Raises
        ------
        TypeError
            If something else is given.
        ValueError
            If the numbers of channels differ.

        Notes
        -----
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        Stanford 1979, generalized from two batches to any number.
        """
        for other in others:
            if not isinstance(other, Stats):
                raise TypeError(f"merge takes Stats, got {type(other).__name__}")
            if other.mean.shape != self.mean.shape:
                raise ValueError(f"merge needs statistics of {self.mean.size} channels, got {other.mean.size}")
        batches = [s for s in (self, *others) if s.count > 0]
        if len(batches) < 2:
            return batches[0] if batches else self
        dtype, base = self.mean.dtype, batches[0].mean.astype(np.float64)
        count = sum(s.count for s in batches)
        shares = [s.count / count for s in batches]
        # Means as offsets from the first one: the difference of two near means is exact.
        offsets = [(s.mean - base) + (0.0 if s.mean_lo is None else s.mean_lo) for s in batches]
        offset = _weighted(shares, offsets)
        # Shares of the count instead of counts: nothing overflows whose result does not.
        var = _weighted(shares, [s.var + np.square(o - offset) for s, o in zip(batches, offsets, strict=True)])
        mean = (base + offset).astype(dtype)
        return Stats(count, mean, var.astype(dtype), ((base - mean) + offset).astype(dtype))


def _weighted(shares: Sequence[float], values: Sequence[Array]) -> Array:
    total: Array = np.sum([share * value for share, value in zip(shares, values, strict=True)], 0)
    return total


@dataclass(frozen=True, eq=False)
class Saved:
    """What the forward keeps for the backward. It is equal to nothing but itself.

    Attributes
    ----------
    mean, invstd : ndarray of shape (C,)
        The statistics the forward used: the mean, and one over the standard deviation.
    mean_lo : ndarray of shape (C,) or None
        What `mean` rounds away; None means zero.
    count : int
        Number of values per channel in the statistics.
    training : bool
        Whether the statistics are the batch's own, so that the gradient flows through them.
    scale, shift : ndarray of shape (C,)
        Of the normalization: ``(x - mean) * scale + shift``.
    shape, dtype, axis
        Of the forward's x: its shape, its dtype, and the axis of its channels.
    mask : ndarray of bool or None
        A copy.
    activation : Builtin, Activation or None
    residual : ndarray of the shape of x, or None
        A copy, where the activation's derivative needs it.
    has_residual : bool
        Whether the forward added a residual.
    """

    mean: Array
    invstd: Array
    mean_lo: Array | None
    count: int
    training: bool
    scale: Array
    shift: Array
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axis: int
    mask: Array | None = None
    activation: Function = None
    residual: Array | None = None
    has_residual: bool = False

    @classmethod
    def of(cls, x: Array, **fields: Any) -> Saved:
        """One for the forward of x; without the calls by which a frozen dataclass sets its fields, which outweigh a small one."""
        saved = object.__new__(cls)
        saved.__dict__.update(fields, shape=x.shape, dtype=x.dtype)
        return saved

    @property
    def invertible(self) -> bool:
        """Whether the input of the forward can be had from its output."""
        return not self.has_residual and (self.activation is None or self.activation.invertible)


class Gradients(NamedTuple):
    """Gradients of one backward pass; None where not asked for.

    Attributes
    ----------
    dx : ndarray, shape and memory order of x
    dweight, dbias : ndarray of shape (C,)
    dresidual : ndarray, shape of x
        Where there is no activation, dy itself, unless dx was written over it.
    """

    dx: Array | None
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None
