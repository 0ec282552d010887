"""What holds of fastbn.keras on each backend; `test_keras` runs this file once for each, in a process of its own."""

from __future__ import annotations

import copy
import doctest
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import fastbn.keras
from fastbn.layout import Array

BACKEND = keras.backend.backend()
Layer = fastbn.keras.BatchNormalization
trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras does not train on its numpy backend")


def only(*names: str) -> Any:
    return pytest.mark.skipif(BACKEND not in names, reason=f"of {' and '.join(names)} alone")


def data(shape: tuple[int, ...], mean: float = 0.0, dtype: str = "float32", seed: int = 0) -> Array:
    return (mean + np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def made(shape: tuple[int, ...], **options: Any) -> Any:
    """A layer, built, whose parameters are neither 0 nor 1."""
    layer = Layer(**options)
    layer.build(shape)
    rng = np.random.default_rng(7)
    for variable, low in ((layer.gamma, 0.5), (layer.beta, -1.0), (layer.moving_mean, -1.0), (layer.moving_variance, 0.5)):
        if variable is not None:
            variable.assign(rng.uniform(low, low + 1.0, variable.shape))
    return layer


def values(tensor: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(tensor)).astype(np.float64)


def along(v: Array, shape: tuple[int, ...], axis: int) -> Array:
    return v.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def truth(x: Array, layer: Any, training: bool, mask: Array | None = None, f: Callable[[Array], Array] = lambda z: z) -> Array:
    """The formula in float64."""
    x, axis = x.astype(np.float64), layer.axis
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    counts = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask[..., None], x.shape)
    mean, var = (along(values(v), x.shape, axis) for v in (layer.moving_mean, layer.moving_variance))
    if training:
        mean = x.mean(axes, keepdims=True, where=counts)
        var = ((x - mean) ** 2).mean(axes, keepdims=True, where=counts)
    gamma = 1.0 if layer.gamma is None else along(values(layer.gamma), x.shape, axis)
    beta = 0.0 if layer.beta is None else along(values(layer.beta), x.shape, axis)
    return f((x - mean) / np.sqrt(var + layer.epsilon) * gamma + beta)


def near(y: Any, want: Array, tolerance: float = 5e-6) -> None:
    y = values(y)
    assert y.shape == want.shape
    worst = np.abs(y - want).max() if y.size else 0.0
    assert (np.abs(y - want) <= tolerance * np.maximum(1.0, np.abs(want))).all(), worst


def gradients(layer: Any, x: Array, dy: Array, **call: Any) -> list[Array]:
    """Of the sum of the output times dy, with respect to x and the trainable weights."""
    if BACKEND == "torch":
        tensor = keras.ops.convert_to_tensor(x).requires_grad_()
        (layer(tensor, **call) * keras.ops.convert_to_tensor(dy)).sum().backward()
        found = [tensor.grad, *(w.value.grad for w in layer.trainable_weights)]
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        tensor = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(tensor)
            loss = tf.reduce_sum(layer(tensor, **call) * dy)
        found = tape.gradient(loss, [tensor, *(w.value for w in layer.trainable_weights)])
    else:
        import jax

        def loss_of(x: Any, weights: Any) -> Any:
            others = [v.value for v in layer.non_trainable_variables]
            return (layer.stateless_call(weights, others, x, **call)[0] * dy).sum()

        of_x, of_weights = jax.jit(jax.grad(loss_of, (0, 1)))(jax.numpy.asarray(x), [w.value for w in layer.trainable_weights])
        found = [of_x, *of_weights]
    return [values(g) for g in found]


def slopes(layer: Any, x: Array, dy: Array, training: bool, **given: Any) -> list[Array]:
    """The same by differences of the formula, in one direction for each, and the direction."""
    rng = np.random.default_rng(3)
    found = []
    for variable in (None, *layer.trainable_weights):
        start = x.astype(np.float64) if variable is None else values(variable)
        way = rng.normal(size=start.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = start + step * way
            if variable is None:
                ends.append((truth(moved, layer, training, **given) * dy).sum())
            else:
                other = _Like(layer, variable, moved)
                ends.append((truth(x, other, training, **given) * dy).sum())
        found.append((way, (ends[0] - ends[1]) / 2e-5))
    return found  # type: ignore[return-value]


class _Like:
    """A layer, one of whose variables has other values."""

    def __init__(self, layer: Any, variable: Any, moved: Array):
        self.layer, self.variable, self.moved = layer, variable, moved

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.layer, name)
        return self.moved if value is self.variable and value is not None else value


