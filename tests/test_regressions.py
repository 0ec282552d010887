"""Inputs that once failed, by kind, with their siblings: each kernel pinned, and none, where plain arrays take one C call."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from truth import backward, columns, forward, near, near_gradient, near_gradients, problem, rng, same_bits

import fastbn
from fastbn.dispatch import TABLE
from fastbn.layout import Array

F32 = np.float32


@pytest.fixture(params=[None, *(kernel.name for kernel in TABLE if not kernel.unusable())], autouse=True)
def pinned(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param is None:
        yield None
    else:
        with fastbn.use_kernel(request.param):
            yield request.param


def refused(call: Callable[[], object], *names: str, error: tuple[type[Exception], ...] = (TypeError, ValueError)) -> None:
    """A ValueError or a TypeError that names an argument."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) in error
    assert any(name in str(caught.value) for name in names), f"{names} in {caught.value}"


# ---- What is written must not be what is read or returned ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_gradient_of_a_residual_survives_dx_written_over_dy(training: bool, mask: bool, activation: Any) -> None:
    p = problem((4, 3, 5, 6))
    residual = problem((4, 3, 5, 6), seed=1).x
    m = rng(3).random((4, 5, 6)) < 0.7 if mask and training else None
    _, saved = fastbn.batch_norm_forward(
        p.x, p.weight, p.bias, p.mean, p.var, training, activation=activation, residual=residual, mask=m
    )  # fmt: skip
    want = fastbn.batch_norm_backward(p.dy.copy(), p.x, saved, wrt=("x", "residual"))
    dy = p.dy.copy()
    got = fastbn.batch_norm_backward(dy, p.x, saved, wrt=("x", "residual"), out=dy)
    assert got.dx is dy
    assert got.dresidual is not None
    assert want.dresidual is not None
    assert not np.shares_memory(got.dresidual, dy)
    same_bits(got.dresidual, want.dresidual)
    if activation is None:
        same_bits(got.dresidual, p.dy)


def test_a_layers_gradients_survive_dx_written_over_dy() -> None:
    x, residual, dy = rng().normal(size=(3, 4, 2, 5, 5)).astype("f")
    bn = fastbn.BatchNorm2d(2)
    bn(x, residual)
    keep = dy.copy()
    g = bn.backward(dy, out=dy)
    same_bits(g.dresidual, keep)


def vectors_in(buffer: Array, channels: int) -> Array:
    return buffer.reshape(-1)[:channels]


