"""Instance, group, layer and RMS normalization, and the variants of batch normalization for small batches."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ways import is_direct, take_the_checked_way

import fastbn
from fastbn import functional, reference
from fastbn.activations import BUILTINS, Builtin
from fastbn.dispatch import Kernel
from fastbn.dtypes import resolve
from fastbn.layout import Array

NORMS = ("instance_norm", "group_norm", "layer_norm", "rms_norm")
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
# With channels first: planes, columns and rows; short, long, and with tails.
SHAPES = ((3, 8, 5, 7), (2, 6, 4, 4, 4), (4, 4, 9), (2, 8, 40, 41), (1, 4, 130), (5, 12))


def _random(shape: tuple[int, ...], dtype: Any = "float64", offset: float = 0.5, seed: int = 0) -> Array:
    x = np.random.default_rng(seed).standard_normal(shape) + offset
    return x.astype(resolve(dtype))


def _truth(norm: str, x: Array, groups: int, axis: int, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """The definition, in float64."""
    if norm in ("layer_norm", "rms_norm"):
        return reference.layer_norm(x, 1, weight, bias, eps, centered=norm == "layer_norm")
    return reference.group_norm(x, x.shape[axis] if norm == "instance_norm" else groups, weight, bias, eps, axis)


def _arguments(norm: str, x: Array, axis: int, groups: int = 2) -> tuple[tuple[Any, ...], dict[str, Any], Array, Array]:
    """What comes before weight and bias, options, and these."""
    n = x.shape[-1] if norm in ("layer_norm", "rms_norm") else x.shape[axis]
    compute = np.float64 if x.dtype == np.float64 else np.float32
    weight, bias = _random((2, n), seed=1).astype(compute)
    first: tuple[Any, ...] = {"instance_norm": (None, None), "group_norm": (groups,)}.get(norm, (n,))
    return first, ({} if norm in ("layer_norm", "rms_norm") else {"axis": axis}), weight, bias


def _affine(norm: str, weight: Array, bias: Array) -> tuple[Array, ...]:
    return (weight,) if norm == "rms_norm" else (weight, bias)


def _worst(y: Array, wanted: Array) -> float:
    return float((np.abs(y.astype(np.float64) - wanted) / np.maximum(1, np.abs(wanted))).max())


def _usable(norm: str, shape: tuple[int, ...]) -> bool:
    return norm != "instance_norm" or len(shape) > 2


CASES = [(norm, shape, last) for norm in NORMS for shape in SHAPES for last in (False, True) if _usable(norm, shape)]


@pytest.mark.parametrize(("norm", "shape", "last"), CASES)
def test_forward_is_the_definition(kernel: Kernel, dtype: np.dtype[Any], norm: str, shape: tuple[int, ...], last: bool) -> None:
    x = _random(shape, dtype)
    axis = -1 if last else 1
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x
    first, options, weight, bias = _arguments(norm, x, axis)
    y = getattr(fastbn, norm)(x, *first, *_affine(norm, weight, bias), eps=1e-5, **options)
    assert _worst(y, _truth(norm, x, 2, axis, weight, None if norm == "rms_norm" else bias, 1e-5)) < TOLERANCE[dtype.name]
    assert y.dtype == x.dtype
    assert y.strides == x.strides


@pytest.mark.parametrize(("norm", "shape", "last"), CASES)
def test_backward_is_that_of_float64(kernel: Kernel, dtype: np.dtype[Any], norm: str, shape: tuple[int, ...], last: bool) -> None:
    x, dy, residual = (_random(shape, dtype, seed=s) for s in range(3))
    if last:
        x, dy, residual = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy, residual))
    first, options, weight, bias = _arguments(norm, x, -1 if last else 1)
    wrt = ("x", "weight", *(() if norm == "rms_norm" else ("bias",)), "residual")

    def gradients(activation: str | None, *arrays: Array) -> list[Array]:
        x, dy, residual, *affine = arrays
        _, saved = getattr(fastbn, f"{norm}_forward")(x, *first, *affine, activation=activation, residual=residual, eps=1e-5, **options)
        g = getattr(fastbn, f"{norm}_backward")(dy, x, saved, wrt=wrt)
        return [a for a in (g.dx, g.dweight, g.dbias, g.dresidual) if a is not None]

    arrays = (x, dy, residual, *_affine(norm, weight, bias))
    for activation in (None, "silu"):
        found = gradients(activation, *arrays)
        with fastbn.use_kernel("reference"):
            wanted = gradients(activation, *(a.astype(np.float64) for a in arrays))
        for a, b in zip(found, wanted, strict=True):
            assert np.abs(a.astype(np.float64) - b).max() <= TOLERANCE[dtype.name] * max(1, np.abs(b).max())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("last", [False, True])
def test_digits_are_kept_far_from_zero(kernel: Kernel, norm: str, offset: float, last: bool) -> None:
    x = _random((3, 8, 24, 23), "float32", offset)
    axis = -1 if last else 1
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x
    first, options, weight, bias = _arguments(norm, x, axis)
    y = getattr(fastbn, norm)(x, *first, *_affine(norm, weight, bias), eps=1e-5, **options)
    assert _worst(y, _truth(norm, x, 2, axis, weight, None if norm == "rms_norm" else bias, 1e-5)) < 5e-6


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("norm", ["batch_channel_norm", "batch_renorm"])
@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("last", [False, True])
def test_a_mean_has_more_digits_than_a_float64_has(norm: str, offset: float, last: bool) -> None:
    x, running = _random((3, 8, 24, 23), "float64", offset), _random((8,), "float64", offset, seed=1)
    wide, of_channel = x.astype(np.longdouble), running.astype(np.longdouble)[:, None, None]

    def normalized(axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
        mean = wide.mean(axes, keepdims=True)
        mean += (wide - mean).mean(axes, keepdims=True)
        deviation = np.sqrt(np.square(wide - mean).mean(axes, keepdims=True) + np.longdouble(1e-5))
        return (wide - mean) / deviation, mean, deviation

    given = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x
    of_batch, mean, deviation = normalized((0, 2, 3))
    if norm == "batch_channel_norm":
        wanted = 0.25 * of_batch + 0.75 * normalized((1, 2, 3))[0]
        y = fastbn.batch_channel_norm(given, None, None, np.full(8, 0.25), training=True, axis=-1 if last else 1)
    else:
        old = np.sqrt(1 + np.longdouble(1e-5))
        wanted = of_batch * deviation / old + (mean - of_channel) / old
        y = fastbn.batch_renorm(given, running.copy(), np.ones(8), training=True, axis=-1 if last else 1)
    assert _worst(np.moveaxis(y, -1, 1) if last else y, wanted.astype(np.float64)) < 1e-13


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_finite_differences(kernel: Kernel, norm: str, activation: str | None, last: bool) -> None:
    x, dy, residual = (_random((2, 4, 3, 6), seed=s) for s in range(3))
    first, options, weight, bias = _arguments(norm, x, -1 if last else 1)
    options |= {"activation": activation, "residual": residual, "eps": 1e-3}

    def loss(x: Array, residual: Array, *affine: Array) -> float:
        return float((getattr(fastbn, norm)(x, *first, *affine, **(options | {"residual": residual})) * dy).sum())

    affine = _affine(norm, weight, bias)
    _, saved = getattr(fastbn, f"{norm}_forward")(x, *first, *affine, **options)
    wrt = ("x", "weight", *(() if norm == "rms_norm" else ("bias",)), "residual")
    g = getattr(fastbn, f"{norm}_backward")(dy, x, saved, wrt=wrt)
    given = [x, residual, *affine]
    for i, found in enumerate((g.dx, g.dresidual, g.dweight, g.dbias)[: len(given)]):
        at = np.unravel_index(range(0, given[i].size, max(1, given[i].size // 7)), given[i].shape)
        for place in zip(*at, strict=True):
            moved = [a.copy() for a in given]
            moved[i][place] += 1e-5
            above = loss(*moved)
            moved[i][place] -= 2e-5
            assert found[place] == pytest.approx((above - loss(*moved)) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_weight_of_zero_has_gradients(kernel: Kernel, norm: str) -> None:
    x, dy = _random((2, 4, 3, 5), "float32"), _random((2, 4, 3, 5), "float32", seed=1)
    first, options, weight, bias = _arguments(norm, x, 1)
    found = []
    for least in (0.0, 1e-6):
        weight[1] = least
        _, saved = getattr(fastbn, f"{norm}_forward")(x, *first, *_affine(norm, weight, bias), **options)
        found.append(getattr(fastbn, f"{norm}_backward")(dy, x, saved, wrt=("x", "weight")))
    np.testing.assert_allclose(found[0].dx, found[1].dx, atol=1e-4)
    np.testing.assert_allclose(found[0].dweight, found[1].dweight, rtol=1e-5)


@pytest.mark.parametrize(("norm", "last"), [(norm, last) for norm in NORMS for last in (False, True)])
def test_threads_places_and_isas_do_not_change_a_bit(norm: str, last: bool) -> None:
    x, dy = (_random((9, 8, 33, 35), "float32", seed=s) for s in (0, 1))
    if last:
        x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
    first, options, weight, bias = _arguments(norm, x, -1 if last else 1)
    kernels = [k.name for k in fastbn.dispatch.TABLE if k.level not in (None, "v2") and not k.unusable()] or ["reference"]
    seen = set()
    for kernel in kernels:
        with fastbn.use_kernel(kernel):
            for threads in (1, 2, 5):
                y, saved = getattr(fastbn, f"{norm}_forward")(x, *first, *_affine(norm, weight, bias), threads=threads, **options)
                g = getattr(fastbn, f"{norm}_backward")(dy, x, saved, wrt=("x", "weight"), threads=threads)
                seen.add((y.tobytes(), g.dx.tobytes(), g.dweight.tobytes()))
            own = x.copy()
            getattr(fastbn, norm)(own, *first, *_affine(norm, weight, bias), out=own, **options)
            gradient = dy.copy()
            getattr(fastbn, f"{norm}_backward")(gradient, x, saved, wrt=("x",), out=gradient)
            seen.add((own.tobytes(), gradient.tobytes(), g.dweight.tobytes()))
    assert len(seen) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_any_strides_give_the_same(kernel: Kernel, norm: str) -> None:
    x = _random((4, 6, 10, 12), "float32")
    first, options, weight, bias = _arguments(norm, x, 1)
    call: Callable[..., Array] = getattr(fastbn, norm)
    y = call(x, *first, *_affine(norm, weight, bias), **options)
    wide = np.zeros((4, 6, 20, 12), "float32")[:, :, ::2]
    wide[...] = x
    for other in (wide, np.asfortranarray(x), x.transpose(2, 0, 3, 1).copy().transpose(1, 3, 0, 2), x[::-1].copy()[::-1]):
        np.testing.assert_allclose(call(other, *first, *_affine(norm, weight, bias), **options), y, atol=2e-6)
        out = np.empty_like(y)
        assert call(other, *first, *_affine(norm, weight, bias), out=out, **options) is out
        np.testing.assert_allclose(out, y, atol=2e-6)


def _unaligned(a: Array) -> Array:
    other = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    other[...] = a
    return other


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_what_a_forward_was_given_may_be_changed_before_the_backward(kernel: Kernel, norm: str, activation: str | None) -> None:
    x, dy, residual = (_random((3, 6, 5, 4), "float32", seed=s) for s in range(3))
    first, options, weight, bias = _arguments(norm, x, 1)
    given = residual, *_affine(norm, weight.copy(), bias.copy())
    y, saved = getattr(fastbn, f"{norm}_forward")(x, *first, *given[1:], activation=activation, residual=residual, **options)
    backward, wrt = getattr(fastbn, f"{norm}_backward"), ("x", "weight", "residual")
    wanted = backward(dy, x, saved, wrt=wrt)
    for a in (y, *given):
        a[...] = 9
    for a, b in zip(backward(dy, x, saved, wrt=wrt), wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_of_a_sum_survives_dx_in_the_place_of_dy(kernel: Kernel, norm: str) -> None:
    x, dy = (_random((3, 6, 5, 4), "float32", seed=s) for s in range(2))
    first, options, *_ = _arguments(norm, x, 1)
    _, saved = getattr(fastbn, f"{norm}_forward")(x, *first, residual=x, **options)
    backward, wrt, own = getattr(fastbn, f"{norm}_backward"), ("x", "residual"), dy.copy()
    wanted = backward(dy, x, saved, wrt=wrt)
    got = backward(own, x, saved, wrt=wrt, out=own)
    assert got.dx is own
    np.testing.assert_array_equal(got.dx, wanted.dx)
    np.testing.assert_array_equal(got.dresidual, dy)


@pytest.mark.parametrize("norm", ["instance_norm", "group_norm"])
def test_each_of_several_images_with_one_channel_is_a_row(kernel: Kernel, norm: str) -> None:
    x, dy = (_random((4, 1, 6, 5), "float32", seed=s) for s in range(2))
    first = (1,) if norm == "group_norm" else ()
    y, saved = getattr(fastbn, f"{norm}_forward")(x, *first)
    rows, kept = fastbn.layer_norm_forward(x, (1, 6, 5))
    np.testing.assert_allclose(y, rows, atol=1e-6)
    assert saved.mean.shape == (4, 1)
    dx = getattr(fastbn, f"{norm}_backward")(dy, x, saved).dx
    np.testing.assert_allclose(dx, fastbn.layer_norm_backward(dy, x, kept).dx, atol=1e-5)


@pytest.mark.parametrize("names", [("running_mean",), ("running_var",), ("running_mean", "running_var")], ids="+".join)
def test_one_running_statistic_is_moved_as_well_as_both(kernel: Kernel, names: tuple[str, ...]) -> None:
    x = _random((3, 6, 5, 4), "float32")
    truth = {"running_mean": x.mean((0, 2, 3)), "running_var": x.var((2, 3), ddof=1).mean(0)}
    running = {name: np.zeros(6, "float32") for name in names}
    fastbn.instance_norm(x, **running, momentum=1.0)
    for name, v in running.items():
        np.testing.assert_allclose(v, truth[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [*NORMS, "batch_channel_norm", "batch_renorm", "ghost_batch_norm"])
@pytest.mark.parametrize("threads", [None, 2])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_unaligned_arrays_give_the_same_bits(norm: str, threads: int | None, dtype: str) -> None:
    x, r, dy = (_random((4, 6, 4), dtype, seed=seed) for seed in range(3))
    running = np.zeros(6), np.ones(6)
    more: dict[str, tuple[Any, ...]] = {
        "group_norm": (2,), "layer_norm": (4,), "rms_norm": ((6, 4),), "batch_channel_norm": (*running, np.full(6, 0.5), None, None, True),
        "batch_renorm": (*running, None, None, True), "ghost_batch_norm": (*running, None, None, True),
    }  # fmt: skip
    forward, backward = getattr(fastbn, f"{norm}_forward"), getattr(fastbn, f"{norm}_backward")
    seen = set()
    for of_x, of_r, of_dy, of_out in itertools.product((np.copy, _unaligned), repeat=4):
        running[0][:], running[1][:] = 0, 1
        options: dict[str, Any] = {"threads": threads, "out": of_out(np.zeros_like(x))}
        y, saved = forward(of_x(x), *more.get(norm, ()), activation="silu", residual=of_r(r), **options)
        bits = y.tobytes()
        g = backward(of_dy(dy), of_x(x), saved, wrt=("x", "weight", "residual"), **options)
        seen.add((bits, *(v.tobytes() for v in (g.dx, g.dweight, g.dresidual))))
    assert len(seen) == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 3e38])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_no_number_stays_in_its_part_and_what_is_large_is_computed(kernel: Kernel, norm: str, value: float, last: bool) -> None:
    x = _random((3, 4, 6, 6), "float32")
    x[1, 2, 3, 4] = value
    axis = -1 if last else 1
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x
    first, options, weight, bias = _arguments(norm, x, axis)
    for out in (None, x.copy()):
        given = x if out is None else out
        y = getattr(fastbn, norm)(given, *first, *_affine(norm, weight, bias), eps=1e-5, out=out, **options)
        with np.errstate(all="ignore"):
            wanted = _truth(norm, x, 2, axis, weight, None if norm == "rms_norm" else bias, 1e-5)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(wanted))
        fine = np.isfinite(wanted)
        np.testing.assert_allclose(y[fine], wanted[fine], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("where", ["x", "dy", "residual", "weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_changes_no_bit_of_what_does_not_depend_on_it(
    kernel: Kernel, dtype: np.dtype[Any], norm: str, where: str, value: float, last: bool
) -> None:
    rows = norm in ("layer_norm", "rms_norm")
    own = {"instance_norm": 1, "group_norm": 4}.get(norm, 12)  # channels of a part
    given = {}
    for seed, name in enumerate(("x", "dy", "residual")):
        a = _random((9, 12) if rows else (2, 8, 3, 5), dtype, seed=seed)
        given[name] = np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) if last else a
    first, options, weight, bias = _arguments(norm, given["x"], 1)
    given["weight"] = weight

    def run(a: dict[str, Array]) -> dict[str, Array]:
        affine = _affine(norm, a["weight"], bias)
        y, saved = getattr(fastbn, f"{norm}_forward")(a["x"], *first, *affine, activation="relu", residual=a["residual"], **options)
        found = getattr(fastbn, f"{norm}_backward")(a["dy"], a["x"], saved, wrt=("x", "weight", "residual"))
        return {"y": y, "dx": found.dx, "dresidual": found.dresidual, "dweight": found.dweight}

    before = run(given)
    bad = given | {where: given[where].copy(order="K")}
    bad[where][(0,) * bad[where].ndim] = value
    with np.errstate(all="ignore"):
        after = run(bad)
    one, part = np.zeros((2, *given["x"].shape), bool)  # what may change
    one[(0,) * one.ndim] = part[0, :own] = True
    if where == "x":
        one = part
    elif where == "weight":
        one[:, :1], part[:, :own] = True, True
    may = {"y": one & (where != "dy"), "dx": part, "dresidual": one, "dweight": part.any(axis=(0, *range(2, part.ndim)))}
    may["dweight"] &= one.any(axis=(0, *range(2, part.ndim)))
    for name, fixed in may.items():
        np.testing.assert_array_equal(after[name][~fixed], before[name][~fixed], err_msg=name, strict=True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_channel_of_a_renorm(
    kernel: Kernel, dtype: np.dtype[Any], where: str, value: float, last: bool
) -> None:
    x, found = _random((4, 5, 6, 6) if last else (4, 6, 5, 6), dtype), []
    weight = np.ones(6, np.float64 if dtype == np.float64 else np.float32)
    for changed in (None, weight if where == "weight" else x):
        if changed is not None:
            changed.reshape(-1)[0] = value
        running = np.zeros_like(weight), np.ones_like(weight)
        with np.errstate(all="ignore"):
            y, saved = fastbn.batch_renorm_forward(x, *running, weight, None, True, axis=-1 if last else 1, rmax=3.0, dmax=5.0)
            dx = fastbn.batch_renorm_backward(x, x, saved).dx if where == "weight" else y
        found.append([*running, *(np.moveaxis(a, -1 if last else 1, 0).astype(np.float64) for a in (y, dx))])
    for before, after in zip(*found, strict=True):
        np.testing.assert_array_equal(after[1:], before[1:])


@pytest.mark.parametrize("values", [1, 2, 64])
def test_rms_norm_of_large_numbers_is_one_also_where_all_are_alike(kernel: Kernel, values: int) -> None:
    x = np.full((3, values), 1e200)
    x[1] *= -1
    y, saved = fastbn.rms_norm_forward(x, values)
    np.testing.assert_allclose(y, np.sign(x), rtol=1e-15)
    dx, dweight, _, _ = fastbn.rms_norm_backward(np.ones_like(x), x, saved)
    np.testing.assert_allclose(dweight, np.ones(values), rtol=1e-14)
    np.testing.assert_allclose(dx, 0, atol=1e-214)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_part_at_the_end_of_the_range_changes_no_bit_of_others(norm: str, last: bool) -> None:
    """Threads have different parts at once, and what is left of these must not depend on that."""
    x = _random((4, 9, 9, 16) if last else (4, 16, 9, 9), "float32")
    x.reshape(-1)[70] = 3e38
    first, options, weight, bias = _arguments(norm, x, -1 if last else 1, 4)
    given = (*first, *_affine(norm, weight, bias))
    forward = getattr(fastbn, norm)
    one = forward(x, *given, **options, threads=1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(forward(x, *given, **options, threads=threads), one)
    np.testing.assert_array_equal(forward(x, *given, **options, out=x), one)


@pytest.mark.parametrize(("norm", "shape", "last"), CASES)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_plain_calls_equal_checked_ones(
    norm: str, shape: tuple[int, ...], last: bool, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any number of threads."""
    x, dy, residual = (_random(shape, "float32", seed=s) for s in range(3))
    if last:
        x, dy, residual = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy, residual))
    first, options, weight, bias = _arguments(norm, x, -1 if last else 1)
    wrt = ("x", "weight", *(() if norm == "rms_norm" else ("bias",)), *(("residual",) if activation else ()))

    def call(threads: int | None, arrays: Any, place: str | None) -> list[Array]:
        a = {"x": x.copy(), "dy": dy.copy(), "residual": residual.copy()}
        out = a.get(place or "")
        options_now = dict(options, activation=activation, residual=a["residual"], threads=threads)
        y, saved = getattr(fastbn, f"{norm}_forward")(a["x"], *first, *arrays, **options_now, out=out if place != "dy" else None)
        y = y.copy()
        g = getattr(fastbn, f"{norm}_backward")(a["dy"], x, saved, wrt=wrt, threads=threads, out=out)
        plain = getattr(fastbn, norm)(x, *first, *arrays, **options, activation=activation, residual=residual, threads=threads)
        return [y, plain, saved.mean, saved.mean_lo, saved.invstd, *(v for v in g if v is not None)]

    for arrays in (_affine(norm, weight, bias), ()):
        for place in (None, "x", "residual", "dy"):
            with monkeypatch.context() as patch:
                take_the_checked_way(patch)
                checked = call(None, arrays, place)
            for threads in (None, 1, 3):
                for a, b in zip(call(threads, arrays, place), checked, strict=True):
                    np.testing.assert_array_equal(a, b)
                    assert (a.shape, a.dtype, a.strides) == (b.shape, b.dtype, b.strides)


