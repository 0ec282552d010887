"""TensorFlow's functions for batch normalization, on NumPy arrays: the names, arguments and results of ``tf.nn``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from fastbn import checks, functional
from fastbn.floating import default_mode
from fastbn.functional import Number
from fastbn.layout import Array

__all__ = ["batch_normalization", "fused_batch_norm", "moments"]

_FORMATS = ("NHWC", "NCHW", "NDHWC", "NCDHW")


def batch_normalization(
    x: Array, mean: ArrayLike, variance: ArrayLike, offset: ArrayLike | None, scale: ArrayLike | None, variance_epsilon: Number,
    name: object = None,
) -> Array:  # fmt: skip
    """``tf.nn.batch_normalization``: normalize with given statistics.

    Parameters
    ----------
    x : ndarray
        Of any shape; float32, float64, float16 or bfloat16.
    mean, variance : array_like
        Broadcastable with x: vectors of shape (C,) for channels on the last axis, what `moments` returns with
        ``keepdims=True``, numbers, or arrays of the shape of x.
    offset, scale : array_like or None
        Broadcastable with x, like mean; None means 0 and 1. The order is TensorFlow's: offset first.
    variance_epsilon : float
        Added to the variance; not negative.
    name : object, optional
        Not used.

    Returns
    -------
    ndarray of the dtype of x, and of the shape that all of them broadcast to
        ``(x - mean) / sqrt(variance + variance_epsilon) * scale + offset``, computed centered, and so more accurate than
        TensorFlow in 16 bits and far from 0.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If the shapes do not broadcast, or the epsilon is negative.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.nn.batch_normalization(np.array([[1.0], [3.0]]), [2.0], [4.0], [1.0], None, 0.0)
    array([[0.5],
           [1.5]])
    """
    array, dtype = checks.array(x)
    eps = checks.number("variance_epsilon", variance_epsilon, 0.0)
    given = {"mean": mean, "variance": variance, "scale": scale, "offset": offset}
    vectors: dict[str, Array | None] = {}
    for key, value in given.items():
        if value is None and key in ("mean", "variance"):
            raise TypeError(f"{key} must be an array of real numbers, got None")
        vectors[key] = None if value is None else checks.real(key, value)
    shape = array.shape
    for key, v in vectors.items():
        shape = shape if v is None else _joined(key, shape, v.shape)
    axis = _axis(array.shape, shape, vectors)
    if axis is not None:
        rows = {key: None if v is None else np.broadcast_to(v.reshape(-1), array.shape[axis]) for key, v in vectors.items()}
        whole = array if array.ndim > 1 else array[None]
        y = functional.batch_norm(
            whole, rows["mean"], rows["variance"], rows["scale"], rows["offset"], eps=eps, axis=axis + whole.ndim - array.ndim
        )
        return y.reshape(shape)
    return _elementwise(array, vectors, eps, dtype.compute)


def _joined(name: str, shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(shape, other)
    except ValueError:
        raise ValueError(f"{name} must broadcast with x and the others to one shape, {shape}, got {other}") from None


def _axis(x: tuple[int, ...], shape: tuple[int, ...], vectors: dict[str, Array | None]) -> int | None:
    """The only axis of x along which parameters run; None where there are several, or x itself would be broadcast."""
    if shape != x or not x:
        return None
    long = {axis - v.ndim + len(x) for v in vectors.values() if v is not None for axis in range(v.ndim) if v.shape[axis] != 1}
    return len(x) - 1 if not long else long.pop() if len(long) == 1 else None


@default_mode
def _elementwise(x: Array, vectors: dict[str, Array | None], eps: float, compute: np.dtype[Any]) -> Array:
    wide = {key: None if v is None else v.astype(np.float64) for key, v in vectors.items()}
    mean, variance, scale, offset = wide.values()
    assert mean is not None and variance is not None  # noqa: S101, PT018  their names are checked
    factor = 1.0 / np.sqrt(variance + eps)
    factor = factor if scale is None else factor * scale
    y = (x.astype(np.float64) - mean) * factor
    y = y if offset is None else y + offset
    return np.asarray(y.astype(compute).astype(x.dtype))


def moments(
    x: Array, axes: int | Iterable[int], shift: object = None, keepdims: bool = False, name: object = None
) -> tuple[Array, Array]:
    """``tf.nn.moments``: mean and population variance.

    Parameters
    ----------
    x : ndarray
        float32, float64, float16 or bfloat16.
    axes : int or sequence of int
        The axes to average over: ``(0, 1, 2)`` for the channels of an NHWC array.
    shift : object, optional
        Not used, as in TensorFlow.
    keepdims : bool
        Whether these axes stay, with a length of 1.
    name : object, optional
        Not used.

    Returns
    -------
    mean, variance : ndarray
        In the dtype of x. NaN where there are no values.

    Raises
    ------
    TypeError, ValueError
        If fastbn does not compute with the dtype of x, or if an axis is not one of x, or is given twice.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.nn.moments(np.array([[1.0, 5.0], [3.0, 5.0]]), [0])
    (array([2., 5.]), array([1., 0.]))
    """
    array, _ = checks.array(x)
    gone = _axes(axes, array.ndim)
    keep = checks.switch("keepdims", keepdims)
    kept = tuple(axis for axis in range(array.ndim) if axis not in gone)
    shape = tuple(array.shape[axis] for axis in kept)
    channels, count = int(np.prod(shape)), int(np.prod([array.shape[axis] for axis in gone]))
    if len(kept) == 1 and array.ndim > 1:
        stats = functional.batch_norm_stats(array, axis=kept[0])
    else:
        stats = functional.batch_norm_stats(array.transpose(*kept, *gone).reshape(1, channels, count), axis=1)
    if keep:
        shape = tuple(1 if axis in gone else array.shape[axis] for axis in range(array.ndim))
    mean, variance = (_narrow(v, array.dtype).reshape(shape) for v in (stats.mean, stats.var))
    if count == 0:
        mean.fill(np.nan)
        variance.fill(np.nan)
    return mean, variance


@default_mode
def _narrow(v: Array, dtype: np.dtype[Any]) -> Array:
    return v.astype(dtype)


def _axes(axes: object, ndim: int) -> tuple[int, ...]:
    given = [axes] if isinstance(axes, (int, np.integer)) or getattr(axes, "ndim", None) == 0 else axes
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise TypeError(f"axes must be an int or a sequence of ints, got {checks.short(axes)}")
    found = []
    for axis in given:
        number = checks.integer("axes", axis, -ndim, ndim - 1) % ndim
        if number in found:
            raise ValueError(f"axes must name each axis once, got {checks.short(axes)}")
        found.append(number)
    return tuple(sorted(found))


def fused_batch_norm(
    x: Array, scale: ArrayLike | None, offset: ArrayLike | None, mean: ArrayLike | None = None, variance: ArrayLike | None = None,
    epsilon: Number = 0.001, data_format: Literal["NHWC", "NCHW", "NDHWC", "NCDHW"] = "NHWC", is_training: bool = True,
    name: object = None, exponential_avg_factor: Number = 1.0,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """``tf.compat.v1.nn.fused_batch_norm``: normalize, and return running statistics.

    Parameters
    ----------
    x : ndarray with 4 or 5 axes
        float32, float64, float16 or bfloat16.
    scale, offset : array_like of shape (C,), or None
        None means 1 and 0; TensorFlow does not accept None.
    mean, variance : array_like of shape (C,), optional
        When not training: the statistics to normalize by. In training: the running statistics; not used if the factor is 1.
    epsilon : float
        Added to the variance.
    data_format : str
        "NHWC" or "NCHW" for 4 axes, "NDHWC" or "NCDHW" for 5.
    is_training : bool
        Whether to use the batch's own statistics.
    name : object, optional
        Not used.
    exponential_avg_factor : float
        Weight of the batch in the running statistics.

    Returns
    -------
    y : ndarray of the shape and dtype of x
    running_mean, running_variance : ndarray of shape (C,)
        New arrays, in float64 for float64 x, else in float32. In training
        ``(1 - exponential_avg_factor) * old + exponential_avg_factor * batch``, where the batch's variance is the *unbiased* one, as in
        TensorFlow, unlike that of Keras' layer; of one value it is 0. When not training, the given ones.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype or shape, or statistics are missing.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([1.0, 3.0]).reshape(2, 1, 1, 1)
    >>> y, mean, variance = fastbn.nn.fused_batch_norm(x, [2.0], [0.0], epsilon=0.0)
    >>> y.ravel(), mean, variance
    (array([-2.,  2.]), array([2.]), array([2.]))
    """
    if not isinstance(data_format, str) or data_format not in _FORMATS:
        raise ValueError(f"data_format must be one of {', '.join(_FORMATS)}, got {checks.short(data_format)}")
    array, dtype = checks.array(x)
    if array.ndim != len(data_format):
        raise ValueError(f"data_format {data_format!r} is for arrays with {len(data_format)} axes, but x has shape {array.shape}")
    axis = data_format.index("C")
    channels = checks.channels_of(array, axis)._replace(shape=())  # data_format is no layout
    eps, factor = checks.number("epsilon", epsilon, 0.0), checks.number("exponential_avg_factor", exponential_avg_factor)
    training, wide = checks.switch("is_training", is_training), np.dtype(np.float64)
    if (not training or factor != 1.0) and (mean is None or variance is None):
        raise ValueError("mean and variance must be given when is_training is False or exponential_avg_factor is not 1")
    if training and factor == 1.0:
        running = np.zeros(channels[0]), np.zeros(channels[0])
    else:
        running = checks.vector("mean", mean, channels, wide).copy(), checks.vector("variance", variance, channels, wide).copy()
    w, b = checks.optional("scale", scale, channels, dtype.compute), checks.optional("offset", offset, channels, dtype.compute)
    count = array.size // max(channels[0], 1)
    y = functional.batch_norm(
        array, *running, w, b, training, factor, eps, axis=axis, correction=1 if count > 1 or array.size == 0 else 0
    )
    if training and array.size == 0:
        for v in running:
            v.fill(np.nan)  # as in TensorFlow
    return y, _narrow(running[0], dtype.compute), _narrow(running[1], dtype.compute)