def relu(z: Array) -> Array:
    return np.maximum(z, 0.0)


def silu(z: Array) -> Array:
    return z / (1.0 + np.exp(-z))


SHAPES = [
    ((64, 3), -1), ((8, 5, 3), -1), ((8, 3, 5), 1), ((4, 5, 6, 3), -1), ((4, 3, 5, 6), 1), ((3, 4, 3, 5), 2), ((2, 3, 4, 5, 3), -1),
    ((5, 4, 2), 0),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_data_far_from_zero_keep_their_digits(shape: tuple[int, ...], axis: int, training: bool) -> None:
    x, layer = data(shape, 1e4), made(shape, axis=axis, momentum=0.0)
    layer(x, training=True)  # statistics near the data's
    near(layer(x, training=training), truth(x, layer, training), 5e-6 if training else 2e-3)
    mean = x.astype(np.float64).mean(tuple(i for i in range(x.ndim) if i != axis % x.ndim))
    near(layer.moving_mean, mean, 1e-6)


@pytest.mark.parametrize("axis", [-1, 1])
def test_masked_data_far_from_zero_keep_their_digits(axis: int) -> None:
    x, mask = data((6, 5, 3), 1e4), np.random.default_rng(1).random((6, 5)) < 0.6
    layer = made(x.shape, axis=axis)
    near(layer(x, training=True, mask=mask), truth(x, layer, True, mask))


@pytest.mark.parametrize("options", [{"center": False}, {"scale": False}, {"center": False, "scale": False}, {"epsilon": 0.5}])
def test_options_mean_what_they_mean_in_keras(options: dict[str, Any]) -> None:
    x = data((8, 5, 3), 2.0)
    ours, theirs = made(x.shape, **options), keras.layers.BatchNormalization(**options)
    theirs.build(x.shape)
    theirs.set_weights(ours.get_weights())
    for training in (True, False):
        near(ours(x, training=training), values(theirs(x, training=training)), 1e-5)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        near(a, b.astype(float), 1e-5)


@pytest.mark.parametrize("case", ["plain", "relu", "silu", "masked", "frozen", "axis", "half batch", "renorm"])
@trains
def test_gradients_are_those_of_the_formula(case: str) -> None:
    x, options, call, given = data((6, 5, 4), 1.0), {}, {"training": True}, {}
    if case in ("relu", "silu"):
        options["activation"] = case
        given["f"] = {"relu": relu, "silu": silu}[case]
    elif case == "masked":
        call["mask"] = given["mask"] = np.random.default_rng(1).random((6, 5)) < 0.6
    elif case == "axis":
        options["axis"] = 1
    elif case == "half batch":
        call["mask"] = given["mask"] = np.arange(30).reshape(6, 5) % 2 == 0
        options["activation"], given["f"] = "relu", relu
    layer = made(x.shape, **options, **({"renorm": True, "renorm_momentum": 0.9} if case == "renorm" else {}))
    training = case != "frozen"
    if case == "renorm":
        return _renormalized(layer, x)
    layer.trainable = training
    dy = data(x.shape, seed=5)
    want = slopes(layer, x, dy, training, **given)
    found = gradients(layer, x, dy, **call)
    assert len(found) == (3 if training else 1)
    for gradient, (way, slope) in zip(found, want, strict=True):
        np.testing.assert_allclose((gradient * way).sum(), slope, rtol=1e-4, atol=1e-4)
    return None


def _renormalized(layer: Any, x: Array) -> None:
    """As Keras' own layer, for which the formula is long."""
    theirs = keras.layers.BatchNormalization(**layer.get_config())
    theirs.build(x.shape)
    theirs.set_weights(layer.get_weights())
    dy = data(x.shape, seed=5)
    for a, b in zip(gradients(layer, x, dy, training=True), gradients(theirs, x, dy, training=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    layer(x, training=True), theirs(x, training=True)
    for a, b in zip(layer.get_weights(), theirs.get_weights(), strict=True):
        near(a, b.astype(float), 1e-5)


@trains
def test_second_derivatives_are_right() -> None:
    """The gradient of a gradient's length, as penalties take it."""
    x, dy, way = (data((6, 3), seed=seed) for seed in (0, 1, 2))
    layer = made(x.shape)

    def length(step: float) -> float:
        x = start + step * way
        n, gamma = len(x), values(layer.gamma)
        c = x - x.mean(0)
        inv = 1.0 / np.sqrt((c**2).mean(0) + layer.epsilon)
        dx = gamma * inv * (dy - dy.mean(0) - c * inv**2 * (dy * c).sum(0) / n)
        return float((dx**2).sum())

    start = x.astype(np.float64)
    want = (length(1e-5) - length(-1e-5)) / 2e-5
    if BACKEND == "torch":
        import torch

        t = torch.tensor(x, requires_grad=True)
        (first,) = torch.autograd.grad((layer(t, training=True) * torch.tensor(dy)).sum(), t, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), t)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        t = tf.constant(x)
        with tf.GradientTape() as outer:
            outer.watch(t)
            with tf.GradientTape() as inner:
                inner.watch(t)
                loss = tf.reduce_sum(layer(t, training=True) * dy)
            penalty = tf.reduce_sum(inner.gradient(loss, t) ** 2)
        second = outer.gradient(penalty, t)
    else:
        import jax

        weights, others = ([v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables))

        def loss_of(x: Any) -> Any:
            return (layer.stateless_call(weights, others, x, training=True)[0] * dy).sum()

        second = jax.grad(lambda x: (jax.grad(loss_of)(x) ** 2).sum())(jax.numpy.asarray(x))
    np.testing.assert_allclose((values(second) * way).sum(), want, rtol=1e-3)


def test_running_statistics_are_the_formulas_in_float64() -> None:
    x, momentum = data((8, 5, 3), 3.0, "float64"), 0.9
    with _wide():
        layer = made(x.shape, momentum=momentum, dtype="float64")
        mean, var = (values(v) for v in (layer.moving_mean, layer.moving_variance))
        for _ in range(3):
            layer(x, training=True)
            mean = momentum * mean + (1.0 - momentum) * x.mean((0, 1))
            var = momentum * var + (1.0 - momentum) * x.var((0, 1))
        near(layer.moving_mean, mean, 1e-13)
        near(layer.moving_variance, var, 1e-13)
        near(layer(x, training=True), truth(x, layer, True), 1e-13)
        near(layer(x, training=False), truth(x, layer, False), 1e-13)
        if BACKEND == "tensorflow":  # Keras computes in 64 bits there, and cuts them to 32 elsewhere
            theirs = keras.layers.BatchNormalization(**layer.get_config())
            theirs.build(x.shape)
            ours = Layer(**layer.get_config())
            ours.build(x.shape)
            theirs(x, training=True), ours(x, training=True)
            for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
                near(a, b, 1e-13)


def _wide() -> Any:
    """Where there is float64: in JAX only where it is asked for."""
    if BACKEND != "jax":
        from contextlib import nullcontext

        return nullcontext()
    import jax

    return jax.enable_x64(True)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_sixteen_bits_are_computed_in_thirty_two(policy: str) -> None:
    dtype = policy.removeprefix("mixed_")
    x = data((8, 5, 3), 2.0)
    layer = made(x.shape, dtype=policy, activation="relu")
    given = keras.ops.cast(x, dtype)
    y = layer(given, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert keras.backend.standardize_dtype(layer.gamma.dtype) == ("float32" if "mixed" in policy else dtype)
    near(y, truth(values(given), layer, True, f=relu), 1e-3 if dtype == "float16" else 8e-3)
    near(layer(given, training=False), truth(values(given), layer, False, f=relu), 1e-3 if dtype == "float16" else 8e-3)


def test_integers_are_taken_as_keras_takes_them() -> None:
    x = np.arange(24).reshape(8, 3)
    layer = made(x.shape)
    near(layer(x, training=True), truth(x, layer, True), 1e-5)


@pytest.mark.parametrize(
    "activation", ["relu6", "leaky_relu", "hard_silu", "sigmoid", "tanh", "gelu", "elu", ("leaky_relu", 0.05), ("gelu", "tanh")]
)
def test_an_activation_is_keras_own(activation: Any) -> None:
    x = data((8, 5, 3))
    layer, plain = made(x.shape, activation=activation), made(x.shape)
    known = {("leaky_relu", 0.05): lambda z: keras.ops.leaky_relu(z, 0.05), ("gelu", "tanh"): lambda z: keras.ops.gelu(z, True)}
    f = known[activation] if isinstance(activation, tuple) else keras.activations.get(activation)
    for training in (True, False):
        near(layer(x, training=training), values(f(plain(x, training=training))), 1e-5)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is Layer
    assert again.get_config() == layer.get_config()
    assert again.activation == layer.activation


@pytest.mark.parametrize("renorm", [False, True])
def test_one_value_and_none_per_channel(renorm: bool) -> None:
    layer = made((1, 3))
    near(layer(data((1, 3)), training=True), truth(data((1, 3)), layer, True), 1e-5)
    layer = made((1, 3), renorm=renorm)
    before = [v.copy() for v in layer.get_weights()]
    assert layer(np.zeros((0, 3), np.float32), training=True).shape == (0, 3)
    assert layer(np.zeros((0, 3), np.float32), training=False).shape == (0, 3)
    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_values_of_one_example_without_a_batch_are_normalized_to_zero(activation: str | None) -> None:
    layer, x = Layer(activation=activation), data((3,))
    near(layer(x, training=True), np.zeros(3), 1e-5)
    near(layer.moving_mean, x * (1 - layer.momentum), 1e-5)


@only("tensorflow")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("renorm", [False, True])
def test_a_batch_that_is_found_empty_when_the_graph_runs_moves_nothing(masked: bool, compiled: bool, renorm: bool) -> None:
    import tensorflow as tf

    layer = made((1, 3), renorm=renorm)
    before = [v.copy() for v in layer.get_weights()]

    def step(x: Any) -> Any:
        return layer(x, training=True, mask=x[:, 0] > -100 if masked else None)

    graph = tf.function(step, input_signature=[tf.TensorSpec((None, 3))], jit_compile=compiled)
    assert graph(np.zeros((0, 3), np.float32)).shape == (0, 3)
    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    graph(data((4, 3)))
    assert (before[2] != layer.get_weights()[2]).any()


@only("tensorflow")
def test_forward_mode_and_ragged_tensors_train_as_in_keras() -> None:
    import tensorflow as tf

    found = []
    for kind in (Layer, keras.layers.BatchNormalization):
        layer, x, direction = kind(), tf.constant(data((5, 3))), tf.constant(data((5, 3), seed=1))
        layer.build((None, 3))
        with tf.autodiff.ForwardAccumulator(x, direction) as forward:
            y = layer(x, training=True)
        ragged = tf.RaggedTensor.from_row_lengths(x, [2, 3])
        found.append((forward.jvp(y), kind()(ragged, training=True).flat_values))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_call_without_state_takes_arrays_of_numpy(training: bool) -> None:
    layer, x = made((4, 3)), data((4, 3))
    state = layer.trainable_variables, layer.non_trainable_variables
    y, moved = layer.stateless_call(*state, x, training=training)
    near(y, truth(x, layer, training))
    assert len(moved) == 2


def test_an_epsilon_of_zero_trains_as_in_keras() -> None:
    x, ours, theirs = data((4, 5, 3), 2.0), Layer(epsilon=0.0), keras.layers.BatchNormalization(epsilon=0.0)
    for training in (True, False):
        np.testing.assert_allclose(values(ours(x, training=training)), values(theirs(x, training=training)), rtol=1e-4, atol=1e-5)
    for own, other in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(values(own), values(other), rtol=1e-5, atol=1e-6)


def test_a_mask_of_another_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match="mask must have one axis less than inputs"):
        made((4, 5, 3))(data((4, 5, 3)), training=True, mask=np.ones(4, bool))
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        made((4, 5, 3)).call(data((4, 5, 3)), training=True, mask=[[True] * 5] * 4)


def small(normalization: Any, fused: bool = False) -> Any:
    """A model with a nested one, a shared layer, and batch norms that activations follow."""
    layers = keras.layers
    first = layers.Input((6, 6, 4)), layers.Conv2D(4, 3, padding="same")
    inner = keras.Sequential([*first, normalization(name="inner_bn"), layers.ReLU()], name="inner")
    shared = normalization(name="shared")
    x = inputs = layers.Input((6, 6, 4), name="image")
    x = inner(x)
    x = layers.Add()([shared(x), shared(layers.Activation("tanh")(x))])
    x = normalization(name="first")(x)
    x = layers.Activation("relu", name="after")(x)
    y = normalization(name="second")(x)
    x = layers.Add(name="sum")([x, layers.LeakyReLU(name="leaky")(y)])
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)), name="small")


