"""Activations, residuals and gradients from the output: every kernel, dtype, memory pattern and operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
from truth import Problem, columns, problem, rng, same_bits, ulp, within

import fastbn
from fastbn import reference
from fastbn.activations import NAMES, lookup
from fastbn.dispatch import Kernel
from fastbn.layout import Array

ALL: tuple[Any, ...] = (*NAMES, ("leaky_relu", 0.2))
KINKED = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
SHAPES = {"NCHW": (3, 5, 9, 7), "NHWC": (3, 9, 7, 5), "small planes": (40, 6, 3, 3), "one channel": (2, 1, 5, 5), "wide": (2, 4, 3, 70)}
# A unit in the last place of the result, or of what is added up: the normalized value is known to 1e-6.
PLACES = {"float32": 4, "float64": 16}


def _axis(name: str) -> int:
    return 3 if name in ("NHWC", "wide") else 1


def _layout(name: str) -> str:
    return "NHWC" if _axis(name) == 3 else "NCHW"


def _truth(activation: Any, z: Array) -> tuple[Array, Array]:
    """The activation of z, and its derivative."""
    f = lookup(activation)
    with np.errstate(all="ignore"):
        value, slope = (function(z, f.parameter) for function in reference.ACTIVATIONS[f.name])
    return value, slope


def _bound(truth: Array, dtype: np.dtype[Any], activation: Any = "relu") -> Array:
    """What an element may be off: 4 places or 1e-6; in 16 bits one place, two for what is not piecewise."""
    if dtype.itemsize == 2:
        piecewise = lookup(activation).name in KINKED
        return np.maximum(ulp(truth, dtype) * (1 if piecewise else 2), 2.0**-20)
    tiny = 1e-6 if dtype == np.float32 else 1e-14
    return np.maximum(PLACES[dtype.name] * ulp(truth, dtype), tiny)


def _normalized(p: Problem, training: bool, residual: Array | None, eps: float = 1e-5) -> Array:
    """What the activation is applied to, in float64."""
    mean, var = reference.batch_norm_stats(p.x, p.axis)[1:] if training else (p.mean, p.var)
    z = reference.batch_norm(p.x, mean, var, p.weight, p.bias, eps, p.axis)
    return z if residual is None else z + residual.astype(np.float64)


def _away_from_kinks(p: Problem, activation: Any, residual: Array | None, training: bool) -> Array:
    """Where a rounding of z does not change the derivative."""
    z = _normalized(p, training, residual)
    near = [np.abs(z - kink) < 1e-5 * max(1.0, kink) for kink in KINKED.get(lookup(activation).name, ())]
    return ~np.logical_or.reduce(near) if near else np.ones(z.shape, bool)


# What Numba would compile for seconds: a few stand for all. `test_special_values` and `test_accuracy...` run all of its functions.
few_for_numba = pytest.mark.only(
    lambda kernel, dtype, activation: (
        kernel.name != "numba" or activation in (None, "relu", "gelu") or (dtype, activation) == ("float32", ("leaky_relu", 0.2))
    )
)


@few_for_numba
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, *ALL], ids=str)
def test_forward(kernel: Kernel, dtype: np.dtype[Any], activation: Any, shape: str) -> None:
    p = problem(SHAPES[shape], dtype, _axis(shape))
    residual = rng(1).standard_normal(p.x.shape).astype(dtype)
    for r in (None, residual):
        if activation is None and r is None:
            continue
        for training in (False, True):
            y = fastbn.batch_norm(
                p.x, p.mean.copy(), p.var.copy(), p.weight, p.bias, training, layout=_layout(shape), activation=activation, residual=r
            )  # fmt: skip
            z = _normalized(p, training, r)
            truth = z if activation is None else _truth(activation, z)[0]
            within(y, truth, _bound(truth, dtype, activation or "relu"))


@few_for_numba
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, *ALL], ids=str)
def test_backward(kernel: Kernel, dtype: np.dtype[Any], activation: Any, shape: str) -> None:
    p = problem(SHAPES[shape], dtype, _axis(shape))
    residual = rng(1).standard_normal(p.x.shape).astype(dtype)
    places = {2: 1, 4: 0, 8: 0}[dtype.itemsize] * (1 if activation in (None, *KINKED) else 2)
    for r in (None, residual):
        for training in (False, True):
            # Where z is at a kink the derivative is a matter of rounding: no gradient comes from there.
            dy = p.dy if activation is None else np.where(_away_from_kinks(p, activation, r, training), p.dy, 0).astype(dtype)
            _, saved = fastbn.batch_norm_forward(
                p.x, p.weight, p.bias, p.mean.copy(), p.var.copy(), training, layout=_layout(shape), activation=activation, residual=r
            )  # fmt: skip
            wrt = ("x", "weight", "bias") if r is None else ("x", "weight", "bias", "residual")
            got = fastbn.batch_norm_backward(dy, p.x, saved, wrt=wrt)
            mean, var = reference.batch_norm_stats(p.x, p.axis)[1:] if training else (p.mean, p.var)
            dz = dy.astype(np.float64)
            if activation is not None:
                dz = dz * _truth(activation, _normalized(p, training, r))[1]
            dx, dweight, dbias = reference.batch_norm_backward(dz, p.x, mean, var, p.weight, 1e-5, p.axis, training)
            count = dx.size / dbias.size
            for gradient, truth, scale in ((got.dx, dx, 1.0), (got.dweight, dweight, count**0.5), (got.dbias, dbias, count**0.5)):
                assert gradient is not None
                relative = 1e-12 if p.weight.dtype == np.float64 else 1e-5
                bound = relative * np.max(np.abs(truth), initial=scale)
                within(gradient, truth, bound + (places * ulp(truth, dtype) if truth.ndim > 1 else 0.0))
            if r is None:
                assert got.dresidual is None
            else:
                assert got.dresidual is not None
                within(got.dresidual, dz, _bound(dz, dtype, activation or "relu") + (1e-6 if dtype.itemsize < 8 else 1e-14))


@pytest.mark.parametrize("activation", ALL, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["frozen", "training"])
def test_gradients_are_differences(activation: Any, training: bool) -> None:
    p = problem((2, 3, 4, 3), np.float64)
    residual = rng(1).standard_normal(p.x.shape)

    def loss(x: Array, weight: Array, bias: Array, r: Array) -> float:
        y = fastbn.batch_norm(x, p.mean.copy(), p.var.copy(), weight, bias, training, activation=activation, residual=r)
        return float((y * p.dy).sum())

    _, saved = fastbn.batch_norm_forward(
        p.x, p.weight, p.bias, p.mean.copy(), p.var.copy(), training, activation=activation, residual=residual
    )
    gradients = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=("x", "weight", "bias", "residual"))
    arguments = [p.x, p.weight, p.bias, residual]
    for i, gradient in enumerate(gradients):
        assert gradient is not None
        direction = rng(2 + i).standard_normal(arguments[i].shape)
        step = 1e-6
        there, back = (loss(*(a + sign * step * direction if j == i else a for j, a in enumerate(arguments))) for sign in (1, -1))
        assert (there - back) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-6)


def _identity(x: Array, activation: Any) -> Array:
    """The activation alone: normalization that changes nothing."""
    return fastbn.batch_norm_elemt(x, np.zeros(1), np.ones(1), activation=activation)


@pytest.mark.parametrize("activation", ALL, ids=str)
def test_special_values(kernel: Kernel, dtype: np.dtype[Any], activation: Any) -> None:
    tiny, huge = (float(np.finfo(dtype).smallest_subnormal), float(np.finfo(dtype).max)) if dtype != "bfloat16" else (2.0**-133, 3.3e38)
    values = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 3.0, -3.0, 6.0, 6.5, -20.0, -90.0, -104.0, -800.0, 65504.0, -65504.0]
    x = np.array([*values, tiny, -tiny, 5 * tiny, huge, -huge] * 3, np.float64).astype(dtype).reshape(-1, 1)
    y = _identity(x, activation)
    truth, _ = _truth(activation, x.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(truth))
    kept = np.isfinite(truth) & (np.abs(truth) <= huge)
    np.testing.assert_array_equal(y[~kept].astype(np.float64), truth[~kept])
    # silu is x times a factor, which may be zero where it is not a normal number.
    places = 2 if dtype.itemsize == 2 else 4
    if activation in ("gelu", "gelu_tanh"):  # an exponential's argument is z^2, rounded
        places = places * (1 + np.square(np.clip(x[kept].astype(np.float64), -40, 40)))
    compute = np.float64 if dtype == np.float64 else np.float32
    smallest = float(np.finfo(compute).smallest_subnormal if lookup(activation).name in KINKED else np.finfo(compute).smallest_normal)
    within(y[kept], truth[kept], places * ulp(truth[kept], dtype) + np.abs(x[kept].astype(np.float64)) * smallest)


# The smooth functions and their derivatives in decimal arithmetic of 60 digits: another truth than the formulas of the reference.

PI = Decimal("3.14159265358979323846264338327950288419716939937510582")


def _logistic(z: Decimal) -> Decimal:
    e = (-abs(z)).exp()
    return (e if z < 0 else Decimal(1)) / (1 + e)


def _normal(z: Decimal) -> tuple[Decimal, Decimal]:
    """The normal distribution function, by its series or, in the tails, its continued fraction; and the density."""
    a, density = abs(z), (-z * z / 2).exp() / (2 * PI).sqrt()
    if a < 3:
        term = inside = a
        n = 1
        while abs(term) > Decimal(10) ** -36:
            term *= -a * a * (2 * n - 1) / (2 * n * (2 * n + 1))
            inside += term
            n += 1
        tail = Decimal("0.5") - inside / (2 * PI).sqrt()
    else:
        fraction = a
        for n in range(200, 0, -1):
            fraction = a + n / fraction
        tail = density / fraction
    return 1 - tail if z > 0 else tail, density


def _gelu(z: Decimal) -> tuple[Decimal, Decimal]:
    below, density = _normal(z)
    return z * below, below + z * density


def _gelu_tanh(z: Decimal) -> tuple[Decimal, Decimal]:
    k = 2 * (2 / PI).sqrt()
    u = k * (z + Decimal("0.044715") * z**3)
    return z * _logistic(u), _logistic(u) * (1 + z * _logistic(-u) * k * (1 + 3 * Decimal("0.044715") * z * z))


SMOOTH: dict[str, Callable[[Decimal], tuple[Decimal, Decimal]]] = {
    "sigmoid": lambda z: (_logistic(z), _logistic(z) * _logistic(-z)),
    "silu": lambda z: (z * _logistic(z), _logistic(z) * (1 + z * _logistic(-z))),
    "tanh": lambda z: (2 * _logistic(2 * z) - 1, 4 * _logistic(2 * z) * _logistic(-2 * z)),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


@cache
def _exactly(activation: str, dtype: str) -> tuple[Array, list[Decimal], list[Decimal]]:
    """Points down to where the tails leave the range, the function there, and its derivative."""
    far = {"gelu": (13.0, 37.5), "gelu_tanh": (5.0, 9.5), "tanh": (43.0, 350.0)}.get(activation, (85.0, 700.0))[dtype == "float64"]
    small = np.geomspace(1e-30, 1, 20)
    z = np.concatenate([np.linspace(-far, far, 201), np.linspace(-3, 3, 121), small, -small]).astype(dtype)
    with localcontext(Context(prec=60)):
        values, slopes = zip(*(SMOOTH[activation](Decimal(float(v))) for v in z), strict=True)
    return z, list(values), list(slopes)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)
def test_smooth_functions_keep_their_digits_in_the_tails(kernel: Kernel, dtype: np.dtype[Any], activation: str) -> None:
    """However small the result is: to 4 places, or where an exponential's argument z^2 is rounded, 6 (1 + z^2)."""
    z, *truths = _exactly(activation, dtype.name)
    x, zero, one = z.reshape(-1, 1), np.zeros(1, dtype), np.ones(1, dtype)
    y, saved = fastbn.batch_norm_forward(x, None, None, zero, one, False, eps=0.0, activation=activation)
    same_bits(y, _identity(x, activation))
    dx = fastbn.batch_norm_backward(np.ones_like(x), x, saved, wrt="x").dx
    assert dx is not None
    rounded = 6 * (1 + np.square(z, dtype=np.float64))
    value_places = rounded if activation.startswith("gelu") else 4
    near_roots = np.where(np.abs(z) < 3, 4 * np.finfo(dtype).eps, 0)  # of the derivatives
    for got, truth, places, least in ((y, truths[0], value_places, 0), (dx, truths[1], rounded, near_roots)):
        with localcontext(Context(prec=60)):
            error = np.array([float(abs(Decimal(float(g)) - t)) for g, t in zip(got.ravel(), truth, strict=True)])
        bound = np.maximum(places * ulp(np.array([float(t) for t in truth]), dtype), least)
        worst = np.argmax(error / bound)
        assert error[worst] <= bound[worst], f"{error[worst] / bound[worst]} times what is allowed at {z[worst]}"


