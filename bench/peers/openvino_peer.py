"""OpenVINO: a model of one batch norm, on given memory. It knows inference alone, and channels on the second axis.

For NHWC it gets what it makes of a batch norm itself: a product and a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import openvino
import openvino.opset13 as ops

import fastbn
from bench.data import Array, Inputs


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def version() -> str:
    return openvino.__version__.partition("-")[0]


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Array] | None:
    if inputs.x.dtype != np.float32 or out is None:
        return None
    x = ops.parameter(list(inputs.x.shape), np.float32)
    weight, bias, mean, var = inputs[2:6]
    if inputs.layout == "NCHW":
        node = ops.batch_norm_inference(x, weight, bias, mean, var, inputs.eps)
    else:
        scale = weight / np.sqrt(var + np.float32(inputs.eps))
        node = ops.add(ops.multiply(x, ops.constant(scale)), ops.constant(bias - mean * scale))
    model = openvino.Model([node], [x], "one")
    # Else it computes in 16 bits where the processor has instructions for them.
    config = {"INFERENCE_NUM_THREADS": fastbn.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = _core().compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(openvino.Tensor(inputs.x, shared_memory=True))
    request.set_output_tensor(openvino.Tensor(out, shared_memory=True))

    def call() -> Array:
        request.infer()
        return out

    return call
