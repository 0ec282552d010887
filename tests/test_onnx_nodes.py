"""ONNX's own tests of BatchNormalization and its siblings, every one in the onnx wheel, through `fastbn.onnx.ops`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from truth import problem

from fastbn.layout import Array

onnx = pytest.importorskip("onnx")
node_cases = pytest.importorskip("onnx.backend.test.case.node")
for module in ("batch_normalization", "groupnormalization", "instance_normalization", "layernormalization", "meanvariancenormalization"):
    pytest.importorskip(f"onnx.backend.test.case.node.{module}")  # its import fills the list
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator

from onnx_models import array, net, norm, run  # noqa: E402

import fastbn.onnx  # noqa: E402

BN = "BatchNormalization"
OURS = {operator.__name__ for operator in fastbn.onnx.ops}
# Where an operator is written out in others, there is nothing of ours to run.
NODE_CASES = [case for case in node_cases._NodeTestCases if {node.op_type for node in case.model.graph.node} & OURS]


def evaluate(model: Any, *inputs: Array, ops: Any = fastbn.onnx.ops) -> list[Array]:
    """What ONNX's own evaluator computes, with our operators."""
    names = [value.name for value in model.graph.input]
    results: list[Array] = ReferenceEvaluator(model, new_ops=ops).run(None, dict(zip(names, inputs, strict=False)))
    return results


def test_all_node_tests_are_here() -> None:
    names = [case.name for case in NODE_CASES]
    assert len(names) == len(set(names)) >= 28  # so many has the wheel of onnx 1.23
    assert {name.partition("_")[2].partition("_")[0] for name in names} == {"batchnorm", "group", "instancenorm", "layer", "mvn"}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", NODE_CASES, ids=lambda case: case.name)