# What the derivatives are where the function has a kink and elsewhere; `fastbn` takes PyTorch's side.
SLOPES = {
    "relu": {-2: 0, 0: 0, 0.5: 1},
    "relu6": {-1: 0, 0: 0, 0.5: 1, 5.5: 1, 6: 0, 7: 0},
    "leaky_relu": {-2: 0.01, 0: 0.01, 1: 1},
    "hardswish": {-4: 0, -3: 0, -1.5: 0, 0: 0.5, 1.5: 1, 2.25: 1.25, 3: 1, 4: 1},
    ("leaky_relu", 0.25): {-2: 0.25, -0.0: 0.25, 1: 1},
}


@pytest.mark.only(lambda kernel, dtype, axis: kernel.name != "numba" or (axis, dtype) == (1, "float32"))
@pytest.mark.parametrize("activation", SLOPES, ids=str)
@pytest.mark.parametrize("axis", [1, 2])
def test_derivatives_at_kinks_and_elsewhere(kernel: Kernel, dtype: np.dtype[Any], activation: Any, axis: int) -> None:
    """In the map and in the sums; with a residual of zeros too, which takes another way through the kernels."""
    z, slope = (np.array(list(values), np.float64) for values in (SLOPES[activation], SLOPES[activation].values()))
    x = np.moveaxis(np.broadcast_to(z, (2, 3, len(z))), 1, axis).astype(dtype).copy()
    compute = np.float64 if dtype == np.float64 else np.float32
    zero, one = np.zeros(3, compute), np.ones(3, compute)
    layout = ("NCL", "NLC")[axis - 1]
    for residual in (None, np.zeros_like(x)):
        _, saved = fastbn.batch_norm_forward(
            x, None, None, zero, one, False, eps=0.0, layout=layout, activation=activation, residual=residual
        )  # fmt: skip
        got = fastbn.batch_norm_backward(np.ones_like(x), x, saved)
        want = np.moveaxis(np.broadcast_to(slope.astype(dtype), (2, 3, len(z))), 1, axis)
        within(np.asarray(got.dx), want.astype(np.float64), ulp(np.ones(1), dtype) / 2)
        exact = slope.astype(compute) if "leaky_relu" in str(activation) else slope
        np.testing.assert_allclose(got.dbias, np.full(3, 2 * exact.sum()), rtol=4 * np.finfo(compute).eps)
        np.testing.assert_allclose(got.dweight, np.full(3, 2 * (exact * z).sum()), rtol=4 * np.finfo(compute).eps)


