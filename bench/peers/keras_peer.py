"""Keras' layer, called directly: the backend is that of KERAS_BACKEND, else PyTorch, JAX or TensorFlow, whichever is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.peers import as_array, choose_keras_backend

choose_keras_backend()

import keras
import numpy as np

from bench.data import LAYOUTS, Array, Inputs

_BACKEND = keras.backend.backend()


def version() -> str:
    return f"{keras.__version__} ({_BACKEND})"


def array(result: Any, inputs: Inputs) -> Array:
    # Keras' own conversion of a torch tensor warns with NumPy 2.
    return as_array(result.detach().double().numpy() if hasattr(result, "detach") else keras.ops.convert_to_numpy(result), inputs)


def _call(inputs: Inputs, training: bool) -> Callable[[], Any] | None:
    if inputs.x.dtype != np.float32:
        return None
    layer = keras.layers.BatchNormalization(axis=LAYOUTS[inputs.layout], epsilon=inputs.eps, momentum=0.9)
    layer.build(inputs.x.shape)
    layer.set_weights(list(inputs[2:6]))
    x = keras.ops.convert_to_tensor(inputs.x)
    if _BACKEND == "torch":
        import torch

        import fastbn

        torch.set_num_threads(fastbn.get_num_threads())

        def call() -> Any:
            with torch.no_grad():
                return layer(x, training=training)

        return call
    if _BACKEND == "jax":
        import jax

        return lambda: jax.block_until_ready(layer(x, training=training))
    return lambda: layer(x, training=training)


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Any] | None:
    return _call(inputs, training=False)


def forward(inputs: Inputs, out: Array | None) -> Callable[[], Any] | None:
    return _call(inputs, training=True)