@pytest.mark.skipif(not fastbn.dispatch.select("float32").name.startswith("simd"), reason="only SIMD kernels have a door for parts")
def test_the_door_for_plain_arrays_leaves_others_to_the_checked_way() -> None:
    x, images = np.ones((4, 6), "f"), np.ones((2, 6, 4), "f")
    w = np.ones(6, "f")
    norm, group = functools.partial(is_direct, fastbn.layer_norm), functools.partial(is_direct, fastbn.group_norm)
    assert norm(x, 6)
    assert norm(images, (6, 4), np.ones((6, 4), "f"))
    assert group(images, 3, w, w)
    for divided in (5, True, (4, 7), (), [[6]], "6", None, (2, 4, 6), np.int64(6)):
        assert not norm(x, divided)
    for groups in (4, 0, -1, True, 2.0, None):
        assert not group(images, groups)
    assert not group(images, 2, axis=0)
    for a in (np.ones((4, 12), "f")[:, ::2], np.asfortranarray(x), x[:0], x.view(np.matrix), x.astype(">f4"), [[1.0, 2.0]], x[0]):
        assert not norm(a, 6)
    fixed = np.empty_like(x)
    fixed.flags.writeable = False
    both = np.ones((5, 6), "f")
    for out in (fixed, both[1:, :4], np.empty((6, 4), "f"), np.empty((4, 6))):
        assert not norm(x, 6, out=out)
    assert not norm(both[:4], 6, out=both[1:])
    assert not norm(x, 6, x[0], out=x)
    for v in (w[:5], w.astype(float), np.ones((1, 6), "f"), [1.0] * 6, np.ones(12, "f")[::2]):
        assert not norm(x, 6, v)
    for eps in (-1.0, 1, None, float("nan"), float("inf")):
        assert not norm(x, 6, eps=eps)
    assert is_direct(fastbn.rms_norm, x, 6, eps=None)


