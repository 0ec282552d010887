"""The operation on Keras' tensorflow backend: a NumPy function in the graph, with a derivative of its own.

Only training comes here. In inference the graph keeps TensorFlow's own operations alone, so that it can be exported.
"""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util
from tensorflow.python.ops import control_flow_util

from fastbn.keras import arrays, composed
from fastbn.keras.arrays import VECTORS, Plan


def mean_of(x: Any, axes: tuple[int, ...], mask: Any) -> Any:
    """Mean over axes, which stay with a length of 1, of the positions in a mask; 0 of none."""
    if mask is None:
        return tf.reduce_mean(x, axes, keepdims=True)
    count = tf.reduce_sum(tf.cast(mask, x.dtype), axes, keepdims=True)
    return tf.reduce_sum(tf.where(mask, x, tf.zeros([], x.dtype)), axes, keepdims=True) / tf.maximum(count, 1)


def _call(function: Any, plan: Plan, given: tuple[Any, ...], results: tuple[Any, ...]) -> list[Any]:
    """Call a function of arrays; the results are like tensors, or of a shape and a dtype."""
    found = tf.numpy_function(lambda *a: function(plan, *a), given, [r.dtype for r in results], stateful=False)
    for tensor, result in zip(found, results, strict=True):
        tensor.set_shape(result.shape)
    return list(found)


def _forward(plan: Plan, x: Any, gamma: Any, beta: Any) -> Any:
    vectors = tf.TensorSpec((VECTORS, gamma.shape[0]), gamma.dtype)

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        y, saved = _call(arrays.forward, plan, (x, gamma, beta), (x, vectors))

        def derive(dy: Any, _: Any) -> Any:
            return _gradients(plan, x, gamma, beta, saved, dy)

        return (y, saved), derive

    return tf.custom_gradient(forward)(x, gamma, beta)


def _gradients(plan: Plan, x: Any, gamma: Any, beta: Any, saved: Any, dy: Any) -> Any:
    def gradients(x: Any, gamma: Any, beta: Any, dy: Any) -> Any:
        found = _call(arrays.backward, plan, (x, saved, dy), (x, gamma, beta))

        def derive(*upstream: Any) -> Any:
            given = x, gamma, beta, dy
            with tf.GradientTape() as outer:
                outer.watch(given)
                with tf.GradientTape() as inner:
                    inner.watch(given[:3])
                    y = composed.train(sys.modules[__name__], plan, *given[:3])
                again = inner.gradient(y, given[:3], dy)
            return outer.gradient(again, given, upstream)

        return tuple(found), derive

    return tf.custom_gradient(gradients)(x, gamma, beta, dy)


def replicas() -> int:
    """How many share a batch in a strategy of tf.distribute."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def _on_cpu(x: Any) -> bool:
    """Whether a tensor is there, or will be where the graph runs."""
    return "CPU" in x.device.upper() if hasattr(x, "numpy") else not tf.config.get_visible_devices("GPU")


def _compiled_by_xla() -> bool:
    """Whether a graph is being traced that XLA will compile, which has no functions of NumPy."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def train(plan: Plan, x: Any, gamma: Any, beta: Any) -> tuple[Any, Any, Any] | None:
    """Output, mean and variance; None where the kernels do not take it."""
    if not isinstance(x, tf.Tensor) or x.shape.rank is None or x.shape.rank < 2 or 0 in x.shape:
        return None
    if not _on_cpu(x) or _compiled_by_xla() or forwardprop_util.pack_tangents([x, gamma, beta]).tangents:  # forward mode
        return None
    y, vectors = _forward(plan, x, gamma, beta)
    return y, vectors[0], vectors[5]


def infer(plan: Plan, x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> None:
    """Nothing: it is composed."""
