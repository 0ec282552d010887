"""The public functions against the float64 definition."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from truth import Problem, axis_of, backward, columns, count, forward, near, near_gradient, near_gradients, problem, rng, same_bits

import fastbn
from fastbn import reference
from fastbn.layout import Array

pytestmark = pytest.mark.usefixtures("kernel")

# Channels with spatial sizes: each of truth.SIZES stands once on either side.
PAIRS = (
    (1, 7), (2, 33), (3, 1), (5, 97), (7, 16), (8, 9), (9, 8), (15, 3), (16, 17),
    (17, 15), (31, 2), (33, 49), (49, 5), (63, 31), (65, 63), (97, 65), (100, 100),
)  # fmt: skip
FULL = {"NC": (9, 33), "NCHW": (3, 17, 7, 5), "NHWC": (3, 7, 5, 17), "NCDHW": (2, 9, 3, 4, 5), "NDHWC": (2, 3, 4, 5, 9)}
CASES = (
    [pytest.param("NCL", (4, c, s), id=f"NCL-{c}-{s}") for c, s in PAIRS]
    + [pytest.param("NLC", (4, s, c), id=f"NLC-{c}-{s}") for c, s in PAIRS]
    + [pytest.param(layout, shape, id=layout) for layout, shape in FULL.items()]
)
ALL = ("x", "weight", "bias")
single = pytest.mark.parametrize("dtype", ["float32"], indirect=True)
wide = pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)


def same_gradients(got: fastbn.Gradients, want: fastbn.Gradients) -> None:
    for name in ALL:
        same_bits(getattr(got, f"d{name}"), getattr(want, f"d{name}"))


def _frozen_gradients(p: Problem, eps: float = 1e-5) -> tuple[Array, Array, Array]:
    return reference.batch_norm_backward(p.dy, p.x, p.mean, p.var, p.weight, eps, p.axis, training=False)


@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_training(layout: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    p = problem(shape, dtype, axis_of(layout))
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)
    assert y.dtype == dtype
    near(y, forward(p.x, p.weight, p.bias, axis=p.axis))
    n, mean, var = reference.batch_norm_stats(p.x, p.axis)
    assert saved.count == n
    assert saved.mean.dtype == saved.invstd.dtype == p.weight.dtype
    accuracy = 1e-13 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(saved.invstd, 1 / np.sqrt(var + 1e-5), rtol=accuracy)
    np.testing.assert_allclose(saved.mean, mean, rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_training_gradients(layout: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    p = problem(shape, dtype, axis_of(layout))
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)[1]
    gradients = fastbn.batch_norm_backward(p.dy, p.x, saved)
    assert gradients.dx is not None
    assert gradients.dx.dtype == dtype
    near_gradients(gradients, backward(p.dy, p.x, p.weight, axis=p.axis))


@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_inference(layout: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    p = problem(shape, dtype, axis_of(layout))
    before = p.mean.copy(), p.var.copy()
    y = fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, layout=layout)
    near(y, reference.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, axis=p.axis))
    again, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, p.mean, p.var, training=False, layout=layout)
    same_bits(again, y)
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), _frozen_gradients(p))
    same_bits(p.mean, before[0])
    same_bits(p.var, before[1])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_inference_is_exact_where_it_can_be(layout: str, dtype: np.dtype[Any]) -> None:
    """Small integers, and deviations that are powers of two: there is nothing to round."""
    axis = axis_of(layout)
    r = rng()
    x = r.integers(-8, 8, FULL[layout]).astype(dtype)
    mean, exponent, bias = (r.integers(-4, 5, 17) for _ in range(3))
    y = fastbn.batch_norm(x, mean, 4.0**exponent, np.full(17, 2), bias, eps=0.0, layout=layout)
    wide_x = x.astype(np.float64)
    want = (wide_x - columns(mean, x, axis)) * columns(2.0 ** (1 - exponent), x, axis) + columns(bias, x, axis)
    exact = want.astype(dtype).astype(np.float64) == want
    assert exact.mean() > 0.9
    np.testing.assert_array_equal(y.astype(np.float64)[exact], want[exact])


@pytest.mark.parametrize("given", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@single
def test_weight_and_bias_are_optional(training: bool, given: tuple[str, ...], dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 5), dtype)
    parameters = {name: getattr(p, name) for name in given}
    full = {"weight": np.ones_like(p.weight), "bias": np.zeros_like(p.bias)} | parameters
    mean, var = (None, None) if training else (p.mean, p.var)
    y, saved = fastbn.batch_norm_forward(p.x, running_mean=mean, running_var=var, training=training, **parameters)
    want, want_saved = fastbn.batch_norm_forward(p.x, running_mean=mean, running_var=var, training=training, **full)
    same_bits(y + np.float32(0), want + np.float32(0))  # the sign of a zero may tell an absent bias from one of zero
    same_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), fastbn.batch_norm_backward(p.dy, p.x, want_saved))


@pytest.mark.parametrize("wrt", [subset for n in range(4) for subset in combinations(ALL, n)], ids=lambda wrt: "+".join(wrt) or "nothing")
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@single
def test_gradients_asked_for(training: bool, wrt: tuple[str, ...], dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 5), dtype)
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, p.mean, p.var, training=training)[1]
    full = fastbn.batch_norm_backward(p.dy, p.x, saved)
    some = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=wrt)
    for name in ALL:
        got, want = getattr(some, f"d{name}"), getattr(full, f"d{name}")
        if name in wrt:
            same_bits(got, want)
        else:
            assert got is None
    assert some.dresidual is None


@single
def test_the_gradient_is_that_of_the_forward(dtype: np.dtype[Any]) -> None:
    """Running statistics may move on between a frozen forward and its backward."""
    p = problem((3, 17, 5), dtype)
    mean, var = p.mean.copy(), p.var.copy()
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, mean, var, training=False)[1]
    mean += 1
    var += 1
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), _frozen_gradients(p))


@single
def test_one_gradient_by_its_name(dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 5), dtype)
    saved = fastbn.batch_norm_forward(p.x)[1]
    gradients = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt="weight")
    assert gradients.dweight is not None
    assert gradients.dx is gradients.dbias is None


# Running statistics


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
def test_running_statistics(layout: str, momentum: float, dtype: np.dtype[Any]) -> None:
    p = problem(FULL[layout], dtype, axis_of(layout))
    mean, var = p.mean.copy(), p.var.copy()
    y = fastbn.batch_norm(p.x, mean, var, p.weight, p.bias, True, momentum, layout=layout)
    same_bits(y, fastbn.batch_norm(p.x, None, None, p.weight, p.bias, True, layout=layout))
    n, batch_mean, batch_var = reference.batch_norm_stats(p.x, p.axis)
    rtol = 1e-14 if dtype == np.float64 else 5e-7
    np.testing.assert_allclose(mean, (1 - momentum) * p.mean.astype(np.float64) + momentum * batch_mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(var, (1 - momentum) * p.var.astype(np.float64) + momentum * batch_var * n / (n - 1), rtol=rtol)
    if momentum == 0.0:
        same_bits(mean, p.mean)
        same_bits(var, p.var)


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@single
def test_one_running_statistic_alone(which: str, dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 5), dtype)
    mean, var = p.mean.copy(), p.var.copy()
    fastbn.batch_norm(p.x, mean, var, training=True)
    alone = {"running_mean": p.mean, "running_var": p.var}[which].copy()
    fastbn.batch_norm_forward(p.x, **{which: alone})
    same_bits(alone, mean if which == "running_mean" else var)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@wide
def test_running_statistics_of_another_dtype(kind: type, dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 5), dtype)
    mean, var = p.mean.astype(kind), p.var.astype(kind)
    want_mean, want_var = p.mean.copy(), p.var.copy()
    fastbn.batch_norm(p.x, mean, var, training=True)
    fastbn.batch_norm(p.x, want_mean, want_var, training=True)
    assert mean.dtype == var.dtype == kind
    tolerance = 4 * max(float(np.finfo(kind).eps), float(np.finfo(np.float32).eps))
    np.testing.assert_allclose(mean, want_mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(var, want_var, rtol=tolerance)


@single
def test_running_statistics_may_be_strided(dtype: np.dtype[Any]) -> None:
    p = problem((3, 4, 5), dtype)
    table = np.stack([p.mean, p.var], 1)
    fastbn.batch_norm(p.x, table[:, 0], table[:, 1], training=True)
    mean, var = p.mean.copy(), p.var.copy()
    fastbn.batch_norm(p.x, mean, var, training=True)
    same_bits(table, np.stack([mean, var], 1))


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int64, list], ids=lambda kind: kind.__name__)
@single
def test_parameters_of_another_type(kind: Any, dtype: np.dtype[Any]) -> None:
    x = problem((3, 4, 5), dtype).x
    vectors = [np.array(v, np.float32) for v in ([1, -2, 0, 3], [2, 1, 5, 4], [3, 0, 1, 1], [4, 1, 16, 1])]
    given = [v.tolist() if kind is list else v.astype(kind) for v in vectors]
    weight, bias, mean, var = given
    same_bits(fastbn.batch_norm(x, mean, var, weight, bias), fastbn.batch_norm(x, *vectors[2:], *vectors[:2]))


# Masks


def _masked(shape: tuple[int, ...], axis: int, seed: int = 5) -> Array:
    return rng(seed).random(np.delete(shape, axis)) < 0.6


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
def test_masked_training(layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    p = problem(FULL[layout], dtype, axis)
    mask = _masked(p.x.shape, axis)
    mean, var = p.mean.copy(), p.var.copy()
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, mean, var, layout=layout, mask=mask)
    near(y, forward(p.x, p.weight, p.bias, axis=axis, mask=mask))
    n, batch_mean, batch_var = reference.batch_norm_stats(p.x, axis, mask)
    assert saved.count == n == np.count_nonzero(mask)
    rtol = 1e-13 if dtype == np.float64 else 5e-7
    np.testing.assert_allclose(mean, 0.9 * p.mean.astype(np.float64) + 0.1 * batch_mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(var, 0.9 * p.var.astype(np.float64) + 0.1 * batch_var * n / (n - 1), rtol=rtol)
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), backward(p.dy, p.x, p.weight, axis=axis, mask=mask))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@wide
def test_masked_positions_get_the_direct_gradient(layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    p = problem(FULL[layout], dtype, axis)
    mask = _masked(p.x.shape, axis)
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout, mask=mask)[1]
    dx = fastbn.batch_norm_backward(p.dy, p.x, saved).dx
    assert dx is not None
    left = np.moveaxis(dx, axis, -1)[~mask]
    np.testing.assert_allclose(left, np.moveaxis(p.dy, axis, -1)[~mask] * (saved.invstd * p.weight), rtol=1e-6)


@single
def test_values_at_masked_positions_do_not_matter(dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 7, 5), dtype)
    mask = _masked(p.x.shape, 1)
    counted = np.broadcast_to(mask[:, None], p.x.shape)
    other = np.where(counted, p.x, np.float32(np.nan))
    y, saved = fastbn.batch_norm_forward(p.x, mask=mask)
    other_y, other_saved = fastbn.batch_norm_forward(other, mask=mask)
    same_bits(other_y[counted], y[counted])
    assert np.all(np.isnan(other_y[~counted]))
    dy = np.where(counted, p.dy, np.float32(0))
    gradients, others = fastbn.batch_norm_backward(dy, p.x, saved), fastbn.batch_norm_backward(dy, other, other_saved)
    same_gradients(others, gradients)


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 5, 7), (4, 5, 1), (7,), (5, 7), (4, 5, 7)], ids=str)
@pytest.mark.parametrize("axis", [1, 3], ids=["NCHW", "NHWC"])
@single
def test_masks_broadcast(axis: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    p = problem((4, 6, 5, 7) if axis == 1 else (4, 5, 7, 6), dtype, axis)
    layout = "NCHW" if axis == 1 else "NHWC"
    mask = np.random.default_rng(3).random(shape) < 0.5
    assert mask.any()
    assert not mask.all()
    whole = np.ascontiguousarray(np.broadcast_to(mask, (4, 5, 7)))
    small_y, small = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout, mask=mask)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout, mask=whole)
    same_bits(small_y, y)
    same_gradients(fastbn.batch_norm_backward(p.dy, p.x, small), fastbn.batch_norm_backward(p.dy, p.x, saved))
    near(y, forward(p.x, p.weight, p.bias, axis=axis, mask=whole))


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
def test_a_mask_of_true_changes_nothing(layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    p = problem(FULL[layout], dtype, axis)
    truth = forward(p.x, p.weight, p.bias, axis=axis)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout, mask=np.array(True))
    near(y, truth)
    assert saved.count == count(p.x.shape, axis)
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), backward(p.dy, p.x, p.weight, axis=axis))


@single
def test_a_mask_means_nothing_without_training(dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 5), dtype)
    mask = np.zeros((3, 5), np.bool_)
    same_bits(fastbn.batch_norm(p.x, p.mean, p.var, mask=mask), fastbn.batch_norm(p.x, p.mean, p.var))
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, p.mean, p.var, False, mask=mask)[1]
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), _frozen_gradients(p))


# Where the result goes


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
def test_in_place(layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    p = problem(FULL[layout], dtype, axis)
    training, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)
    inference = fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, layout=layout)
    mask = _masked(p.x.shape, axis)
    masked, masked_saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout, mask=mask)
    x = p.x.copy()
    assert fastbn.batch_norm_forward(x, p.weight, p.bias, layout=layout, out=x)[0] is x
    same_bits(x, training)
    x = p.x.copy()
    assert fastbn.batch_norm(x, p.mean, p.var, p.weight, p.bias, layout=layout, out=x) is x
    same_bits(x, inference)
    x = p.x.copy()
    assert fastbn.batch_norm_forward(x, p.weight, p.bias, layout=layout, mask=mask, out=x)[0] is x
    same_bits(x, masked)
    frozen = fastbn.batch_norm_forward(p.x, p.weight, p.bias, p.mean, p.var, False, layout=layout)[1]
    for context in (saved, masked_saved, frozen):
        want = fastbn.batch_norm_backward(p.dy, p.x, context)
        for over in ("dy", "x"):
            dy, x = p.dy.copy(), p.x.copy()
            out = {"dy": dy, "x": x}[over]
            got = fastbn.batch_norm_backward(dy, x, context, out=out)
            assert got.dx is out
            same_gradients(got, want)


@single
def test_in_place_through_a_view_of_the_same_memory(dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 7, 5), dtype)
    want = fastbn.batch_norm(p.x, p.mean, p.var)
    x = p.x.copy()
    out = x[:]
    assert fastbn.batch_norm(x, p.mean, p.var, out=out) is out
    same_bits(x, want)


@pytest.mark.parametrize("stride", [np.s_[::2], np.s_[..., ::2], np.s_[:, ::-1]], ids=["batch", "width", "channels"])
@single
def test_in_place_of_strided_memory(stride: Any, dtype: np.dtype[Any]) -> None:
    x = problem((4, 18, 6, 4), dtype).x
    part = x[stride]
    y = fastbn.batch_norm_forward(part)[0]
    before = x.copy()
    assert fastbn.batch_norm_forward(part, out=part)[0] is part
    same_bits(part, y)
    before[stride] = y
    same_bits(x, before)


@single
def test_out_beside_x_in_one_buffer(dtype: np.dtype[Any]) -> None:
    p = problem((4, 6, 5, 8), dtype)
    want = fastbn.batch_norm_forward(np.ascontiguousarray(p.x[..., ::2]))[0]
    buffer = p.x.copy()
    fastbn.batch_norm_forward(buffer[..., ::2], out=buffer[..., 1::2])
    same_bits(buffer[..., ::2], p.x[..., ::2])
    same_bits(buffer[..., 1::2], want)


@single
def test_inputs_are_left_alone(dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 7, 5), dtype)
    before = [a.copy() for a in p[:6]]
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias)
    fastbn.batch_norm_backward(p.dy, p.x, saved)
    fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias)
    for a, b in zip(p[:6], before, strict=True):
        same_bits(a, b)
    assert not np.shares_memory(saved.mean, p.mean)
    y[...] = 0
    same_bits(p.x, before[0])


# The split primitives


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
def test_split_primitives_compose_to_the_whole(layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    p = problem(FULL[layout], dtype, axis)
    stats = fastbn.batch_norm_stats(p.x, layout=layout)
    mean = stats.mean if stats.mean_lo is None else stats.mean.astype(np.float64) + stats.mean_lo
    invstd = 1 / np.sqrt(stats.var.astype(np.float64) + 1e-5)
    near(fastbn.batch_norm_elemt(p.x, mean, invstd, p.weight, p.bias, layout=layout), forward(p.x, p.weight, p.bias, axis=axis))
    sum_dy, sum_dy_xmu = fastbn.batch_norm_backward_reduce(p.dy, p.x, mean, invstd, layout=layout)
    dx = fastbn.batch_norm_backward_elemt(p.dy, p.x, mean, invstd, p.weight, sum_dy, sum_dy_xmu, stats.count, layout=layout)
    want_dx, dweight, dbias = backward(p.dy, p.x, p.weight, axis=axis)
    assert dx.dtype == dtype
    near_gradient(dx, want_dx)
    near_gradient(sum_dy, dbias)
    near_gradient((sum_dy_xmu * invstd).astype(sum_dy.dtype), dweight)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@wide
def test_synchronized_batch_norm(layout: str, parts: int, dtype: np.dtype[Any]) -> None:
    """What each of several processes with a part of the batch would do gives the gradient of the whole."""
    axis = axis_of(layout)
    p = problem(FULL[layout], dtype, axis, mean=10.0)
    xs, dys = np.array_split(p.x, parts), np.array_split(p.dy, parts)
    stats = fastbn.Stats.merge(*(fastbn.batch_norm_stats(x, layout=layout) for x in xs))
    assert stats.mean_lo is not None
    mean = stats.mean.astype(np.float64) + stats.mean_lo
    invstd = 1 / np.sqrt(stats.var.astype(np.float64) + 1e-5)
    y = [fastbn.batch_norm_elemt(x, mean, invstd, p.weight, p.bias, layout=layout) for x in xs]
    near(np.concatenate(y), forward(p.x, p.weight, p.bias, axis=axis))
    sums = [fastbn.batch_norm_backward_reduce(dy, x, mean, invstd, layout=layout) for dy, x in zip(dys, xs, strict=True)]
    totals = [np.sum([s[i] for s in sums], axis=0, dtype=np.float64) for i in (0, 1)]
    dx = [
        fastbn.batch_norm_backward_elemt(dy, x, mean, invstd, p.weight, *totals, stats.count, layout=layout)
        for dy, x in zip(dys, xs, strict=True)
    ]
    near_gradient(np.concatenate(dx), backward(p.dy, p.x, p.weight, axis=axis)[0])


@wide
def test_split_primitives_write_where_they_are_told(dtype: np.dtype[Any]) -> None:
    p = problem((3, 17, 7, 5), dtype)
    invstd = 1 / np.sqrt(p.var)
    y = fastbn.batch_norm_elemt(p.x, p.mean, invstd, p.weight, p.bias)
    x = p.x.copy()
    assert fastbn.batch_norm_elemt(x, p.mean, invstd, p.weight, p.bias, out=x) is x
    same_bits(x, y)
    sums = fastbn.batch_norm_backward_reduce(p.dy, p.x, p.mean, invstd)
    dx = fastbn.batch_norm_backward_elemt(p.dy, p.x, p.mean, invstd, p.weight, *sums, 105)
    dy = p.dy.copy()
    assert fastbn.batch_norm_backward_elemt(dy, p.x, p.mean, invstd, p.weight, *sums, 105, out=dy) is dy
    same_bits(dy, dx)


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
def test_stats(layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    x = problem(FULL[layout], dtype, axis).x
    for mask in (None, _masked(x.shape, axis)):
        stats = fastbn.batch_norm_stats(x, layout=layout, mask=mask)
        n, mean, var = reference.batch_norm_stats(x, axis, mask)
        assert stats.count == n
        compute = np.float64 if dtype == np.float64 else np.float32
        assert stats.mean.dtype == stats.var.dtype == compute
        rtol = 1e-13 if dtype == np.float64 else 1e-6
        np.testing.assert_allclose(stats.mean, mean, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(stats.var, var, rtol=rtol)


@pytest.mark.parametrize("cuts", [(0,), (1,), (5,), (3, 7), (0, 0, 8), (1, 2, 3, 4)], ids=str)
@wide
def test_merged_stats_are_those_of_the_whole(cuts: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    x = problem((8, 17, 5), dtype, mean=1000.0).x
    merged = fastbn.Stats.merge(*(fastbn.batch_norm_stats(part) for part in np.split(x, cuts)))
    n, mean, var = reference.batch_norm_stats(x)
    rtol = 1e-13 if dtype == np.float64 else 1e-6
    assert merged.count == n
    np.testing.assert_allclose(merged.mean, mean, rtol=rtol)
    np.testing.assert_allclose(merged.var, var, rtol=rtol)


@wide
def test_an_empty_batch_is_the_identity_of_merge(dtype: np.dtype[Any]) -> None:
    x = problem((8, 17, 5), dtype).x
    stats, nothing = fastbn.batch_norm_stats(x), fastbn.batch_norm_stats(x[:0])
    for merged in (stats.merge(), stats.merge(nothing), nothing.merge(stats), nothing.merge(stats, nothing)):
        assert merged.count == stats.count
        same_bits(merged.mean, stats.mean)
        same_bits(merged.var, stats.var)
    assert nothing.merge(nothing).count == 0


# Edges


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 3, 0), (2, 3, 0, 4), (0, 3, 2, 2, 2), (4, 0, 5)], ids=str)
def test_empty_batches(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    p = problem(shape, dtype)
    mean, var = p.mean.copy(), p.var.copy()
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, mean, var)
    assert y.shape == shape
    assert y.dtype == dtype
    assert saved.count == 0
    same_bits(mean, p.mean)
    same_bits(var, p.var)
    gradients = fastbn.batch_norm_backward(p.dy, p.x, saved)
    assert gradients.dx is not None
    assert gradients.dx.shape == shape
    for gradient in (gradients.dweight, gradients.dbias):
        assert gradient is not None
        same_bits(gradient, np.zeros_like(p.weight))
    out = np.empty_like(p.x)
    assert fastbn.batch_norm(p.x, mean, var, out=out) is out
    assert fastbn.batch_norm_forward(p.x, out=out)[0] is out
    stats = fastbn.batch_norm_stats(p.x)
    assert stats.count == 0
    assert stats.mean.shape == stats.var.shape == (shape[1],)
    assert not stats.mean.any()
    sums = fastbn.batch_norm_backward_reduce(p.dy, p.x, p.mean, p.var)
    assert not np.any(sums)
    assert fastbn.batch_norm_backward_elemt(p.dy, p.x, p.mean, p.var, p.weight, *sums, 0).shape == shape


@single
def test_a_mask_that_leaves_one_value(dtype: np.dtype[Any]) -> None:
    x = problem((3, 4, 5), dtype).x
    mask = np.zeros((3, 5), np.bool_)
    mask[1, 2] = True
    assert fastbn.batch_norm_stats(x, mask=mask).count == 1
    np.testing.assert_array_equal(fastbn.batch_norm_stats(x, mask=mask).mean, x[1, :, 2])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fastbn.batch_norm_forward(x, mask=mask)
    assert fastbn.batch_norm_stats(x, mask=np.zeros((3, 5), np.bool_)).count == 0


@wide
def test_two_values_per_channel(dtype: np.dtype[Any]) -> None:
    x = np.array([[1.0, -3.0, 0.0], [3.0, 5.0, 0.5]], dtype)
    var = np.zeros(3, dtype)
    y = fastbn.batch_norm(x, None, var, training=True, momentum=1.0, eps=0.0)
    np.testing.assert_array_equal(y, [[-1, -1, -1], [1, 1, 1]])
    np.testing.assert_array_equal(var, [2, 32, 0.125])  # unbiased


@pytest.mark.parametrize("momentum", [-0.5, 1.5, np.inf, np.nan])
@single
def test_momentum_is_the_users(momentum: float, dtype: np.dtype[Any]) -> None:
    x = problem((3, 4, 5), dtype).x
    mean = np.ones(4, dtype)
    fastbn.batch_norm(x, mean, None, training=True, momentum=momentum)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(mean, (1 - momentum) + momentum * reference.batch_norm_stats(x)[1], rtol=1e-6)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, int], ids=lambda kind: kind.__name__)
@single
def test_numbers_of_any_type(kind: type, dtype: np.dtype[Any]) -> None:
    x = problem((3, 4, 5), dtype).x
    same_bits(fastbn.batch_norm_forward(x, momentum=kind(1), eps=kind(2))[0], fastbn.batch_norm_forward(x, momentum=1.0, eps=2.0)[0])


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 1.0])
@wide
def test_eps(eps: float, dtype: np.dtype[Any]) -> None:
    p = problem((3, 4, 5), dtype)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, eps=eps)
    near(y, forward(p.x, p.weight, p.bias, eps))
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), backward(p.dy, p.x, p.weight, eps))
    near(fastbn.batch_norm(p.x, p.mean, p.var, eps=eps), reference.batch_norm(p.x, p.mean, p.var, eps=eps))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_channel(bad: float, layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    p = problem(FULL[layout], dtype, axis)
    good_y, good_saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)
    good = fastbn.batch_norm_backward(p.dy, p.x, good_saved)
    x = p.x.copy()
    np.moveaxis(x, axis, 0)[3, 1, 2, 1] = bad
    mean, var = p.mean.copy(), p.var.copy()
    y, saved = fastbn.batch_norm_forward(x, p.weight, p.bias, mean, var, layout=layout)
    got = fastbn.batch_norm_backward(p.dy, x, saved)
    stats = fastbn.batch_norm_stats(x, layout=layout)
    others = np.arange(17) != 3
    for a, b, where in ((y, good_y, axis), (got.dx, good.dx, axis), (got.dweight, good.dweight, 0)):
        assert a is not None
        assert b is not None
        assert np.all(np.isnan(np.moveaxis(a, where, 0)[3]))
        same_bits(np.moveaxis(a, where, 0)[others], np.moveaxis(b, where, 0)[others])
    near_gradient(got.dbias, backward(p.dy, p.x, p.weight, axis=axis)[2])  # it does not depend on x
    np.testing.assert_array_equal(np.isfinite(mean), others)
    np.testing.assert_array_equal(np.isnan(var), ~others)
    np.testing.assert_array_equal(stats.mean[3], np.float32(bad))
    assert np.isnan(stats.var[3])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_nan_and_inf_in_inference(layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    p = problem(FULL[layout], dtype, axis)
    good = fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, layout=layout)
    x = p.x.copy()
    at = [(0, 1, 2, 3), (1, 2, 3, 4), (2, 0, 1, 2)]
    for place, bad in zip(at, (np.nan, np.inf, -np.inf), strict=True):
        x[place] = bad
        good[place] = bad  # the weights are positive
    same_bits(fastbn.batch_norm(x, p.mean, p.var, p.weight, p.bias, layout=layout), good)


@single
def test_parameters_are_the_users(dtype: np.dtype[Any]) -> None:
    """A negative variance, a NaN or an infinity gives what NumPy's formula gives, in its channel alone."""
    x = problem((3, 6, 5), dtype).x
    mean = np.array([0, np.nan, 0, 0, 0, 0], dtype)
    var = np.array([-1, 1, np.inf, 1, 0, 1], dtype)
    weight = np.array([1, 1, 1, np.nan, 1, 1], dtype)
    with np.errstate(all="ignore"):
        want = reference.batch_norm(x, mean, var, weight, eps=0.0)
    for y in (fastbn.batch_norm(x, mean, var, weight, eps=0.0), fastbn.FrozenBatchNorm(mean, var, weight, eps=0.0)(x)):
        np.testing.assert_array_equal(np.isnan(y), np.isnan(want))
        np.testing.assert_array_equal(y[:, [2, 4]], want[:, [2, 4]])  # zeros and infinities
        near(y[:, 5:], want[:, 5:])