@pytest.mark.skipif(not fastbn.dispatch.select("float32").name.startswith("simd"), reason="only SIMD kernels have a door for parts")
@pytest.mark.parametrize("norm", ["instance_norm", "group_norm", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("after", [{}, {"activation": "silu"}, {"activation": "relu", "residual": True}, {"residual": True}], ids=str)
def test_forwards_and_backwards_of_plain_arrays_are_direct(norm: str, after: dict[str, Any]) -> None:
    x = _random((2, 6, 4), "float32")
    options = {**after, "residual": x} if "residual" in after else after
    first = {"instance_norm": (), "group_norm": (3,)}.get(norm, (4,))
    assert is_direct(getattr(fastbn, norm), x, *first, **options)
    assert is_direct(getattr(fastbn, f"{norm}_forward"), x, *first, **options)
    assert is_direct(getattr(fastbn, norm), x, *first, **options, threads=2)
    for threads in (0, -1, True, 1.0, 2**70, "2"):
        assert not is_direct(getattr(fastbn, norm), x, *first, **options, threads=threads)
    y, saved = getattr(fastbn, f"{norm}_forward")(x, *first, **options)
    backward = getattr(fastbn, f"{norm}_backward")
    assert is_direct(backward, y, x, saved)
    rounded = "activation" in after and norm in ("layer_norm", "rms_norm")  # of rows the kernels keep dy before the activation
    assert is_direct(backward, y, x.copy(), saved, wrt=("weight",))
    x = x.astype("float16")
    y, saved = getattr(fastbn, f"{norm}_forward")(x, *first, **{**options, **({"residual": x} if "residual" in after else {})})
    assert is_direct(backward, y, x, saved) != rounded


@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh"])
def test_gradients_of_rows_and_an_activation_far_from_zero_are_those_of_float64(activation: str) -> None:
    """What the mean rounds away there is up to a thirtieth of a deviation."""
    r = np.random.default_rng(0)
    x, dy, w = 1e6 + r.standard_normal((9, 70)).astype("f"), r.standard_normal((9, 70)).astype("f"), r.standard_normal(70).astype("f")
    x = x.astype("f")
    found = []
    for dtype in (np.float32, np.float64):
        given = [a.astype(dtype) for a in (x, dy, w)]
        _, saved = fastbn.layer_norm_forward(given[0], 70, given[2], given[2], activation=activation)
        assert np.abs(saved.mean_lo).max() > (0.01 if dtype is np.float32 else 0)
        found.append(fastbn.layer_norm_backward(given[1], given[0], saved)[:3])
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", [*BUILTINS, ("leaky_relu", 0.3)], ids=str)
def test_gradients_of_many_rows_and_an_activation_are_the_references(norm: str, activation: Any) -> None:
    """Rows of less than a block, of whole blocks, of several at once and a rest; dx of its own, over dy, over x, or not wanted."""
    forward, backward = getattr(fastbn, f"{norm}_forward"), getattr(fastbn, f"{norm}_backward")
    r = np.random.default_rng(1)  # no value lies where a derivative jumps
    for (rows, width), dtype in itertools.product(((70, 7), (3, 64), (131, 300)), (np.float32, np.float64)):
        x, dy, residual = (r.standard_normal((rows, width)).astype(dtype) for _ in range(3))
        w, bias = (r.standard_normal(width).astype(dtype) + 1 for _ in range(2))
        for added, vectors in itertools.product((None, residual), ((), (w, *([bias] if norm == "layer_norm" else [])))):
            _, saved = forward(x, width, *vectors, activation=activation, residual=added)
            usual = ["x", "weight", *(["bias"] if norm == "layer_norm" else []), *(["residual"] if added is not None else [])]
            with fastbn.use_kernel("reference"):
                want = backward(dy, x, saved, wrt=usual)
            over = dy.copy(), x.copy()
            found = [
                backward(dy, x, saved, wrt=usual), backward(over[0], x, saved, wrt=usual, out=over[0]),
                backward(dy, over[1], saved, wrt=usual, out=over[1]), backward(dy, x, saved, wrt=usual[1:]),
                backward(dy, x, saved, threads=3),
            ]  # fmt: skip
            for got in found:
                for a, b in zip(got, want, strict=True):
                    if a is not None:
                        np.testing.assert_allclose(a, b, rtol=0, atol=np.finfo(dtype).eps * 64 * max(1.0, np.abs(b).max()))
            for got in found[1:]:  # the same bits, wherever dx lies
                assert all(a is None or np.array_equal(a, b) for a, b in zip(got[:2], found[0][:2], strict=True))


CHANGES: tuple[dict[str, Any], ...] = (
    {"group": 0}, {"group": 4}, {"group": None}, {"group": 2**70}, {"axis": 9}, {"axis": None}, {"axis": 2**70},
    {"mean": np.ones(1, "f")}, {"mean": None}, {"mean": np.ones((2, 3))}, {"mean_lo": "a"}, {"invstd": [[1.0] * 3] * 2},
    {"weight": np.ones(5, "f")}, {"bias": object}, {"shape": (1,)}, {"shape": None}, {"shape": np.ones(3)}, {"dtype": "a"},
    {"activation": "silu"}, {"residual": None}, {"residual": np.ones((2, 6, 4))}, {"residual": 3}, {"axis": -1}, {"axis": True},
    {"activation": Builtin("relu", 0.0, 99)}, {"activation": Builtin("leaky_relu", float("nan"), 3)}, {"has_residual": 2},
    {"activation": Builtin("leaky_relu", 1, 3)}, {"mean": np.ones(6, "f")}, {"invstd": np.ones((3, 2), "f")},
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("threads", [None, 1])
def test_a_saved_that_was_changed_crashes_nothing(change: dict[str, Any], threads: int | None) -> None:
    x, w = _random((2, 6, 4), "float32"), np.ones(6, "float32")
    _, saved = fastbn.group_norm_forward(x, 3, w, w, activation="silu", residual=x)
    with pytest.raises((ValueError, TypeError), match=f"saved.*({next(iter(change))}|had)"):
        fastbn.group_norm_backward(x, x, dataclasses.replace(saved, **change), threads=threads)


@pytest.mark.parametrize("norm", NORMS)
def test_a_backward_refuses_what_the_forward_of_another_norm_has_saved(norm: str) -> None:
    """Groups of one channel, and rows that are as long as these: all else is the same."""
    x = _random((2, 6, 4), "float32")
    first = {"instance_norm": (), "group_norm": (6,), "layer_norm": ((6, 4),), "rms_norm": ((6, 4),)}
    saved = {other: getattr(fastbn, f"{other}_forward")(x, *first[other])[1] for other in NORMS}
    backward = getattr(fastbn, f"{norm}_backward")
    for other in NORMS:
        if other == norm:
            backward(x, x, saved[other])
            continue
        with pytest.raises(TypeError, match=f"saved must be what {norm}_forward returned, got one of {other}"):
            backward(x, x, saved[other])
        with pytest.raises(TypeError, match=f"saved must be what {norm}_forward returned, got one of {other}"):
            backward(x, x, dataclasses.replace(saved[norm], kind=other))


@pytest.mark.parametrize(
    "name", ["mean", "mean_lo", "invstd", "layer_mean", "layer_mean_lo", "layer_invstd", "weight", "bias", "mix", "residual", "axis"]
)
def test_so_does_one_of_batch_channel_norm(name: str) -> None:
    x = _random((2, 6, 4), "float32")
    _, saved = fastbn.batch_channel_norm_forward(x, None, None, np.full(6, 0.5), training=True, activation="silu", residual=x)
    for value in (None, "a", np.ones(7)):
        with pytest.raises((ValueError, TypeError), match=f"saved.{name}"):
            fastbn.batch_channel_norm_backward(x, x, dataclasses.replace(saved, **{name: value}))


def test_a_changed_correction_of_renorm_is_refused_before_dx_is_written() -> None:
    x = _random((8, 3), "float32")
    _, saved = fastbn.batch_renorm_forward(x, np.zeros(3), np.ones(3), training=True)
    out = np.zeros_like(x)
    with pytest.raises(ValueError, match=r"saved\.d"):
        fastbn.batch_renorm_backward(x, x, dataclasses.replace(saved, d=np.ones(4)), out=out)
    assert not out.any()


def test_instance_norm_moves_running_statistics_and_uses_them() -> None:
    torch = pytest.importorskip("torch")
    x = _random((3, 4, 5, 6), "float32")
    mean, var = np.zeros(4, "float32"), np.ones(4, "float32")
    t_mean, t_var = torch.zeros(4), torch.ones(4)
    fastbn.instance_norm(x, mean, var, momentum=0.3)
    torch.nn.functional.instance_norm(torch.from_numpy(x), t_mean, t_var, momentum=0.3)
    np.testing.assert_allclose(mean, t_mean, rtol=1e-5)
    np.testing.assert_allclose(var, t_var, rtol=1e-5)
    y = fastbn.instance_norm(x, mean, var, use_input_stats=False)
    np.testing.assert_allclose(y, fastbn.batch_norm(x, mean, var), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_as_torchs_own_samples(norm: str) -> None:
    torch = pytest.importorskip("torch")
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = (op for op in methods.op_db if op.name == f"nn.functional.{norm}")
    seen = 0
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=False):
        if sample.kwargs.get("eps") is not None and sample.kwargs["eps"] < 0:
            continue  # which makes no numbers of some rows, and is an error here
        args = [a.numpy() if isinstance(a, torch.Tensor) else a for a in (sample.input, *sample.args)]
        options = {k: v.numpy().copy() if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()}
        try:
            wanted = info.op(sample.input, *sample.args, **sample.kwargs)
        except ValueError:
            with pytest.raises(ValueError, match="Expected more than 1"):
                getattr(fastbn, norm)(*args, **options)
            continue
        np.testing.assert_allclose(getattr(fastbn, norm)(*args, **options), wanted, rtol=1e-4, atol=1e-5)
        seen += 1
    assert seen


@pytest.mark.parametrize("op", ["InstanceNormalization", "GroupNormalization", "LayerNormalization"])
def test_onnx_own_tests(op: str) -> None:
    cases = pytest.importorskip("onnx.backend.test.case.node")
    onnx = pytest.importorskip("onnx")
    for name in ("instance_normalization", "groupnormalization", "layernormalization"):
        pytest.importorskip(f"onnx.backend.test.case.node.{name}")  # its import fills the list
    seen = 0
    for case in cases._NodeTestCases:
        nodes = case.model.graph.node
        if len(nodes) != 1 or nodes[0].op_type != op:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
        eps = attributes.get("epsilon", 1e-5)
        for inputs, outputs in case.data_sets:
            x, *affine = inputs
            if op == "InstanceNormalization":
                y = fastbn.instance_norm(x, None, None, *affine, eps=eps)
            elif op == "GroupNormalization":
                y = fastbn.group_norm(x, attributes["num_groups"], *affine, eps=eps)
            else:
                y = fastbn.layer_norm(x, x.shape[attributes.get("axis", -1) % x.ndim :], *affine, eps=eps)
            np.testing.assert_allclose(y, outputs[0], rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen >= 2


ERRORS = (
    (lambda x: fastbn.group_norm(x, 3), ValueError, "num_groups must divide"),
    (lambda x: fastbn.group_norm(x, 2.0), TypeError, "num_groups must be an int"),
    (lambda x: fastbn.group_norm(x, 2, np.ones(3)), ValueError, "weight has shape"),
    (lambda x: fastbn.group_norm(x, 2, axis=0), ValueError, "axis must not be 0"),
    (lambda x: fastbn.group_norm(x[:1, :, :1, :1].copy(), 4), ValueError, "more than 1 value per group"),
    (lambda x: fastbn.group_norm(x[:1, :1, :1, :1], 1), ValueError, "more than 1 value per group"),
    (lambda x: fastbn.layer_norm(x, 4), ValueError, "ends in normalized_shape"),
    (lambda x: fastbn.layer_norm(x, ()), ValueError, "at least one axis"),
    (lambda x: fastbn.layer_norm(x, "5"), TypeError, "normalized_shape must be"),
    (lambda x: fastbn.layer_norm(x, bytes([5])), TypeError, "normalized_shape must be"),
    (lambda x: fastbn.layer_norm(x, np.array([5.0])), TypeError, "normalized_shape must be an int, got 5.0"),
    (lambda x: fastbn.layer_norm(x, (5, 5.0)), TypeError, "normalized_shape must be an int, got 5.0"),
    (lambda x: fastbn.layer_norm(x, np.array([[5]])), TypeError, "normalized_shape must be"),
    (lambda x: fastbn.layer_norm(x, 5, np.ones(4)), ValueError, "weight must have the shape of normalized_shape"),
    (lambda x: fastbn.rms_norm(x, 5, eps=-1.0), ValueError, "eps must be"),
    (lambda x: fastbn.instance_norm(x[:, :, :1, :1]), ValueError, "more than 1 spatial"),
    (lambda x: fastbn.instance_norm(x, use_input_stats=False), ValueError, "must be given"),
    (lambda x: fastbn.instance_norm(x, threads=0), ValueError, "threads must be"),
    (lambda x: fastbn.instance_norm(x, momentum="0.1"), TypeError, "momentum must be a number"),
    (lambda x: fastbn.instance_norm(x, use_input_stats="yes"), TypeError, "use_input_stats must be True or False"),
    (lambda x: fastbn.instance_norm(x, out=x[..., ::-1]), ValueError, "out overlaps x"),
    (lambda x: fastbn.instance_norm(x.astype(int)), TypeError, "x must have dtype"),
    (lambda x: fastbn.layer_norm_backward(x, x, fastbn.group_norm_forward(x, 2)[1]), TypeError, "saved must be"),
    (lambda x: fastbn.rms_norm_backward(x, x, None, wrt=("bias",)), ValueError, "rms_norm has none"),
    (lambda x: fastbn.layer_norm_backward(x, x, fastbn.layer_norm_forward(x, 5)[1], wrt=("residual",)), ValueError, "the forward had none"),
    (lambda x: fastbn.rms_norm_backward(x, x, fastbn.rms_norm_forward(x, 5)[1], wrt=("x", "bias")), ValueError, "rms_norm has none"),
    (lambda x: fastbn.batch_channel_norm(x, None, None, np.ones(3), training=True), ValueError, "mix has shape"),
    (lambda x: fastbn.batch_renorm(x, np.zeros(4), np.ones(4), training=True, rmax=0.5), ValueError, "rmax must be"),
    (lambda x: fastbn.ghost_batch_norm(x, None, None, training=True, virtual_batch_size=0), ValueError, "virtual_batch_size"),
    (lambda x: fastbn.instance_norm(x, x[0, :, 0, 0]), ValueError, "running_mean and x share memory"),
    (lambda x: fastbn.batch_channel_norm(x, x[0, :, 0, 0], None, np.ones(4), training=True), ValueError, "running_mean and x share memory"),
    (lambda x: fastbn.batch_renorm(x, np.zeros(4), x[0, :, 0, 0], training=True), ValueError, "running_var and x share memory"),
)


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_name_the_argument(case: int) -> None:
    call, error, words = ERRORS[case]
    x = _random((2, 4, 5, 5), "float32")
    before = x.copy()
    with pytest.raises(error, match=words):
        call(x)
    np.testing.assert_array_equal(x, before)


def test_groups_of_one_value_are_fine_in_several_images_as_in_pytorch() -> None:
    np.testing.assert_array_equal(fastbn.group_norm(_random((2, 4, 1), "float32"), 4, bias=np.arange(4)), np.arange(8).reshape(2, 4, 1) % 4)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0)])
def test_empty_arrays_are_fine(shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, "float32")
    for y, saved, backward in (
        (*fastbn.instance_norm_forward(x), fastbn.instance_norm_backward),
        (*fastbn.group_norm_forward(x, 2), fastbn.group_norm_backward),
    ):
        assert y.shape == shape
        g = backward(x, x, saved)
        assert g.dx.shape == shape
        np.testing.assert_array_equal(g.dweight, np.zeros(4))
    assert fastbn.layer_norm(x, shape[-1]).shape == shape


def _small_batch(seed: int = 0) -> tuple[Array, ...]:
    r = np.random.default_rng(seed)
    return r.standard_normal((4, 6, 5, 5)) * 2 + 3, r.standard_normal((4, 6, 5, 5)), *r.standard_normal((3, 6)), *r.uniform(0.5, 2, (2, 6))


@pytest.mark.parametrize("training", [True, False])
def test_batch_channel_norm_is_the_papers_formula(kernel: Kernel, training: bool) -> None:
    torch = pytest.importorskip("torch")
    F = torch.nn.functional  # noqa: N806
    x, dy, weight, bias, mix, mean, var = _small_batch()
    given = [torch.tensor(a, requires_grad=True) for a in (x, weight, bias, mix)]
    tx, w, b, m = given
    batch = F.batch_norm(tx, torch.tensor(mean), torch.tensor(var), training=training)
    w, b, m = (v.view(1, -1, 1, 1) for v in (w, b, m))
    wanted = F.silu(w * (m * batch + (1 - m) * F.layer_norm(tx, tx.shape[1:])) + b)
    gradients = torch.autograd.grad(wanted, given, torch.tensor(dy))
    y, saved = fastbn.batch_channel_norm_forward(x, mean, var, mix, weight, bias, training, activation="silu")
    g = fastbn.batch_channel_norm_backward(dy, x, saved)
    np.testing.assert_allclose(y, wanted.detach(), atol=1e-10)
    for found, theirs in zip((g.dx, g.dweight, g.dbias, g.dmix), gradients, strict=True):
        np.testing.assert_allclose(found, theirs, atol=1e-9)


def test_batch_renorm_is_the_papers_formula(kernel: Kernel) -> None:
    torch = pytest.importorskip("torch")
    x, dy, weight, bias, _, mean, var = _small_batch()
    given = [torch.tensor(a, requires_grad=True) for a in (x, weight, bias)]
    tx, w, b = given
    spread = np.sqrt(var + 1e-5)
    r = np.clip(np.sqrt(x.var((0, 2, 3)) + 1e-5) / spread, 1 / 1.5, 1.5).reshape(1, -1, 1, 1)
    d = np.clip((x.mean((0, 2, 3)) - mean) / spread, -0.5, 0.5).reshape(1, -1, 1, 1)
    wanted = w.view(1, -1, 1, 1) * (torch.nn.functional.batch_norm(tx, None, None, training=True) * torch.tensor(r) + torch.tensor(d))
    wanted = wanted + b.view(1, -1, 1, 1)
    gradients = torch.autograd.grad(wanted, given, torch.tensor(dy))
    old = mean.copy(), var.copy()
    y, saved = fastbn.batch_renorm_forward(x, mean, var, weight, bias, True, rmax=1.5, dmax=0.5)
    g = fastbn.batch_renorm_backward(dy, x, saved)
    np.testing.assert_allclose(y, wanted.detach(), atol=1e-10)
    for found, theirs in zip((g.dx, g.dweight, g.dbias), gradients, strict=True):
        np.testing.assert_allclose(found, theirs, atol=1e-9)
    np.testing.assert_allclose(mean, 0.9 * old[0] + 0.1 * x.mean((0, 2, 3)))
    np.testing.assert_allclose(var, 0.9 * old[1] + 0.1 * x.var((0, 2, 3), ddof=1))


def test_one_value_per_channel_is_said_of_x_by_all_variants() -> None:
    x, moved = np.ones((1, 3, 1, 1)), (np.zeros(3), np.ones(3))
    message = r"^Expected more than 1 value per channel when training, got .*x of shape \(1, 3, 1, 1\)$"
    for function in (fastbn.batch_renorm_forward, fastbn.batch_renorm, fastbn.ghost_batch_norm):
        with pytest.raises(ValueError, match=message):
            function(x, *moved, training=True)
    with pytest.raises(ValueError, match=message):
        fastbn.batch_channel_norm(x, *moved, np.zeros(3), training=True)
    np.testing.assert_array_equal(moved, ([0, 0, 0], [1, 1, 1]))


def test_ghost_batch_norm_is_batch_norm_of_each_virtual_batch(kernel: Kernel) -> None:
    x, dy, weight, bias, _, mean, var = _small_batch()
    moved = mean.copy(), var.copy()
    y, saved = fastbn.ghost_batch_norm_forward(x, mean, var, weight, bias, True, virtual_batch_size=2)
    g = fastbn.ghost_batch_norm_backward(dy, x, saved)
    dweight = 0
    for at in (slice(0, 2), slice(2, 4)):
        own, own_saved = fastbn.batch_norm_forward(x[at], weight, bias, *moved)
        np.testing.assert_array_equal(y[at], own)
        of_own = fastbn.batch_norm_backward(dy[at], x[at], own_saved)
        np.testing.assert_array_equal(g.dx[at], of_own.dx)
        dweight = dweight + of_own.dweight
    np.testing.assert_allclose(g.dweight, dweight)
    np.testing.assert_array_equal(mean, moved[0])
    np.testing.assert_array_equal(var, moved[1])


LAYERS: tuple[tuple[Any, tuple[int, ...], str], ...] = (
    (lambda: fastbn.InstanceNorm1d(4, 1e-5, 0.2, True, True), (2, 4, 6), "InstanceNorm1d(4, 1e-5, 0.2, True, True)"),
    (lambda: fastbn.InstanceNorm2d(4), (2, 4, 6, 5), "InstanceNorm2d(4)"),
    (lambda: fastbn.InstanceNorm3d(4, affine=True), (2, 4, 3, 3, 2), "InstanceNorm3d(4, affine=True)"),
    (lambda: fastbn.GroupNorm(2, 4), (2, 4, 6, 5), "GroupNorm(2, 4)"),
    (lambda: fastbn.InstanceNorm2d(4, affine=True, bias=False), (2, 4, 3, 3), "InstanceNorm2d(4, affine=True, bias=False)"),
    (lambda: fastbn.GroupNorm(2, 4, bias=False), (2, 4, 6, 5), "GroupNorm(2, 4, bias=False)"),
    (lambda: fastbn.LayerNorm((4, 5)), (2, 4, 5), "LayerNorm((4, 5))"),
    (lambda: fastbn.LayerNorm(5, bias=False), (2, 4, 5), "LayerNorm(5, bias=False)"),
    (lambda: fastbn.RMSNorm(5), (2, 4, 5), "RMSNorm(5)"),
)


def _module(text: str) -> Any:
    import torch

    try:
        return eval(f"torch.nn.{text}", {"torch": torch})  # noqa: S307  our own text
    except TypeError as error:
        if "'bias'" not in str(error):
            raise
        pytest.skip(f"this PyTorch has none: {error}")


@pytest.mark.parametrize(("make", "shape", "theirs"), LAYERS, ids=[name for _, _, name in LAYERS])
def test_layers_are_pytorchs(make: Any, shape: tuple[int, ...], theirs: str) -> None:
    torch = pytest.importorskip("torch")
    layer, module = make(), _module(theirs)
    assert layer.state_dict().keys() == module.state_dict().keys()
    state = {k: v + 0.25 if v.dtype.kind == "f" else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
    x, dy = _random(shape, "float32"), _random(shape, "float32", seed=1)
    t = torch.from_numpy(x.copy()).requires_grad_()
    y, wanted = layer(x), module(t)
    wanted.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(y, wanted.detach(), atol=1e-5)
    g = layer.backward(dy)
    np.testing.assert_allclose(g.dx, t.grad, atol=1e-5)
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            np.testing.assert_allclose(getattr(g, f"d{name}"), getattr(module, name).grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.eval()(x), module.eval()(t).detach(), atol=1e-5)
    for key, value in layer.state_dict().items():
        np.testing.assert_allclose(value, module.state_dict()[key], rtol=1e-5)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))  # noqa: S301
    np.testing.assert_array_equal(again(x), layer(x))