WITH_VECTORS = {
    "weight": lambda x, out, v, one: fastbn.batch_norm_forward(x, weight=v, out=out),
    "bias": lambda x, out, v, one: fastbn.batch_norm_forward(x, bias=v, out=out),
    "running_mean": lambda x, out, v, one: fastbn.batch_norm_forward(x, running_mean=v, out=out),
    "running_var": lambda x, out, v, one: fastbn.batch_norm(x, None, v, training=True, out=out),
    "eval mean": lambda x, out, v, one: fastbn.batch_norm(x, v, one, out=out),
    "eval var": lambda x, out, v, one: fastbn.batch_norm(x, one, v, out=out),
    "eval weight": lambda x, out, v, one: fastbn.batch_norm(x, one, one, v, out=out),
    "eval bias": lambda x, out, v, one: fastbn.batch_norm(x, one, one, one, v, out=out),
    "elemt mean": lambda x, out, v, one: fastbn.batch_norm_elemt(x, v, one, out=out),
    "elemt invstd": lambda x, out, v, one: fastbn.batch_norm_elemt(x, one, v, out=out),
    "elemt weight": lambda x, out, v, one: fastbn.batch_norm_elemt(x, one, one, v, out=out),
    "backward mean": lambda x, out, v, one: fastbn.batch_norm_backward_elemt(x, x, v, one, None, one, one, 9, out=out),
    "backward sum": lambda x, out, v, one: fastbn.batch_norm_backward_elemt(x, x, one, one, None, v, one, 9, out=out),
    "backward invstd": lambda x, out, v, one: fastbn.batch_norm_backward_elemt(x, x, one, v, None, one, one, 9, out=out),
    "saved": lambda x, out, v, one: fastbn.batch_norm_backward(
        x, x, dataclasses.replace(fastbn.batch_norm_forward(x)[1], mean=v), out=out
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_VECTORS)
@pytest.mark.parametrize("shape", [(8, 16), (2, 16, 5), (64, 16, 4, 4)])
def test_an_output_that_shares_memory_with_a_vector_is_refused(name: str, shape: tuple[int, ...]) -> None:
    x, one = rng().normal(size=shape).astype("f"), np.ones(16, F32)
    out = np.full(shape, 7, F32)
    before = out.copy()
    refused(lambda: WITH_VECTORS[name](x, out, vectors_in(out, 16), one), "out", error=(ValueError,))
    same_bits(out, before)


def test_an_output_that_shares_memory_with_a_mask_is_refused() -> None:
    x, out = rng().normal(size=(6, 4)).astype("f"), np.ones((6, 4), F32)
    mask = out.view(np.bool_).reshape(-1)[:6]
    refused(lambda: fastbn.batch_norm_forward(x, mask=mask, out=out), "out", error=(ValueError,))


@pytest.mark.parametrize(("mean", "var"), [(slice(0, 4), slice(0, 4)), (slice(0, 4), slice(2, 6))])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_running_statistics_that_share_memory_are_refused(mean: slice, var: slice, dtype: str) -> None:
    x, both = rng().normal(size=(6, 4)).astype("f"), np.ones(6, dtype)
    refused(lambda: fastbn.batch_norm_forward(x, None, None, both[mean], both[var]), "running_mean", error=(ValueError,))
    assert np.all(both == 1)


@pytest.mark.parametrize("call", [fastbn.batch_norm_forward, fastbn.batch_norm_elemt, fastbn.batch_norm, fastbn.FrozenBatchNorm])
def test_an_output_one_row_ahead_of_the_residual_is_refused(call: Any) -> None:
    x, buffer, one = rng().normal(size=(6, 4)).astype("f"), np.zeros((7, 4), F32), np.ones(4, F32)
    arguments = (x,) if call is fastbn.batch_norm_forward else (x, one, one)
    if call is fastbn.FrozenBatchNorm:
        call, arguments = call(one, one), (x,)
        call(x, x)  # from now on plain arrays take the short way
    refused(lambda: call(*arguments, residual=buffer[:6], out=buffer[1:]), "residual", error=(ValueError,))


def test_an_output_one_row_ahead_of_a_gradient_is_refused() -> None:
    x, buffer, one = rng().normal(size=(6, 4)).astype("f"), np.zeros((7, 4), F32), np.ones(4, F32)
    _, saved = fastbn.batch_norm_forward(x, activation="relu", residual=x)
    _, bare = fastbn.batch_norm_forward(x)
    refused(lambda: fastbn.batch_norm_backward(buffer[:6], x, saved, out=buffer[1:]), "dy", error=(ValueError,))
    refused(lambda: fastbn.batch_norm_backward(buffer[:6], x, bare, out=buffer[1:]), "dy", error=(ValueError,))
    refused(lambda: fastbn.batch_norm_backward_elemt(buffer[:6], x, one, one, None, one, one, 6, out=buffer[1:]), "dy", error=(ValueError,))
    kept = saved.residual
    assert kept is not None
    room = np.zeros(28, F32)
    shifted = dataclasses.replace(saved, residual=room[:24].reshape(6, 4))
    refused(lambda: fastbn.batch_norm_backward(x, x, shifted, out=room[4:].reshape(6, 4)), "residual", error=(ValueError,))


# ---- What a forward saves is its own ----


def test_a_mask_may_be_changed_after_the_forward() -> None:
    p = problem((6, 4, 3))
    mask = rng(2).random((6, 3)) < 0.6
    want = fastbn.batch_norm_backward(p.dy, p.x, fastbn.batch_norm_forward(p.x, mask=mask.copy())[1])
    _, saved = fastbn.batch_norm_forward(p.x, mask=mask)
    mask[...] = ~mask
    got = fastbn.batch_norm_backward(p.dy, p.x, saved)
    for a, b in zip(got[:3], want[:3], strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", ("leaky_relu", 0.1)])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_residual_may_be_changed_after_the_forward(activation: Any, training: bool, in_place: bool) -> None:
    p, residual = problem((6, 4, 3)), problem((6, 4, 3), seed=1).x
    arguments = p.x, p.weight, p.bias, p.mean, p.var, training
    _, saved = fastbn.batch_norm_forward(*arguments, activation=activation, residual=residual.copy())
    want = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=("x", "weight", "bias", "residual"))
    if in_place:
        _, saved = fastbn.batch_norm_forward(*arguments, activation=activation, residual=residual, out=residual)
    else:
        _, saved = fastbn.batch_norm_forward(*arguments, activation=activation, residual=residual)
        residual[0] = 0
    got = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=("x", "weight", "bias", "residual"))
    for a, b in zip(got, want, strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_vectors_may_be_changed_after_the_forward(training: bool) -> None:
    p = problem((6, 4, 3))
    weight, bias, mean, var = (v.copy() for v in (p.weight, p.bias, p.mean, p.var))
    _, saved = fastbn.batch_norm_forward(p.x, weight, bias, mean, var, training)
    want = fastbn.batch_norm_backward(p.dy, p.x, saved)
    for v in (weight, bias, mean, var):
        v[...] = 9
    for a, b in zip(fastbn.batch_norm_backward(p.dy, p.x, saved)[:3], want[:3], strict=True):
        same_bits(a, b)


def test_what_another_batch_saved_is_refused() -> None:
    x = rng().normal(size=(8, 3, 4, 4)).astype("f")
    half = x.astype("f2")
    for saved in (fastbn.batch_norm_forward(x)[1], fastbn.batch_norm_forward(x, activation="relu")[1]):
        refused(partial(fastbn.batch_norm_backward, x[:2], x[:2], saved), "saved", error=(ValueError,))
        refused(partial(fastbn.batch_norm_backward, half, half, saved), "saved", error=(TypeError,))
    _, masked = fastbn.batch_norm_forward(x[:1], mask=np.ones((1, 4, 4), bool))
    refused(lambda: fastbn.batch_norm_backward(x, x, masked), "saved", error=(ValueError,))


WRONG: dict[str, Any] = {
    "none": None, "list": [1.0, 2.0, 3.0, 4.0], "short": np.ones(3, F32), "long": np.ones(5, F32), "f8": np.ones(4), "int": np.ones(4, int),
    "matrix": np.ones((4, 1), F32), "strided": np.ones(8, F32)[::2], "text": "abc", "number": 1.0,
    "masked": np.ma.masked_less(np.ones(4, F32), 0), "unaligned": np.zeros(17, np.uint8)[1:].view(F32), "swapped": np.ones(4, ">f4"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["mean", "invstd", "mean_lo", "scale", "shift"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_saved_with_wrong_vectors_is_refused(name: str, wrong: str, activation: Any) -> None:
    x = rng().normal(size=(6, 4)).astype("f")
    _, saved = fastbn.batch_norm_forward(x, activation=activation)
    if name == "mean_lo" and wrong == "none":
        assert fastbn.batch_norm_backward(x, x, dataclasses.replace(saved, mean_lo=None)).dx is not None
        return
    bad = dataclasses.replace(saved, **{name: WRONG[wrong]})
    for wrt in (("x", "weight", "bias"), ("x",), ("bias",)):
        if name == "shift" and activation is None and wrt == ("x", "weight", "bias"):
            continue  # no part of this gradient
        refused(partial(fastbn.batch_norm_backward, x, x, bad, wrt=wrt), f"saved.{name}")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("count", None), ("count", 3), ("count", "6"), ("count", 10**400), ("training", None), ("training", 2), ("activation", "relu"),
     ("activation", 3), ("axis", None), ("axis", 7), ("axis", "1"), ("mask", 3), ("mask", np.ones(3, bool)), ("mask", np.zeros(6, bool)),
     ("shape", None), ("shape", (4, 6)), ("dtype", None), ("dtype", "f4"), ("residual", 3), ("has_residual", None)],
)  # fmt: skip
def test_a_saved_with_wrong_fields_is_refused(name: str, wrong: Any) -> None:
    x = rng().normal(size=(6, 4)).astype("f")
    _, saved = fastbn.batch_norm_forward(x, activation="relu", residual=x)
    bad = dataclasses.replace(saved, **{name: wrong})
    if (name, wrong) in (("dtype", "f4"), ("axis", None)):  # another name of the same
        assert fastbn.batch_norm_backward(x, x, bad).dx is not None
    else:
        refused(lambda: fastbn.batch_norm_backward(x, x, bad), name, "saved")


# ---- Arrays whose meaning is not their buffer's ----


def masked(a: Array) -> Any:
    return np.ma.masked_greater(a, 1e8)


SUBCLASSES: dict[str, Callable[[Array], Any]] = {
    "masked": masked,
    "matrix": lambda a: a.view(np.matrix),
    "recarray": lambda a: a.view(np.recarray),
    "own": lambda a: a.view(type("Kelvin", (np.ndarray,), {})),
}


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_subclasses_are_refused_wherever_an_array_is_taken(kind: str) -> None:
    x, one = rng().normal(size=(6, 4)).astype("f"), np.ones(4, F32)
    odd, vector = SUBCLASSES[kind](x.copy()), SUBCLASSES[kind](one)
    _, saved = fastbn.batch_norm_forward(x)
    frozen = fastbn.FrozenBatchNorm(one, one)
    frozen(x)
    calls: dict[str, Callable[[], object]] = {
        "x": lambda: fastbn.batch_norm_stats(odd),
        "x forward": lambda: fastbn.batch_norm_forward(odd),
        "x inference": lambda: fastbn.batch_norm(odd, one, one),
        "x frozen": lambda: frozen(odd),
        "x elemt": lambda: fastbn.batch_norm_elemt(odd, one, one),
        "dy": lambda: fastbn.batch_norm_backward(odd, x, saved),
        "dy reduce": lambda: fastbn.batch_norm_backward_reduce(odd, x, one, one),
        "residual": lambda: fastbn.batch_norm_forward(x, residual=odd),
        "out": lambda: fastbn.batch_norm(x, one, one, out=odd),
        "out forward": lambda: fastbn.batch_norm_forward(x, out=odd),
        "out backward": lambda: fastbn.batch_norm_backward(x, x, saved, out=odd),
        "mask": lambda: fastbn.batch_norm_forward(x, mask=SUBCLASSES[kind](np.ones((1, 6), bool))),
        "weight": lambda: fastbn.batch_norm_forward(x, weight=vector),
        "running_mean": lambda: fastbn.batch_norm_forward(x, running_mean=vector),
        "running_var": lambda: fastbn.batch_norm(x, one, vector),
        "mean": lambda: fastbn.batch_norm_elemt(x, vector, one),
        "running_mean frozen": lambda: fastbn.FrozenBatchNorm(vector, one),
        "bias load": lambda: fastbn.BatchNorm1d(4).load_state_dict(fastbn.BatchNorm1d(4).state_dict() | {"bias": vector}),
    }
    for name, call in calls.items():
        refused(call, name.split()[0], error=(TypeError,))


# ---- Digits of the caller's ----


@pytest.mark.parametrize("shape", [(1000, 4), (10, 4, 100)])
def test_statistics_in_float64_keep_their_digits_on_float32(shape: tuple[int, ...]) -> None:
    x = (1e6 + rng().normal(size=shape)).astype("f")
    axes = tuple(i for i in range(x.ndim) if i != 1)
    m, v = x.mean(axes, dtype=float), x.var(axes, dtype=float)
    want = (x - columns(m, x, 1)) / np.sqrt(columns(v, x, 1) + 1e-5)
    for y in (
        fastbn.batch_norm(x, m, v),
        fastbn.batch_norm_forward(x, None, None, m, v, False)[0],
        fastbn.FrozenBatchNorm(m, v)(x),
        fastbn.batch_norm_elemt(x, m, 1 / np.sqrt(v + 1e-5)),
    ):
        near(y, want)
    _, saved = fastbn.batch_norm_forward(x, None, None, m, v, False)
    dy = rng(1).normal(size=shape).astype("f")
    near_gradient(fastbn.batch_norm_backward(dy, x, saved).dweight, np.float64(dy * want).sum(axes), np.sqrt(1000))


@pytest.mark.parametrize("dtype", ["f8", "g", ">f8", ">f4", "f2", "f4"])
def test_running_statistics_move_in_their_own_type(dtype: str) -> None:
    x = (1e6 + rng().normal(size=(1000, 4))).astype("f")
    if dtype == "f2":
        x -= F32(1e6)
    mean, var = np.full(4, 3, dtype), np.full(4, 5, dtype)
    fastbn.batch_norm(x, mean, var, training=True, momentum=0.25)
    near_mean, near_var = 0.75 * 3 + 0.25 * np.float64(x).mean(0), 0.75 * 5 + 0.25 * np.float64(x).var(0, ddof=1)
    digits = {"f2": 1e-3, "f4": 2e-7, ">f4": 2e-7}.get(dtype, 1e-9)
    np.testing.assert_allclose(np.float64(mean), near_mean, rtol=digits, atol=1e-3 if dtype == "f2" else 0)
    np.testing.assert_allclose(np.float64(var), near_var, rtol=max(digits, 1e-6))


def test_var_and_weight_beyond_float32_are_used_as_they_are() -> None:
    x = np.array([[1.0], [3.0]], F32)
    near(fastbn.batch_norm(x, [2.0], [1e-60], [1e-30], eps=0.0), np.array([[-1.0], [1.0]]))
    near(fastbn.batch_norm(x, [2.0], [1e60], [1e30], eps=0.0), np.array([[-1.0], [1.0]]))
    near(fastbn.batch_norm_elemt(x, [2.0], [1e-50], [1e50]), np.array([[-1.0], [1.0]]))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_mean_gives_infinities(value: float) -> None:
    x = np.ones((3, 2), F32)
    for mean in (np.array([value, 0]), np.array([value, 0], F32)):
        y = fastbn.batch_norm(x, mean, np.ones(2), eps=0.0)
        np.testing.assert_array_equal(y, [[-value, 1]] * 3)


# ---- One check for vectors ----

NO_NUMBERS: dict[str, Any] = {
    "none": [None, 1], "text": ["1", "2"], "dates": np.array(["2020", "2021"], "M8[Y]"), "bool": [True, False],
    "complex": np.array([1 + 5j, 2]), "object": np.array([1, None], object), "ragged": [[1], [1, 2]], "huge": [10**400, 1],
    "dict": {"a": 1}, "set": {1, 2}, "scalar": 1.0, "matrix": [[1.0, 1.0]], "structured": np.zeros(2, "f4,f4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_vectors_that_hold_no_numbers_are_refused_everywhere(kind: str) -> None:
    bad, one = NO_NUMBERS[kind], np.ones(2, F32)
    x = np.zeros((3, 2), F32)
    calls: dict[str, Callable[[], object]] = {
        "running_mean": lambda: fastbn.batch_norm(x, bad, one),
        "running_var": lambda: fastbn.batch_norm(x, one, bad),
        "weight": lambda: fastbn.batch_norm(x, one, one, bad),
        "bias": lambda: fastbn.batch_norm_forward(x, bias=bad),
        "running_mean training": lambda: fastbn.batch_norm_forward(x, running_mean=bad),
        "running_var training": lambda: fastbn.batch_norm_forward(x, running_var=bad),
        "mean": lambda: fastbn.batch_norm_elemt(x, bad, one),
        "invstd": lambda: fastbn.batch_norm_elemt(x, one, bad),
        "invstd reduce": lambda: fastbn.batch_norm_backward_reduce(x, x, one, bad),
        "sum_dy": lambda: fastbn.batch_norm_backward_elemt(x, x, one, one, None, bad, one, 3),
        "sum_dy_xmu": lambda: fastbn.batch_norm_backward_elemt(x, x, one, one, None, one, bad, 3),
        "running_mean frozen": lambda: fastbn.FrozenBatchNorm(bad, one),
        "running_var frozen": lambda: fastbn.FrozenBatchNorm(one, bad),
        "weight frozen": lambda: fastbn.FrozenBatchNorm(one, one, bad),
        "bias frozen": lambda: fastbn.FrozenBatchNorm(one, one, one, bad),
        "bias loaded": lambda: fastbn.BatchNorm1d(2).load_state_dict(fastbn.BatchNorm1d(2).state_dict() | {"bias": bad}),
        "running_var loaded": lambda: fastbn.BatchNorm1d(2).load_state_dict(fastbn.BatchNorm1d(2).state_dict() | {"running_var": bad}),
        "gamma": lambda: fastbn.FrozenBatchNorm.from_keras(bad, one, one, one),
        "moving_variance": lambda: fastbn.FrozenBatchNorm.from_keras(one, one, one, bad),
        "B": lambda: fastbn.FrozenBatchNorm.from_onnx(one, bad, one, one),
    }
    for name, call in calls.items():
        refused(call, name.split()[0])


@pytest.mark.parametrize("vector", [[1, 2], (1.0, 2.0), np.array([1, 2]), np.array([1, 2], "f2"), np.array([1, 2], ">f8"), range(1, 3)])
def test_vectors_may_be_anything_that_holds_real_numbers(vector: Any) -> None:
    p = problem((5, 2, 3))
    want = fastbn.batch_norm(p.x, p.mean, p.var, np.array([1, 2], F32))
    same_bits(fastbn.batch_norm(p.x, p.mean, p.var, vector), want)
    same_bits(fastbn.FrozenBatchNorm(p.mean, p.var, vector)(p.x), want)


def test_a_state_is_read_before_any_of_it_is_loaded() -> None:
    bn = fastbn.BatchNorm1d(3)
    assert bn.weight is not None
    assert bn.bias is not None
    bn.weight[...], bn.bias[...] = (1, 2, 3), (4, 5, 6)
    bn.load_state_dict(bn.state_dict() | {"weight": bn.bias, "bias": bn.weight})
    np.testing.assert_array_equal([bn.weight, bn.bias], [[4, 5, 6], [1, 2, 3]])


# ---- Numbers ----


@pytest.mark.parametrize("eps", [-1.0, -1e-30, np.nan, np.inf, -np.inf, 10**400, np.float32(-1)])
def test_eps_that_is_no_finite_number_from_0_on_is_refused(eps: Any) -> None:
    x, one = np.ones((4, 2), F32), np.ones(2, F32)
    for call in (
        lambda: fastbn.batch_norm(x, one, one, eps=eps),
        lambda: fastbn.batch_norm_forward(x, eps=eps),
        lambda: fastbn.BatchNorm1d(2, eps=eps),
        lambda: fastbn.FrozenBatchNorm(one, one, eps=eps),
    ):
        refused(call, "eps", error=(ValueError,))


HUGE = 10**400


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("momentum", lambda x: fastbn.batch_norm_forward(x, momentum=HUGE)),
        ("momentum", lambda x: fastbn.BatchNorm1d(4, momentum=HUGE)),
        ("leaky_relu", lambda x: fastbn.batch_norm_forward(x, activation=("leaky_relu", HUGE))),
        ("count", lambda x: fastbn.batch_norm_backward_elemt(x, x, x[0], x[0], None, x[0], x[0], HUGE)),
        ("count", lambda x: fastbn.batch_norm_backward_elemt(x, x, x[0], x[0], None, x[0], x[0], -1)),
        ("layout", lambda x: fastbn.batch_norm_forward(x, layout=["NC"])),
        ("layout", lambda x: fastbn.batch_norm_forward(x, layout={"NC": 1})),
        ("layout", lambda x: fastbn.batch_norm_stats(x, layout=np.array(["NC", "NL"]))),
        ("layout", lambda x: fastbn.FrozenBatchNorm(x[0], x[0], layout="XYZ")),
        ("layout", lambda x: fastbn.FrozenBatchNorm(x[0], x[0], layout=["NC"])),
        ("layout", lambda x: fastbn.BatchNorm1d(4, layout=["NC"])),
        ("axis", lambda x: fastbn.batch_norm_forward(x, axis=2)),
        ("axis", lambda x: fastbn.batch_norm_forward(x, axis=-3)),
        ("axis", lambda x: fastbn.batch_norm_forward(x, axis=1.0)),
        ("axis", lambda x: fastbn.batch_norm_forward(x, axis=True)),
        ("axis", lambda x: fastbn.batch_norm_forward(x, axis=[1])),
        ("axis", lambda x: fastbn.batch_norm_forward(x, axis=1, layout="NC")),
        ("axis", lambda x: fastbn.FrozenBatchNorm(x[0], x[0], axis="1")),
        ("training", lambda x: fastbn.batch_norm_forward(x, training=np.ones(2))),
        ("training", lambda x: fastbn.batch_norm(x, None, None, training="yes")),
        ("training", lambda x: fastbn.batch_norm(x, x[0], x[0], training=None)),
        ("from_output", lambda x: fastbn.batch_norm_backward(x, x, fastbn.batch_norm_forward(x)[1], from_output=np.ones(2))),
        ("activation", lambda x: fastbn.batch_norm_forward(x, activation=("gelu", np.ones(2)))),
        ("activation", lambda x: fastbn.batch_norm_forward(x, activation=["relu"])),
        ("activation", lambda x: fastbn.batch_norm_forward(x, activation=np.array("relu"))),
        ("activation", lambda x: fastbn.batch_norm_forward(x, activation=np.tanh)),
        ("correction", lambda x: fastbn.batch_norm_forward(x, correction=2)),
        ("correction", lambda x: fastbn.batch_norm_forward(x, correction=-1)),
        ("correction", lambda x: fastbn.batch_norm_forward(x, correction=True)),
        ("correction", lambda x: fastbn.batch_norm_forward(x, correction=None)),
        ("correction", lambda x: fastbn.BatchNorm1d(4, correction=2)),
        ("wrt", lambda x: fastbn.batch_norm_backward(x, x, fastbn.batch_norm_forward(x)[1], wrt=None)),
        ("wrt", lambda x: fastbn.batch_norm_backward(x, x, fastbn.batch_norm_forward(x)[1], wrt=5)),
        ("wrt", lambda x: fastbn.batch_norm_backward(x, x, fastbn.batch_norm_forward(x)[1], wrt=[1])),
        ("wrt", lambda x: fastbn.batch_norm_backward(x, x, fastbn.batch_norm_forward(x)[1], wrt=True)),
        ("merge", lambda x: fastbn.batch_norm_stats(x).merge(3)),
        ("op", lambda x: fastbn.explain(x, x)),
        ("op", lambda x: fastbn.explain(["stats"], x)),
        ("x", lambda x: fastbn.explain("stats", None)),
        ("x", lambda x: fastbn.explain("forward", [[1.0]])),
        ("layout", lambda x: fastbn.explain("stats", x, ["NC"])),
        ("dtypes", lambda x: fastbn.warmup(5)),
        ("dtypes", lambda x: fastbn.warmup([5])),
        ("layouts", lambda x: fastbn.warmup("float32", None)),
        ("layouts", lambda x: fastbn.warmup("float32", [["NC"]])),
        ("num_batches_tracked", lambda x: fastbn.BatchNorm1d(4).load_state_dict(_state(num_batches_tracked=2.7))),
        ("num_batches_tracked", lambda x: fastbn.BatchNorm1d(4).load_state_dict(_state(num_batches_tracked=-1))),
        ("num_batches_tracked", lambda x: fastbn.BatchNorm1d(4).load_state_dict(_state(num_batches_tracked=HUGE))),
        ("num_batches_tracked", lambda x: fastbn.BatchNorm1d(4).load_state_dict(_state(num_batches_tracked="5"))),
        ("num_batches_tracked", lambda x: fastbn.BatchNorm1d(4).load_state_dict(_state(num_batches_tracked=[5, 6]))),
        ("num_batches_tracked", lambda x: fastbn.BatchNorm1d(4).load_state_dict(_state(num_batches_tracked=[[5], [5, 6]]))),
        ("running_mean", lambda x: fastbn.BatchNorm1d.from_torch(_state(running_mean=[[5], [5, 6]]))),
        ("communicator.all_gather", lambda x: fastbn.sync.batch_norm_stats(x, _Returns([[5], [5, 6]]))),
        ("communicator.all_reduce", lambda x: _estimated_by(x, [[5], [5, 6]])),
        ("communicator.all_reduce", lambda x: _estimated_by(x, np.zeros(2))),
        ("state_dict", lambda x: fastbn.BatchNorm1d(4).load_state_dict(None)),
        ("state_dict", lambda x: fastbn.BatchNorm1d(4).load_state_dict([("weight", x[0])])),
        ("num_features", lambda x: fastbn.BatchNorm1d(HUGE)),
        ("num_features", lambda x: fastbn.BatchNorm1d(None)),
        ("affine", lambda x: fastbn.BatchNorm1d(4, affine=None)),
        ("track_running_stats", lambda x: fastbn.BatchNorm1d(4, track_running_stats="no")),
        ("skip_nonfinite", lambda x: fastbn.BatchNorm1d(4, skip_nonfinite=2)),
        ("mode", lambda x: fastbn.BatchNorm1d(4).train("yes")),
        ("mode", lambda x: fastbn.BatchNorm1d(4).freeze(3)),
        ("dtype", lambda x: fastbn.BatchNorm1d(4, dtype=">f4")),
        ("dtype", lambda x: fastbn.BatchNorm1d(4, dtype="float8")),
        ("dtype", lambda x: fastbn.BatchNorm1d(4, dtype=None)),
        ("dtype", lambda x: fastbn.BatchNorm1d(4, dtype=np.longdouble)),
        ("running_mean", lambda x: fastbn.FrozenBatchNorm(None, None)),
        ("running_var", lambda x: fastbn.FrozenBatchNorm(x[0], None)),
        ("module", lambda x: fastbn.FrozenBatchNorm.from_torch(3)),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(name: str, call: Callable[[Array], object]) -> None:
    refused(lambda: call(np.arange(12, dtype=F32).reshape(3, 4)), name)


class _Returns(fastbn.sync.Alone):
    """A communicator whose messages are answered by something else."""

    def __init__(self, gathered: Any = None, reduced: Any = None):
        self.gathered, self.reduced = gathered, reduced

    def all_gather(self, array: Array) -> Array:
        return super().all_gather(array) if self.gathered is None else self.gathered  # type: ignore[no-any-return]

    def all_reduce(self, array: Array) -> Array:
        return self.reduced  # type: ignore[no-any-return]


def _estimated_by(x: Array, reduced: Any) -> None:
    bn = fastbn.BatchNorm1d(4)
    fastbn.update_bn([bn], [x], bn, communicator=_Returns(reduced=reduced))


def _state(**wrong: Any) -> dict[str, Any]:
    return dict(fastbn.BatchNorm1d(4).state_dict()) | wrong


def test_the_name_of_longdouble_is_not_that_of_float16() -> None:
    with pytest.raises(TypeError, match=f"got {np.dtype(np.longdouble)}"):
        fastbn.batch_norm_stats(np.ones((2, 3), np.longdouble))


def test_dtypes_that_are_refused_are_not_remembered_for_ever() -> None:
    from fastbn import dtypes

    for i in range(200):
        with pytest.raises(TypeError):
            fastbn.batch_norm_stats(np.zeros((2, 3), [(f"f{i}", "f4")]))
    assert len(dtypes._rows) <= 100


# ---- Nothing is half done ----


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_no_error_state_of_numpys_makes_a_call_fail(dtype: str, pinned: str | None) -> None:
    x = np.array([[1e6, 1e-30], [-1e6, 2e-30], [3e38, 3]], "f")
    half = (rng().normal(size=(4, 2, 5, 5)) * 1000).astype("f2")
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for a in (x, half, x.astype(float) * 1e150):
            mean, var = np.zeros(2, dtype), np.ones(2, dtype)
            y, saved = fastbn.batch_norm_forward(a, None, None, mean, var)
            fastbn.batch_norm_backward(a, a, saved)
            fastbn.batch_norm_backward(a, a, saved, wrt=("x",))
            fastbn.batch_norm(a, [np.inf, 1e300], [1e-300, 0.0], [1e300, 1e-300], [np.nan, 1.0])
            fastbn.batch_norm_elemt(a, np.array([np.inf, 1e300]), [1e300, 1.0])
            fastbn.batch_norm_backward_reduce(a, a, np.array([np.inf, 1e300]), [1e300, 1.0])
            fastbn.batch_norm_backward_elemt(a, a, [np.inf, 1e300], [1e300, 1.0], [1e300, 1], [1e300, 1.0], [1e300, np.inf], 3)
            frozen = fastbn.FrozenBatchNorm([np.inf, 1e300], [1e-300, 0.0], [1e300, 1.0])
            frozen(a)
            assert frozen.scale.shape == frozen.shift.shape == (2,)
            stats = fastbn.batch_norm_stats(a)
            stats.merge(stats, fastbn.Stats(3, np.array([np.inf, 3], stats.mean.dtype), np.array([np.inf, 0], stats.mean.dtype)))
            assert y.shape == a.shape


# ---- Layers ----


def test_a_subclass_may_override_forward() -> None:
    class Mine(fastbn.BatchNorm2d):
        def forward(self, x: Array, *args: Any, **kwargs: Any) -> Array:
            return super().forward(x, *args, **kwargs) + 100

    x = np.zeros((2, 3, 4, 4), F32)
    assert Mine(3)(x).mean() == Mine(3).forward(x).mean() == 100


def test_a_forward_of_a_subclass_has_its_own_parameters() -> None:
    """A call gives it what the caller gave, and nothing more."""

    class Plain(fastbn.GroupNorm):
        def forward(self, x: Array) -> Array:  # type: ignore[override]
            return super().forward(x)

    class Scaled(fastbn.BatchNorm2d):
        def forward(self, x: Array, residual: Array | None, scale: float, *, shift: float = 0.0) -> Array:  # type: ignore[override]
            return super().forward(x, residual) * scale + shift

    x = np.zeros((2, 3, 4, 4), F32)
    assert Plain(3, 3)(x).mean() == 0
    assert Plain(3, 3)(x=x).mean() == 0
    assert Scaled(3)(x, None, 2.0, shift=5.0).mean() == 5
    with pytest.raises(TypeError, match="forward"):
        Plain(3, 3)(x, x)


def test_tracking_may_be_switched_off_and_on() -> None:
    bn = fastbn.BatchNorm2d(3)
    assert bn.running_mean is not None
    bn.running_mean[:] = 4
    bn.track_running_stats = False
    x = problem((2, 3, 4, 4)).x
    near(bn(x), forward(x))
    np.testing.assert_array_equal(bn.running_mean, [4, 4, 4])
    assert bn.num_batches_tracked == 0
    bn.eval()
    near(bn(x), (x - 4.0) / np.sqrt(1 + 1e-5))
    bn.train().track_running_stats = True
    bn(x)
    assert bn.num_batches_tracked == 1


def test_batches_are_counted_without_running_statistics_too() -> None:
    x = problem((2, 3, 4, 4)).x
    bn = fastbn.BatchNorm2d(3)
    bn.running_mean = bn.running_var = None
    bn(x)
    bn.eval()(x)
    assert bn.num_batches_tracked == 1  # as in PyTorch


def test_pickles_and_copies_hold_no_caches_and_no_inputs() -> None:
    x = problem((4, 3, 20, 20)).x
    for activation in (None, "relu"):
        frozen = fastbn.FrozenBatchNorm(np.zeros(3), np.ones(3), activation=activation)
        fresh = len(pickle.dumps(frozen))
        want = frozen(x)
        assert len(pickle.dumps(frozen)) == fresh
        for again in (pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen), copy.copy(frozen)):  # noqa: S301
            same_bits(again(x), want)
            same_bits(again(x), want)
    for bn in (fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3).eval(), fastbn.BatchNorm2d(3).freeze()):
        fresh = len(pickle.dumps(bn))
        bn(x)
        assert len(pickle.dumps(bn)) <= fresh + 8
        again = pickle.loads(pickle.dumps(bn))  # noqa: S301
        same_bits(again(x), copy.deepcopy(bn)(x))
        with pytest.raises(RuntimeError, match="backward needs a forward"):
            copy.deepcopy(bn).backward(x)
    _, saved = fastbn.batch_norm_forward(x, activation="relu")
    same_bits(fastbn.batch_norm_backward(x, x, pickle.loads(pickle.dumps(saved))).dx, fastbn.batch_norm_backward(x, x, saved).dx)  # noqa: S301
    assert pickle.loads(pickle.dumps(fastbn.batch_norm_stats(x))) == fastbn.batch_norm_stats(x)  # noqa: S301


def test_a_layer_in_eval_keeps_no_input_alive() -> None:
    bn = fastbn.BatchNorm2d(3).eval()
    x, residual = problem((4, 3, 5, 5)).x, problem((4, 3, 5, 5), seed=1).x
    bn(x, residual)
    assert bn.backward(x).dx is not None
    alive = weakref.ref(x), weakref.ref(residual)
    dy = x.copy()
    del x
    assert alive[0]() is None
    with pytest.raises(RuntimeError, match="a layer in eval keeps no arrays"):
        bn.backward(dy)
    del residual
    assert alive[1]() is None


def test_in_place_with_weights_that_are_0_is_refused_and_named() -> None:
    x, dy = rng().normal(size=(2, 4, 2, 5, 5)).astype("f")
    bn = fastbn.BatchNorm2d(2)
    assert bn.weight is not None
    assert bn.bias is not None
    bn.weight[0] = 0
    z = x.copy()
    bn(z, out=z)
    refused(lambda: bn.backward(dy), "weight", error=(ValueError,))
    bn.weight[0], bn.bias[0] = 1e-3, 1e4  # no digit of the input is left in the output
    z = x.copy()
    bn(z, out=z)
    refused(lambda: bn.backward(dy), "weight", error=(ValueError,))
    bn.weight[0], bn.bias[0] = 0.5, 1
    z = x.copy()
    bn(z, out=z)
    assert np.isfinite(bn.backward(dy).dweight).all()


def test_running_statistics_are_reset() -> None:
    bn = fastbn.BatchNorm1d(2)
    fresh = bn.state_dict()
    for reset in (bn.reset_running_stats, bn.reset_parameters):
        bn(problem((5, 2)).x)
        assert bn.weight is not None
        bn.weight[...] = 3
        reset()
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            np.testing.assert_array_equal(bn.state_dict()[key], fresh[key])
    np.testing.assert_array_equal(bn.weight, [1, 1])
    bare = fastbn.BatchNorm1d(2, affine=False, track_running_stats=False)
    bare.reset_parameters()
    assert bare.state_dict() == {}


def test_states_may_be_loaded_in_part() -> None:
    bn = fastbn.BatchNorm1d(2)
    state = dict(bn.state_dict())
    assert bn.load_state_dict(state | {"num_batches_tracked": np.array([5])}) == ([], [])
    assert bn.num_batches_tracked == 5
    keys = bn.load_state_dict({"bias": [1, 2], "gamma": 3}, strict=False)
    assert keys == (["weight", "running_mean", "running_var"], ["gamma"])
    np.testing.assert_array_equal(bn.bias, [1, 2])
    assert bn.num_batches_tracked == 5
    with pytest.raises(KeyError, match="gamma"):
        bn.load_state_dict({"bias": [1, 2], "gamma": 3})


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_bad_batch_may_leave_the_statistics_alone(value: float) -> None:
    x = problem((4, 2, 3, 3)).x
    bad = x.copy()
    bad[0, 0, 0, 0] = value
    bn, other = fastbn.BatchNorm2d(2, skip_nonfinite=True), fastbn.BatchNorm2d(2)
    bn(x)
    other(x)
    y = bn(bad)
    assert np.isnan(y[:, 0]).any()
    with np.errstate(all="ignore"):
        near(y[:, 1], forward(bad)[:, 1])
    for key, v in other.state_dict().items():
        same_bits(bn.state_dict()[key], v)
    assert (bn.num_batches_tracked, bn.num_batches_skipped) == (1, 1)


def test_bfloat16_is_known_by_its_name() -> None:
    pytest.importorskip("ml_dtypes")
    assert fastbn.BatchNorm2d(3, dtype="bfloat16").dtype.name == "bfloat16"


# ---- Other frameworks' conventions ----


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("mask", [False, True])
def test_the_populations_variance(dtype: str, mask: bool) -> None:
    p = problem((5, 3, 4), dtype)
    m = rng(2).random((5, 4)) < 0.7 if mask else None
    counted = np.moveaxis(p.x, 1, -1)[np.ones((5, 4), bool) if m is None else m].astype(float)
    mean, var = np.zeros(3, dtype), np.ones(3, dtype)
    fastbn.batch_norm(p.x, mean, var, training=True, momentum=0.25, mask=m, correction=0)
    np.testing.assert_allclose(var, 0.75 + 0.25 * counted.var(0), rtol=1e-6 if dtype == "f4" else 1e-14)
    bn = fastbn.BatchNorm1d(3, momentum=0.25, correction=0, dtype=dtype)
    bn(p.x, mask=m)
    same_bits(bn.running_var, var)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_value_per_channel_is_its_own_mean(shape: tuple[int, ...], activation: Any) -> None:
    p = problem(shape)
    mean, var = np.zeros(3, F32), np.ones(3, F32)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, mean, var, correction=0, activation=activation)
    want = columns(p.bias, p.x, 1) + np.zeros(shape)
    near(y, np.maximum(want, 0) if activation else want)
    np.testing.assert_allclose(mean, 0.1 * p.x.reshape(3), rtol=1e-6)
    np.testing.assert_allclose(var, [0.9] * 3, rtol=1e-6)
    gradients = fastbn.batch_norm_backward(p.dy, p.x, saved)
    np.testing.assert_array_equal(gradients.dx, np.zeros(shape))
    np.testing.assert_array_equal(gradients.dweight, np.zeros(3))
    refused(lambda: fastbn.batch_norm_forward(p.x), "more than 1 value per channel", error=(ValueError,))
    one = np.ones((2, *shape[1:]), F32), np.array([True] + [False] * (2 * p.x[0, 0].size - 1)).reshape(2, *shape[2:])
    y, _ = fastbn.batch_norm_forward(one[0], mask=one[1], correction=0)
    np.testing.assert_array_equal(y, np.zeros_like(y))
    refused(lambda: fastbn.batch_norm_forward(one[0], mask=~(one[1] | True), correction=0), "mask", error=(ValueError,))


def test_the_order_of_another_framework_is_given_by_name() -> None:
    gamma, beta, mean, var = np.array([[2.0], [5.0], [1.0], [4.0]])
    x, want = np.array([[3.0]]), np.array([[(3 - 1) / np.sqrt(4.001) * 2 + 5]])
    near(fastbn.FrozenBatchNorm.from_keras(gamma, beta, mean, var)(x), want)
    near(fastbn.FrozenBatchNorm.from_onnx(gamma, beta, mean, var, epsilon=1e-3)(x), want)
    with pytest.raises(TypeError):
        fastbn.FrozenBatchNorm(gamma, beta, mean, var, 1e-3)  # type: ignore[misc]
    bn = fastbn.BatchNorm1d(1, eps=1e-3, dtype=np.float64)
    bn.load_state_dict({"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var})
    near(fastbn.FrozenBatchNorm.from_torch(bn)(x), want)


def test_a_layer_of_torchs_is_taken_as_it_is() -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(3, eps=1e-3).eval()
    with torch.no_grad():
        layer.weight[:] = torch.tensor([1.0, 2, 3])
        layer.running_mean[:] = torch.tensor([4.0, 5, 6])
    x = problem((2, 3, 4, 4)).x
    near(fastbn.FrozenBatchNorm.from_torch(layer)(x), layer(torch.tensor(x, dtype=torch.float32)).detach().numpy().astype(float))


def test_what_a_frozen_layer_has_folded_can_be_read() -> None:
    frozen = fastbn.FrozenBatchNorm([1.0, 0], [4.0, 1], [2.0, 3], [3.0, 4], eps=0.0)
    np.testing.assert_array_equal(frozen.scale, [1, 3])
    np.testing.assert_array_equal(frozen.shift, [2, 4])
    frozen.scale[...] = 0  # a copy
    near(frozen(np.ones((1, 2))), np.array([[3.0, 7.0]]))


# ---- Comparisons ----


def test_statistics_are_compared_by_value_and_saved_by_identity() -> None:
    s = fastbn.batch_norm_stats(np.ones((2, 3)))
    assert s == copy.deepcopy(s)
    assert len({s, copy.deepcopy(s)}) == 1
    assert s != fastbn.batch_norm_stats(np.zeros((2, 3)))
    assert s != fastbn.batch_norm_stats(np.ones((3, 3)))
    assert s != 3
    assert s in [None, s]
    _, saved = fastbn.batch_norm_forward(np.ones((2, 3)))
    assert saved == saved
    assert saved != copy.deepcopy(saved)
    assert len({saved, saved}) == 1


def test_gradients_of_a_frozen_layer_in_place() -> None:
    p = problem((4, 3, 5))
    _, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, p.mean, p.var, False)
    want = fastbn.batch_norm_backward(p.dy, p.x, saved)
    for name in ("x", "dy"):
        x, dy = p.x.copy(), p.dy.copy()
        got = fastbn.batch_norm_backward(dy, x, saved, out=x if name == "x" else dy)
        for a, b in zip(got[:3], want[:3], strict=True):
            same_bits(a, b)
    near_gradients(
        fastbn.batch_norm_backward(p.dy, p.x, fastbn.batch_norm_forward(p.x, p.weight)[1]), backward(p.dy, p.x, p.weight)
    )  # fmt: skip


def test_a_copy_of_saved_is_nothing_but_its_fields() -> None:
    """What it was made from would be a second set of vectors, which a change of the first does not reach."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(F32)
    _, saved = fastbn.batch_norm_forward(x)
    for other in (pickle.loads(pickle.dumps(saved)), copy.deepcopy(saved)):  # noqa: S301  our own
        assert other.made is None
        other.scale[...] *= 2
        dx = fastbn.batch_norm_backward(x, x, other).dx
        np.testing.assert_allclose(dx, 2 * fastbn.batch_norm_backward(x, x, saved).dx, rtol=1e-5, atol=1e-7)


def test_the_fields_of_saved_are_listed_before_one_is_looked_at() -> None:
    """Interactive shells complete names from the list, and debuggers show what is in it."""
    _, saved = fastbn.batch_norm_forward(np.ones((4, 3), F32))
    assert {field.name for field in dataclasses.fields(saved)} <= {*dir(saved)}
