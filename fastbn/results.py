"""The results of calls: statistics, what a backward needs, and gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastbn import checks
from fastbn.activations import Activation, Builtin
from fastbn.dtypes import lookup, resolve
from fastbn.floating import default_mode
from fastbn.layout import Array

Function = Builtin | Activation | None  # an activation

_NARROW, _WIDE = np.dtype(np.float32), np.dtype(np.float64)
_LARGEST = 10**30  # count: far from where a float overflows


class Stats:
    """Statistics of a batch, mergeable with those of other batches.

    A `Stats` is immutable and hashable: its arrays are its own and read-only. Two of the same dtype are equal if all their
    numbers are. `merge` gives the same result in any order and grouping, up to rounding; in the same order and grouping, it
    gives the same bits. Merging the empty batch changes nothing.

    Parameters
    ----------
    count : int
        Number of values per channel.
    mean, var : array_like of shape (C,)
        Mean and population variance. They are stored in float32 if both have a floating-point dtype of at most that, else in float64.
    mean_lo, var_lo : array_like of shape (C,), optional
        What `mean` and `var` round away; None means zero.

    Attributes
    ----------
    count : int
        A Python int, which does not overflow.
    mean, var, mean_lo, var_lo : ndarray of shape (C,)
        float64 for float64 input, else float32. The low parts keep a million merges in a row within 1e-6.

    Raises
    ------
    TypeError
        If the count is not an int, or a vector does not contain real numbers.
    ValueError
        If the count or a variance is negative, if the count is above 1e30, or if the vectors do not have the same shape
        (C,).

    Examples
    --------
    >>> from fastbn import batch_norm_stats
    >>> x = np.array([[1.0], [3.0], [5.0]])
    >>> batch_norm_stats(x[:1]).merge(batch_norm_stats(x[1:]))
    Stats(count=3, mean=array([3.]), var=array([2.66666667]))
    """

    __slots__ = ("__weakref__", "_count", "_vectors")

    _count: int
    _vectors: Array  # mean, var, mean_lo and var_lo, one below the other: many Stats become one array in one call

    def __init__(self, count: int, mean: ArrayLike, var: ArrayLike, mean_lo: ArrayLike | None = None, var_lo: ArrayLike | None = None):
        n, m, v = checks.integer("count", count, 0, _LARGEST), checks.real("mean", mean), checks.real("var", var)
        if m.ndim != 1:
            raise ValueError(f"mean must have shape (C,), got {m.shape}")
        channels, dtype = checks.Channels(m.size, f"mean has {m.size} channels"), _wider(_digits(m.dtype), _digits(v.dtype))
        given = {"mean": m, "var": v, "mean_lo": mean_lo, "var_lo": var_lo}
        rows = [np.zeros(m.size) if a is None else checks.vector(name, a, channels, dtype) for name, a in given.items()]
        for name, total in (("var", rows[1]), ("var + var_lo", rows[1] + rows[3])):
            if (total < 0).any():
                c = int(np.argmax(total < 0))
                raise ValueError(f"{name} must not be negative, but of channel {c} it is {total[c]:g}")
        self._set(n, np.array(rows, dtype))

    def _set(self, count: int, vectors: Array) -> None:
        vectors.setflags(write=False)
        self._count, self._vectors = count, vectors

    @property
    def count(self) -> int:
        """Number of values per channel."""
        return self._count

    @property
    def vectors(self) -> Array:
        """Mean, var, mean_lo and var_lo, one below the other: of shape (4, C)."""
        return self._vectors[:]  # a view, which nobody can make writable

    @property
    def mean(self) -> Array:
        """Mean of each channel."""
        return self._vectors[0]  # type: ignore[no-any-return]

    @property
    def var(self) -> Array:
        """Population variance of each channel."""
        return self._vectors[1]  # type: ignore[no-any-return]

    @property
    def mean_lo(self) -> Array:
        """What `mean` rounds away."""
        return self._vectors[2]  # type: ignore[no-any-return]

    @property
    def var_lo(self) -> Array:
        """What `var` rounds away."""
        return self._vectors[3]  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"Stats(count={self.count}, mean={self.mean!r}, var={self.var!r})"

    def __reduce__(self) -> tuple[type[Stats], tuple[Any, ...], tuple[int, Array]]:
        """Only the arrays, and of the low parts only those that say something."""
        return type(self), (0, [], []), (self.count, self._vectors[: 4 if self._vectors[2:].any() else 2])

    def __setstate__(self, state: tuple[int, Array]) -> None:
        """Without the checks of what users give: many counts, each below the limit, may have added up."""
        count, given = state
        vectors = np.zeros((4, given.shape[1]), given.dtype.newbyteorder("="))  # another machine's may be the other way round
        vectors[: len(given)] = given
        self._set(count, vectors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stats) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        # NaN is NaN, whatever its bits, so that a copy is equal; and -0.0 + 0.0 is 0.0, as zeros of either sign are one number.
        v = self._vectors
        return self.count, v.shape, v.dtype.str, np.where(np.isnan(v), np.nan, v + 0.0).tobytes()

    @classmethod
    def identity(cls, channels: int, dtype: DTypeLike = np.float32) -> Stats:
        """Statistics of no values; merging them changes nothing.

        Parameters
        ----------
        channels : int
        dtype : dtype
            The dtype of the input. The statistics are float64 for float64 inputs, else float32.

        Returns
        -------
        Stats

        Raises
        ------
        TypeError, ValueError
            If `channels` is not an int or is negative, or if fastbn does not compute with the dtype.

        Examples
        --------
        >>> Stats.identity(2)
        Stats(count=0, mean=array([0., 0.], dtype=float32), var=array([0., 0.], dtype=float32))
        """
        zero = np.zeros(checks.integer("channels", channels, 0), _digits(resolve(dtype)))
        return cls(0, zero, zero)

    @default_mode
    def merge(self, *others: Stats) -> Stats:
        """Statistics of all the batches together.

        Parameters
        ----------
        *others : Stats
            Statistics of other batches with the same channels.

        Returns
        -------
        Stats
            In float64 if any non-empty batch is in float64, else in float32.

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

        Examples
        --------
        >>> Stats(1, [0.0], [0.0]).merge(Stats(1, [2.0], [0.0]), Stats(2, [1.0], [0.0]))
        Stats(count=4, mean=array([1.]), var=array([0.5]))
        """
        for other in (self, *others):
            if not isinstance(other, Stats):
                raise TypeError(f"merge takes Stats, got {type(other).__name__}")
            if other.mean.shape != self.mean.shape:
                raise ValueError(f"merge needs statistics of {self.mean.size} channels, got {other.mean.size}")
        batches = [s for s in (self, *others) if s.count > 0]
        if len(batches) < 2:
            return batches[0] if batches else self
        count = sum(s.count for s in batches)
        # Shares of the count instead of counts, and halves of the means: nothing overflows whose result does not.
        shares = np.array([s.count / count for s in batches])[:, None]
        vectors = np.array([s._vectors for s in batches], np.float64)
        vectors[:, ::2] *= 0.5
        halves, variances, halves_lo, variances_lo = vectors.swapaxes(0, 1)
        # Means as offsets from that of the largest batch: the difference of two near means is exact. An infinite one has no
        # difference to itself, and the mean of all is infinite, as that of the whole.
        base = halves[shares.argmax()]
        base = np.where(np.isfinite(base), base, 0.0)
        offsets = (halves - base) + halves_lo
        offset = np.add.reduce(shares * offsets)
        distances = 2.0 * (offsets - offset)
        var = np.add.reduce(shares * (variances + variances_lo) + (shares * distances) * distances)
        mean, mean_lo = _sum(base, offset)
        return rounded(count, 2.0 * mean, 2.0 * mean_lo, var, _wider(*(s._vectors.dtype for s in batches)))

    @staticmethod
    def concat(parts: Iterable[Stats]) -> Stats:
        """Statistics of arrays that are joined along the channels.

        Parameters
        ----------
        parts : iterable of Stats
            At least one, all with the same count.

        Returns
        -------
        Stats
            The channels of the first, then those of the second, and so on.

        Raises
        ------
        TypeError
            If something else is given.
        ValueError
            If the counts differ, or there are no parts.

        Examples
        --------
        >>> Stats.concat([Stats(4, [1.0], [0.0]), Stats(4, [2.0, 3.0], [0.0, 5.0])])
        Stats(count=4, mean=array([1., 2., 3.]), var=array([0., 0., 5.]))
        """
        if not checks.is_iterable(parts):
            raise TypeError(f"concat takes an iterable of Stats, got {type(parts).__name__}")
        given = list(parts)
        for part in given:
            if not isinstance(part, Stats):
                raise TypeError(f"concat takes an iterable of Stats, got {type(part).__name__} in it")
            if part.count != given[0].count:
                raise ValueError(f"concat needs statistics with one count, got {given[0].count} and {part.count}")
        if not given:
            raise ValueError("concat needs at least one Stats, got none")
        return of_rows(given[0].count, np.concatenate([part._vectors for part in given], 1))

    @classmethod
    @default_mode
    def running(cls, mean: ArrayLike, var: ArrayLike, count: int, *, unbiased: bool = True) -> Stats:
        """Turn running statistics into the statistics of a batch.

        Parameters
        ----------
        mean, var : array_like of shape (C,)
        count : int
            Their weight in a merge: as many values per channel. With 0, they have no influence.
        unbiased : bool
            Whether `var` is the unbiased variance, as in PyTorch. The population variance is (count - 1) / count times
            that.

        Returns
        -------
        Stats

        Raises
        ------
        TypeError, ValueError
            As for `Stats`, and if the count is 1 and `unbiased`.

        Examples
        --------
        >>> Stats.running([1.0], [2.0], 4)
        Stats(count=4, mean=array([1.]), var=array([1.5]))
        """
        given = cls(count, mean, var)
        n = given.count
        if n == 0:
            return cls.identity(given.mean.size, given.mean.dtype)
        if checks.switch("unbiased", unbiased):
            given._has_unbiased()
        wide = given.var.astype(np.float64)
        return rounded(n, given.mean.astype(np.float64), np.zeros(1), wide * ((n - 1) / n) if unbiased else wide, given.mean.dtype)

    @default_mode
    def to_running(self, *, unbiased: bool = True) -> tuple[Array, Array]:
        """Return mean and variance as running statistics.

        Parameters
        ----------
        unbiased : bool
            Whether to return the unbiased variance, as in PyTorch, or the population variance, as in ONNX, Keras and Flax.

        Returns
        -------
        mean, var : ndarray of shape (C,)
            New arrays, which you may modify.

        Raises
        ------
        TypeError
            If `unbiased` is not True or False.
        ValueError
            If the count is 0, or 1 and `unbiased`.

        Examples
        --------
        >>> Stats(4, [1.0], [1.5]).to_running()
        (array([1.]), array([2.]))
        """
        if checks.switch("unbiased", unbiased):
            self._has_unbiased()
        if self.count == 0:
            raise ValueError("statistics of no values have no mean and no variance")
        return self.mean.copy(), variance(self, 1 if unbiased else 0).astype(self.var.dtype)

    def _has_unbiased(self) -> None:
        if self.count < 2:
            raise ValueError(f"an unbiased variance needs a count of at least 2, got {self.count}; use unbiased=False")

    @property
    @default_mode
    def standard_error(self) -> Array:
        """Standard error of the mean, of shape (C,): the root of the unbiased variance over the count.

        It is infinite for fewer than two values.

        Examples
        --------
        >>> Stats(5, [1.0], [16.0]).standard_error
        array([2.])
        """
        if self.count < 2:
            return np.full_like(self.mean, np.inf)
        return np.sqrt(variance(self) / float(self.count - 1)).astype(self.mean.dtype)

    def to_arrays(self) -> tuple[Array, Array, Array, Array, Array]:
        """Return everything as plain arrays, to send them by MPI, Flower or Arrow.

        Returns
        -------
        count : ndarray of int64, shape (1,)
        mean, var, mean_lo, var_lo : ndarray of shape (C,)
            New arrays, which you may modify.

        Raises
        ------
        OverflowError
            If the count does not fit an int64.

        Examples
        --------
        >>> Stats(2, [1.0], [0.25]).to_arrays()
        (array([2]), array([1.]), array([0.25]), array([0.]), array([0.]))
        """
        if self.count >= 2**63:
            raise OverflowError(f"the count must be below 2**63 to be an int64, got {checks.short(self.count)}")
        return np.array([self.count], np.int64), self.mean.copy(), self.var.copy(), self.mean_lo.copy(), self.var_lo.copy()

    @classmethod
    def from_arrays(cls, arrays: Iterable[ArrayLike]) -> Stats:
        """Make a `Stats` of the arrays of `to_arrays`.

        Parameters
        ----------
        arrays : iterable of array_like
            count (one element), mean, var and, if known, mean_lo and var_lo.

        Returns
        -------
        Stats

        Raises
        ------
        TypeError, ValueError
            As for `Stats`, and if there are fewer than three arrays or more than five.

        Examples
        --------
        >>> Stats.from_arrays(Stats(2, [1.0], [0.25]).to_arrays())
        Stats(count=2, mean=array([1.]), var=array([0.25]))
        """
        if not checks.is_iterable(arrays):
            raise TypeError(f"arrays must be an iterable of arrays, got {type(arrays).__name__}")
        given: list[Any] = list(arrays)
        if not 3 <= len(given) <= 5:
            raise ValueError(f"arrays must be count, mean, var, mean_lo and var_lo, got {len(given)} of them")
        count = checks.real("count", given[0])
        if count.size != 1:
            raise ValueError(f"count must have one element, got shape {count.shape}")
        n = count.item()
        return cls(int(n) if isinstance(n, float) and n.is_integer() else n, *given[1:])


def rounded(count: int, mean: Array, mean_lo: Array, var: Array, dtype: np.dtype[Any]) -> Stats:
    """Statistics found in float64, rounded to `dtype`; without the checks of what users give."""
    wide = np.array([mean, var])
    vectors = np.empty((4, mean.size), dtype)
    vectors[:2] = wide
    wide -= vectors[:2]
    wide[0] += mean_lo
    if not (finite := np.isfinite(wide)).all():
        wide[~finite] = 0.0  # of what is not finite, nothing is rounded away
    vectors[2:] = wide
    return of_rows(count, vectors)


def of_rows(count: int, vectors: Array) -> Stats:
    """Statistics from mean, var, mean_lo and var_lo as a kernel has found them, one below the other."""
    stats = object.__new__(Stats)
    stats._set(count, vectors)
    return stats


def variance(stats: Stats, correction: int = 0) -> Array:
    """Variance in float64, with `correction` taken from the count under it."""
    wide: Array = stats.var.astype(np.float64) + stats.var_lo
    return wide if correction == 0 else wide * (stats.count / (stats.count - correction))


def _digits(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that statistics given in another have."""
    row = lookup(dtype.newbyteorder("="))
    return _WIDE if row is None else row.compute