def test_layers_of_the_variants_train() -> None:
    x, dy = _random((2, 4, 5, 5), "float32"), _random((2, 4, 5, 5), "float32", seed=1)
    for layer in (fastbn.BatchChannelNorm2d(4), fastbn.BatchRenorm2d(4, rmax=2.0, dmax=1.0)):
        layer(x)
        g = layer.backward(dy)
        assert g.dx is not None
        assert g.dx.shape == x.shape
        assert layer.num_batches_tracked == 1
        assert (layer.running_mean != 0).all()
        before = layer.state_dict()
        layer.eval()(x)
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, before[key])


VARIANTS: tuple[Callable[..., Any], ...] = (
    lambda **o: fastbn.InstanceNorm2d(4, affine=True, track_running_stats=True, **o),
    lambda **o: fastbn.InstanceNorm2d(4, **o),
    lambda **o: fastbn.GroupNorm(2, 4, **o),
    lambda **o: fastbn.LayerNorm(5, **o),
    lambda **o: fastbn.RMSNorm(5, **o),
    lambda **o: fastbn.BatchChannelNorm2d(4, **o),
    lambda **o: fastbn.BatchRenorm2d(4, **o),
    lambda **o: fastbn.BatchNorm2d(4, **o),
)
each_layer = pytest.mark.parametrize("make", VARIANTS, ids=[str(i) + type(make()).__name__ for i, make in enumerate(VARIANTS)])


