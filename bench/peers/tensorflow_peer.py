"""TensorFlow: the operators behind its batch norm. It transposes NCHW to and fro on a CPU, as it does in a model."""

from __future__ import annotations

import os
from collections.abc import Callable

from bench.peers import choose_keras_backend

choose_keras_backend()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

import fastbn
from bench.data import Array, Inputs

_ops = tf.raw_ops


def version() -> str:
    return str(tf.__version__)


def _set_threads(n: int) -> bool:
    """Whether TensorFlow runs on so many; it can be told once, before its first call."""
    try:
        tf.config.threading.set_intra_op_parallelism_threads(n)
    except RuntimeError:
        return int(tf.config.threading.get_intra_op_parallelism_threads()) == n
    return True


def _call(inputs: Inputs, training: bool) -> Callable[[], tf.Tensor] | None:
    if inputs.x.dtype.name == "float64" or not _set_threads(fastbn.get_num_threads()):
        return None
    x, weight, bias, mean, var = (tf.constant(a) for a in (inputs.x, *inputs[2:6]))
    nothing = tf.constant([], tf.float32)
    mean, var = (nothing, nothing) if training else (mean, var)

    def call() -> tf.Tensor:
        return _ops.FusedBatchNormV3(
            x=x, scale=weight, offset=bias, mean=mean, variance=var, epsilon=inputs.eps, data_format=inputs.layout, is_training=training
        ).y

    return _if_it_can(call)


def _if_it_can(call: Callable[[], tf.Tensor]) -> Callable[[], tf.Tensor] | None:
    try:
        call()
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.NotFoundError):
        return None  # a dtype or an order of axes without a kernel
    return call


def inference(inputs: Inputs, out: Array | None) -> Callable[[], tf.Tensor] | None:
    return _call(inputs, training=False)


def forward(inputs: Inputs, out: Array | None) -> Callable[[], tf.Tensor] | None:
    return _call(inputs, training=True)


def backward(inputs: Inputs, out: Array | None) -> Callable[[], tf.Tensor] | None:
    if inputs.x.dtype.name == "float64" or not _set_threads(fastbn.get_num_threads()):
        return None
    x, dy, weight, bias = (tf.constant(a) for a in inputs[:4])
    nothing = tf.constant([], tf.float32)
    form = {"epsilon": inputs.eps, "data_format": inputs.layout, "is_training": True}
    try:
        saved = _ops.FusedBatchNormV3(x=x, scale=weight, offset=bias, mean=nothing, variance=nothing, **form)
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.NotFoundError):
        return None
    spaces = {f"reserve_space_{i}": getattr(saved, f"reserve_space_{i}") for i in (1, 2, 3)}
    return _if_it_can(lambda: _ops.FusedBatchNormGradV3(y_backprop=dy, x=x, scale=weight, **spaces, **form).x_backprop)
