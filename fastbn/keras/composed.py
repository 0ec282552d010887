"""The same composed of a framework's own operations, for what the kernels do not take, and for second derivatives.

Each backend's module brings `mean_of`, `where` and the operators of its tensors. Centered data are computed with, and what
rounding takes from the mean is found in a second pass, so that data far from 0 keep their digits.
"""

from __future__ import annotations

from typing import Any

import keras

from fastbn.keras.arrays import Plan

ops = keras.ops
FUNCTIONS = {
    "relu": ops.relu,
    "relu6": ops.relu6,
    "hardswish": ops.hard_silu,
    "sigmoid": ops.sigmoid,
    "silu": ops.silu,
    "tanh": ops.tanh,
    "gelu": lambda z: ops.gelu(z, approximate=False),
    "gelu_tanh": lambda z: ops.gelu(z, approximate=True),
}


def activate(plan: Plan, z: Any) -> Any:
    """What follows the normalization."""
    f = plan.activation
    if f is None:
        return z
    return ops.leaky_relu(z, negative_slope=f.parameter) if f.name == "leaky_relu" else FUNCTIONS[f.name](z)


def along(plan: Plan, vector: Any, rank: int) -> Any:
    """A vector of channels in a shape that is broadcast to those of tensors."""
    return ops.reshape(vector, [-1 if axis == plan.axis else 1 for axis in range(rank)])


def center(backend: Any, plan: Plan, x: Any, mask: Any) -> tuple[Any, Any, Any]:
    """X without its mean; the mean and the variance, in shapes that are broadcast. No values have a mean and a variance of 0."""
    axes = tuple(axis for axis in range(len(x.shape)) if axis != plan.axis)
    mean = backend.mean_of(x, axes, mask)
    centered = x - mean
    low = backend.mean_of(centered, axes, mask)
    centered = centered - low
    return centered, mean + low, backend.mean_of(centered * centered, axes, mask)


def scaled(plan: Plan, centered: Any, var: Any, gamma: Any, beta: Any) -> Any:
    """The output, from centered data."""
    return activate(plan, centered * (gamma * (var + plan.eps) ** -0.5) + beta)


def train(backend: Any, plan: Plan, x: Any, gamma: Any, beta: Any) -> Any:
    """Output of training."""
    centered, _, var = center(backend, plan, x, None)
    return scaled(plan, centered, var, along(plan, gamma, len(x.shape)), along(plan, beta, len(x.shape)))