@each_layer
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_layer_in_eval_keeps_no_array_alive(make: Callable[..., Any], activation: str | None) -> None:
    layer = make(activation=activation).eval()
    x, residual, dy = (_random((2, 4, 5, 5), "float32", seed=i) for i in range(3))
    layer(x, residual)
    if layer.weight is not None:
        layer.weight[...] = 7.0  # the gradient is that of the forward
    g = layer.backward(dy)
    if layer.weight is not None:
        layer.weight[...] = 1.0
    again = layer.train() if not hasattr(layer, "running_mean") or layer.running_mean is None else layer
    again(x, residual)
    for found, wanted in zip(g, again.backward(dy), strict=True):
        np.testing.assert_array_equal(found, wanted)
    layer.eval()(x, residual)
    alive = weakref.ref(x), weakref.ref(residual)
    del x, residual
    assert [a() for a in alive] == [None, None]
    with pytest.raises(RuntimeError, match="a layer in eval keeps no arrays: hold x and residual until the backward"):
        layer.backward(dy)


@each_layer
def test_a_residual_that_a_layer_in_eval_wrote_over_has_its_gradient(make: Callable[..., Any]) -> None:
    layer = make(activation="silu").eval()
    x, residual, dy = (_random((2, 4, 5, 5), "float32", seed=i) for i in range(3))
    layer(x, residual)
    wanted = layer.backward(dy)
    layer(x, residual, out=residual)
    for found, one in zip(layer.backward(dy), wanted, strict=True):
        np.testing.assert_array_equal(found, one)


