"""ONNX's own tests of BatchNormalization, every one in the onnx wheel, through the public functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from truth import problem

import fastbn
from fastbn.layout import Array

onnx = pytest.importorskip("onnx")
node_cases = pytest.importorskip("onnx.backend.test.case.node")
pytest.importorskip("onnx.backend.test.case.node.batch_normalization")  # its import fills the list
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator

pytestmark = pytest.mark.usefixtures("kernel")


def run(node: Any, opset: int, inputs: list[Array]) -> list[Array]:
    """Run a BatchNormalization node.

    What differs between the opsets, and from PyTorch:

    - ONNX's momentum is the weight of the *old* value, PyTorch's of the new one;
    - opset 14 and later: the attribute `training_mode` asks for training, and the running variance is updated with
      the population variance; PyTorch updates it with the unbiased one;
    - opsets 7 and 9: training is asked for by naming more than one output;
    - opset 6: the attribute `is_test` asks for inference.
    """
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    eps, momentum = attributes.get("epsilon", 1e-5), attributes.get("momentum", 0.9)
    x, weight, bias, mean, var = inputs
    if opset >= 14:
        training = bool(attributes.get("training_mode", 0))
    elif opset >= 7:
        training = len(node.output) > 1
    else:
        training = not attributes.get("is_test", 0)
    if not training:
        return [fastbn.batch_norm(x, mean, var, weight, bias, eps=eps)]
    mean = mean.copy()
    y, saved = fastbn.batch_norm_forward(x, weight, bias, mean, None, momentum=1.0 - momentum, eps=eps)
    batch = fastbn.batch_norm_stats(x)
    var = momentum * var + (1.0 - momentum) * batch.var
    return [y, mean, var.astype(mean.dtype)] if opset >= 14 else [y, mean, var.astype(mean.dtype), saved.mean, batch.var]


NODE_CASES = [case for case in node_cases._NodeTestCases if case.model.graph.node[0].op_type == "BatchNormalization"]


def test_all_node_tests_are_here() -> None:
    assert {case.name for case in NODE_CASES} >= {
        "test_batchnorm_epsilon",
        "test_batchnorm_epsilon_training_mode",
        "test_batchnorm_example",
        "test_batchnorm_example_training_mode",
    }


@pytest.mark.parametrize("case", NODE_CASES, ids=lambda case: case.name)
def test_node(case: Any) -> None:
    opset = case.model.opset_import[0].version
    for inputs, outputs in case.data_sets:
        for ours, theirs in zip(run(case.model.graph.node[0], opset, inputs), outputs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            assert ours.dtype == theirs.dtype


# Models of one BatchNormalization node that PyTorch wrote at opset 6, with data.
CONVERTED = sorted((Path(onnx.__file__).parent / "backend/test/data/pytorch-converted").glob("test_BatchNorm*"))


@pytest.mark.parametrize("folder", CONVERTED, ids=lambda folder: folder.name)
def test_converted_from_pytorch(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    (node,) = model.graph.node
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    x, y = (onnx.numpy_helper.to_array(onnx.load_tensor(folder / f"test_data_set_0/{name}_0.pb")) for name in ("input", "output"))
    (ours,) = run(node, model.opset_import[0].version, [x, *(values[name] for name in node.input[1:])])
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("opset", [14, 15])
def test_as_onnx_own_evaluator(opset: int, training: bool) -> None:
    x, _, weight, bias, mean, var, _ = problem((3, 4, 5, 6))
    names = ["x", "scale", "B", "input_mean", "input_var"]
    outputs = ["y", "mean", "var"] if training else ["y"]
    attributes = {"epsilon": 1e-3, "momentum": 0.8} | ({"training_mode": 1} if training else {})
    node = onnx.helper.make_node("BatchNormalization", names, outputs, **attributes)
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info(name, kind, None) for name in names],
        [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    inputs = [x, weight, bias, mean, var]
    theirs = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))
    for a, b in zip(run(node, opset, inputs), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [7, 9])
def test_older_opsets_train_where_they_have_more_outputs(opset: int) -> None:
    x, _, weight, bias, mean, var, _ = problem((3, 4, 5, 6))
    names = ["x", "scale", "B", "input_mean", "input_var"]
    inference = onnx.helper.make_node("BatchNormalization", names, ["y"])
    training = onnx.helper.make_node("BatchNormalization", names, ["y", "mean", "var", "saved_mean", "saved_var"])
    newest = onnx.helper.make_node("BatchNormalization", names, ["y", "mean", "var"], training_mode=1)
    inputs = [x, weight, bias, mean, var]
    np.testing.assert_array_equal(run(inference, opset, inputs)[0], run(inference, 15, inputs)[0])
    results = run(training, opset, inputs)
    for old, new in zip(results, run(newest, 15, inputs), strict=False):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_allclose(results[3], x.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(results[4], x.var((0, 2, 3)), rtol=1e-5)