def _norms(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


@pytest.mark.parametrize("fuse", [False, True])
def test_a_converted_model_computes_the_same(fuse: bool) -> None:
    model, x = small(keras.layers.BatchNormalization), data((4, 6, 6, 4))
    model.set_weights([np.abs(w) + data(w.shape, 0.5, seed=9) ** 2 for w in model.get_weights()])
    converted = fastbn.keras.convert(model, fuse=fuse)
    assert all(type(layer) is keras.layers.BatchNormalization for layer in _norms(model))
    assert all(type(layer) is Layer for layer in _norms(converted))
    assert len(_norms(converted)) == len(_norms(model)) == 4
    near(converted(x), values(model(x)), 2e-5)
    assert [w.path for w in converted.weights] == [w.path for w in model.weights]
    fused = {layer.name for layer in _norms(converted) if layer.activation is not None}
    assert fused == ({"inner_bn", "first", "second"} if fuse else set())
    near(converted(x, training=True), values(model(x, training=True)), 2e-5)
    for a, b in zip(converted.get_weights(), model.get_weights(), strict=True):
        near(a, b.astype(float), 2e-5)


def test_layers_of_several_models_are_not_fused() -> None:
    """What follows a layer in one model does not follow it in another."""
    layers = keras.layers
    shared, relu = layers.BatchNormalization(name="shared"), layers.ReLU(name="relu")
    first, second, third = (layers.Input((3,)) for _ in range(3))
    followed = keras.Model(first, layers.ReLU()(shared(first)), name="followed")
    alone = keras.Model(second, shared(second), name="alone")
    other = keras.Model(third, relu(layers.BatchNormalization(name="other")(third)), name="other_model")
    x = layers.Input((3,))
    model = keras.Model(x, layers.Add()([followed(x), alone(x), other(x), keras.Sequential([layers.Input((3,)), relu])(x)]))
    converted = fastbn.keras.convert(model, fuse=True)
    assert [layer.activation for layer in _norms(converted)] == [None, None]
    near(converted(data((4, 3))), values(model(data((4, 3)))))


def test_what_is_regularized_is_not_fused() -> None:
    layers = keras.layers
    for options in ({"activity_regularizer": "l2"}, {}), ({}, {"activity_regularizer": "l2"}):
        parts = layers.BatchNormalization(**options[0]), layers.ReLU(**options[1])
        model = keras.Sequential([layers.Input((3,)), *parts])
        converted = fastbn.keras.convert(model, fuse=True)
        near(converted(data((4, 3))), values(model(data((4, 3)))))
        assert len(model.losses) == 1
        np.testing.assert_allclose([values(v) for v in converted.losses], [values(v) for v in model.losses], rtol=1e-5)


@keras.saving.register_keras_serializable("fastbn_tests")
class Derived(keras.layers.BatchNormalization):  # type: ignore[misc]
    """A class of the user's, which may compute anything."""


def test_derived_classes_stay_with_the_activations_behind_them() -> None:
    model = keras.Sequential([keras.layers.Input((3,)), Derived(), keras.layers.ReLU(), Derived(), keras.layers.Activation("tanh")])
    converted = fastbn.keras.convert(model, fuse=True)
    assert [type(layer) for layer in converted.layers] == [type(layer) for layer in model.layers]
    near(converted(data((4, 3))), values(model(data((4, 3)))))


class Descent(keras.optimizers.SGD):
    """An optimizer that Keras does not know by its name."""


class Half(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step: Any) -> float:
        return 0.5

    def get_config(self) -> dict[str, Any]:
        return {}


class Distance(keras.metrics.MeanSquaredError):
    """A metric of one's own."""


def test_what_a_model_is_compiled_with_may_be_of_ones_own() -> None:
    inner = keras.Sequential([keras.layers.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)])
    inner.compile("adam", loss=lambda y, p: keras.ops.sum(p - y))
    model = keras.Sequential([keras.layers.Input((3,)), inner, keras.layers.BatchNormalization()])
    model.compile(Descent(Half(), momentum=0.9), loss=keras.losses.Huber(0.5), metrics=[Distance()], run_eagerly=True)
    converted = fastbn.keras.convert(model)
    assert model.compiled and inner.compiled and converted.compiled and converted.layers[0].compiled  # noqa: PT018
    assert converted.layers[0].loss is inner.loss
    assert (type(converted.optimizer), converted.optimizer.momentum, converted.run_eagerly) == (Descent, 0.9, True)
    assert converted.optimizer is not model.optimizer
    assert float(converted.optimizer.learning_rate) == 0.5
    if BACKEND != "numpy":
        x = data((8, 3))
        losses = [one.fit(x, np.zeros((8, 2)), epochs=2, shuffle=False, verbose=0).history["loss"] for one in (model, converted)]
        np.testing.assert_allclose(*losses, rtol=1e-4)