def _wider(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    return _WIDE if _WIDE in dtypes else _NARROW


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Sum of two vectors, and what it rounds away (Knuth)."""
    high = a + b
    back = high - a
    return high, (a - (high - back)) + (b - back)


_VECTORS = ("mean", "mean_lo", "invstd", "scale", "shift")
_OTHERS = ("count", "training", "shape", "dtype", "axis", "activation", "residual", "has_residual")


@dataclass(frozen=True, eq=False)
class Saved:
    """What a forward saves for its backward. It is equal only to itself.

    Attributes
    ----------
    mean, invstd : ndarray of shape (C,)
        The statistics that the forward used: the mean, and one over the standard deviation.
    mean_lo : ndarray of shape (C,) or None
        What `mean` rounds away; None means zero.
    count : int
        Number of values per channel in the statistics.
    training : bool
        Whether the statistics are the batch's own, so that the gradient flows through them.
    scale, shift : ndarray of shape (C,)
        The factors of the normalization ``(x - mean) * scale + shift``.
    shape, dtype, axis
        Shape, dtype and channel axis of the forward's x.
    mask : ndarray of bool or None
        A copy.
    activation : Builtin, Activation or None
    residual : ndarray of the shape of x, or None
        A copy, if the derivative of the activation needs it.
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
    mask: Array | None
    activation: Function
    residual: Array | None
    has_residual: bool
    # What a plain call has made, which is taken apart when it is looked at; None where the fields are from elsewhere.
    made: ClassVar[tuple[Any, ...] | None] = None

    def __getattr__(self, name: str) -> Any:
        made = self.made
        if made is None or name not in self.__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in _OTHERS:
            return made[1 + _OTHERS.index(name)]
        self.__dict__.update(zip(_VECTORS, made[0], strict=True), mask=None)
        return self.__dict__[name]

    def __dir__(self) -> list[str]:
        return [*{*super().__dir__(), *self.__dataclass_fields__}]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # not what these were made from

    @property
    def invertible(self) -> bool:
        """Whether the input of the forward can be recomputed from its output."""
        return not self.has_residual and (self.activation is None or self.activation.invertible)


@dataclass(frozen=True, eq=False)
class SavedParts:
    """What a forward over parts of images saves for its backward. It is equal only to itself.

    Attributes
    ----------
    kind : str
        The normalization: "instance_norm", "group_norm", "layer_norm" or "rms_norm".
    shape, dtype
        Shape and dtype of the forward's x.
    axis : int
        The channel axis; for rows, the first axis of a row.
    group : int
        Number of channels that share statistics.
    mean, invstd : ndarray of shape (batch, parts)
        The statistics: the mean, and one over the deviation.
    mean_lo : ndarray of shape (batch, parts)
        What `mean` rounds away.
    weight, bias : ndarray or None
        Copies, one number for each channel.
    activation : Builtin, Activation or None
    residual : ndarray of the shape of x, or None
        A copy, if the derivative of the activation needs it.
    has_residual : bool
        Whether the forward added a residual.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axis: int
    group: int
    mean: Array
    mean_lo: Array
    invstd: Array
    weight: Array | None
    bias: Array | None
    activation: Function
    residual: Array | None
    has_residual: bool


class Gradients(NamedTuple):
    """Gradients of one backward pass; None if not requested.

    Attributes
    ----------
    dx : ndarray, shape and memory order of x
    dweight, dbias : ndarray of shape (C,)
    dresidual : ndarray, shape of x
        Without an activation, dy itself, unless dx was written over it.
    """

    dx: Array | None
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None


class MixedGradients(Gradients):
    """Gradients of `batch_channel_norm_forward`, including the gradient of the mix.

    Attributes
    ----------
    dmix : ndarray of shape (C,), or None
    """

    dmix: Array | None = None

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, dmix={self.dmix!r})"

    def _replace(self, **given: Any) -> MixedGradients:
        """Others of the same, as for any named tuple; dmix, which is none of its fields, goes along."""
        dmix = given.pop("dmix", self.dmix)
        made = type(self)(*super()._replace(**given))
        made.dmix = dmix
        return made

    __replace__ = _replace  # for copy.replace
