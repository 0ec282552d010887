"""The definition of batch normalization: plain formulas in NumPy, float64, never fast.

Every kernel is tested against this file. It also runs where no compiled kernel can.

The first part is the four operations, on arrays of shape ``(outer, channels, inner)``, with the arguments every
kernel takes; as compiled ones, they are silent about NaN and infinity. The second part is batch normalization as a
user knows it, for any axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def _wide(a: Array) -> Array:
    return a.astype(np.float64)


def _columns(v: Array) -> Array:
    return _wide(v)[:, None]


def _sum(a: Array, axis: int = 1) -> Array:
    """Sums over each channel, of numbers that lie side by side: these NumPy adds in pairs, and others one after the other."""
    rows = np.ascontiguousarray(np.moveaxis(a, axis, 0))
    return np.asarray(rows.reshape(len(rows), math.prod(rows.shape[1:])).sum(1))


def _sigmoid(z: Array) -> Array:
    return np.asarray(np.exp(np.minimum(z, 0)) / (1 + np.exp(-np.abs(z))))


def _normal(z: Array) -> Array:
    """The standard normal distribution function."""
    return np.asarray(np.frompyfunc(lambda v: math.erfc(-v / 2**0.5) / 2, 1, 1)(z), np.float64)


def _cubic(z: Array) -> Array:
    return np.asarray(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))


def _gelu_tanh_slope(z: Array) -> Array:
    return np.asarray(_sigmoid(_cubic(z)) * (1 + z * _sigmoid(-_cubic(z)) * 2 * np.sqrt(2 / np.pi) * (1 + 0.134145 * z * z)))


# The functions that may follow a normalization, of z and of a parameter, and their derivatives: as PyTorch defines them,
# where they have a kink too.
ACTIVATIONS: dict[str, tuple[Callable[[Array, float], Array], Callable[[Array, float], Array]]] = {
    "relu": (
        lambda z, _: np.where(z < 0, 0, z),
        lambda z, _: np.where(z <= 0, 0.0, 1.0),
    ),
    "relu6": (
        lambda z, _: np.clip(z, 0, 6),
        lambda z, _: np.where((z <= 0) | (z >= 6), 0.0, 1.0),
    ),
    "leaky_relu": (
        lambda z, slope: np.where(z > 0, z, slope * z),
        lambda z, slope: np.where(z > 0, 1.0, slope),
    ),
    "hardswish": (
        lambda z, _: z * (np.clip(z + 3, 0, 6) / 6),
        lambda z, _: np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, z / 3 + 0.5)),
    ),
    "sigmoid": (
        lambda z, _: _sigmoid(z),
        lambda z, _: _sigmoid(z) * _sigmoid(-z),
    ),
    "silu": (
        lambda z, _: z * _sigmoid(z),
        lambda z, _: _sigmoid(z) * (1 + z * _sigmoid(-z)),
    ),
    "tanh": (
        lambda z, _: np.tanh(z),
        lambda z, _: 4 * _sigmoid(2 * z) * _sigmoid(-2 * z),
    ),
    "gelu": (
        lambda z, _: z * _normal(z),
        lambda z, _: _normal(z) + z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi),
    ),
    "gelu_tanh": (
        lambda z, _: z * _sigmoid(_cubic(z)),
        lambda z, _: _gelu_tanh_slope(np.clip(z, -100, 100)) + 0 * z,  # beyond it is 0 or 1, though its factors may be no numbers
    ),
}

FLAT = ("relu", "relu6", "hardswish")  # where these are flat no gradient passes, not even an infinite one


def finish(z: Array, epilogue: Any) -> Array:
    """Add the residual and apply the activation."""
    if epilogue is None:
        return z
    if epilogue.residual is not None:
        z = z + _wide(epilogue.residual)
    if epilogue.activation is None:
        return z
    return ACTIVATIONS[epilogue.activation.name][0](z, epilogue.activation.parameter)


def _begin(dy: Array, x: Array, mean: Array, epilogue: Any) -> tuple[Array, Array]:
    """Take dy back through the activation; the second result is x, restored where it is the forward's output."""
    dy, x = _wide(dy), _wide(x)
    activation = None if epilogue is None else epilogue.activation
    if activation is None:
        return dy, x
    if epilogue.from_output:
        z = x = np.where(x > 0, x, x / activation.parameter)
    else:
        z = (x - _columns(mean)) * _columns(epilogue.scale) + _columns(epilogue.shift)
        z = z if epilogue.residual is None else z + _wide(epilogue.residual)
    slope = ACTIVATIONS[activation.name][1](z, activation.parameter)
    dz = np.where(slope == 0, 0, dy * slope) if activation.name in FLAT else dy * slope
    # Rounded as the mean of it will be, which is subtracted: from a single value, nothing may be left.
    return _wide(dz.astype(mean.dtype)), x


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
    x, count = _wide(x), x.shape[0] * x.shape[2]
    first = np.where(np.isfinite(x[0, :, 0]), x[0, :, 0], 0.0)
    mean = first + _sum(x - first[:, None]) / count
    deviation = x - mean[:, None]
    mean_lo = _sum(deviation) / count
    m2 = _sum(np.square(deviation - mean_lo[:, None]))
    return mean, np.where(np.isfinite(mean_lo), mean_lo, 0.0), m2


@np.errstate(all="ignore")
def normalize(x: Array, y: Array, mean: Array, scale: Array, shift: Array, threads: int = 1, epilogue: Any = None) -> None:
    """Write ``activation((x - mean) * scale + shift + residual)`` to `y`.

    Parameters
    ----------
    x, y : ndarray of shape (outer, channels, inner)
        Input and output; `y` may be `x`.
    mean, scale, shift : ndarray of shape (channels,)
    threads : int
        Ignored.
    epilogue : Epilogue, optional
        The activation and the residual.
    """
    y[...] = finish((_wide(x) - _columns(mean)) * _columns(scale) + _columns(shift), epilogue).astype(y.dtype)