def test_what_was_adapted_is_copied() -> None:
    """A normalization has numbers made of its weights, and a lookup a vocabulary beside them."""
    x = data((64, 3), mean=7.0)
    scaling = keras.layers.Normalization()
    scaling.adapt(x)
    inner = keras.Sequential([keras.layers.Input((3,)), scaling, keras.layers.BatchNormalization(), keras.layers.ReLU()])
    model = keras.Sequential([keras.layers.Input((3,)), inner])
    near(fastbn.keras.convert(model, fuse=True)(x), values(model(x)))


@only("tensorflow")
def test_vocabularies_are_copied() -> None:
    lookup = keras.layers.IntegerLookup(output_mode="one_hot")
    lookup.adapt(np.array([3, 5, 7]))
    model = keras.Sequential([keras.layers.Input((1,), dtype="int64"), lookup, keras.layers.BatchNormalization()])
    x = np.array([[3], [5], [9]])
    near(fastbn.keras.convert(model)(x), values(model(x)))


class WithItsOwn(keras.Model):
    """A Functional model whose constructor makes the graph."""

    def __init__(self) -> None:
        x = keras.layers.Input((3,))
        super().__init__(x, keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(name="bn")(x)))


def test_a_functional_model_with_a_constructor_of_its_own_is_fused() -> None:
    x = data((4, 3))
    outside = keras.layers.Input((3,))
    for model in (WithItsOwn(), keras.Model(outside, WithItsOwn()(outside))):
        assert "ReLU" in str(fastbn.keras.summary(model))
        converted = fastbn.keras.convert(model, fuse=True)
        (norm,) = _norms(converted)
        assert norm.activation is keras.activations.relu
        near(converted(x, training=True), values(model(x, training=True)))


