"""The operation on Keras' numpy backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn import functional
from fastbn.keras.arrays import Plan, forward
from fastbn.layout import Array


def mean_of(x: Array, axes: tuple[int, ...], mask: Array | None) -> Array:
    """Mean over axes, which stay with a length of 1, of the positions in a mask; 0 of none."""
    if mask is None:
        return x.mean(axes, keepdims=True)  # type: ignore[no-any-return]
    count = mask.sum(axes, keepdims=True, dtype=x.dtype)
    return np.where(mask, x, 0).sum(axes, keepdims=True) / np.maximum(count, 1)  # type: ignore[no-any-return]


def train(plan: Plan, x: Any, gamma: Any, beta: Any) -> tuple[Any, Any, Any] | None:
    """Output, mean and variance; None where the kernels do not take it."""
    if x.ndim < 2 or x.size == 0:
        return None
    y, vectors = forward(plan, np.asarray(x), np.asarray(gamma), np.asarray(beta))
    return y, vectors[0], vectors[5]


def infer(plan: Plan, x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
    """Output with given statistics; None where the kernels do not take it."""
    if x.ndim < 2:
        return None
    given = (np.asarray(v) for v in (mean, var, gamma, beta))
    return functional.batch_norm(np.asarray(x), *given, eps=plan.eps, axis=plan.axis, activation=plan.after)  # type: ignore[arg-type, misc]