def test_node(case: Any) -> None:
    for inputs, outputs in case.data_sets:
        for ours, theirs in zip(evaluate(case.model, *inputs), outputs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape


# Models of one BatchNormalization node that PyTorch wrote at opset 6, with data.
CONVERTED = sorted((Path(onnx.__file__).parent / "backend/test/data/pytorch-converted").glob("test_BatchNorm*"))


@pytest.mark.parametrize("folder", CONVERTED, ids=lambda folder: folder.name)
def test_converted_from_pytorch(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    x, y = (onnx.numpy_helper.to_array(onnx.load_tensor(folder / f"test_data_set_0/{name}_0.pb")) for name in ("input", "output"))
    held = {tensor.name for tensor in model.graph.initializer}
    (name,) = (value.name for value in model.graph.input if value.name not in held)
    (ours,) = ReferenceEvaluator(model, new_ops=fastbn.onnx.ops).run(None, {name: x})
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-6)


def training(opset: int, channels: int, dtype: str = "float32", momentum: float = 0.8) -> Any:
    """A model of one node that trains, with all that it returns."""
    names = ["y", "mean:1", "var:1"] + ([] if opset >= 14 else ["saved_mean:1", "saved_var:1"])
    outputs = ", ".join(name.partition(":")[0] for name in names)
    mode = "training_mode = 1, " if opset >= 14 else ""
    nodes = f"{outputs} = {BN} <{mode}epsilon = 0.001, momentum = {momentum}> (x, s, b, m, v)"
    return net(nodes, ("N", channels, "H", "W"), norm(channels, dtype), opset=opset, dtype=dtype, outputs=names)


@pytest.mark.parametrize("opset", [14, 15])
def test_as_onnx_own_evaluator_where_that_is_right(opset: int) -> None:
    x = problem((3, 4, 5, 6)).x
    inference = net(f"y = {BN} <epsilon = 0.001> (x, s, b, m, v)", x.shape, norm(4), opset=opset)
    for model in (training(opset, 4), inference):
        for ours, theirs in zip(evaluate(model, x), evaluate(model, x, ops=None), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [7, 8, 9, 12, 13, 14, 15])
def test_as_onnx_runtime_in_inference(opset: int) -> None:
    pytest.importorskip("onnxruntime")
    x = problem((3, 4, 5, 6)).x
    model = net(f"y = {BN} <epsilon = 0.001> (x, s, b, m, v)", x.shape, norm(4), opset=opset)
    (ours,), (theirs,) = evaluate(model, x), run(model, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_as_onnx_runtime_where_each_position_has_parameters() -> None:
    pytest.importorskip("onnxruntime")
    x = problem((3, 4, 5, 6)).x
    parameters = {name: value.reshape(4, 5, 6) for name, value in norm(120).items()}
    model = net(f"y = {BN} <spatial = 0> (x, s, b, m, v)", x.shape, parameters, opset=7)
    np.testing.assert_allclose(evaluate(model, x)[0], run(model, x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15])
@pytest.mark.parametrize("momentum", [0.9, 0.1, 0.0, 1.0])
def test_running_statistics_follow_the_formula(opset: int, momentum: float) -> None:
    x = problem((6, 4, 5, 3), np.float64, mean=3.0).x
    held = norm(4, np.float64)
    given = float(np.float32(momentum))  # the attribute is a float32
    y, mean, var, *saved = evaluate(training(opset, 4, "float64", momentum), x)
    batch = x.mean((0, 2, 3)), x.var((0, 2, 3))
    np.testing.assert_allclose(mean, held["m"] * given + batch[0] * (1 - given), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(var, held["v"] * given + batch[1] * (1 - given), rtol=1e-13)
    for ours, theirs in zip(saved, batch, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    assert len(saved) == (0 if opset >= 14 else 2)
    invstd = 1 / np.sqrt(batch[1] + float(np.float32(0.001)))
    expected = (x - batch[0][:, None, None]) * (invstd * held["s"])[:, None, None] + held["b"][:, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_what_a_node_names_is_what_it_returns() -> None:
    x = problem((3, 4, 5, 6)).x
    nodes = f"y = {BN} <training_mode = 1> (x, s, b, m, v)"
    (y,) = evaluate(net(nodes, x.shape, norm(4)), x)
    three = evaluate(net(nodes.replace("y =", "y, n, o ="), x.shape, norm(4), outputs=("y", "n:1", "o:1")), x)
    np.testing.assert_array_equal(y, three[0])
    three_named = net(nodes.replace("y =", "y, , o ="), x.shape, norm(4), outputs=("y", "o:1"))
    np.testing.assert_array_equal(evaluate(three_named, x)[1], three[2])
    held = norm(4)
    evaluate(net(nodes, x.shape, held), x)
    np.testing.assert_array_equal(held["m"], norm(4)["m"])  # nothing that a caller holds was moved


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("stored", "parameters"), [("float16", "float16"), ("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64")]
)
def test_types_may_differ_from_opset_15_on(kernel: Any, stored: str, parameters: str, train: bool) -> None:
    if kernel.declines(stored):
        return
    x = problem((6, 4, 5, 3)).x.astype(np.dtype(stored) if stored != "bfloat16" else pytest.importorskip("ml_dtypes").bfloat16)
    held = norm(4, parameters)
    text = "y, n, o" if train else "y"
    model = net(f"{text} = {BN} <training_mode = {int(train)}> (x, s, b, m, v)", x.shape, held, dtype=stored)
    (y, *_) = ReferenceEvaluator(model, new_ops=fastbn.onnx.ops).run(None, {"x": x})
    assert y.dtype == x.dtype
    wide = x.astype(np.float64)
    mean, var = (wide.mean((0, 2, 3)), wide.var((0, 2, 3))) if train else (held["m"], held["v"])
    columns = [np.asarray(v, np.float64)[:, None, None] for v in (mean, var, held["s"], held["b"])]
    expected = (wide - columns[0]) / np.sqrt(columns[1] + 1e-5) * columns[2] + columns[3]
    bound = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[stored]
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=bound, atol=bound)


def test_rows_without_channels_have_one() -> None:
    x = np.array([1.0, 3.0], np.float32)
    model = net(f"y = {BN} <epsilon = 0.0> (x, s, b, m, v)", (2,), {name: np.ones(1, np.float32) for name in "sbmv"})
    np.testing.assert_array_equal(evaluate(model, x)[0], [1, 3])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("nodes", "over", "parameters"),
    [
        ("y = InstanceNormalization (x, s, b)", (2, 3), (1, 6, 1, 1)),
        ("y = GroupNormalization <num_groups = 6> (x, s, b)", (2, 3), (1, 6, 1, 1)),
        ("y = LayerNormalization <axis = -1> (x, t, t)", (3,), (1, 1, 1, 9)),
        ("y = MeanVarianceNormalization (x)", (0, 2, 3), None),
        ("y = MeanVarianceNormalization <axes = [3, 1]> (x)", (1, 3), None),
        ("y = MeanVarianceNormalization <axes = [-1]> (x)", (3,), None),
        ("y = MeanVarianceNormalization <axes = [0, 1, 2, 3]> (x)", (0, 1, 2, 3), None),
    ],
)
def test_siblings_are_exact_far_from_zero(nodes: str, over: tuple[int, ...], parameters: tuple[int, ...] | None) -> None:
    x = array(3, 6, 4, 9) + np.float32(1e4)
    constants = {"s": array(6), "b": array(6), "t": array(9)}
    (y,) = evaluate(net(nodes, x.shape, constants, opset=21), x)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(over, keepdims=True)) / np.sqrt(wide.var(over, keepdims=True) + (0 if parameters is None else 1e-5))
    if parameters is not None:
        scale, bias = (constants["t"],) * 2 if "Layer" in nodes else (constants["s"], constants["b"])
        expected = expected * scale.reshape(parameters) + bias.reshape(parameters)
    np.testing.assert_allclose(y, expected, rtol=5e-6, atol=5e-6)


def test_groups_have_one_scale_each_before_opset_21() -> None:
    x = array(3, 6, 4, 9)
    models = [
        net(f"y = {BN} (x, s, b, m, v)", x.shape, {**norm(6), "p": np.float32(p), "q": np.float32(q)}, opset=opset)
        for opset, p, q in ((18, [1, 2], [3, 4]), (21, [1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]))
    ]
    for model in models:  # the checker takes the older one for deprecated, and it was written all the same
        model.graph.node[0].CopyFrom(onnx.helper.make_node("GroupNormalization", ["x", "p", "q"], ["y"], num_groups=2))
    old, new = (evaluate(model, x)[0] for model in models)
    np.testing.assert_array_equal(old, new)


def test_operators_run_in_branches_and_functions() -> None:
    function = f"""<domain: "local", opset_import: ["": 17]> block <eps> (a, s, b, m, v) => (r) {{
        r = {BN} <epsilon: float = @eps> (a, s, b, m, v) }}"""
    nodes = """t = Constant <value = bool {1}> () u = If (t) <then_branch = p () => (float[A, B] e) { e = BN (x, s, b, m, v) },
        else_branch = q () => (float[C, D] f) { f = Relu (x) }> y = local.block <eps = 0.5> (u, s, b, m, v)"""
    x, held = array(5, 3), norm(3)
    model = net(nodes.replace("BN", BN), x.shape, held, functions=function)
    expected = x.astype(np.float64)
    for epsilon in (1e-5, 0.5):
        expected = (expected - held["m"]) / np.sqrt(held["v"] + epsilon) * held["s"] + held["b"]
    np.testing.assert_allclose(evaluate(model, x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 6), (2, 3, 4, 5), (0, 3, 4), (2, 0)])
