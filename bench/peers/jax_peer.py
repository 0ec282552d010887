"""JAX: the formulas, compiled by jit for these shapes. XLA takes all cores, so other numbers of threads have no row."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

import fastbn
from bench.data import LAYOUTS, Array, Inputs

jax.config.update("jax_platforms", "cpu")


def _column(v: jax.Array, axis: int) -> jax.Array:
    return v.reshape(tuple(-1 if i == axis else 1 for i in range(4)))


def _affine(x: jax.Array, weight: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array, eps: float, axis: int) -> jax.Array:
    scale = weight * jax.lax.rsqrt(var + eps)
    return ((x.astype(scale.dtype) - _column(mean, axis)) * _column(scale, axis) + _column(bias, axis)).astype(x.dtype)


def _statistics(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    axes = tuple(i for i in range(4) if i != axis)
    wide = x if x.dtype.itemsize > 2 else x.astype(jnp.float32)
    return wide.mean(axes), wide.var(axes)


@partial(jax.jit, static_argnums=(5, 6))
def _inference(x, weight, bias, mean, var, eps, axis):
    return _affine(x, weight, bias, mean, var, eps, axis)


@partial(jax.jit, static_argnums=(5, 6))
def _forward(x, weight, bias, running_mean, running_var, eps, axis):
    mean, var = _statistics(x, axis)
    count = x.size // mean.size
    updated = 0.9 * running_mean + 0.1 * mean, 0.9 * running_var + 0.1 * var * (count / (count - 1))
    return _affine(x, weight, bias, mean, var, eps, axis), updated


@partial(jax.jit, static_argnums=(4, 5))
def _backward(dy, x, weight, saved, eps, axis):
    mean, var = saved
    axes, count = tuple(i for i in range(4) if i != axis), x.size // mean.size
    invstd = jax.lax.rsqrt(var + eps)
    x_hat = (x.astype(mean.dtype) - _column(mean, axis)) * _column(invstd, axis)
    wide = dy.astype(mean.dtype)
    dbias, dweight = wide.sum(axes), (wide * x_hat).sum(axes)
    dx = (wide - _column(dbias / count, axis) - x_hat * _column(dweight / count, axis)) * _column(weight * invstd, axis)
    return dx.astype(x.dtype), dweight, dbias


def _all_cores() -> bool:
    return fastbn.get_num_threads() == len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def _given(inputs: Inputs) -> list[jax.Array] | None:
    if inputs.x.dtype.name == "float64" or not _all_cores():
        return None
    return [jnp.asarray(a) for a in inputs[:6]]


def inference(inputs: Inputs, out: Array | None) -> Callable[[], jax.Array] | None:
    given, axis = _given(inputs), LAYOUTS[inputs.layout]
    if given is None:
        return None
    x, _, *vectors = given
    return lambda: _inference(x, *vectors, inputs.eps, axis).block_until_ready()


def forward(inputs: Inputs, out: Array | None) -> Callable[[], jax.Array] | None:
    given, axis = _given(inputs), LAYOUTS[inputs.layout]
    if given is None:
        return None
    x, _, *vectors = given
    return lambda: jax.block_until_ready(_forward(x, *vectors, inputs.eps, axis))[0]


def backward(inputs: Inputs, out: Array | None) -> Callable[[], jax.Array] | None:
    given, axis = _given(inputs), LAYOUTS[inputs.layout]
    if given is None:
        return None
    x, dy, weight, *_ = given
    saved = jax.jit(_statistics, static_argnums=1)(x, axis)
    return lambda: jax.block_until_ready(_backward(dy, x, weight, saved, inputs.eps, axis))[0]