def test_files_are_read_by_both(tmp_path: Path) -> None:
    theirs, x = small(keras.layers.BatchNormalization), data((4, 6, 6, 4))
    ours = fastbn.keras.convert(theirs)
    theirs.save(tmp_path / "theirs.keras")
    ours.save(tmp_path / "ours.keras")
    again = keras.saving.load_model(tmp_path / "ours.keras")
    assert {type(layer) for layer in _norms(again)} == {Layer}
    near(again(x), values(ours(x)), 1e-6)
    read = keras.saving.load_model(tmp_path / "ours.keras", custom_objects={"BatchNormalization": keras.layers.BatchNormalization})
    assert {type(layer) for layer in _norms(read)} == {keras.layers.BatchNormalization}
    near(read(x), values(ours(x)), 2e-5)
    where_fastbn_is_not = (
        "import sys, keras; keras.saving.load_model(sys.argv[1], "
        "custom_objects={'fastbn>BatchNormalization': keras.layers.BatchNormalization}); assert 'fastbn' not in sys.modules"
    )
    if BACKEND == "numpy":  # once; the files are the same
        subprocess.run([sys.executable, "-c", where_fastbn_is_not, str(tmp_path / "ours.keras")], check=True)
    converted = fastbn.keras.convert(keras.saving.load_model(tmp_path / "theirs.keras"))
    near(converted(x), values(theirs(x)), 2e-5)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")


