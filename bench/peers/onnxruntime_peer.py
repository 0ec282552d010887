"""ONNX Runtime: a model of one BatchNormalization node, on bound memory. It knows NCHW and inference alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import onnxruntime

import fastbn
from bench.data import Array, Inputs


def _model(inputs: Inputs) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    kind = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}[inputs.x.dtype.name]
    names = ["scale", "bias", "mean", "var"]
    tensors = [numpy_helper.from_array(v, name) for name, v in zip(names, inputs[2:6], strict=True)]
    node = helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=inputs.eps)
    x, y = (helper.make_tensor_value_info(name, kind, inputs.x.shape) for name in "xy")
    graph = helper.make_graph([node], "one", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9).SerializeToString()


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Array] | None:
    if inputs.layout != "NCHW" or inputs.x.dtype.name not in ("float32", "float64") or out is None or find_spec("onnx") is None:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = fastbn.get_num_threads(), 3
    session = onnxruntime.InferenceSession(_model(inputs), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    dtype = np.dtype(inputs.x.dtype).type
    binding.bind_input("x", "cpu", 0, dtype, inputs.x.shape, inputs.x.ctypes.data)
    binding.bind_output("y", "cpu", 0, dtype, out.shape, out.ctypes.data)

    def call() -> Array:
        session.run_with_iobinding(binding)
        return out

    return call