@np.errstate(all="ignore")
def grad_sums(dy: Array, x: Array, mean: Array, threads: int = 1, epilogue: Any = None) -> tuple[Array, Array]:
    """Sums over each channel of `dy`, taken back through the activation, and of that times ``x - mean``.

    Parameters
    ----------
    dy, x : ndarray of shape (outer, channels, inner)
    mean : ndarray of shape (channels,)
    threads : int
        Ignored.
    epilogue : Epilogue, optional
        The activation, the residual, and the parameters of the forward.

    Returns
    -------
    sum_dy, sum_dy_xmu : ndarray of shape (channels,), float64
    """
    dz, x = _begin(dy, x, mean, epilogue)
    return _sum(dz), _sum(dz * (x - _columns(mean)))


@np.errstate(all="ignore")
def grad_input(
    dy: Array, x: Array, dx: Array, mean: Array, scale: Array, line: tuple[Array, Array], threads: int = 1, epilogue: Any = None
) -> None:
    """Write ``scale * (dz - g0 - (x - mean) * g1)`` to `dx`, where dz is dy, taken back through the activation.

    Where g1 is 0, as that of statistics that are constants, x is not in the sum: it may be infinite.

    Parameters
    ----------
    dy, x, dx : ndarray of shape (outer, channels, inner)
        Gradient of y, input, and output; `dx` may be `dy` or `x`.
    mean, scale : ndarray of shape (channels,)
    line : tuple of two ndarrays of shape (channels,)
        g0 and g1.
    threads : int
        Ignored.
    epilogue : Epilogue, optional
        The activation, the residual, the parameters of the forward, and where to write dz.
    """
    (g0, g1), (dz, x) = line, _begin(dy, x, mean, epilogue)
    far = np.where(_columns(g1) == 0, 0, x - _columns(mean))
    dx[...] = (_columns(scale) * (dz - _columns(g0) - far * _columns(g1))).astype(dx.dtype)
    if epilogue is not None and epilogue.dresidual is not None:
        epilogue.dresidual[...] = dz.astype(dx.dtype)


def _along(axis: int, ndim: int) -> tuple[int, ...]:
    """The shape of a vector of channels that broadcasts."""
    return tuple(-1 if i == axis % ndim else 1 for i in range(ndim))


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
    mean = _sum(rows) / len(rows)
    lost = _sum(rows - mean) / len(rows)  # by adding many values
    mean = mean + np.where(np.isfinite(lost), lost, 0.0)
    return len(rows), mean, _sum(np.square(rows - mean)) / len(rows)


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
    column = _along(axis, x.ndim)
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
    column = _along(axis, x.ndim)
    invstd = 1.0 / np.sqrt(_wide(var) + eps)
    scale = invstd if weight is None else invstd * _wide(weight)
    dy = _wide(dy)
    x_hat = (_wide(x) - _wide(mean).reshape(column)) * invstd.reshape(column)
    counted = np.ones(x.shape) if mask is None else np.expand_dims(np.broadcast_to(mask, np.moveaxis(x, axis, -1).shape[:-1]), axis)
    counted = np.broadcast_to(counted, x.shape).astype(np.float64)
    dbias, dweight = _sum(dy * counted, axis), _sum(dy * x_hat * counted, axis)
    dx = dy
    if training:
        count = _sum(counted, axis).reshape(column)
        dx = dy - counted * (dbias.reshape(column) + x_hat * dweight.reshape(column)) / count
    return dx * scale.reshape(column), dweight, dbias


def group_norm(
    x: Array, num_groups: int, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, axis: int = 1
) -> Array:
    """Group normalization in float64; with as many groups as channels it is instance normalization.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or with the channels on another axis
    num_groups : int
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
    Wu and He, "Group Normalization", ECCV 2018.

    Examples
    --------
    >>> group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    first = np.moveaxis(_wide(x), axis, 1)
    rows = first.reshape(len(first) * num_groups, -1)
    y = np.moveaxis(layer_norm(rows, 1, eps=eps).reshape(first.shape), 1, axis)
    column = _along(axis, x.ndim)
    y = y if weight is None else y * _wide(weight).reshape(column)
    return y if bias is None else y + _wide(bias).reshape(column)


def layer_norm(
    x: Array, ndim: int = 1, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, centered: bool = True
) -> Array:
    """Layer normalization over the last axes, in float64.

    Parameters
    ----------
    x : ndarray
    ndim : int
        Number of the axes that have statistics together.
    weight, bias : ndarray of the shape of these axes, optional
    eps : float
        Added to the variance.
    centered : bool
        Whether the mean is subtracted; else it is normalization by the root mean square.

    Returns
    -------
    ndarray, float64, of the shape of x

    Notes
    -----
    Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Examples
    --------
    >>> layer_norm(np.array([[1.0, 3.0]]), eps=0.0)
    array([[-1.,  1.]])
    """
    axes = tuple(range(x.ndim - ndim, x.ndim))
    wide = _wide(x)
    if centered:
        wide = wide - wide.mean(axes, keepdims=True)
        wide = wide - wide.mean(axes, keepdims=True)
    y = np.asarray(wide / np.sqrt(np.square(wide).mean(axes, keepdims=True) + eps))
    y = y if weight is None else y * _wide(weight)
    return y if bias is None else y + _wide(bias)