@each_layer
def test_layers_are_reset_as_they_were_made(make: Callable[..., Any]) -> None:
    layer, fresh = make(), make().state_dict()
    layer(_random((2, 4, 5, 5), "float32"))
    statistics = {key: value for key, value in layer.state_dict().items() if key.startswith(("running", "num"))}
    for name in layer.state_dict().keys() - statistics.keys():
        getattr(layer, name)[...] = 3
    if statistics:
        layer.reset_running_stats()
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, fresh[key] if key in statistics else np.float32(3))
    layer(_random((2, 4, 5, 5), "float32"))
    layer.reset_parameters()
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, fresh[key])


@pytest.mark.parametrize("theirs", [name for _, _, name in LAYERS])
def test_layers_have_the_resets_of_pytorchs(theirs: str) -> None:
    pytest.importorskip("torch")
    layer, module = eval(f"fastbn.{theirs}"), _module(theirs)  # noqa: S307  our own text
    for name in ("reset_parameters", "reset_running_stats"):
        assert hasattr(layer, name) == hasattr(module, name), name


@pytest.mark.parametrize("text", [
    "InstanceNorm2d(4, eps=1e-05, momentum=0.1, affine=False, layout=None)",
    "InstanceNorm1d(4, eps=0.5, momentum=None, affine=True, layout='NLC', track_running_stats=True, activation='relu').eval()",
    "GroupNorm(2, 4, eps=1e-05, affine=False, layout=None, axis=-1, activation=('leaky_relu', 0.5))",
    "GroupNorm(2, 4, eps=1e-05, affine=True, layout=None, bias=False)",
    "LayerNorm((4, 5), eps=1e-05, elementwise_affine=True, dtype='float64')",
    "LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=False, activation='silu')",
    "LayerNorm((4,), eps=1e-05, elementwise_affine=False)",
    "RMSNorm((4,), eps=None, elementwise_affine=True, activation='gelu').eval()",
    "BatchChannelNorm2d(4, eps=1e-05, momentum=0.1, affine=True, layout='NHWC', track_running_stats=False)",
    "BatchRenorm2d(4, eps=1e-05, momentum=0.1, affine=True, layout=None, axis=1, rmax=2.0, dmax=1.0)",
])  # fmt: skip
def test_the_repr_of_a_layer_makes_it_again(text: str) -> None:
    assert repr(eval(f"fastbn.{text}")) == text  # noqa: S307  our own text


@each_layer
@pytest.mark.only(lambda make: "bias" in make().state_dict())
def test_what_is_no_array_of_a_layer_is_named(make: Callable[..., Any]) -> None:
    layer = make()
    layer.bias = [0.0] * 4
    with pytest.raises(TypeError, match=r"bias of the layer must be a numpy\.ndarray, got list"):
        layer.state_dict()


@each_layer
@pytest.mark.only(lambda make: "num_batches_tracked" in make().state_dict() and not isinstance(make(), fastbn.InstanceNorm2d))
def test_a_count_of_batches_below_zero_is_named(make: Callable[..., Any]) -> None:
    layer = make(momentum=None)
    layer.num_batches_tracked[...] = -1
    with pytest.raises(ValueError, match="num_batches_tracked must be at least 0, got -1"):
        layer(np.zeros((2, 4, 5, 5), np.float32))


@each_layer
def test_an_output_between_the_inputs_elements_is_not_over_them(make: Callable[..., Any]) -> None:
    layer, other, memory, dy = make(), make(), _random((2, 4, 5, 5, 2), "float32"), _random((2, 4, 5, 5), "float32", seed=1)
    x = memory[..., 0]
    other(x.copy())
    layer(x, out=memory[..., 1])
    for found, wanted in zip(layer.backward(dy), other.backward(dy), strict=True):
        np.testing.assert_array_equal(found, wanted)


@each_layer
@pytest.mark.only(lambda make: "running_mean" in make().state_dict() and not isinstance(make(), fastbn.InstanceNorm2d))
def test_layers_without_tracking_move_nothing(make: Callable[..., Any]) -> None:
    layer, x = make(), _random((2, 4, 5, 5), "float32")
    layer.track_running_stats = False
    before = layer.state_dict()
    layer(x)
    layer.eval()(x)
    assert layer.state_dict().keys() == before.keys()
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_instance_norm_without_tracking_uses_the_images_statistics_in_eval() -> None:
    layer, x = fastbn.InstanceNorm2d(4, track_running_stats=True), _random((2, 4, 5, 5), "float32")
    layer.track_running_stats = False
    np.testing.assert_array_equal(layer.eval()(x), fastbn.instance_norm(x))
    layer = fastbn.InstanceNorm2d(4, track_running_stats=True)
    layer.running_mean = None
    np.testing.assert_array_equal(layer.eval()(x), fastbn.instance_norm(x))
    np.testing.assert_array_equal(layer.running_var, np.ones(4))


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_moves_the_statistics_that_it_has_wherever_it_uses_the_images_own(training: bool) -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = (kind(4, track_running_stats=True) for kind in (fastbn.InstanceNorm2d, torch.nn.InstanceNorm2d))
    x = _random((2, 4, 5, 5), "float32")
    for layer in (ours, theirs):
        layer.track_running_stats = False
        layer.train(training)
    ours(x), theirs(torch.from_numpy(x))
    assert (ours.running_mean != 0).all()
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[key], value.numpy(), rtol=1e-6)


def test_an_empty_batch_is_not_counted() -> None:
    for layer in (fastbn.BatchChannelNorm2d(4), fastbn.BatchRenorm2d(4), fastbn.BatchNorm2d(4)):
        layer(np.zeros((0, 4, 2, 2), np.float32))
        assert layer.num_batches_tracked == 0


@each_layer
def test_whether_a_layer_has_weights_cannot_be_set(make: Callable[..., Any]) -> None:
    layer = make()
    name = "elementwise_affine" if isinstance(layer, fastbn.LayerNorm) else "affine"
    assert getattr(layer, name) is (layer.weight is not None)
    with pytest.raises(AttributeError, match=r"no setter|can't set"):
        setattr(layer, name, False)


def test_loading_does_not_depend_on_numpys_error_mode() -> None:
    layer = fastbn.LayerNorm((2, 2))
    state = {"weight": np.array([[1e300, 1.0], [1e-300, 2.0]]), "bias": np.zeros((2, 2))}
    with np.errstate(all="raise"):
        layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.weight, np.array([[np.inf, 1], [0, 2]], np.float32))