@pytest.mark.parametrize("axes", ["", "<axes = [1, -1]>", "<axes = [0, 2, 0]>"])
def test_axes_that_x_lacks_are_left_out(shape: tuple[int, ...], axes: str) -> None:
    """As ONNX Runtime does it; by default they are those of images."""
    pytest.importorskip("onnxruntime")
    model, x = net(f"y = MeanVarianceNormalization {axes} (x)", shape, {}, opset=13), array(*shape)
    np.testing.assert_allclose(evaluate(model, x)[0], run(model, x)[0], rtol=1e-5, atol=1e-5)
    model = net("y = MeanVarianceNormalization <axes = [7]> (x)", shape, {}, opset=13)
    with pytest.raises(ValueError, match=r"axes must name one of x, of shape \(.*\), got \[7\]"):
        evaluate(model, x)


@pytest.mark.parametrize("opset", [7, 8])
def test_an_empty_batch_has_parameters_for_each_position(opset: int) -> None:
    held = {name: array(3, 4) ** 2 for name in "sbmv"}
    model = net(f"y = {BN} <spatial = 0> (x, s, b, m, v)", (0, 3, 4), held, opset=opset)
    assert evaluate(model, array(0, 3, 4))[0].shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("nodes", "shape", "message"),
    [
        ("y = LayerNormalization <axis = 5> (x, s)", (2, 3, 4), r"axis must be one of x, of shape \(2, 3, 4\), got 5"),
        ("y = LayerNormalization <axis = -4> (x, s)", (2, 3, 4), r"axis must be one of x, of shape \(2, 3, 4\), got -4"),
        ("y = GroupNormalization <num_groups = 3> (x, s, s)", (2, 4, 3), "num_groups must divide the 4 channels of x, got 3"),
        ("y = GroupNormalization <num_groups = 0> (x, s, s)", (2, 4, 3), "num_groups must divide the 4 channels of x, got 0"),
        ("y = GroupNormalization <num_groups = 1> (x, s, s)", (4,), r"x must have an axis of images and one of channels, got shape \(4,\)"),
        ("y = InstanceNormalization (x, s, s)", (4,), r"x must have an axis of images and one of channels, got shape \(4,\)"),
    ],
)
def test_what_no_node_can_mean_is_an_error_that_says_so(nodes: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(net(nodes, shape, {"s": array(4)}, opset=21), array(*shape))