def test_what_cannot_be_cloned_is_said() -> None:
    class Own(keras.Model):  # type: ignore[misc]
        pass

    class Graph(keras.Model):  # type: ignore[misc]
        def call(self, inputs: Any) -> Any:
            return super().call(inputs) + 100

    with pytest.raises(ValueError, match="Own is neither Sequential nor Functional"):
        fastbn.keras.convert(Own())
    end = keras.layers.Input((3,))
    graph = Graph(end, keras.layers.BatchNormalization()(end))
    for model in (graph, keras.Sequential([keras.layers.Input((3,)), graph])):
        with pytest.raises(ValueError, match="Graph has a call of its own, and only its own code knows"):
            fastbn.keras.convert(model)
    with pytest.raises(TypeError, match=r"model must be a keras\.Model, got int"):
        fastbn.keras.convert(3)
    with pytest.raises(TypeError, match=r"model must be a keras\.Model, got int"):
        fastbn.keras.summary(3)
    with pytest.raises(TypeError, match="fuse must be True or False, got 'no'"):
        fastbn.keras.convert(keras.Sequential([keras.layers.Input((3,))]), fuse="no")


def test_a_copy_is_not_compiled_where_a_metric_cannot_be_made_again() -> None:
    class Mine(keras.metrics.Mean):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="mine")

    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.BatchNormalization()])
    model.compile("sgd", "mse", metrics=[Mine()])
    with pytest.warns(UserWarning, match="is not compiled, because an optimizer or a metric cannot be made again"):
        converted = fastbn.keras.convert(model)
    assert not converted.compiled
    near(converted(data((4, 3))), values(model(data((4, 3)))), 1e-5)