@each_layer
@pytest.mark.only(lambda make: len(make().state_dict()) > 1)
def test_a_layer_that_cannot_take_all_is_loaded_with_nothing(make: Callable[..., Any]) -> None:
    layer = make()
    state = {key: value + 1 for key, value in layer.state_dict().items()}
    last = list(state)[-1]
    getattr(layer, last).setflags(write=False)
    before = layer.state_dict()
    with pytest.raises(ValueError, match=f"{last} of the layer is read-only"):
        layer.load_state_dict(state)
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_a_normalized_shape_may_be_an_array_as_for_pytorch() -> None:
    x = _random((2, 4, 5), "float32")
    np.testing.assert_array_equal(fastbn.layer_norm(x, np.array([4, 5])), fastbn.layer_norm(x, (4, 5)))
    assert fastbn.LayerNorm(np.array([4, 5])).normalized_shape == (4, 5)  # type: ignore[arg-type]
    assert fastbn.RMSNorm(np.array(5)).normalized_shape == (5,)  # type: ignore[arg-type]


def test_only_rms_norm_chooses_eps() -> None:
    with pytest.raises(TypeError, match="eps must be a number, got None"):
        fastbn.layer_norm(np.ones((2, 3), np.float32), 3, eps=None)  # type: ignore[arg-type]


STATISTICS = ("running_mean", "running_var")
SHARED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "batch_norm": (fastbn.batch_norm, (None, None), {"training": True}),
    "instance_norm": (fastbn.instance_norm, (None, None), {}),
    "group_norm": (fastbn.group_norm, (2,), {}),
    "layer_norm": (fastbn.layer_norm, (4,), {}),
    "rms_norm": (fastbn.rms_norm, (4,), {}),
    "batch_channel_norm": (fastbn.batch_channel_norm, (None, None, np.ones(4)), {"training": True}),
    "batch_renorm": (fastbn.batch_renorm, (np.zeros(4), np.ones(4)), {"training": True}),
    "ghost_batch_norm": (fastbn.ghost_batch_norm, (None, None), {"training": True, "virtual_batch_size": 2}),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("norm", ["batch_norm", "instance_norm", "batch_channel_norm", "batch_renorm", "ghost_batch_norm"])
@pytest.mark.parametrize("momentum", [0.0, 0.125])
def test_running_statistics_in_long_double_keep_their_digits(norm: str, momentum: float) -> None:
    function, given, options = SHARED[norm]
    x, tiny = _random((4, 4, 3, 4), "float32"), np.finfo(np.longdouble).eps
    found = []
    for rest in (0, tiny):  # what float64 rounds away
        options = options | {"momentum": momentum, **{name: np.full(4, 1 + rest, np.longdouble) for name in STATISTICS}}
        function(x, **options, **({"mix": given[2]} if len(given) > 2 else {}))
        found.append([options[name] for name in STATISTICS])
    batches = 2 if norm == "ghost_batch_norm" else 1
    for low, high in zip(*found, strict=True):
        np.testing.assert_allclose(np.float64((high - low) / tiny), (1 - momentum) ** batches, atol=1)  # to the last place
        assert (high > low).all()


class _Interface:
    """Memory of an array under NumPy's protocol."""

    def __init__(self, a: Array):
        self.__array_interface__ = a.__array_interface__


class _Convertible:
    """What turns into an array, without a copy."""

    def __init__(self, a: Array):
        self.a = a

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        return self.a


@pytest.mark.parametrize("given", [np.asarray, memoryview, _Interface, _Convertible])
@pytest.mark.parametrize("step", [1, -1, 2])
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("norm", SHARED)
@pytest.mark.only(lambda norm, which: (norm, which) != ("rms_norm", "bias"))
def test_an_output_over_a_parameter_is_refused(norm: str, which: str, step: int, given: Callable[[Array], Any]) -> None:
    function, first, options = SHARED[norm]
    x, out = _random((4, 4, 3, 4), "float32"), _random((4, 4, 3, 4), "float32")
    before = out.copy()
    with pytest.raises(ValueError, match=f"out and {which} share memory"):
        function(x, *first, **{which: given(out.reshape(-1)[16:48][::step][:4])}, out=out, **options)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize("layer", [fastbn.BatchRenorm2d, fastbn.BatchChannelNorm2d])
def test_a_batch_that_cannot_be_counted_moves_nothing(layer: Callable[[int], Any]) -> None:
    bn = layer(4)
    bn.num_batches_tracked.setflags(write=False)
    with pytest.raises(ValueError, match="num_batches_tracked is updated in place but is read-only"):
        bn(_random((2, 4, 3, 3), "float32"))
    assert not bn.running_mean.any()


@each_layer
@pytest.mark.only(lambda make: "num_batches_tracked" in make().state_dict() and not isinstance(make(), fastbn.InstanceNorm2d))
@pytest.mark.parametrize("count", [np.array(True), np.array("one"), np.array([1, 2]), np.array(1.0), np.array(127, np.int8), 2**63 - 1])
def test_what_cannot_count_batches_is_named_before_anything_moves(make: Callable[..., Any], count: Any) -> None:
    layer = make()
    layer.num_batches_tracked = count
    with pytest.raises((TypeError, ValueError), match=r"num_batches_tracked must be (an int|at most)"):
        layer(np.ones((2, 4, 5, 5), np.float32))
    assert not layer.running_mean.any()


def test_a_forward_that_fails_leaves_the_one_before_it() -> None:
    layer, x = fastbn.GroupNorm(2, 4), _random((2, 4, 3, 3), "float32")
    layer(x)
    want = layer.backward(x)
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        layer(x, x[:1])
    np.testing.assert_array_equal(layer.backward(x).dx, want.dx)


@pytest.mark.parametrize("which", ["weight", "bias", "x", "residual"])
@pytest.mark.parametrize("moved", ["running_mean", "running_var"])
def test_what_the_next_virtual_batch_needs_is_not_moved(moved: str, which: str) -> None:
    x, residual = _random((4, 4, 3, 4), "float32"), _random((4, 4, 3, 4), "float32")
    given = {"x": x, "residual": residual, "weight": np.ones(4, np.float32), "bias": np.ones(4, np.float32)}
    statistics = {"running_mean": np.zeros(4, np.float32), "running_var": np.ones(4, np.float32)}
    statistics[moved] = given[which].reshape(-1)[-4:]
    before = statistics[moved].copy()
    with pytest.raises(ValueError, match=f"{moved} and {which} share memory, and the call writes {moved}"):
        fastbn.ghost_batch_norm(**given, **statistics, training=True, virtual_batch_size=2)
    np.testing.assert_array_equal(statistics[moved], before)


