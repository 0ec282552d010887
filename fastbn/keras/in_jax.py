"""The operation on Keras' jax backend: a callback from the compiled program, with a derivative of its own.

Only training comes here. In inference XLA makes one pass of it, together with what stands beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from fastbn.keras import arrays, composed, xla
from fastbn.keras.arrays import VECTORS, Plan
from fastbn.layout import Array


def mean_of(x: Any, axes: tuple[int, ...], mask: Any) -> Any:
    """Mean over axes, which stay with a length of 1, of the positions in a mask; 0 of none."""
    if mask is None:
        return x.mean(axes, keepdims=True)
    return jnp.where(mask, x, 0).sum(axes, keepdims=True) / jnp.maximum(mask.sum(axes, keepdims=True), 1)


def _callback(function: Callable[..., tuple[Any, ...]], plan: Plan, results: Any, *given: Any) -> Any:
    """Call `arrays.forward` or `backward` from the program: by XLA's own interface where it works, else as JAX does it."""
    if xla.works():
        name = f"fastbn_{function.__name__}_{plan.axis}_{plan.eps!r}_{plan.after}"

        def filled(arguments: list[Array], found: list[Array]) -> None:
            for target, result in zip(found, function(plan, *arguments, out=found[0]), strict=True):
                if target is not result:
                    target[...] = result

        return xla.call(name, filled, results, *given)

    def called(*tensors: Any) -> tuple[Any, ...]:
        return function(plan, *map(np.asarray, tensors))

    return jax.pure_callback(called, results, *given, vmap_method="sequential")


def _like(a: Any) -> Any:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _called_forward(plan: Plan, x: Any, gamma: Any, beta: Any) -> Any:
    vectors = jax.ShapeDtypeStruct((VECTORS, gamma.shape[0]), gamma.dtype)
    return _callback(arrays.forward, plan, (_like(x), vectors), x, gamma, beta)


def _keep(plan: Plan, x: Any, gamma: Any, beta: Any) -> Any:
    y, vectors = _forward(plan, x, gamma, beta)
    return (y, vectors), (x, gamma, beta, vectors)


def _derive(plan: Plan, kept: Any, cotangents: Any) -> Any:
    return _gradients(plan, *kept, cotangents[0])


_forward = jax.custom_vjp(_called_forward, nondiff_argnums=(0,))
_forward.defvjp(_keep, _derive)


def _called_backward(plan: Plan, x: Any, gamma: Any, beta: Any, vectors: Any, dy: Any) -> Any:
    return _callback(arrays.backward, plan, (_like(x), _like(gamma), _like(beta)), x, vectors, dy)


def _keep_all(plan: Plan, *given: Any) -> Any:
    return _gradients(plan, *given), given


def _derive_again(plan: Plan, given: Any, cotangents: Any) -> Any:
    x, gamma, beta, vectors, dy = given

    def again(x: Any, gamma: Any, beta: Any, dy: Any) -> Any:
        return jax.vjp(partial(composed.train, sys.modules[__name__], plan), x, gamma, beta)[1](dy)

    *found, ddy = jax.vjp(again, x, gamma, beta, dy)[1](cotangents)
    return *found, jnp.zeros_like(vectors), ddy


_gradients = jax.custom_vjp(_called_backward, nondiff_argnums=(0,))
_gradients.defvjp(_keep_all, _derive_again)


def train(plan: Plan, x: Any, gamma: Any, beta: Any) -> tuple[Any, Any, Any] | None:
    """Output, mean and variance; None where the kernels do not take it."""
    if x.ndim < 2 or x.size == 0 or jax.default_backend() != "cpu" or keras.distribution.distribution() is not None:
        return None
    y, vectors = _forward(plan, x, gamma, beta)
    vectors = jax.lax.stop_gradient(vectors)
    return y, vectors[0], vectors[5]


def infer(plan: Plan, x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> None:
    """Nothing: it is composed."""
