"""Layers from those of other libraries: each computes what the other does, and its statistics go where the other's go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn.layout import Array

RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 2.0, (6, 4, 5, 3))
GAMMA, BETA, MEAN, VAR = RNG.uniform(0.5, 2.0, 3), RNG.normal(size=3), RNG.normal(size=3), RNG.uniform(0.5, 2.0, 3)


def inference(x: Array, eps: float, axis: int = -1) -> Array:
    around = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    mean, var, gamma, beta = (v.reshape(around) for v in (MEAN, VAR, GAMMA, BETA))
    return (x - mean) / np.sqrt(var + eps) * gamma + beta


def moved(old: Array, batch: Array, momentum: float) -> Array:
    """``moving * m + batch * (1 - m)``: Keras, Flax, ONNX."""
    return old * momentum + batch * (1.0 - momentum)


def keras_layer(**changes: Any) -> Any:
    """What a layer of Keras looks like."""
    given = {
        "gamma": GAMMA, "beta": BETA, "moving_mean": MEAN, "moving_variance": VAR, "epsilon": 1e-2, "momentum": 0.9, "axis": -1,
        "compute_dtype": "float64",
    }  # fmt: skip
    return SimpleNamespace(**given | changes)


NODE = SimpleNamespace(  # what a NodeProto looks like
    op_type="BatchNormalization", name="bn", input=["x", "s", "b", "m", "v"], output=["y"],
    attribute=[SimpleNamespace(name="epsilon", type=1, f=1e-2, i=0), SimpleNamespace(name="momentum", type=1, f=0.8, i=0)],
)  # fmt: skip
ELU, RELU = SimpleNamespace(__name__="elu"), SimpleNamespace(op_type="Relu", attribute=[])
TENSORS = {"s": GAMMA, "b": BETA, "m": MEAN, "v": VAR}
LINEN = {"params": {"scale": GAMMA, "bias": BETA}, "batch_stats": {"mean": MEAN, "var": VAR}}
NNX = SimpleNamespace(scale=GAMMA, bias=BETA, mean=MEAN, var=VAR, epsilon=1e-2, momentum=0.95, axis=-1)
OTHERS = {
    "keras layer": (lambda k: k.from_keras(keras_layer()), 1e-2, 0.9, -1),
    "keras vectors": (lambda k: k.from_keras(GAMMA, BETA, MEAN, VAR), 1e-3, 0.99, -1),
    "keras vectors, own numbers": (lambda k: k.from_keras(GAMMA, BETA, MEAN, VAR, epsilon=0.1, momentum=0.5, axis=3), 0.1, 0.5, -1),
    "flax linen": (lambda k: k.from_flax(LINEN), 1e-5, 0.99, -1),
    "flax linen, flat": (lambda k: k.from_flax(LINEN["params"] | LINEN["batch_stats"], epsilon=1e-2), 1e-2, 0.99, -1),
    "flax nnx": (lambda k: k.from_flax(NNX), 1e-2, 0.95, -1),
    "onnx node": (lambda k: k.from_onnx(NODE, TENSORS), 1e-2, 0.8, 1),
    "onnx vectors": (lambda k: k.from_onnx(GAMMA, BETA, MEAN, VAR), 1e-5, 0.9, 1),
}


@pytest.mark.parametrize("other", OTHERS)
def test_inference_and_running_statistics_are_the_others(other: str) -> None:
    make, eps, momentum, axis = OTHERS[other]
    x = X if axis == -1 else np.moveaxis(X, -1, 1)
    np.testing.assert_allclose(make(fastbn.FrozenBatchNorm)(x), inference(x, eps, axis), rtol=1e-12)
    layer = make(fastbn.BatchNorm2d)
    np.testing.assert_allclose(layer.eval()(x), inference(x, eps, axis), rtol=1e-12)
    axes = tuple(i for i in range(4) if i != axis % 4)
    mean, var = MEAN, VAR
    for _ in range(3):
        layer.train()(x)
        mean, var = moved(mean, x.mean(axes), momentum), moved(var, x.var(axes), momentum)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)
    np.testing.assert_array_equal(VAR, VAR.copy())
    assert layer.running_var is not VAR


def test_what_a_layer_lacks_it_lacks_here_too() -> None:
    layer = fastbn.BatchNorm2d.from_keras(keras_layer(gamma=None))
    assert layer.weight is None
    np.testing.assert_array_equal(layer.bias, BETA)
    assert not fastbn.BatchNorm2d.from_keras(keras_layer(gamma=None, beta=None)).affine
    assert fastbn.BatchNorm2d.from_keras(keras_layer(compute_dtype="float16")).dtype == np.float16


def test_a_layer_of_flax_in_evaluation_is_so_here() -> None:
    layer = SimpleNamespace(**vars(NNX), use_running_average=True)  # which `eval` of a model of nnx sets
    np.testing.assert_allclose(fastbn.BatchNorm2d.from_flax(layer)(X), inference(X, NNX.epsilon), rtol=1e-12)
    layer.use_running_average = False
    assert fastbn.BatchNorm2d.from_flax(layer).training


def test_options_count_for_more_than_what_was_found() -> None:
    layer = fastbn.BatchNorm2d.from_keras(keras_layer(), layout="NCHW", dtype="float32", momentum=0.5)
    assert (layer.layout, layer.axis, layer.dtype, layer.momentum) == ("NCHW", None, np.float32, 0.5)
    assert fastbn.FrozenBatchNorm.from_torch(fastbn.BatchNorm1d(3), eps=0.5, axis=-1).eps == 0.5
    assert fastbn.FrozenBatchNorm.from_keras(keras_layer(), axis=1).axis == 1


def test_a_layer_of_fastbn_and_its_state_are_taken_as_pytorchs() -> None:
    layer = fastbn.BatchNorm2d(3, eps=1e-2, momentum=None, dtype="float64").train()
    layer(np.moveaxis(X, -1, 1))
    for again in (fastbn.BatchNorm2d.from_torch(layer), fastbn.BatchNorm2d.from_torch(layer.state_dict(), eps=1e-2, momentum=None)):
        assert again.momentum is None
        assert again.num_batches_tracked == 1
        x = np.moveaxis(X, -1, 1)
        np.testing.assert_array_equal(again.eval()(x), layer.eval()(x))


def test_what_a_layer_of_fastbn_does_besides_is_taken_too() -> None:
    layer = fastbn.BatchNorm2d(3, layout="NHWC", activation="relu", dtype="float16", correction=0, skip_nonfinite=True).freeze()
    layer.load_state_dict({"weight": GAMMA, "bias": BETA, "running_mean": MEAN, "running_var": VAR})
    x = X.astype(np.float16)
    for again in (fastbn.BatchNorm2d.from_torch(layer), fastbn.FrozenBatchNorm.from_torch(layer)):
        np.testing.assert_allclose(again(x), layer(x), rtol=2e-3)
    assert repr(fastbn.BatchNorm2d.from_torch(layer)) == repr(layer)
    assert fastbn.FrozenBatchNorm.from_torch(layer, axis=1, activation=None).axis == 1
    last = fastbn.FrozenBatchNorm.from_torch(fastbn.BatchNorm2d(3, axis=-1, activation=("leaky_relu", 0.5)))
    assert (last.axis, last.activation) == (-1, ("leaky_relu", 0.5))


def test_a_layer_whose_tracking_was_switched_off_is_one_that_does_not_track() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    layer = fastbn.BatchNorm2d(3)
    layer.track_running_stats = False
    again, tracking = (fastbn.BatchNorm2d.from_torch(layer, **options) for options in ({}, {"track_running_stats": True}))
    for one in (layer, again, tracking):
        one(x)
    assert repr(again) == repr(layer)
    np.testing.assert_array_equal(again.running_mean, layer.running_mean)  # type: ignore[arg-type]
    assert tracking.num_batches_tracked == 1


@pytest.mark.parametrize("layer", [fastbn.BatchRenorm2d(3), fastbn.InstanceNorm2d(3, track_running_stats=True)])
def test_a_layer_that_is_trained_otherwise_is_taken_for_inference_alone(layer: Any) -> None:
    x = np.moveaxis(X, -1, 1).astype(np.float32)
    np.testing.assert_allclose(fastbn.FrozenBatchNorm.from_torch(layer)(x), layer.eval()(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"trained by (instance |batch re)normalization, which is not what BatchNorm2d does"):
        fastbn.BatchNorm2d.from_torch(layer)


@pytest.mark.parametrize("count", [-1, 2.7, float("nan"), "3", [1, 2], 2**63, True, np.timedelta64(3, "s")])
def test_a_number_of_batches_is_a_number(count: Any) -> None:
    state = {"running_mean": MEAN, "running_var": VAR, "num_batches_tracked": count}
    with pytest.raises((TypeError, ValueError), match="num_batches_tracked must"):
        fastbn.BatchNorm2d.from_torch(state)
    with pytest.raises((TypeError, ValueError), match="num_batches_tracked must"):
        fastbn.BatchNorm2d(3, affine=False).load_state_dict(state)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "module must have running_mean", lambda k: k.from_torch(3)),
        (TypeError, "module must be a layer, or a state_dict", lambda k: k.from_torch({"weight": GAMMA})),
        (TypeError, "module must be a layer, or a state_dict", lambda k: k.from_torch({"weight": GAMMA, 1: BETA})),
        (TypeError, "module must be a batch normalization, got BatchCh", lambda k: k.from_torch(fastbn.BatchChannelNorm2d(3))),
        ((TypeError, ValueError), "running_mean .*must", lambda k: k.from_torch({"running_mean": None, "running_var": VAR})),
        (ValueError, "running_var must", lambda k: k.from_torch({"running_mean": MEAN, "running_var": None})),
        (ValueError, "give axis or layout, not both", lambda k: k.from_keras(GAMMA, BETA, MEAN, VAR, axis=1, layout="NHWC")),
        (TypeError, "variables must hold the batch_stats", lambda k: k.from_flax({"params": None, "batch_stats": None})),
        (ValueError, "layer must have one axis of channels, got axis=.1, 2.", lambda k: k.from_keras(keras_layer(axis=[1, 2]))),
        (ValueError, "node must have the inputs X, sc", lambda k: k.from_onnx(SimpleNamespace(**vars(NODE) | {"input": ["x", "s"]}), {})),
        (ValueError, "give axis or layout, not both", lambda k: k.from_flax(LINEN, axis=1, layout="NHWC")),
        (ValueError, "layer must be built", lambda k: k.from_keras(keras_layer(moving_mean=None))),
        (TypeError, "layer must be a BatchNormalization of Keras, or gamma, .*got ndarray", lambda k: k.from_keras(GAMMA)),
        (TypeError, r"\*layer.get_weights\(\).*, got list", lambda k: k.from_keras([GAMMA, BETA, MEAN, VAR])),
        (TypeError, "are the layer's own", lambda k: k.from_keras(keras_layer(), BETA)),
        (ValueError, "the layer's activation, 'elu', is none of", lambda k: k.from_keras(keras_layer(activation=ELU))),
        (TypeError, "variables must hold the batch_stats", lambda k: k.from_flax({"params": {"scale": GAMMA}})),
        (TypeError, "variables must be a flax.nnx.BatchNorm", lambda k: k.from_flax(3)),
        (ValueError, "node must be a BatchNormalization, got Relu", lambda k: k.from_onnx(RELU, {})),
        (ValueError, "but v is not among those given", lambda k: k.from_onnx(NODE, {k: v for k, v in TENSORS.items() if k != "v"})),
        (TypeError, "tensors of a node must be a mapping", lambda k: k.from_onnx(NODE)),
        (TypeError, "scale, B, input_mean and input_var must be given", lambda k: k.from_onnx(GAMMA, BETA)),
        (ValueError, "moving_variance has shape", lambda k: k.from_keras(GAMMA, BETA, MEAN, VAR[:2])),
        (TypeError, "momentum must be a number", lambda k: k.from_keras(GAMMA, BETA, MEAN, VAR, momentum="0.9")),
        (ValueError, "epsilon must be", lambda k: k.from_keras(GAMMA, BETA, MEAN, VAR, epsilon=-1.0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [fastbn.FrozenBatchNorm, fastbn.BatchNorm2d])
def test_errors_name_what_is_wrong(kind: Any, error: Any, text: str, call: Any) -> None:
    with pytest.raises(error, match=text):
        call(kind)


def test_batch_renormalization_is_for_inference_alone() -> None:
    fastbn.FrozenBatchNorm.from_keras(keras_layer(renorm=True))
    with pytest.raises(ValueError, match="batch renormalization"):
        fastbn.BatchNorm2d.from_keras(keras_layer(renorm=True))


def test_a_keras_layer_that_is_not_trainable_stays_frozen() -> None:
    for trainable in (True, False):
        layer = fastbn.BatchNorm2d.from_keras(keras_layer(trainable=trainable))
        assert (layer.training, layer.frozen) == (True, not trainable)


def test_pytorchs_layers() -> None:
    torch = pytest.importorskip("torch")
    x = np.moveaxis(X, -1, 1)
    for dtype in (torch.float32, torch.float64):
        theirs = torch.nn.BatchNorm2d(3, eps=1e-2, momentum=0.3, dtype=dtype)
        ours, given = fastbn.BatchNorm2d.from_torch(theirs), torch.tensor(x, dtype=dtype)
        assert str(ours.dtype) == str(dtype).removeprefix("torch.")
        for _ in range(2):
            np.testing.assert_allclose(ours(given.numpy()), theirs(given).detach().numpy(), atol=1e-5)
        np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), rtol=1e-5)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 2
        assert fastbn.BatchNorm2d.from_torch(theirs.eval()).training is False
    half = torch.nn.BatchNorm2d(3).to(torch.bfloat16)
    np.testing.assert_array_equal(fastbn.BatchNorm2d.from_torch(half).weight, 1.0)
    plain = fastbn.BatchNorm2d.from_torch(torch.nn.BatchNorm2d(3, track_running_stats=False))
    assert plain.running_mean is None
    bare = torch.nn.BatchNorm2d(3, affine=False)
    assert not fastbn.BatchNorm2d.from_torch(bare).affine


def test_pytorchs_layers_without_numbers_are_refused() -> None:
    torch = pytest.importorskip("torch")
    for layer, message in (
        (torch.nn.LazyBatchNorm2d(), "module must have been called once, but it is lazy and never was"),
        (torch.nn.BatchNorm2d(3, device="meta"), "module must have numbers, but its tensors lie on meta"),
    ):
        for kind in (fastbn.BatchNorm2d, fastbn.FrozenBatchNorm):
            with pytest.raises(ValueError, match=message):
                kind.from_torch(layer)


def test_onnx_models_and_nodes() -> None:
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    helper, x = onnx.helper, np.moveaxis(X, -1, 1).astype(np.float32)
    tensors = [onnx.numpy_helper.from_array(v.astype(np.float32), name) for name, v in TENSORS.items()]
    constant = helper.make_node("Constant", [], ["v"], value=tensors[3])
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="bn", epsilon=1e-2, momentum=0.8)
    value = helper.make_tensor_value_info
    graph = helper.make_graph([constant, node], "g", [value("x", 1, x.shape)], [value("y", 1, x.shape)], initializer=tensors[:3])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    want = reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
    for given in ((model, "bn"), (model, "y"), (node, tensors), (node, {k: v.astype(np.float32) for k, v in TENSORS.items()})):
        np.testing.assert_allclose(fastbn.FrozenBatchNorm.from_onnx(*given)(x), want, rtol=1e-5, atol=1e-5)
        layer = fastbn.BatchNorm2d.from_onnx(*given)
        assert (layer.training, layer.correction, layer.momentum) == (False, 0, pytest.approx(0.2))
        np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-5)
    trained = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "n", "o", "p", "q"])  # of opset 13
    assert fastbn.BatchNorm2d.from_onnx(trained, tensors).training
    model.graph.node[0].CopyFrom(helper.make_node("Constant", [], ["v"], value_floats=list(VAR)))
    np.testing.assert_allclose(fastbn.FrozenBatchNorm.from_onnx(model, "bn")(x), want, rtol=1e-5, atol=1e-5)
    model.graph.node[0].CopyFrom(helper.make_node("Constant", [], ["v"], value_strings=[b"1"]))
    with pytest.raises(ValueError, match="but v is not among those given"):
        fastbn.FrozenBatchNorm.from_onnx(model, "bn")
    tensors[0].ClearField("raw_data")
    with pytest.raises(ValueError, match="the numbers of s cannot be read"):
        fastbn.FrozenBatchNorm.from_onnx(node, tensors)
    with pytest.raises(ValueError, match="one BatchNormalization called 'other', got 0; those it has: bn"):
        fastbn.FrozenBatchNorm.from_onnx(model, "other")
    with pytest.raises(TypeError, match="after a model comes the name of a node"):
        fastbn.FrozenBatchNorm.from_onnx(model)