@pytest.mark.parametrize("place", ["x", "residual", "own"])
def test_a_virtual_batch_that_fails_leaves_everything_as_it_was(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(usual: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count()

        def second_fails(*args: Any, **options: Any) -> Any:
            if next(calls):
                raise MemoryError
            return usual(*args, **options)

        return second_fails

    x, mean, var = _random((4, 4, 3, 4), "float32"), np.zeros(4, np.float32), np.ones(4, np.float32)
    given = {"x": x, "residual": x[::-1].copy(), "own": np.zeros_like(x)}
    options: dict[str, Any] = {"training": True, "residual": given["residual"], "activation": "relu", "virtual_batch_size": 2}
    _, saved = fastbn.ghost_batch_norm_forward(x, mean.copy(), var.copy(), **options)
    before = {name: a.copy() for name, a in given.items()}
    for name in ("batch_norm_forward", "batch_norm_backward"):
        monkeypatch.setattr(functional, name, failing(getattr(functional, name)))
    with pytest.raises(MemoryError):
        fastbn.ghost_batch_norm(x, mean, var, **options, out=given[place])
    assert (mean.tolist(), var.tolist()) == ([0.0] * 4, [1.0] * 4)
    with pytest.raises(MemoryError):
        fastbn.ghost_batch_norm_backward(given["residual"], x, saved, out=given[place])
    for name, a in given.items():
        np.testing.assert_array_equal(a, before[name])


def test_the_gradient_of_the_mix_stays_with_the_others() -> None:
    x = _random((4, 4, 3, 4), "float32")
    _, saved = fastbn.batch_channel_norm_forward(x, None, None, np.full(4, 0.5), training=True)
    g = fastbn.batch_channel_norm_backward(x, x, saved)
    for same in (copy.copy(g), copy.deepcopy(g), g._replace(dx=None), g.__replace__(dx=None)):
        np.testing.assert_array_equal(same.dmix, g.dmix)
        np.testing.assert_array_equal(same.dweight, g.dweight)
    assert g._replace(dmix=None).dmix is None


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_residuals_gradient_of_virtual_batches_lies_in_memory_as_x(activation: Any) -> None:
    x = _random((4, 3, 4, 5), "float32").transpose(0, 3, 1, 2)
    dy = np.ascontiguousarray(x[::-1])
    _, saved = fastbn.ghost_batch_norm_forward(x, None, None, training=True, residual=x, activation=activation, virtual_batch_size=2)
    g = fastbn.ghost_batch_norm_backward(dy.copy(), x, saved, wrt=("x", "residual"))
    assert g.dresidual.strides == x.strides
    assert activation or np.array_equal(g.dresidual, dy)
    again = fastbn.ghost_batch_norm_backward(dy, x, saved, wrt=("x", "residual"), out=dy)
    np.testing.assert_array_equal(again.dresidual, g.dresidual)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_the_mean_of_what_is_not_finite_is_not_finite(value: float) -> None:
    x = _random((3, 2, 4, 4), "float32")
    x[1, 0, 2, 2] = value
    mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    _, saved = fastbn.instance_norm_forward(x, mean, var)
    np.testing.assert_array_equal([mean[0], var[0], saved.mean[1, 0], saved.mean_lo[1, 0]], [value, np.nan, value, 0.0])
    assert np.isfinite([mean[1], var[1]]).all()
    for forward, given in ((fastbn.group_norm_forward, 1), (fastbn.layer_norm_forward, (2, 4, 4))):
        _, saved = forward(x, given)
        np.testing.assert_array_equal([saved.mean[1, 0], saved.mean_lo[1, 0]], [value, 0.0])
    _, mixed = fastbn.batch_channel_norm_forward(x, None, None, np.full(2, 0.5), training=True)
    np.testing.assert_array_equal(mixed.layer_mean[1, 0], value)


GHOSTS = fastbn.ghost_batch_norm_forward(np.arange(8.0).reshape(4, 2), None, None, training=True, virtual_batch_size=2)[1]
RENORM = fastbn.batch_renorm_forward(np.arange(8.0).reshape(4, 2), np.zeros(2), np.ones(2), training=True)[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("saved", None), ("saved", ()), ("saved", (3, 3)), ("saved", list(GHOSTS.saved)), ("saved", GHOSTS.saved * 2),
        ("sizes", None), ("sizes", 4), ("sizes", ("2", "2")), ("sizes", (2, 2, 0)), ("sizes", (1, 3)), ("sizes", (3, 3)),
    ],
)  # fmt: skip
def test_what_virtual_batches_have_saved_is_checked_before_one_is_written(name: str, value: Any) -> None:
    x, out = np.arange(8.0).reshape(4, 2), np.zeros((4, 2))
    with pytest.raises((TypeError, ValueError), match="saved"):
        fastbn.ghost_batch_norm_backward(x, x, dataclasses.replace(GHOSTS, **{name: value}), out=out)
    assert not out.any()


@pytest.mark.parametrize("name", ["r", "d"])
def test_a_correction_is_whole_or_none(name: str) -> None:
    x = np.arange(8.0).reshape(4, 2)
    with pytest.raises(ValueError, match=r"saved\.r and saved\.d must both"):
        fastbn.batch_renorm_backward(x, x, dataclasses.replace(RENORM, **{name: None}))


def test_numbers_that_were_saved_may_be_arrays_without_axes() -> None:
    x = _random((2, 4, 3), "float32")
    _, saved = fastbn.group_norm_forward(x, 2)
    want = fastbn.group_norm_backward(x, x, saved)
    for name in ("axis", "group"):
        with fastbn.use_kernel("reference"):
            got = fastbn.group_norm_backward(x, x, dataclasses.replace(saved, **{name: np.array(getattr(saved, name))}))
        np.testing.assert_allclose(got.dx, want.dx, rtol=1e-4, atol=1e-5)


def test_a_gradient_is_not_written_over_what_was_saved() -> None:
    x, cases = np.arange(3.0)[None] + 1, []
    cases += [(fastbn.layer_norm_backward, fastbn.layer_norm_forward(x, 3, np.ones(3), np.ones(3))[1], ("weight", "bias"))]
    cases += [(fastbn.layer_norm_backward, fastbn.layer_norm_forward(x.T, 1)[1], ("mean", "mean_lo", "invstd"))]
    mixed = fastbn.batch_channel_norm_forward(x, None, None, np.ones(3), training=True, correction=0)[1]
    cases += [(fastbn.batch_channel_norm_backward, mixed, ("mean", "mean_lo", "invstd", "weight", "bias", "mix"))]
    for backward, saved, names in cases:
        for name in names:
            given = x.reshape(saved.shape)
            with pytest.raises(ValueError, match=rf"out and saved\.{name} share memory"):
                backward(given, given, saved, out=getattr(saved, name).reshape(saved.shape))


@pytest.mark.parametrize(("dtype", "eps"), [("float16", 2.0**-23), ("bfloat16", 2.0**-23), ("float32", 2.0**-23), ("float64", 2.0**-52)])
def test_what_rms_norm_adds_by_itself_is_of_the_arithmetic_as_in_pytorch(dtype: str, eps: float) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = (_random((3, 8), "float64") * 1e-4).astype(resolve(dtype))
    want = fastbn.rms_norm(x, 8, eps=eps)
    np.testing.assert_array_equal(fastbn.rms_norm(x, 8), want)
    np.testing.assert_array_equal(fastbn.rms_norm_forward(x, 8)[0], want)
    np.testing.assert_array_equal(fastbn.RMSNorm(8, dtype=dtype)(x), want)


BACKWARDS: dict[str, tuple[Callable[..., Any], Callable[[Array], Any]]] = {
    "batch_norm": (fastbn.batch_norm_backward, fastbn.batch_norm_forward),
    "instance_norm": (fastbn.instance_norm_backward, fastbn.instance_norm_forward),
    "group_norm": (fastbn.group_norm_backward, lambda x: fastbn.group_norm_forward(x, 2)),
    "layer_norm": (fastbn.layer_norm_backward, lambda x: fastbn.layer_norm_forward(x, 4)),
    "rms_norm": (fastbn.rms_norm_backward, lambda x: fastbn.rms_norm_forward(x, 4)),
    "batch_channel_norm": (
        fastbn.batch_channel_norm_backward,
        lambda x: fastbn.batch_channel_norm_forward(x, None, None, np.ones(4), training=True),
    ),
    "batch_renorm": (fastbn.batch_renorm_backward, lambda x: fastbn.batch_renorm_forward(x, np.zeros(4), np.ones(4), training=True)),
    "ghost_batch_norm": (
        fastbn.ghost_batch_norm_backward,
        lambda x: fastbn.ghost_batch_norm_forward(x, None, None, training=True, virtual_batch_size=2),
    ),
}


@pytest.mark.parametrize("norm", BACKWARDS)
def test_names_of_gradients_may_be_such_as_can_be_read_once(norm: str) -> None:
    backward, forward = BACKWARDS[norm]
    x = _random((4, 4, 3, 4), "float32")
    saved = forward(x)[1]
    found = backward(x, x, saved, wrt=iter(["x", "weight"]))
    assert [v is not None for v in found] == [True, True, False, False]


@pytest.mark.parametrize(
    ("where", "error", "text"),
    [
        ({"layout": "HWCN"}, ValueError, "layout must be one of"),
        ({"layout": "NCHW", "axis": 1}, ValueError, "give axis or layout, not both"),
        ({"axis": 1.5}, TypeError, "axis must be an int"),
        ({"axis": 0}, ValueError, "axis must not be 0, the axis of the images"),
        ({"axis": -4}, ValueError, "axis must not be 0, the axis of the images"),
    ],
)
@pytest.mark.parametrize("norm", ["instance_norm", "group_norm", "batch_channel_norm", "batch_renorm"])
@pytest.mark.only(lambda norm, where: "axis" not in where or (norm, where["axis"]) != ("group_norm", -4))
def test_a_layer_refuses_where_no_channels_can_be(norm: str, where: dict[str, Any], error: type[Exception], text: str) -> None:
    if norm == "batch_renorm" and where.get("axis") in (0, -4):  # as batch norm
        x = _random((4, 2, 3, 3), "float32")
        np.testing.assert_array_equal(LAYERS_ON_CHANNELS[norm](**where)(x), fastbn.BatchNorm2d(4, **where)(x))
        return
    with pytest.raises(error, match=text):
        LAYERS_ON_CHANNELS[norm](**where)


LAYERS_ON_CHANNELS: dict[str, Callable[..., Any]] = {
    "batch_norm": lambda **options: fastbn.BatchNorm2d(4, **options),
    "instance_norm": lambda **options: fastbn.InstanceNorm2d(4, affine=True, track_running_stats=True, **options),
    "group_norm": lambda **options: fastbn.GroupNorm(2, 4, **options),
    "batch_channel_norm": lambda **options: fastbn.BatchChannelNorm2d(4, **options),
    "batch_renorm": lambda **options: fastbn.BatchRenorm2d(4, rmax=1.0, dmax=0.0, **options),
}


@pytest.mark.parametrize("norm", LAYERS_ON_CHANNELS)
def test_a_pruned_layer_has_the_channels_that_it_says(norm: str) -> None:
    layer, x = LAYERS_ON_CHANNELS[norm](), _random((2, 4, 3, 3), "float32")
    name = "num_channels" if norm == "group_norm" else "num_features"
    for key in layer.state_dict():
        if (own := getattr(layer, key)).ndim:
            setattr(layer, key, own[:2].copy())
    setattr(layer, name, 2)
    assert layer(x[:, :2]).shape == (2, 2, 3, 3)
    with pytest.raises(ValueError, match="x has 4 channels on axis 1 but the layer has"):
        layer(x)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_stays_in_its_image_and_channel_of_a_mix(value: float, last: bool) -> None:
    x, dy = _random((3, 8, 6, 5), "float32"), _random((3, 8, 6, 5), "float32", seed=1)
    apart = np.ones(x.shape, np.bool_)
    apart[1], apart[:, 3] = False, False
    found = []
    for number in (1.0, value):
        x[1, 3, 2, 2] = number
        given = [np.ascontiguousarray(np.moveaxis(a, 1, -1)) if last else a for a in (x, dy)]
        y, saved = fastbn.batch_channel_norm_forward(given[0], None, None, np.full(8, 0.5), training=True, axis=-1 if last else 1)
        g = fastbn.batch_channel_norm_backward(given[1], given[0], saved)
        found.append([(np.moveaxis(a, -1, 1) if last else a)[apart] for a in (y, g.dx)])
    np.testing.assert_array_equal(found[1][0], found[0][0])
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)


def test_a_weight_of_zero_leaves_the_residuals_gradient(kernel: Kernel) -> None:
    x, dy, residual = (np.random.default_rng(i).integers(-4, 5, (3, 6, 5)).astype("f") for i in range(3))
    zero, half = np.zeros(6, "f"), np.full(6, 0.5, "f")
    _, saved = fastbn.group_norm_forward(x, 2, weight=zero, bias=half, activation="relu", residual=residual)
    found = fastbn.group_norm_backward(dy, x, saved, wrt=("x", "residual"))
    np.testing.assert_array_equal(found[-1], np.where(residual + 0.5 > 0, dy, 0))
    np.testing.assert_array_equal(found[0], np.zeros_like(x))
