"""Small ONNX models, written as text, with their constants as arrays; and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, numpy_helper

from fastbn.layout import Array

KINDS = {"float32": "float", "float64": "double", "float16": "float16", "bfloat16": "bfloat16"}


def net(
    nodes: str,
    shape: Sequence[int | str],
    constants: Mapping[str, Array],
    *,
    opset: int = 17,
    ir: int = 8,
    outputs: Sequence[str] = ("y",),
    dtype: str = "float32",
    overridable: Sequence[str] = (),
    functions: str = "",
) -> ModelProto:
    """A model with one input x, some nodes in ONNX' text form, and constants: initializers, of IR 3 also inputs.

    An output has as many axes as x, or "name:2" says how many.
    """
    kind = KINDS[dtype]
    imports = f'"": {opset}' + (', "local": 1' if functions else "")
    head = f"<ir_version: {ir}, opset_import: [{imports}]>"
    returned = ", ".join(_returned(kind, name, len(shape)) for name in outputs)
    text = f"{head} net ({kind}[{', '.join(map(str, shape))}] x) => ({returned}) {{ {nodes} }} {functions}"
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        tensor = numpy_helper.from_array(np.asarray(value), name)
        model.graph.initializer.append(tensor)
        if ir < 4 or name in overridable:
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(model)
    return model


def _returned(kind: str, output: str, rank: int) -> str:
    name, _, axes = output.partition(":")
    return f"{kind}[{', '.join(f'{name}_{axis}' for axis in range(int(axes or rank)))}] {name}"


def norm(channels: int, dtype: Any = np.float32, seed: int = 0, prefix: str = "") -> dict[str, Array]:
    """The parameters s, b, m, v of a batch norm."""
    rng = np.random.default_rng(seed)
    s, b, m = rng.standard_normal((3, channels))
    v = rng.uniform(0.5, 2, channels)
    return {f"{prefix}{name}": value.astype(dtype) for name, value in (("s", s), ("b", b), ("m", m), ("v", v))}


def array(*shape: int, seed: int = 1, dtype: Any = np.float32) -> Array:
    """Numbers by chance."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def run(model: ModelProto, x: Array, name: str = "x") -> list[Array]:
    """What ONNX Runtime computes, node by node as the model says."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, {name: x})
    return results


def operators(model: ModelProto) -> list[str]:
    """The operators of a model's nodes."""
    return [node.op_type for node in model.graph.node]