def test_a_summary_is_a_table_of_all_layers() -> None:
    found = fastbn.keras.summary(small(Layer))
    assert [layer.path for layer in found] == ["inner/inner_bn", "shared", "first", "second"]
    text = str(found)
    assert all(layer.path in text for layer in found)
    assert found[2].after == "Activation"
    assert "4 layers, 16 channels" in text


@pytest.mark.parametrize("fuse", [False, True])
def test_operations_stand_among_layers(fuse: bool) -> None:
    layers = keras.layers
    entry = layers.Input((8, 8, 3))
    first = layers.BatchNormalization(name="first")(keras.ops.add(entry, 1.0))
    second = layers.ReLU()(layers.BatchNormalization(name="second")(keras.ops.relu(first)))
    model = keras.Model(entry, second)
    converted = fastbn.keras.convert(model, fuse=fuse)
    for found in (fastbn.keras.summary(model), fastbn.keras.summary(converted)):
        assert (found[0].before.lower(), found[0].after.lower()) == ("add", "relu")
    activations = [None if layer.activation is None else layer.activation.__name__ for layer in _norms(converted)]
    assert activations == [None, "relu" if fuse else None]
    x = data((2, 8, 8, 3))
    near(converted(x), values(model(x)), 2e-5)


@trains
def test_a_network_trains_to_the_losses_of_keras_own() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    x, y = (digits.images[:512, ..., None] / 16.0).astype(np.float32), digits.target[:512]
    losses = {}
    for kind in (keras.layers.BatchNormalization, Layer):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Input((8, 8, 1))]
        for n in (8, 16):
            layers += [keras.layers.Conv2D(n, 3, padding="same", use_bias=False), kind(), keras.layers.ReLU()]
        model = keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        fitted = model.fit(x, y, batch_size=64, epochs=3, shuffle=False, verbose=0)
        losses[kind] = [*fitted.history["loss"], model.evaluate(x, y, verbose=0)[0]]
    theirs, ours = losses.values()
    assert theirs[2] < theirs[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@only("tensorflow")
def test_shapes_stay_known_in_a_graph_and_batches_may_vary() -> None:
    import tensorflow as tf

    layer = made((None, 5, 3))

    @tf.function(input_signature=[tf.TensorSpec((None, 5, 3))])
    def step(x: Any) -> Any:
        y = layer(x, training=True)
        assert y.shape.as_list() == [None, 5, 3]
        return y

    for n in (4, 7):
        near(step(data((n, 5, 3))), truth(data((n, 5, 3)), layer, True))


@only("tensorflow")
def test_what_xla_compiles_and_what_is_exported_has_tensorflows_own_operations(tmp_path: Path) -> None:
    import tensorflow as tf

    model, x = fastbn.keras.convert(small(keras.layers.BatchNormalization)), data((4, 6, 6, 4))
    model.compile("sgd", "mse", jit_compile=True)
    model.fit(x, np.zeros((4, 3)), verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    near(served.serve(x), values(model(x, training=False)), 1e-5)
    assert not any("PyFunc" in node.op for node in served.signatures["serving_default"].graph.as_graph_def().node)


@only("jax")
def test_a_batch_of_batches_has_statistics_of_each() -> None:
    import jax

    x, layer = data((3, 8, 4)), made((8, 4))
    weights, others = ([v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables))
    y = jax.jit(jax.vmap(lambda x: layer.stateless_call(weights, others, x, training=True)[0]))(x)
    for one, part in zip(y, x, strict=True):
        near(one, truth(part, layer, True))


@only("jax")
def test_without_xlas_interface_jax_calls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbn.keras import xla

    assert xla.works()
    x, dy = data((8, 5, 3), 1.0), data((8, 5, 3), seed=5)
    found = gradients(made(x.shape), x, dy, training=True)
    monkeypatch.setattr(xla, "works", lambda: False)
    for a, b in zip(found, gradients(made(x.shape, name="other"), x, dy, training=True), strict=True):
        np.testing.assert_array_equal(a, b)


@only("jax")
def test_an_error_in_a_function_of_arrays_is_one_of_the_program() -> None:
    import jax

    from fastbn.keras import xla

    def fails(arguments: list[Array], results: list[Array]) -> None:
        raise ValueError("not these numbers")

    with pytest.raises(Exception, match="ValueError: not these numbers"):
        jax.block_until_ready(xla.call("fastbn_fails", fails, (jax.ShapeDtypeStruct((3,), "float32"),), np.ones(3, np.float32)))


def test_a_layer_can_be_copied() -> None:
    layer = made((4, 3), activation="relu")
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301  our own
        near(again(data((4, 3))), values(layer(data((4, 3)))), 1e-6)


@only("torch")
def test_memory_in_other_orders_and_sizes_above_torchs_threshold() -> None:
    import torch

    x = data((8, 64, 20, 20), 1e4)  # 0.8 MB
    for axis, order in ((1, torch.channels_last), (1, torch.contiguous_format), (-1, None)):
        given = torch.tensor(x).contiguous(memory_format=order) if order else torch.tensor(x).permute(0, 2, 3, 1)
        layer = made(tuple(given.shape), axis=axis)
        near(layer(given, training=True), truth(given.numpy(), layer, True))


@only("torch")
def test_compiled_steps_take_the_operator() -> None:
    import torch

    layer, x = made((4, 8, 6)), torch.tensor(data((4, 8, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of functions that torch looks through
        y = torch.compile(lambda x: layer(x, training=False), backend="eager")(x)
    near(y, truth(x.numpy(), layer, False))


@pytest.mark.parametrize("module", ["conversion", "layer", "overview"])
def test_examples_print_what_they_say(module: str) -> None:
    found = doctest.DocTestFinder(exclude_empty=True).find(import_module(f"fastbn.keras.{module}"))
    examples = [example for example in found if example.examples]
    assert examples
    for example in examples:
        doctest.DebugRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)


@trains
def test_the_page_for_keras_runs() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "keras.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(block, names)  # noqa: S102  our own text


class _Swap:
    """Has Keras' own tests test ours."""

    def pytest_configure(self) -> None:
        from keras.src import layers

        layers.BatchNormalization = Layer

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what Keras' own configuration of pytest, which is not installed, leaves out."""
        if BACKEND == "numpy":
            items[:] = [item for item in items if not item.get_closest_marker("requires_trainable_backend")]


if __name__ == "__main__":
    from keras.src.layers.normalization import batch_normalization_test

    raise SystemExit(pytest.main([*sys.argv[1:], str(batch_normalization_test.__file__), __file__], plugins=[_Swap()]))