# At minus infinity and infinity: as PyTorch's, of which some are products of zero and infinity.
FAR_SLOPES: dict[Any, tuple[float, float]] = {
    "relu": (0, 1), "relu6": (0, 0), "leaky_relu": (0.01, 1), "hardswish": (0, 1), "sigmoid": (0, 0), "tanh": (0, 0),
    "silu": (np.nan, np.nan), "gelu": (np.nan, np.nan), "gelu_tanh": (np.nan, np.nan),
}  # fmt: skip


@pytest.mark.only(lambda kernel, dtype: kernel.name != "numba" or dtype == "float32")
@pytest.mark.parametrize("activation", FAR_SLOPES)
@pytest.mark.parametrize("shape", [(2, 40), (40, 2), (5, 2, 9)], ids=str)
def test_derivatives_at_infinity(kernel: Kernel, dtype: np.dtype[Any], activation: str, shape: tuple[int, ...]) -> None:
    """Whether an array is dense or not: given statistics are constants, and an infinite x changes no other gradient."""
    compute = np.float64 if dtype == np.float64 else np.float32
    zero, one = np.zeros(shape[1], compute), np.ones(shape[1], compute)
    x = np.resize(np.array([-np.inf, np.inf, 0.5], dtype), shape)
    want = np.resize(np.array([*FAR_SLOPES[activation], _truth(activation, np.full(1, 0.5))[1][0]]), shape)
    wide = np.zeros((*shape[:-1], 2 * shape[-1]), dtype)
    wide[..., ::2] = x
    for given in (x, wide[..., ::2]):
        for residual in (None, np.zeros_like(x)):
            options: dict[str, Any] = {"eps": 0.0, "activation": activation, "residual": residual}
            _, saved = fastbn.batch_norm_forward(given, one, zero, zero, one, False, **options)
            g = fastbn.batch_norm_backward(np.ones_like(x), given, saved, wrt=("x",) if residual is None else ("x", "residual"))
            for gradient in (g.dx, g.dresidual)[: 1 if residual is None else 2]:
                np.testing.assert_allclose(np.asarray(gradient, np.float64), want, atol=4 * float(ulp(np.ones(1), dtype)[0]))


