"""Finite data at the ends of the range have finite answers: those of the same data in another unit."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from truth import columns, rng, same_bits, within

import fastbn
from fastbn import reference
from fastbn.dispatch import KERNELS
from fastbn.layout import Array

SHAPE = (8, 3, 5, 4)
EXTREME = [0, 2]  # channels; the one between is ordinary
SIZES = {
    "float64": [1e150, 1e154, 1e200, 1e300, 1e306, 1e-150, 1e-160, 1e-170, 1e-300],
    "float32": [1e30, 5e37, 1e-30, 1e-37],
}
CASES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]

pytestmark = pytest.mark.usefixtures("kernel")


def _data(dtype: str, size: float, layout: str = "NCHW") -> tuple[Array, Array, Array, Array]:
    """Values with extreme channels; the exponents of units in which these are ordinary; and the values in them."""
    x, dy = rng().normal(0.5, 1, SHAPE), rng(1).standard_normal(SHAPE)
    x[:, EXTREME] *= size
    x = x.astype(dtype)
    exponents = np.where(np.isin(np.arange(3), EXTREME), np.frexp(size)[1], 0)
    units = np.ldexp(x.astype(np.float64), -exponents[:, None, None])
    if layout == "NHWC":
        x, dy, units = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)) for a in (x, dy, units))
    return x, dy.astype(dtype), exponents, units


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_training(dtype: str, size: float, layout: str) -> None:
    axis = 1 if layout == "NCHW" else 3
    x, dy, exponents, units = _data(dtype, size, layout)
    weight, bias = np.array([0.5, 2, -3], dtype), np.array([1, -1, 0.5], dtype)
    running_mean, running_var = np.zeros(3, dtype), np.ones(3, dtype)
    y, saved = fastbn.batch_norm_forward(x, weight, bias, running_mean, running_var, eps=0.0, layout=layout)
    count, mean, var = reference.batch_norm_stats(units, axis)
    tiny = 1e-6 if dtype == "float32" else 1e-14
    within(y, reference.batch_norm(units, mean, var, weight, bias, 0.0, axis), 5 * tiny)
    with np.errstate(all="ignore"):  # a variance need not be a number
        within(saved.invstd, np.ldexp(1 / np.sqrt(var), -exponents), tiny * np.ldexp(1 / np.sqrt(var), -exponents) + np.finfo(dtype).tiny)
        np.testing.assert_allclose(running_mean, 0.1 * np.ldexp(mean, exponents), rtol=10 * tiny, atol=float(np.finfo(dtype).tiny))
        sample = np.ldexp(var * count / (count - 1), 2 * exponents).astype(dtype)
        np.testing.assert_allclose(running_var, 0.9 + np.asarray(0.1, dtype) * sample, rtol=tiny)
        stats = fastbn.batch_norm_stats(x, layout=layout)
        np.testing.assert_allclose(stats.var, np.ldexp(var, 2 * exponents).astype(dtype), rtol=tiny, atol=float(np.finfo(dtype).tiny))
        want = reference.batch_norm_backward(dy, units, mean, var, weight, 0.0, axis)
        dx = want[0] / columns(np.exp2(exponents), x, axis)
    got = fastbn.batch_norm_backward(dy, x, saved)
    assert got.dx is not None
    per_channel = tuple(i for i in range(4) if i != axis)
    within(got.dx, dx, 10 * tiny * np.abs(dx).max(per_channel, keepdims=True) + np.finfo(dtype).tiny)
    within(np.asarray(got.dweight), want[1], 100 * tiny)
    within(np.asarray(got.dbias), want[2], 100 * tiny)


@pytest.mark.parametrize(("dtype", "size"), [("float64", 1e200), ("float64", 1e-170), ("float32", 5e37)])
def test_residual_activation_and_in_place(dtype: str, size: float) -> None:
    x, dy, _, units = _data(dtype, size)
    residual = rng(2).standard_normal(SHAPE).astype(dtype)
    y, saved = fastbn.batch_norm_forward(x, eps=0.0, activation="relu", residual=residual)
    _, mean, var = reference.batch_norm_stats(units)
    z = reference.batch_norm(units, mean, var, eps=0.0) + residual
    tiny = 1e-6 if dtype == "float32" else 1e-14
    within(y, np.maximum(z, 0), 5 * tiny)
    wrt = ("x", "weight", "bias", "residual")
    got = fastbn.batch_norm_backward(dy, x, saved, wrt=wrt)
    same_bits(np.asarray(got.dresidual), np.where(z > 0, dy, 0).astype(dtype))
    for name, a in (("x", x.copy()), ("residual", residual.copy())):
        given = {"x": x, "residual": residual} | {name: a}
        same_bits(fastbn.batch_norm_forward(**given, eps=0.0, activation="relu", out=a)[0], y)
    for name in ("dy", "x"):
        given = {"dy": dy.copy(), "x": x.copy()}
        again = fastbn.batch_norm_backward(**given, saved=saved, wrt=wrt, out=given[name])
        for a, b in zip(got, again, strict=True):
            same_bits(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_other_channels_keep_their_bits(dtype: str, size: float) -> None:
    x, dy, _, _ = _data(dtype, size)
    ordinary = x.copy()
    ordinary[:, EXTREME] = 1
    results: list[list[Any]] = []
    for a in (x, ordinary):
        y, saved = fastbn.batch_norm_forward(a)
        gradients = fastbn.batch_norm_backward(dy, a, saved)
        results.append([y[:, 1], np.asarray(gradients.dx)[:, 1], np.asarray(gradients.dweight)[1:2], saved.invstd[1:2], saved.scale[1:2]])
    for a, b in zip(*results, strict=True):
        same_bits(np.ascontiguousarray(a), np.ascontiguousarray(b))


def test_values_that_span_the_range() -> None:
    for dtype in ("float32", "float64"):
        largest = np.finfo(dtype).max
        x = np.array([[-largest], [largest], [largest], [largest]])  # the first is more than the largest away from the mean
        np.testing.assert_allclose(fastbn.batch_norm(x, None, None, training=True).ravel(), np.array([-3, 1, 1, 1]) / 3**0.5, rtol=1e-6)
        x = np.array([[-largest], [largest], [largest], [-largest]])
        y, saved = fastbn.batch_norm_forward(x)
        np.testing.assert_allclose(y, x / largest, rtol=1e-6)
        np.testing.assert_allclose(np.float64(saved.invstd) * largest, 1, rtol=1e-6)
        dx = fastbn.batch_norm_backward(x / largest, x, saved, wrt="x").dx  # dy is along y: only the rounding is left
        assert dx is not None
        assert np.all(np.abs(dx) <= 10 * np.finfo(dtype).eps / largest)


def test_a_variance_that_is_a_number_though_the_sum_of_squares_is_none() -> None:
    x = np.resize([1e154, -1e154], (400, 1))
    np.testing.assert_allclose(fastbn.batch_norm_stats(x).var, 1e308, rtol=1e-14)
    running_var = np.zeros(1)
    fastbn.batch_norm(x, None, running_var, training=True, momentum=1.0)
    np.testing.assert_allclose(running_var, 1e308 / 399 * 400, rtol=1e-14)


@pytest.mark.parametrize("eps", [1e-80, 1e-300])
def test_constant_channels_with_a_very_small_eps_are_the_bias(eps: float) -> None:
    bias = np.array([0.25, -3.0])
    for dtype in ("float32", "float64"):
        x = np.full((4, 2, 3, 3), 7.0, dtype)
        y = fastbn.batch_norm(x, None, None, None, bias, training=True, eps=eps)
        np.testing.assert_array_equal(y, np.broadcast_to(bias[:, None, None], x.shape))
        frozen = fastbn.FrozenBatchNorm([7, 7], [0, 0], None, bias, eps=eps)
        np.testing.assert_array_equal(frozen(x), y)
        np.testing.assert_array_equal(fastbn.batch_norm(x, np.full(2, 7.0), np.zeros(2), None, bias, eps=eps), y)


@pytest.mark.parametrize(("dtype", "values"), [("float32", (0, 1e-40)), ("float32", (3e-39, -3e-39)), ("float64", (0, 1e-310))])
def test_two_subnormal_values_are_minus_one_and_one(dtype: str, values: tuple[float, float]) -> None:
    x = np.array(values, dtype).reshape(2, 1)
    np.testing.assert_allclose(fastbn.batch_norm(x, None, None, training=True, eps=0.0), np.sign(x - x[::-1]), rtol=1e-6)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    for dtype in ("float32", "float64"):
        x = rng().standard_normal((6, 3)).astype(dtype)
        x[2, 1] = value
        y = fastbn.batch_norm(x, None, None, training=True)
        np.testing.assert_array_equal(np.isnan(y), np.broadcast_to([False, True, False], y.shape))


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_gradients_from_given_sums_and_with_a_mask(size: float) -> None:
    x, dy, exponents, units = _data("float64", size)
    _, mean, var = reference.batch_norm_stats(units)
    dx, dweight, dbias = reference.batch_norm_backward(dy, units, mean, var, eps=0.0)
    dx = dx / columns(np.exp2(exponents), x, 1)
    largest = np.abs(dx).max((0, 2, 3), keepdims=True)
    wide_mean, invstd = np.ldexp(mean, exponents), np.ldexp(1 / np.sqrt(var), -exponents)
    sums = fastbn.batch_norm_backward_reduce(dy, x, wide_mean, invstd)
    within(fastbn.batch_norm_backward_elemt(dy, x, wide_mean, invstd, None, sums[0], sums[1], x.size // 3), dx, 1e-13 * largest)
    _, saved = fastbn.batch_norm_forward(x, eps=0.0, mask=np.ones((8, 5, 4), bool))
    got = fastbn.batch_norm_backward(dy, x, saved)
    for gradient, truth, bound in zip(got[:3], (dx, dweight, dbias), (1e-13 * largest, 1e-12, 1e-12), strict=True):
        within(np.asarray(gradient), truth, bound)


@pytest.mark.parametrize("shape", [(2, 40, 30), (1, 40, 700), (100, 128, 1), (300, 40, 1), (40, 40, 5), (3, 2, 20_000)], ids=str)
@pytest.mark.parametrize(("dtype", "size"), [("float64", 1e200), ("float64", 1e-170), ("float32", 1.2e38), ("bfloat16", 1.2e38)])
def test_the_bits_do_not_depend_on_threads_and_places(dtype: str, size: float, shape: tuple[int, ...]) -> None:
    """One channel at an end of the range among others that are not, which have the bits that they have without it."""
    if dtype == "bfloat16" and any(k.name == fastbn.dispatch.pinned() and k.declines(dtype) for k in KERNELS.values()):
        return
    storage: Any = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    r = rng(3)
    x, residual = (np.clip(r.normal(0.5, 1, shape), -2.5, 2.5) for _ in range(2))
    ordinary = x.astype(storage)
    x[:, 1] *= size
    others = np.arange(shape[1]) != 1
    x, residual = x.astype(storage), residual.astype(storage)
    for activation, added in ((None, None), ("silu", residual)):
        results = []
        for threads, place in ((1, "new"), (2, "new"), (1, "x"), (2, "x"), (2, "residual")):
            a, b = x.copy(), None if added is None else added.copy()
            kind = np.float64 if activation is None else np.float32
            running = np.zeros(shape[1], kind), np.ones(shape[1], kind)
            out = a if place == "x" else b if place == "residual" else None
            with fastbn.num_threads(threads):
                y, saved = fastbn.batch_norm_forward(a, None, None, *running, eps=0.0, activation=activation, residual=b, out=out)
            results.append([np.asarray(v, np.float64) for v in (y, *running, saved.mean, saved.invstd, saved.scale, saved.shift)])
        for other in results[1:]:
            for v, w in zip(results[0], other, strict=True):
                same_bits(v, w)
        plain, _ = fastbn.batch_norm_forward(ordinary, eps=0.0, activation=activation, residual=added)
        same_bits(np.ascontiguousarray(results[0][0][:, others]), np.ascontiguousarray(np.asarray(plain, np.float64)[:, others]))
        within(results[0][0][:, 1], np.asarray(plain, np.float64)[:, 1], {"float64": 1e-13, "float32": 1e-5, "bfloat16": 0.05}[dtype])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("dtype", "size"), [*CASES, ("float32", 1e-39), ("bfloat16", 5e37), ("bfloat16", 1e-39)])
def test_a_mask(dtype: str, size: float, layout: str) -> None:
    """What counts are the ordinary statistics of the rest; what does not is normalized with these."""
    if dtype == "bfloat16" and any(k.name == fastbn.dispatch.pinned() and k.declines(dtype) for k in KERNELS.values()):
        return
    storage: Any = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    axis = 1 if layout == "NCHW" else 3
    x, _, _, units = _data(storage, size, layout)
    mask = rng(4).random((8, 5, 4)) < 0.7
    residual = rng(2).standard_normal(x.shape).astype(storage)
    weight, bias = np.array([0.5, 2, -3]), np.array([1, -1, 0.5])
    y, saved = fastbn.batch_norm_forward(x, weight, bias, eps=0.0, layout=layout, mask=mask, residual=residual, activation="relu")
    count, mean, var = reference.batch_norm_stats(units, axis, mask)
    assert saved.count == count
    z = reference.batch_norm(units, mean, var, weight, bias, 0.0, axis) + residual
    within(y, np.maximum(z, 0), {"float64": 5e-14, "float32": 5e-6}.get(dtype, 0.05))


@pytest.mark.parametrize("mask", [None, np.ones(400, bool)], ids=["all", "masked"])
@pytest.mark.parametrize(("momentum", "truth"), [(1e-3, 1e307), (1.0, np.inf), (0.0, 0.0)])
def test_a_running_variance_that_is_a_number_though_that_of_the_batch_is_none(momentum: float, truth: float, mask: Array | None) -> None:
    x = np.resize([1.0, -1.0], (2, 400)).T * [1, 1e155]
    running = np.zeros(2), np.full(2, 2.0)
    fastbn.batch_norm(x, *running, training=True, momentum=momentum, correction=0, mask=mask)
    np.testing.assert_allclose(running[0], 0, atol=1e140)
    np.testing.assert_allclose(running[1], [2 - momentum, truth + 2 * (1 - momentum)], rtol=1e-14)


@pytest.mark.parametrize("activation", ["hardswish", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh"])
@pytest.mark.parametrize(("dtype", "size"), [("float64", 1e160), ("float32", 1e30)])
def test_far_out_slopes_are_0_or_1(dtype: str, size: float, activation: str) -> None:
    x, zero, one = np.array([[-size], [size]], dtype), np.zeros(1), np.ones(1)
    y, saved = fastbn.batch_norm_forward(x, None, None, zero, one, training=False, eps=0.0, activation=activation)
    bounded = activation in ("sigmoid", "tanh")
    np.testing.assert_allclose(y, [[-1 if activation == "tanh" else 0], [1 if bounded else x[1, 0]]], rtol=0, atol=1e-30)
    dx = fastbn.batch_norm_backward(np.ones_like(x), x, saved).dx
    np.testing.assert_allclose(np.asarray(dx), [[0], [0 if bounded else 1]], rtol=0, atol=1e-30)


@pytest.mark.parametrize("shape", [(9, 16, 1), (35, 8, 1), (40, 3, 1), (3, 4, 9)], ids=str)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e-25), ("float32", 1e-39), ("float64", 1e-160), ("float64", 1e-300)])
def test_a_variance_of_small_numbers_that_cancel(dtype: str, size: float, shape: tuple[int, ...]) -> None:
    """Around their mean they add up to exactly zero, and their squares are too small a number: that is no constant channel."""
    for seed in range(50):
        units = rng(seed).integers(-3, 4, shape).astype(np.float64)
        units[:, 0] = 1  # this one is
        x = (units * size).astype(dtype)
        varies = np.flatnonzero(units.var((0, 2)))
        units = units[:, varies]
        _, mean, var = reference.batch_norm_stats(units)
        y = fastbn.batch_norm(x, None, None, training=True, eps=0.0)[:, varies]
        within(y, reference.batch_norm(units, mean, var, eps=0.0), 1e-5 if dtype == "float32" else 1e-13)
        assert fastbn.batch_norm_stats(x).var[0] == 0


WIDE = np.longdouble
needs_range = pytest.mark.skipif(np.finfo(WIDE).max / 2 < WIDE(1e308) * 10, reason="long double has no larger range than double here")
PLACES = {"image": np.s_[1:2], "channel": np.s_[:, 1:2], "all": np.s_[:]}
SIBLINGS = [*CASES, ("float64", 1e160), ("float32", 1e19), ("float32", 1e-41)]


def _images(dtype: str, size: float, place: str, last: bool) -> tuple[Array, Array, int]:
    """Values of which some are extreme, as the caller has them, and with channels first in long double; the axis of the channels."""
    x = rng().normal(0.5, 1, (3, 4, 5, 6)).astype(WIDE)
    x[:, 3] = 0.75  # a constant channel
    x[PLACES[place]] *= size
    x = x.astype(dtype)
    return np.ascontiguousarray(np.moveaxis(x, 1, -1) if last else x), x.astype(WIDE), 3 if last else 1


def _moments(x: Array, *axes: int) -> tuple[Array, Array]:
    mean = x.mean(axes, keepdims=True)
    mean = mean + (x - mean).mean(axes, keepdims=True)
    return mean, np.square(x - mean).mean(axes, keepdims=True)


@needs_range
@pytest.mark.parametrize(("place", "last"), list(product(PLACES, (False, True))))
@pytest.mark.parametrize(("dtype", "size"), SIBLINGS)
def test_batch_channel_norm_and_renorm(dtype: str, size: float, place: str, last: bool) -> None:
    x, wide, axis = _images(dtype, size, place, last)
    tiny, eps = 1e-5 if dtype == "float32" else 1e-12, 1e-5
    (mean, var), (own_mean, own_var) = _moments(wide, 0, 2, 3), _moments(wide, 1, 2, 3)
    batch = (wide - mean) / np.sqrt(var + WIDE(eps))
    want = (batch + 3 * (wide - own_mean) / np.sqrt(own_var + WIDE(eps))) / 4
    y = fastbn.batch_channel_norm(x, None, None, np.full(4, 0.25), training=True, eps=eps, axis=axis)
    within(np.moveaxis(y, axis, 1), want, tiny * np.maximum(1, np.abs(want)))
    r = np.clip(np.sqrt(var + WIDE(eps)) / np.sqrt(WIDE(1 + eps)), WIDE(1) / 3, 3)
    want = batch * r + np.clip(mean / np.sqrt(WIDE(1 + eps)), -5, 5)
    y = fastbn.batch_renorm(x, np.zeros(4, dtype), np.ones(4, dtype), training=True, eps=eps, axis=axis)
    within(np.moveaxis(y, axis, 1), want, tiny * np.maximum(1, np.abs(want)))


@needs_range
@pytest.mark.parametrize(("place", "last"), list(product(PLACES, (False, True))))
@pytest.mark.parametrize("momentum", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize(("dtype", "size"), [*SIBLINGS, ("float64", 4e307)])
def test_running_statistics_of_instance_norm(dtype: str, size: float, momentum: float, place: str, last: bool) -> None:
    x, wide, axis = _images(dtype, size, place, last)
    mean, var = _moments(wide, 2, 3)
    running = np.zeros(4, dtype), np.full(4, 2, dtype)
    fastbn.instance_norm(x, *running, momentum=momentum, axis=axis)
    with np.errstate(over="ignore"):
        want = [(momentum * v.mean((0, 2, 3))).astype(dtype) for v in (mean, var * WIDE(30) / 29)]
        tiny, step = 1e-5 if dtype == "float32" else 1e-13, 2 * float(np.finfo(dtype).smallest_subnormal)
        np.testing.assert_allclose(running[0], want[0], rtol=tiny, atol=1e-15 * momentum * np.abs(x).max() + step)
        np.testing.assert_allclose(running[1], want[1] + (1 - momentum) * np.asarray(2, dtype), rtol=tiny, atol=step)


def test_what_is_not_finite_stays_in_its_channel_of_running_statistics() -> None:
    x = rng().normal(0.5, 1, (3, 4, 5, 6))
    x[0, 1, 0, 0], x[1, 2, 0, 0] = np.nan, np.inf
    running = np.zeros(4), np.ones(4)
    fastbn.instance_norm(x, *running)
    for v in running:
        np.testing.assert_array_equal(np.isfinite(v), [True, False, False, True])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("eps", "size", "weight"), [(1e200, 1.0, 1.0), (1e300, 1.0, 1e30), (1e-5, 1e37, 1e-10)])
def test_a_scale_that_underflows_gives_a_gradient_of_zero(eps: float, size: float, weight: float, last: bool) -> None:
    draw = np.random.default_rng(0)
    x, dy = (draw.uniform(0.5, 1.0, (3, 4, 5, 6)) * size).astype(np.float32), draw.normal(size=(3, 4, 5, 6)).astype(np.float32)
    if last:
        x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy))
    w = np.full(4, weight)
    for forward, backward, given in (
        (fastbn.group_norm_forward, fastbn.group_norm_backward, (2, w)),
        (fastbn.instance_norm_forward, fastbn.instance_norm_backward, (None, None, w)),
        (fastbn.batch_norm_forward, fastbn.batch_norm_backward, (w,)),
    ):
        g = backward(dy, x, forward(x, *given, eps=eps)[1])
        assert np.abs(g.dx).max() < 1e-37
        np.testing.assert_allclose(g.dbias, dy.sum((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("weights", [[0.0, 1.0, 2.0, -1.0], [1e-20, 1.0, 1e9, -1.0]])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("power", [84, -84])
def test_a_weight_of_zero_takes_values_of_any_size(power: int, last: bool, weights: list[float]) -> None:
    x, dy = (np.random.default_rng(i).normal(size=(3, 4, 5, 6)).astype(np.float32) for i in range(2))
    if last:
        x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy))
    w, size = np.array(weights), np.float32(2.0**power)
    for forward, backward, given in (
        (fastbn.group_norm_forward, fastbn.group_norm_backward, (2, w)),
        (fastbn.instance_norm_forward, fastbn.instance_norm_backward, (None, None, w)),
    ):
        for after in (None, "silu"):
            want = backward(dy, x, forward(x, *given, eps=0.0, activation=after)[1]).dx.astype(np.float64)
            got = backward(dy, x * size, forward(x * size, *given, eps=0.0, activation=after)[1]).dx * 2.0**power
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
            # A tiny weight is as good as none where another one is not: by one sweep.
            near = np.where(np.abs(w) < 1e-9, 1e-9, w)
            own = (*given[:-1], near)
            one = backward(dy, x, forward(x, *own, eps=0.0, activation=after)[1]).dx
            np.testing.assert_allclose(want, one, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.usefixtures("kernel")
def test_a_weight_that_is_tiny_beside_another_takes_small_values() -> None:
    x, dy = (np.random.default_rng(i).normal(size=(3, 4, 5, 6)).astype(np.float32) for i in range(2))
    given, size = (None, None, np.full(4, 0.5), np.array([1e-20, 1.0, 1e9, -1.0]), None, True), np.float32(2.0**-84)
    forward, backward = fastbn.batch_channel_norm_forward, fastbn.batch_channel_norm_backward
    want = backward(dy, x, forward(x, *given, eps=0.0)[1]).dx.astype(np.float64)
    got = backward(dy, x * size, forward(x * size, *given, eps=0.0)[1]).dx * 2.0**-84
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("power", [540, 1000, -540, -1000])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("weights", [[0.5, 1.0, 2.0, -1.0], [0.0, 1.0, 2.0, -1.0]])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_of_float64_take_values_of_any_size(activation: Any, weights: list[float], last: bool, power: int) -> None:
    """The square of one over a deviation leaves the range, and no gradient does."""
    x, dy = (rng(i).normal(size=(3, 4, 5, 6)) for i in range(2))
    w, size = np.array(weights), np.ldexp(1.0, power)
    if last:
        x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy))
    for forward, backward, given in (
        (fastbn.group_norm_forward, fastbn.group_norm_backward, (2, w)),
        (fastbn.instance_norm_forward, fastbn.instance_norm_backward, (None, None, w)),
        (fastbn.batch_channel_norm_forward, fastbn.batch_channel_norm_backward, (None, None, np.full(4, 0.25), w, None, True)),
        (fastbn.batch_norm_forward, fastbn.batch_norm_backward, (w,)),
        (fastbn.layer_norm_forward, fastbn.layer_norm_backward, (6,)),
    ):
        want, got = (backward(dy, a, forward(a, *given, eps=0.0, activation=activation)[1]) for a in (x, x * size))
        np.testing.assert_allclose(got.dx * size, want.dx, rtol=1e-11, atol=1e-12 * np.abs(want.dx).max())
        np.testing.assert_allclose(got.dweight, want.dweight, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 3, 40, 40), (64, 3)], ids=str)
def test_an_infinite_weight_gives_infinities_of_the_sign_of_the_deviation(shape: tuple[int, ...]) -> None:
    """Whatever the rounded mean has lost: infinite times that, it would be all there is."""
    x = rng().standard_normal(shape).astype(np.float32)
    weight = np.array([np.inf, 1, -np.inf], np.float32)
    sides = np.sign(x - x.mean((0, *range(2, x.ndim)), np.float64, keepdims=True))
    y, _ = fastbn.batch_norm_forward(x, weight)
    for c in (0, 2):
        np.testing.assert_array_equal(y[:, c], sides[:, c] * weight[c])
    if x.ndim > 2:
        sides = np.sign(x - x.mean((2, 3), np.float64, keepdims=True))
        z, saved = fastbn.instance_norm_forward(x, weight=weight, activation="leaky_relu")
        np.testing.assert_array_equal(z[:, 0], sides[:, 0] * weight[0])
        assert np.isnan(fastbn.instance_norm_backward(x, x, saved).dx[:, 1]).sum() == 0


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 3, 40, 40), (64, 3)], ids=str)
def test_an_infinite_gradient_gives_the_weight_one_of_the_sign_of_the_deviation(shape: tuple[int, ...]) -> None:
    x, dy = rng().standard_normal(shape).astype(np.float32), rng(1).standard_normal(shape).astype(np.float32)
    for n in range(shape[0]):
        given, at = dy.copy(), (n, 1, *[0] * (x.ndim - 2))
        given[at] = np.inf
        _, saved = fastbn.batch_norm_forward(x)
        gradients = fastbn.batch_norm_backward(given, x, saved)
        assert gradients.dweight is not None
        assert gradients.dweight[1] == np.inf * (x[at] - x[:, 1].mean(dtype=np.float64))
        if x.ndim > 2:
            _, saved_parts = fastbn.instance_norm_forward(x, weight=np.ones(3, np.float32))
            gradients = fastbn.instance_norm_backward(given, x, saved_parts)
            assert gradients.dweight is not None
            assert gradients.dweight[1] == np.inf * (x[at] - x[n, 1].mean(dtype=np.float64))
