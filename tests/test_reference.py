"""The reference is what everything else is measured by; this is what the reference is measured by."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from truth import SHAPES, axis_of, columns, problem, rng

import fastbn
from fastbn import reference
from fastbn.layout import Array

FINITE_DIFFERENCE = {"rtol": 1e-6, "atol": 1e-8}


def _loss(x: Array, weight: Array, bias: Array, dy: Array, axis: int, training: bool, mean: Array, var: Array, mask: Array | None) -> float:
    if training:
        _, mean, var = reference.batch_norm_stats(x, axis, mask)
    return float(np.sum(dy * reference.batch_norm(x, mean, var, weight, bias, 1e-3, axis)))


def _slope(f: Callable[[Array], float], v: Array, h: float = 1e-5) -> Array:
    """Central differences, element by element."""
    slope = np.empty_like(v)
    for i in np.ndindex(v.shape):
        value = v[i]
        v[i] = value + h
        above = f(v)
        v[i] = value - h
        slope[i] = (above - f(v)) / (2 * h)
        v[i] = value
    return slope


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("layout", ["NC", "NCL", "NHWC"])
def test_gradients_are_slopes(layout: str, training: bool, masked: bool) -> None:
    axis = axis_of(layout)
    x, dy, weight, bias, mean, var, _ = problem(SHAPES[layout], np.float64, axis)
    positions = np.moveaxis(x, axis, -1).shape[:-1]
    mask = rng(1).random(positions) < 0.7 if masked and training else None
    if mask is not None:  # a masked loss: the gradient is exact only where it does not see the masked positions
        dy = dy * np.expand_dims(mask, axis)
    used_mean, used_var = reference.batch_norm_stats(x, axis, mask)[1:] if training else (mean, var)
    dx, dweight, dbias = reference.batch_norm_backward(dy, x, used_mean, used_var, weight, 1e-3, axis, training, mask)
    settings = (dy, axis, training, mean, var, mask)
    np.testing.assert_allclose(dx, _slope(lambda v: _loss(v, weight, bias, *settings), x), **FINITE_DIFFERENCE)
    np.testing.assert_allclose(dweight, _slope(lambda v: _loss(x, v, bias, *settings), weight), **FINITE_DIFFERENCE)
    np.testing.assert_allclose(dbias, _slope(lambda v: _loss(x, weight, v, *settings), bias), **FINITE_DIFFERENCE)


def test_digits_of_sums_over_many_rows() -> None:
    """NumPy adds the rows of an array one to the other, which loses more digits than adding in pairs."""
    x, dy = (np.exp(1.5 * rng(seed).standard_normal((30_000, 3))) for seed in (0, 1))
    exact = np.array([math.fsum(v) for v in dy.T])
    for sums in (reference.grad_sums(dy[:, :, None], x[:, :, None], np.zeros(3))[0], reference.batch_norm_backward(dy, x, *x[:2])[2]):
        np.testing.assert_allclose(sums, exact, rtol=1e-15)
    mean = np.array([math.fsum(v) for v in x.T]) / len(x)
    var = np.array([math.fsum(v) for v in np.square(x - mean).T]) / len(x)
    _, *both = reference.batch_norm_stats(x)
    op_mean, _, m2 = reference.stats(x[:, :, None])
    for found, truth in zip((*both, op_mean, m2 / len(x)), (mean, var) * 2, strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_value_per_channel_has_no_gradient_however_large_the_scale(dtype: str) -> None:
    """As in every kernel, what is subtracted from the gradient is exactly the gradient that was rounded."""
    x = np.arange(1, 8, dtype=dtype).reshape(1, 7)
    with fastbn.use_kernel("reference"):
        _, saved = fastbn.batch_norm_forward(x, eps=1e-30, activation=("leaky_relu", 0.1), correction=0)
        np.testing.assert_array_equal(np.asarray(fastbn.batch_norm_backward(x, x, saved).dx), 0)


@pytest.mark.parametrize("layout", SHAPES)
def test_statistics_are_numpys(layout: str) -> None:
    axis = axis_of(layout)
    x = problem(SHAPES[layout], np.float64, axis).x
    rest = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    count, mean, var = reference.batch_norm_stats(x, axis)
    assert count == x.size // 4
    np.testing.assert_allclose(mean, x.mean(rest), rtol=1e-14)
    np.testing.assert_allclose(var, x.var(rest), rtol=1e-14)


@pytest.mark.parametrize("name", ["relu", "exponential", "lognormal"])
def test_variance_of_skewed_data(name: str) -> None:
    r = rng(1)
    x = {
        "relu": lambda: np.maximum(r.normal(size=(256, 64, 2)), 0),
        "exponential": lambda: r.exponential(1, (256, 64, 2)),
        "lognormal": lambda: r.lognormal(0, 1.5, (256, 64, 2)),
    }[name]()
    wide = x.astype(np.longdouble)
    mean = wide.mean((0, 2))
    m2 = np.square(wide - mean[:, None]).sum((0, 2)).astype(np.float64)
    np.testing.assert_allclose(reference.stats(x)[2], m2, rtol=1e-13)
    np.testing.assert_allclose(reference.batch_norm_stats(x)[2], m2 / 512, rtol=1e-13)


@pytest.mark.parametrize("layout", SHAPES)
def test_output_has_the_mean_and_variance_it_should(layout: str) -> None:
    axis = axis_of(layout)
    x, _, weight, bias, _, _, _ = problem(SHAPES[layout], np.float64, axis, mean=100.0)
    _, mean, var = reference.batch_norm_stats(x, axis)
    _, y_mean, y_var = reference.batch_norm_stats(reference.batch_norm(x, mean, var, weight, bias, 0.0, axis), axis)
    np.testing.assert_allclose(y_mean, bias, atol=1e-13)
    np.testing.assert_allclose(y_var, weight**2, rtol=1e-12)


def test_the_four_operations_compose_to_the_definition() -> None:
    x, dy, weight, bias, _, _, _ = problem((3, 4, 5), np.float64)
    _, mean, var = reference.batch_norm_stats(x)
    op_mean, mean_lo, m2 = reference.stats(x)
    np.testing.assert_allclose(op_mean, mean, rtol=1e-15)
    np.testing.assert_allclose(m2 / 15, var, rtol=1e-15)
    assert np.all(np.abs(mean_lo) < 1e-15)
    invstd = 1 / np.sqrt(var + 1e-5)
    y, dx = np.empty_like(x), np.empty_like(x)
    reference.normalize(x, y, mean, invstd * weight, bias)
    np.testing.assert_allclose(y, reference.batch_norm(x, mean, var, weight, bias), rtol=1e-13, atol=1e-14)
    sum_dy, sum_dy_xmu = reference.grad_sums(dy, x, mean)
    reference.grad_input(dy, x, dx, mean, invstd * weight, (sum_dy / 15, invstd**2 * sum_dy_xmu / 15))
    want = reference.batch_norm_backward(dy, x, mean, var, weight)
    for got, truth in zip((dx, sum_dy_xmu * invstd, sum_dy), want, strict=True):
        np.testing.assert_allclose(got, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("layout", ["NC", "NCL", "NCHW", "NCDHW"])
def test_like_torch(layout: str, training: bool) -> None:
    torch = pytest.importorskip("torch")
    x, dy, weight, bias, mean, var, _ = problem(SHAPES[layout], np.float64)
    tx, tw, tb = (torch.tensor(a, requires_grad=True) for a in (x, weight, bias))
    ty = torch.nn.functional.batch_norm(tx, torch.tensor(mean), torch.tensor(var), tw, tb, training=training, eps=1e-3)
    ty.backward(torch.tensor(dy))
    if training:
        _, mean, var = reference.batch_norm_stats(x)
    y = reference.batch_norm(x, mean, var, weight, bias, 1e-3)
    gradients = reference.batch_norm_backward(dy, x, mean, var, weight, 1e-3, training=training)
    for ours, theirs in zip((y, *gradients), (ty.detach(), tx.grad, tw.grad, tb.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("training_mode", [False, True])
def test_onnx_node_tests(training_mode: bool) -> None:
    node = pytest.importorskip("onnx.backend.test.case.node")
    pytest.importorskip("onnx.backend.test.case.node.batch_normalization")  # its import fills the list
    cases = [case for case in node._NodeTestCases if case.name.startswith("test_batchnorm") and ("training" in case.name) == training_mode]
    assert len(cases) == 2
    for case in cases:
        attributes = {a.name: a.f for a in case.model.graph.node[0].attribute}
        ((x, weight, bias, mean, var), outputs) = case.data_sets[0]
        if training_mode:
            _, batch_mean, batch_var = reference.batch_norm_stats(x)
            np.testing.assert_allclose(0.9 * mean + 0.1 * batch_mean, outputs[1], rtol=1e-6)
            np.testing.assert_allclose(0.9 * var + 0.1 * batch_var, outputs[2], rtol=1e-6)
            mean, var = batch_mean, batch_var
        y = reference.batch_norm(x, mean, var, weight, bias, attributes.get("epsilon", 1e-5))
        np.testing.assert_allclose(y, outputs[0], rtol=1e-5, atol=1e-6)


def test_vectors_broadcast_along_the_channels() -> None:
    x = np.arange(24.0).reshape(2, 3, 4)
    for axis in (0, 1, 2, -1):
        mean = np.arange(x.shape[axis]) + 0.5
        y = reference.batch_norm(x, mean, np.ones_like(mean), eps=0.0, axis=axis)
        np.testing.assert_array_equal(y, x - columns(mean, x, axis))
