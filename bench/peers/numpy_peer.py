"""NumPy, as one would write it: float32 arithmetic with few temporary arrays, statistics by mean and var."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.data import LAYOUTS, Array, Inputs


def _shapes(inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes to reduce, and the shape in which a vector of channels broadcasts."""
    axis = LAYOUTS[inputs.layout]
    return tuple(i for i in range(4) if i != axis), tuple(-1 if i == axis else 1 for i in range(4))


def _wide(a: Array) -> Array:
    """16-bit floats as float32, in which their sums do not overflow."""
    return a.astype(np.float32) if a.dtype.itemsize == 2 else a


def _affine(x: Array, scale: Array, shift: Array, out: Array | None) -> Array:
    y = np.empty_like(x) if out is None else out
    if x.dtype.itemsize == 2:
        y[...] = _wide(x) * scale + shift
    else:
        np.multiply(x, scale, out=y)
        y += shift
    return y


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    x, (_, column) = inputs.x, _shapes(inputs)
    weight, bias, mean, var = (v.reshape(column) for v in inputs[2:6])
    eps = inputs.eps

    def call() -> Array:
        scale = weight / np.sqrt(var + eps)
        return _affine(x, scale, bias - mean * scale, out)

    return call


def forward(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    x, (axes, column) = inputs.x, _shapes(inputs)
    weight, bias, mean, var = (v.reshape(column) for v in inputs[2:6])
    running_mean, running_var, eps, count = mean.copy(), var.copy(), inputs.eps, x.size // mean.size

    def call() -> Array:
        nonlocal running_mean, running_var
        wide = _wide(x)
        mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
        running_mean = 0.9 * running_mean + 0.1 * mean
        running_var = 0.9 * running_var + 0.1 * var * (count / (count - 1))
        scale = weight / np.sqrt(var + eps)
        return _affine(x, scale, bias - mean * scale, out)

    return call


def backward(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    (axes, column), count = _shapes(inputs), inputs.x.size // inputs.weight.size
    weight, wide = inputs.weight.reshape(column), _wide(inputs.x)
    mean = wide.mean(axes, keepdims=True)
    invstd = 1.0 / np.sqrt(wide.var(axes, keepdims=True) + inputs.eps)

    def call() -> Array:
        x_hat, dy = _wide(inputs.x) - mean, _wide(inputs.dy)
        x_hat *= invstd
        dbias = dy.sum(axes, keepdims=True)
        dweight = (dy * x_hat).sum(axes, keepdims=True)
        x_hat *= dweight / count
        dx = np.subtract(dy, x_hat, out=x_hat)
        dx -= dbias / count
        return np.multiply(dx, weight * invstd, out=np.empty_like(inputs.x) if out is None else out, casting="same_kind")

    return call
