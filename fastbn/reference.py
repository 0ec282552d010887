"""The definition of batch normalization: plain formulas in NumPy, float64, never fast.

Every kernel is tested against this file. It also runs where no compiled kernel can.

The first part is the four operations, on arrays of shape ``(outer, channels, inner)``, with the arguments every
kernel takes; as compiled ones, they are silent about NaN and infinity. The second part is batch normalization as a
user knows it, for any axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def _wide(a: Array) -> Array:
    return a.astype(np.float64)


def _columns(v: Array) -> Array:
    return _wide(v)[:, None]


@np.errstate(all="ignore")
def stats(x: Array, threads: int = 1) -> tuple[Array, Array, Array]:
    """Mean and M2, the sum of squared deviations, of each channel.

    Parameters
    ----------
    x : ndarray of shape (outer, channels, inner)
        Not empty.
    threads : int
        Ignored.

    Returns
    -------
    mean, mean_lo, m2 : ndarray of shape (channels,), float64
        ``mean + mean_lo`` is the mean beyond the last digit of a float64.

    Notes
    -----
    Two passes, as in Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American
    Statistician 37 (1983): the mean of the deviations from the first mean is the correction `mean_lo`. Sums are of
    deviations from the first value, so that a constant channel has exactly no variance.
    """
    x = _wide(x)
    first = np.where(np.isfinite(x[0, :, 0]), x[0, :, 0], 0.0)
    mean = first + (x - first[:, None]).mean((0, 2))
    deviation = x - mean[:, None]
    mean_lo = deviation.mean((0, 2))
    m2 = np.square(deviation - mean_lo[:, None]).sum((0, 2))
    return mean, np.where(np.isfinite(mean_lo), mean_lo, 0.0), m2


@np.errstate(all="ignore")
def normalize(x: Array, y: Array, mean: Array, scale: Array, shift: Array, threads: int = 1) -> None:
    """Write ``(x - mean) * scale + shift`` to `y`.

    Parameters
    ----------
    x, y : ndarray of shape (outer, channels, inner)
        Input and output; `y` may be `x`.
    mean, scale, shift : ndarray of shape (channels,)
    threads : int
        Ignored.
    """
    y[...] = ((_wide(x) - _columns(mean)) * _columns(scale) + _columns(shift)).astype(y.dtype)


@np.errstate(all="ignore")
def grad_sums(dy: Array, x: Array, mean: Array, threads: int = 1) -> tuple[Array, Array]:
    """Sums over each channel of `dy` and of ``dy * (x - mean)``.

    Parameters
    ----------
    dy, x : ndarray of shape (outer, channels, inner)
    mean : ndarray of shape (channels,)
    threads : int
        Ignored.

    Returns
    -------
    sum_dy, sum_dy_xmu : ndarray of shape (channels,), float64
    """
    dy = _wide(dy)
    return dy.sum((0, 2)), (dy * (_wide(x) - _columns(mean))).sum((0, 2))


@np.errstate(all="ignore")
def grad_input(dy: Array, x: Array, dx: Array, mean: Array, scale: Array, g0: Array, g1: Array, threads: int = 1) -> None:
    """Write ``scale * (dy - g0 - (x - mean) * g1)`` to `dx`.

    Parameters
    ----------
    dy, x, dx : ndarray of shape (outer, channels, inner)
        Gradient of y, input, and output; `dx` may be `dy` or `x`.
    mean, scale, g0, g1 : ndarray of shape (channels,)
    threads : int
        Ignored.
    """
    centered = (_wide(x) - _columns(mean)) * _columns(g1)
    dx[...] = (_columns(scale) * (_wide(dy) - _columns(g0) - centered)).astype(dx.dtype)


def _along(axis: int, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes to reduce, and the shape of a vector of channels that broadcasts."""
    axis %= ndim
    return tuple(i for i in range(ndim) if i != axis), tuple(-1 if i == axis else 1 for i in range(ndim))