@pytest.mark.only(lambda kernel, dtype, activation: kernel.name != "numba" or (dtype, activation) == ("float32", "relu"))
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid"])
def test_what_a_mask_leaves_out_may_be_infinite(kernel: Kernel, dtype: np.dtype[Any], activation: Any) -> None:
    x, dy = (rng(i).normal(size=(6, 3, 5)).astype(dtype) for i in range(2))
    mask = rng(2).random((6, 5)) < 0.6
    np.moveaxis(x, 1, -1)[~mask] = np.inf
    _, saved = fastbn.batch_norm_forward(x, mask=mask, activation=activation)
    g = fastbn.batch_norm_backward(dy, x, saved)
    for gradient in (g.dx, g.dweight, g.dbias):
        assert np.isfinite(np.asarray(gradient, np.float64)).all()


@pytest.mark.parametrize("activation", FAR_SLOPES)
def test_derivatives_at_infinity_are_pytorchs(activation: str) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (pip install torch)")
    z = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64, requires_grad=True)
    functions = {"gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"), "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    functions.get(activation, getattr(torch.nn.functional, activation, None))(z).sum().backward()
    np.testing.assert_array_equal(z.grad, FAR_SLOPES[activation])


@pytest.mark.only(lambda kernel, dtype: kernel.name != "numba" or dtype == "float32")
@pytest.mark.parametrize("shape", [(3, 2, 40), (5, 64)], ids=str)
def test_infinite_gradients(kernel: Kernel, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Nothing passes where a function is flat; elsewhere it is a product, as in PyTorch; in blocks and behind them."""
    far = -200 if dtype != np.float64 else -2000
    compute = np.float64 if dtype == np.float64 else np.float32
    x, dy = np.full(shape, far, dtype), np.full(shape, np.inf, dtype)
    zero, one = np.zeros(shape[1], compute), np.ones(shape[1], compute)
    expected = {"relu": 0, "relu6": 0, "hardswish": 0, "gelu": np.nan, ("leaky_relu", 0.0): np.nan}
    for activation, want in expected.items():
        _, saved = fastbn.batch_norm_forward(x, None, None, zero, one, False, eps=0.0, activation=activation)
        got = fastbn.batch_norm_backward(dy, x, saved)
        for gradient in (got.dx, got.dweight, got.dbias):
            np.testing.assert_array_equal(np.asarray(gradient, np.float64), want, err_msg=str(activation))


@pytest.mark.only(lambda kernel, dtype: kernel.name != "numba" or dtype == "float32")
@pytest.mark.parametrize("activation", [None, "relu"])
def test_an_infinite_gradient_is_infinite_in_the_sums_as_in_pytorch(kernel: Kernel, dtype: np.dtype[Any], activation: Any) -> None:
    """Statistics that are given round nothing away, which infinity would be multiplied with."""
    x, dy = np.array([[1, 2], [3, 4], [2, 1]], dtype), np.array([[np.inf, 1], [1, 1], [1, 1]], dtype)
    compute = np.float64 if dtype == np.float64 else np.float32
    zero, one = np.zeros(2, compute), np.ones(2, compute)
    for mean in (zero, zero.astype(np.float64)):
        _, saved = fastbn.batch_norm_forward(x, one, zero, mean, one, False, eps=0.0, activation=activation)
        g = fastbn.batch_norm_backward(dy, x, saved)
        np.testing.assert_array_equal([g.dweight, g.dbias], [[np.inf, 7], [np.inf, 3]])


@pytest.mark.only(  # Numba: one dtype for each
    lambda kernel, dtype, activation: kernel.name != "numba" or activation not in NAMES or (dtype == "float32") != lookup(activation).costly
)
@pytest.mark.parametrize("activation", [None, *ALL], ids=str)
def test_gradients_have_the_same_bits_in_place(kernel: Kernel, dtype: np.dtype[Any], activation: Any) -> None:
    """`out` may be dy or x, in training and frozen, with a mask or without."""
    p = problem((2, 4, 3, 5), dtype)
    mask = rng(3).random((2, 3, 5)) < 0.6
    for training, positions in ((True, None), (False, None), (True, mask)):
        _, saved = fastbn.batch_norm_forward(
            p.x, p.weight, p.bias, p.mean.copy(), p.var.copy(), training, activation=activation, mask=positions
        )
        want = fastbn.batch_norm_backward(p.dy, p.x, saved)
        for where in ("dy", "x"):
            given = {"dy": p.dy.copy(), "x": p.x.copy()}
            got = fastbn.batch_norm_backward(**given, saved=saved, out=given[where])
            assert got.dx is given[where]
            for a, b in zip(want[:3], got[:3], strict=True):
                assert a is not None
                assert b is not None
                same_bits(a, b)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_for_any_threads_and_in_place(kernel: Kernel, activation: Any, shape: str) -> None:
    p = problem((*SHAPES[shape][:-1], SHAPES[shape][-1] * (1 if _axis(shape) == 3 else 40)), np.float32, _axis(shape))
    x = np.repeat(p.x, 25, 0)
    dy, residual = np.repeat(p.dy, 25, 0), rng(1).standard_normal(x.shape).astype(np.float32)

    def step(threads: int, where: str) -> list[Array | None]:
        with fastbn.num_threads(threads):
            given = {name: a.copy() for name, a in (("x", x), ("residual", residual))}
            out = given.get(where)
            y, saved = fastbn.batch_norm_forward(
                given["x"], p.weight, p.bias, layout=_layout(shape), activation=activation, residual=given["residual"], out=out
            )
            if out is not None:
                return [y]
            d = dy.copy()
            gradients = fastbn.batch_norm_backward(d, x, saved, wrt=("x", "weight", "bias", "residual"), out=d if activation else None)
            return [y, *gradients]

    first = step(1, "")
    for threads in (2, 3):
        for a, b in zip(first, step(threads, ""), strict=True):
            assert a is not None
            assert b is not None
            same_bits(a, b)
    for where in ("x", "residual"):
        (y,) = step(2, where)
        assert y is not None
        assert first[0] is not None
        same_bits(first[0], y)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_residual_in_another_memory_order(kernel: Kernel, activation: Any) -> None:
    p = problem((3, 6, 5, 4))
    residual = rng(1).standard_normal(p.x.shape).astype(np.float32)
    last = np.ascontiguousarray(residual.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    strange = np.zeros((6, 6, 5, 8), np.float32)[::2, :, :, ::2]
    strange[...] = residual
    results = []
    for r in (residual, last, strange):
        y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, activation=activation, residual=r)
        results.append((y, *fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=("x", "weight", "bias", "residual"))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is not None
            assert b is not None
            same_bits(a, b)


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.1), "silu"], ids=str)
@pytest.mark.parametrize("axis", [1, 3])
def test_mask(kernel: Kernel, activation: Any, axis: int) -> None:
    p = problem((3, 4, 5, 6), np.float32, axis)
    mask = rng(3).random(np.delete(p.x.shape, axis)) < 0.6
    residual = rng(1).standard_normal(p.x.shape).astype(np.float32)
    layout = "NCHW" if axis == 1 else "NHWC"
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout, activation=activation, residual=residual, mask=mask)
    _, mean, var = reference.batch_norm_stats(p.x, axis, mask)
    z = reference.batch_norm(p.x, mean, var, p.weight, p.bias, 1e-5, axis) + residual
    value, slope = _truth(activation, z)
    within(y, value, _bound(value, p.x.dtype))
    got = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=("x", "weight", "bias", "residual"))
    dx, dweight, dbias = reference.batch_norm_backward(p.dy * slope, p.x, mean, var, p.weight, 1e-5, axis, True, mask)
    for gradient, truth in ((got.dx, dx), (got.dweight, dweight), (got.dbias, dbias), (got.dresidual, p.dy * slope)):
        assert gradient is not None
        within(gradient, truth, 1e-5 * max(1.0, float(np.abs(truth).max())))


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.01), ("leaky_relu", 0.5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_from_the_output(kernel: Kernel, activation: Any, shape: str) -> None:
    dtypes = [np.dtype(name) for name in ("float32", "float64") if not kernel.declines(name)]
    for dtype in dtypes:
        p = problem(SHAPES[shape], dtype, _axis(shape), mean=3.0)
        p = p._replace(weight=np.where(np.arange(p.weight.size) % 2, p.weight, -p.weight))
        for training in (True, False):
            arguments = p.weight, p.bias, p.mean.copy(), p.var.copy(), training
            _, saved = fastbn.batch_norm_forward(p.x, *arguments, layout=_layout(shape), activation=activation)
            dy = np.where(_away_from_kinks(p, activation or "relu", None, training), p.dy, 0).astype(dtype)
            want = fastbn.batch_norm_backward(dy, p.x, saved)
            x = p.x.copy()
            y, saved = fastbn.batch_norm_forward(x, *arguments, layout=_layout(shape), activation=activation, out=x)
            got = fastbn.batch_norm_backward(dy, y, saved, from_output=True)
            for a, b in zip(want[:3], got[:3], strict=True):
                assert a is not None
                assert b is not None
                within(b, a.astype(np.float64), (2e-4 if dtype == np.float32 else 1e-12) * max(1.0, float(np.abs(a).max())))


def test_layers() -> None:
    p = problem((4, 3, 6, 5))
    residual = rng(1).standard_normal(p.x.shape).astype(np.float32)
    layer = fastbn.BatchNorm2d(3, activation="relu")
    y = layer(p.x, residual)
    want, saved = fastbn.batch_norm_forward(p.x, layer.weight, layer.bias, activation="relu", residual=residual)
    same_bits(y, want)
    gradients = layer.backward(p.dy)
    for a, b in zip(gradients, fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=("x", "weight", "bias", "residual")), strict=True):
        assert a is not None
        assert b is not None
        same_bits(a, b)
    assert "activation='relu'" in repr(layer)


def test_layers_in_place() -> None:
    p = problem((4, 3, 6, 5))
    layer, other = (fastbn.BatchNorm2d(3, activation=("leaky_relu", 0.01)) for _ in range(2))
    x = p.x.copy()
    layer(x, out=x)
    other(p.x)
    for a, b in zip(layer.backward(p.dy)[:3], other.backward(p.dy)[:3], strict=True):
        assert a is not None
        assert b is not None
        within(a, b.astype(np.float64), 1e-4)
    lost = fastbn.BatchNorm2d(3, activation="relu")
    lost(x, out=x)
    with pytest.raises(RuntimeError, match="which the output has overwritten"):
        lost.backward(p.dy)


@pytest.mark.parametrize("activation", [None, *ALL], ids=str)
def test_frozen_layer_small_and_large(activation: Any) -> None:
    for shape in ((1, 8, 4, 4), (4, 8, 60, 60), (4, 8, 100, 100)):
        p = problem(shape)
        residual = rng(1).standard_normal(shape).astype(np.float32)
        layer = fastbn.FrozenBatchNorm(p.mean, p.var, p.weight, p.bias, activation=activation)
        for r in (None, residual):
            want = fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, activation=activation, residual=r)
            first = layer(p.x, r)
            within(first, want.astype(np.float64), 1e-6 * np.maximum(1, np.abs(want)))
            for _ in range(2):  # from the second call on, plain arrays take a shorter path
                got = layer(p.x, r)
                same_bits(got, first)
                out = p.x.copy()
                assert layer(out, r, out) is out
                same_bits(out, got)
        out = residual.copy()
        assert layer(p.x, out, out) is out
        same_bits(out, layer(p.x, residual))
        with pytest.raises(ValueError, match="residual must have the shape of x"):
            layer(p.x, residual[:, :, :2])
        with pytest.raises(TypeError, match="residual must have the dtype of x"):
            layer(p.x, residual.astype(np.float64))


def test_elemt_and_zero_slope() -> None:
    p = problem((4, 3, 2, 2))
    mean, invstd = np.zeros(3), np.ones(3)
    got = fastbn.batch_norm_elemt(p.x, mean, invstd, activation=("leaky_relu", 0), residual=p.dy)
    np.testing.assert_array_equal(np.maximum(p.x + p.dy, 0), np.abs(got))


@pytest.mark.parametrize(
    ("activation", "error", "message"),
    [
        ("swish", ValueError, "activation must be one of relu, .*, got 'swish'; did you mean \"silu\"\\?"),
        ("LeakyReLU", ValueError, "got 'LeakyReLU'; did you mean \"leaky_relu\"\\?"),
        ("softmax", ValueError, "activation must be one of relu, .*, got 'softmax'$"),
        (("leaky_relu", "a"), TypeError, "activation: the slope of leaky_relu must be a number, got 'a'"),
        (("leaky_relu", True), TypeError, "activation: the slope of leaky_relu must be a number"),
        (("leaky_relu", np.ones(1)), TypeError, "activation: the slope of leaky_relu must be a number"),
        (("leaky_relu", 10**400), ValueError, "activation: the slope of leaky_relu must be a finite float64, got inf"),
        (("leaky_relu", 0.1, 0.2), ValueError, "activation takes a parameter as"),
        (("relu", 1.0), ValueError, "activation takes a parameter as"),
        (("gelu", "erf"), ValueError, "activation takes a parameter as"),
        (("gelu", np.ones(2)), TypeError, "activation takes a parameter as"),
        ((), TypeError, "activation must be None, a name"),
        (([],), TypeError, "activation must be None, a name"),
        (3, TypeError, "activation must be None, a name"),
        (["relu"], TypeError, "activation must be None, a name"),
        ({"relu": 0}, TypeError, "activation must be None, a name"),
        (np.ones(2), TypeError, "activation must be None, a name"),
        (b"relu", TypeError, "activation must be None, a name"),
        (np.tanh, TypeError, "activation must be .* got <ufunc 'tanh'>; did you mean \"tanh\"\\?"),
        (type("ReLU", (), {"__call__": abs, "__repr__": lambda _: "it"})(), TypeError, 'activation must be .*; did you mean "relu"\\?'),
        (type("Hardswish", (), {}), TypeError, 'activation must be .*; did you mean "hardswish"\\?'),
    ],
    ids=str,
)
def test_wrong_activations(activation: Any, error: type[Exception], message: str) -> None:
    x = np.ones((2, 3), np.float32)
    calls: list[Any] = [
        lambda: fastbn.batch_norm(x, np.zeros(3), np.ones(3), activation=activation),
        lambda: fastbn.batch_norm_forward(x, activation=activation),
        lambda: fastbn.batch_norm_elemt(x, np.zeros(3), np.ones(3), activation=activation),
        lambda: fastbn.BatchNorm1d(3, activation=activation),
        lambda: fastbn.FrozenBatchNorm(np.zeros(3), np.ones(3), activation=activation),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_wrong_residuals_modify_nothing() -> None:
    x = rng().standard_normal((4, 3)).astype(np.float32)
    mean, var, out = np.zeros(3, np.float32), np.ones(3, np.float32), np.zeros_like(x)
    memory = np.zeros(20, np.float32)
    overlapping = memory[:12].reshape(4, 3), memory[4:16].reshape(4, 3)
    for residual, target, error in (
        (x[:2], out, "residual must have the shape of x"),
        (x.astype(np.float64), out, "residual must have the dtype of x"),
        ([1.0], out, "residual must be a numpy.ndarray"),
        (overlapping[0], overlapping[1], "out overlaps residual in part"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            fastbn.batch_norm(x, mean, var, training=True, residual=residual, out=target)
    assert not mean.any()
    assert (var == 1).all()
    assert not out.any()
    assert not memory.any()


def test_wrong_backwards() -> None:
    x = rng().standard_normal((4, 3)).astype(np.float32)
    for wrt in ("residual", ("residual",), ("x", "residual")):
        for activation in ("silu", None):
            _, saved = fastbn.batch_norm_forward(x, activation=activation)
            with pytest.raises(ValueError, match="wrt names 'residual', but the forward had none"):
                fastbn.batch_norm_backward(x, x, saved, wrt=wrt)
    _, saved = fastbn.batch_norm_forward(x, activation="silu")
    with pytest.raises(ValueError, match="from_output needs a forward without a residual"):
        fastbn.batch_norm_backward(x, x, saved, from_output=True)
    _, saved = fastbn.batch_norm_forward(x, residual=x)
    with pytest.raises(ValueError, match="from_output needs a forward without a residual"):
        fastbn.batch_norm_backward(x, x, saved, from_output=True)
    _, saved = fastbn.batch_norm_forward(x, residual=x)
    assert fastbn.batch_norm_backward(x, x, saved, wrt="residual").dresidual is x


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_only_slopes_that_can_be_undone_do_without_the_input(slope: float) -> None:
    x = rng().standard_normal((4, 3)).astype(np.float32)
    y, saved = fastbn.batch_norm_forward(x, activation=("leaky_relu", slope))
    with pytest.raises(ValueError, match=r"from_output needs .* a leaky_relu whose slope is above 0"):
        fastbn.batch_norm_backward(x, y, saved, from_output=True)


@pytest.mark.parametrize("slope", [1e-50, 1e-300])
def test_a_slope_that_leaves_no_digits_of_negative_numbers_cannot_be_undone(slope: float, dtype: np.dtype[Any]) -> None:
    x = rng().standard_normal((4, 3)).astype(dtype)
    y, saved = fastbn.batch_norm_forward(x, activation=("leaky_relu", slope))
    if dtype == np.float64:
        want, got = fastbn.batch_norm_backward(x, x, saved), fastbn.batch_norm_backward(x, y, saved, from_output=True)
        np.testing.assert_allclose(got[0], want[0], atol=1e-3)  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=rf"from_output needs a slope of leaky_relu that is not tiny, .* in {dtype}: the slope is {slope}"):
        fastbn.batch_norm_backward(x, y, saved, from_output=True)


@pytest.mark.parametrize("slope", [np.nan, np.inf, -np.inf, 10**400])
def test_slopes_are_finite(slope: float) -> None:
    with pytest.raises(ValueError, match="activation: the slope of leaky_relu must be a finite"):
        fastbn.BatchNorm1d(3, activation=("leaky_relu", slope))


def test_empty_batch() -> None:
    x = np.zeros((0, 3, 2, 2), np.float32)
    y, saved = fastbn.batch_norm_forward(x, activation="relu", residual=x)
    gradients = fastbn.batch_norm_backward(y, x, saved, wrt=("x", "weight", "bias", "residual"))
    assert y.shape == x.shape
    assert gradients.dresidual is not None
    assert gradients.dresidual.shape == x.shape


def test_sums_that_leave_the_range_of_float32() -> None:
    x = (rng().standard_normal((8, 3, 5, 5)) * 1e30).astype(np.float32)
    dy = (rng(1).standard_normal(x.shape) * 1e20).astype(np.float32)
    for activation in ("relu", "silu"):
        _, saved = fastbn.batch_norm_forward(x, activation=activation)
        got = fastbn.batch_norm_backward(dy, x, saved)
        _, mean, var = reference.batch_norm_stats(x)
        z = reference.batch_norm(x, mean, var)
        truth = reference.batch_norm_backward(dy * _truth(activation, z)[1], x, mean, var)
        for a, b in zip(got[:3], truth, strict=True):
            assert a is not None
            within(a, b, 1e-5 * float(np.abs(b).max()))


def test_the_residual_is_added_after_the_shift() -> None:
    p = problem((2, 3, 4, 4))
    y = fastbn.batch_norm(p.x, p.mean, p.var, np.zeros(3), p.bias, residual=p.dy)
    np.testing.assert_array_equal(y, columns(p.bias, p.x, 1) + p.dy)


def test_what_a_forward_saved_as_activation_can_be_given_again() -> None:
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    y, saved = fastbn.batch_norm_forward(x, activation=("leaky_relu", 0.5))
    same_bits(fastbn.batch_norm_forward(x, activation=saved.activation)[0], y)
    assert lookup(saved.activation) is saved.activation


@pytest.mark.parametrize("wrong", [{"name": "zzz"}, {"name": 1}, {"code": 999}, {"code": -1}, {"parameter": None}, {"parameter": np.nan}])
def test_a_saved_activation_that_no_forward_made_is_refused(wrong: dict[str, Any]) -> None:
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    _, saved = fastbn.batch_norm_forward(x, activation=("leaky_relu", 0.5))
    other = dataclasses.replace(saved, activation=saved.activation._replace(**wrong))
    with pytest.raises(TypeError, match=r"saved\.activation must be what the forward made of it"):
        fastbn.batch_norm_backward(x, x, other)