def batch_norm_stats(x: Array, axis: int = 1, mask: Array | None = None) -> tuple[int, Array, Array]:
    """Number of values, mean and population variance of each channel.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or with the channels on another axis
    axis : int
        Axis of the channels.
    mask : ndarray of bool, shape of x without the channel axis, optional
        Positions that count.

    Returns
    -------
    count : int
    mean, var : ndarray of shape (C,), float64

    Examples
    --------
    >>> batch_norm_stats(np.array([[1.0, 5.0], [3.0, 5.0]]))
    (2, array([2., 5.]), array([1., 0.]))
    """
    rows = np.moveaxis(_wide(x), axis, -1)
    rows = rows.reshape(-1, rows.shape[-1]) if mask is None else rows[np.broadcast_to(mask, rows.shape[:-1])]
    mean = rows.mean(0)
    lost = (rows - mean).mean(0)  # by adding many values in sequence
    mean = mean + np.where(np.isfinite(lost), lost, 0.0)
    return len(rows), mean, np.square(rows - mean).mean(0)


def batch_norm(
    x: Array, mean: Array, var: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, axis: int = 1
) -> Array:
    """Batch normalization with given statistics, in float64.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or with the channels on another axis
    mean, var : ndarray of shape (C,)
        Mean and population variance.
    weight, bias : ndarray of shape (C,), optional
    eps : float
        Added to the variance.
    axis : int
        Axis of the channels.

    Returns
    -------
    ndarray, float64, of the shape of x

    Notes
    -----
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift", ICML 2015, algorithm 1.

    Examples
    --------
    >>> batch_norm(np.array([[1.0], [3.0]]), np.array([2.0]), np.array([1.0]), eps=0.0)
    array([[-1.],
           [ 1.]])
    """
    _, column = _along(axis, x.ndim)
    y = (_wide(x) - _wide(mean).reshape(column)) / np.sqrt(_wide(var).reshape(column) + eps)
    if weight is not None:
        y = y * _wide(weight).reshape(column)
    if bias is not None:
        y = y + _wide(bias).reshape(column)
    return y


def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    eps: float = 1e-5,
    axis: int = 1,
    training: bool = True,
    mask: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of batch normalization, in float64.

    Parameters
    ----------
    dy, x : ndarray of shape (N, C, *spatial), or with the channels on another axis
    mean, var : ndarray of shape (C,)
        The statistics the forward used.
    weight : ndarray of shape (C,), optional
    eps : float
        Added to the variance.
    axis : int
        Axis of the channels.
    training : bool
        Whether mean and var were computed from x, and so depend on it.
    mask : ndarray of bool, shape of x without the channel axis, optional
        Positions that count in the statistics and in the sums.

    Returns
    -------
    dx : ndarray, float64, of the shape of x
    dweight, dbias : ndarray of shape (C,), float64

    Notes
    -----
    Ioffe and Szegedy 2015, section 3, with the three terms of dx gathered.
    """
    reduced, column = _along(axis, x.ndim)
    invstd = 1.0 / np.sqrt(_wide(var) + eps)
    scale = invstd if weight is None else invstd * _wide(weight)
    dy = _wide(dy)
    x_hat = (_wide(x) - _wide(mean).reshape(column)) * invstd.reshape(column)
    counted = np.ones(x.shape) if mask is None else np.expand_dims(np.broadcast_to(mask, np.moveaxis(x, axis, -1).shape[:-1]), axis)
    counted = np.broadcast_to(counted, x.shape).astype(np.float64)
    dbias = (dy * counted).sum(reduced)
    dweight = (dy * x_hat * counted).sum(reduced)
    dx = dy
    if training:
        count = counted.sum(reduced).reshape(column)
        dx = dy - counted * (dbias.reshape(column) + x_hat * dweight.reshape(column)) / count
    return dx * scale.reshape(column), dweight, dbias
