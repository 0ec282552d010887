"""What no other test would notice: each of these failed on a small change of the code that all the others let pass.

`tests/mutants.py` makes those changes again, one at a time.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from truth import backward, forward, near, near_gradient, near_gradients, problem, rng

import fastbn
from fastbn import cpu, dispatch, layout, memory, threads
from fastbn.layout import Array

pinned = pytest.mark.usefixtures("kernel")
wide = pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)


def ahead(*shape: int) -> tuple[Array, Array]:
    """An array, and another that is one row ahead of it in the same memory."""
    buffer = rng().standard_normal((shape[0] + 1, *shape[1:])).astype(np.float32)
    return buffer[:-1], buffer[1:]


# --- functional: which arrays an output may not overlap


@pytest.mark.parametrize("pin", [None, "reference"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_out_ahead_of_the_residual_is_refused(pin: str | None, activation: str | None) -> None:
    residual, out = ahead(4, 3, 5)
    x, v = np.ones_like(out), np.ones(3, np.float32)
    layer, frozen = fastbn.BatchNorm1d(3, activation=activation), fastbn.FrozenBatchNorm(v, v, activation=activation)
    before = out.copy()
    with fastbn.use_kernel(pin):
        for call in (
            lambda: fastbn.batch_norm_forward(x, residual=residual, activation=activation, out=out),
            lambda: fastbn.batch_norm(x, v, v, residual=residual, activation=activation, out=out),
            lambda: fastbn.batch_norm(x, v, v, training=True, residual=residual, activation=activation, out=out),
            lambda: fastbn.batch_norm_elemt(x, v, v, residual=residual, activation=activation, out=out),
            lambda: layer(x, residual, out=out),
            lambda: frozen(x, residual, out),
        ):
            with pytest.raises(ValueError, match="out overlaps residual"):
                call()
    assert np.array_equal(out, before)


@pytest.mark.parametrize("pin", [None, "reference"])
def test_out_ahead_of_dy_is_refused(pin: str | None) -> None:
    dy, out = ahead(4, 3)
    x, v = rng(1).standard_normal((4, 3)).astype(np.float32), np.ones(3, np.float32)
    saved = fastbn.batch_norm_forward(x)[1]
    before = out.copy()
    with fastbn.use_kernel(pin):
        for call in (
            lambda: fastbn.batch_norm_backward(dy, x, saved, out=out),
            lambda: fastbn.batch_norm_backward_elemt(dy, x, v, v, v, v, v, 4, out=out),
        ):
            with pytest.raises(ValueError, match="out overlaps dy"):
                call()
    assert np.array_equal(out, before)


def test_overlap_that_cannot_be_excluded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_hard(*_: object, **__: object) -> bool:
        raise np.exceptions.TooHardError("too hard")

    buffer = np.zeros((4, 6), np.float32)
    monkeypatch.setattr(np, "shares_memory", too_hard)
    with pytest.raises(ValueError, match="out overlaps x"), fastbn.use_kernel("reference"):
        fastbn.batch_norm(buffer[:, ::2], np.zeros(3), np.ones(3), out=buffer[:, 1::2])


@pinned
def test_out_may_have_an_axis_of_one_without_a_stride() -> None:
    x = rng().standard_normal((1, 3, 5)).astype(np.float32)
    out = np.lib.stride_tricks.as_strided(np.zeros((3, 10), np.float32), x.shape, (0, 40, 8))
    assert fastbn.batch_norm(x, np.zeros(3), np.ones(3), eps=0.0, out=out) is out
    assert np.array_equal(out, x)


@pinned
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [False, True])
def test_out_over_a_vector_of_the_call_is_refused(name: str, training: bool) -> None:
    x, out = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones((4, 3), np.float32)
    vectors = {key: np.ones(3, np.float32) for key in ("weight", "bias", "running_mean", "running_var")} | {name: out[1]}
    with pytest.raises(ValueError, match=f"out.*{name}|{name}.*out"):
        fastbn.batch_norm(x, **vectors, training=training, out=out)
    assert np.array_equal(out, np.ones((4, 3)))


@pinned
def test_out_over_the_mask_is_refused() -> None:
    x, out = np.arange(12, dtype=np.float32).reshape(4, 3), np.zeros((4, 3), np.float32)
    mask = out.view(np.bool_).reshape(-1)[:4]
    mask[:3] = True
    before = out.copy()
    with pytest.raises(ValueError, match=r"out.*mask|mask.*out"):
        fastbn.batch_norm(x, None, None, training=True, mask=mask, out=out)
    assert np.array_equal(out.view(np.uint32), before.view(np.uint32))


@pinned
def test_running_statistics_over_each_other_or_the_mask_are_refused() -> None:
    x, both = np.arange(12, dtype=np.float32).reshape(4, 3), np.zeros(4, np.float32)
    for mean, var in ((both[:3], both[:3]), (both[:3], both[1:])):
        with pytest.raises(ValueError, match=r"running_mean.*running_var|running_var.*running_mean"):
            fastbn.batch_norm(x, mean, var, training=True)
    mask = both.view(np.bool_)[:4]
    mask[:3] = True
    for name in ("running_mean", "running_var"):
        with pytest.raises(ValueError, match=rf"{name}.*mask|mask.*{name}"):
            fastbn.batch_norm_forward(x, **{name: both[:3]}, mask=mask)
    assert mask[:3].all()
    assert not both[1:].any()


# --- functional: what arguments must be


def test_eps_is_not_none() -> None:
    """Which the kernels take to mean that the variance is one over the deviation."""
    x, v = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(3, np.float32)
    for pin in (None, "reference"):
        with fastbn.use_kernel(pin), pytest.raises(TypeError, match="eps must be a number"):
            fastbn.batch_norm(x, v, v, eps=None)  # type: ignore[arg-type]


@pinned
@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1.0, np.float32("nan")])
def test_eps_is_finite_and_not_negative(eps: Any) -> None:
    x, v = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(3, np.float32)
    for call in (
        lambda: fastbn.batch_norm(x, v, v, eps=eps),
        lambda: fastbn.batch_norm(x, v, v, eps=eps, activation="relu"),
        lambda: fastbn.batch_norm(x, None, None, training=True, eps=eps),
        lambda: fastbn.batch_norm_forward(x, eps=eps),
        lambda: fastbn.batch_norm_forward(x, None, None, v, v, False, eps=eps),
        lambda: fastbn.BatchNorm1d(3, eps=eps),
        lambda: fastbn.FrozenBatchNorm(v, v, eps=eps),
    ):
        with pytest.raises(ValueError, match="eps must be a finite number of at least 0"):
            call()


@pinned
@pytest.mark.parametrize("kind", [lambda a: a.view(np.matrix), np.ma.masked_array], ids=["matrix", "masked"])
def test_arrays_with_a_meaning_of_their_own_are_refused(kind: Any) -> None:
    x, v = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(3, np.float32)
    odd = kind(x)
    layer, frozen = fastbn.BatchNorm1d(3), fastbn.FrozenBatchNorm(v, v)
    layer(x)
    frozen(x)
    saved = fastbn.batch_norm_forward(x, residual=x)[1]
    for name, call in (
        ("x", lambda: fastbn.batch_norm(odd, v, v)),
        ("x", lambda: fastbn.batch_norm_forward(odd)),
        ("x", lambda: fastbn.batch_norm_stats(odd)),
        ("x", lambda: fastbn.batch_norm_elemt(odd, v, v)),
        ("x", lambda: fastbn.batch_norm_backward(x, odd, saved)),
        ("x", lambda: layer(odd)),
        ("x", lambda: frozen(odd)),
        ("x", lambda: fastbn.explain("forward", odd)),
        ("dy", lambda: fastbn.batch_norm_backward(odd, x, saved)),
        ("dy", lambda: layer.backward(odd)),
        ("dy", lambda: fastbn.batch_norm_backward_reduce(odd, x, v, v)),
        ("residual", lambda: fastbn.batch_norm(x, v, v, residual=odd)),
        ("residual", lambda: frozen(x, odd)),
        ("out", lambda: fastbn.batch_norm(x, v, v, out=odd)),
        ("out", lambda: frozen(x, None, odd)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a plain numpy.ndarray"):
            call()


# --- functional: what is given by its name, its number, or not at all


@pinned
def test_wrt_may_be_one_name() -> None:
    x = rng().standard_normal((4, 3)).astype(np.float32)
    saved = fastbn.batch_norm_forward(x)[1]
    gradients = fastbn.batch_norm_backward(x, x, saved, wrt="weight")
    assert [name for name, value in gradients._asdict().items() if value is not None] == ["dweight"]


@pinned
def test_out_without_dx_is_refused() -> None:
    x = rng().standard_normal((4, 3)).astype(np.float32)
    saved = fastbn.batch_norm_forward(x)[1]
    with pytest.raises(ValueError, match="out is where dx goes"):
        fastbn.batch_norm_backward(x, x, saved, wrt=["weight"], out=np.empty_like(x))


@pinned
def test_what_a_forward_with_given_statistics_saved_is_its_own() -> None:
    x = rng().standard_normal((4, 3, 5)).astype(np.float32)
    vectors = [np.full(3, value, np.float32) for value in (2.0, 0.5, 0.25, 4.0)]
    weight, bias, mean, var = vectors
    saved = fastbn.batch_norm_forward(x, weight, bias, mean, var, training=False, activation="silu")[1]
    assert saved.count == 20
    want = fastbn.batch_norm_backward(x, x, saved)
    for vector in vectors:
        vector[...] = 77
    for a, b in zip(want[:3], fastbn.batch_norm_backward(x, x, saved)[:3], strict=True):
        assert np.array_equal(a, b)


@pinned
@wide
@pytest.mark.parametrize("activation", [None, "silu", "relu"])
def test_what_a_forward_saved_is_its_own(dtype: np.dtype[Any], activation: str | None) -> None:
    """Changed arrays change no gradient; but for x, which the backward is given again."""
    p = problem((6, 3, 5), dtype)
    residual, mask = rng(2).standard_normal(p.x.shape).astype(dtype), rng(3).random((6, 5)) < 0.7
    given = {"weight": p.weight, "bias": p.bias, "running_mean": p.mean, "running_var": p.var, "mask": mask, "residual": residual}
    saved = fastbn.batch_norm_forward(p.x, **given, activation=activation)[1]
    wrt = ("x", "weight", "bias", "residual")
    want = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=wrt)
    for a in given.values():
        a[...] = True
    for a, b in zip(want, fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=wrt), strict=True):
        assert np.array_equal(a, b)


@pinned
@wide
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_residuals_gradient_survives_dx_in_the_place_of_dy(dtype: np.dtype[Any], activation: str | None) -> None:
    p = problem((6, 3, 5), dtype)
    for training in (True, False):
        statistics = (None, None) if training else (p.mean, p.var)
        saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, *statistics, training, activation=activation, residual=p.x)[1]
        wrt = ("x", "weight", "bias", "residual")
        want = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=wrt)
        dy = p.dy.copy()
        got = fastbn.batch_norm_backward(dy, p.x, saved, wrt=wrt, out=dy)
        assert got.dx is dy
        for a, b in zip(got, want, strict=True):
            assert np.array_equal(a, b)


@pinned
def test_backward_elemt_wants_at_least_one_value() -> None:
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    for count in (0, -1):
        with pytest.raises(ValueError, match="count must be at least 1"):
            fastbn.batch_norm_backward_elemt(x, x, v, v, v, v, v, count)


# --- core: digits that a float32 mean rounds away


@pinned
def test_a_wide_mean_is_used_to_all_its_digits() -> None:
    p = problem((64, 3, 7), mean=1e6)
    mean, var = p.x.mean((0, 2), dtype=np.float64), p.x.var((0, 2), dtype=np.float64)
    invstd = (1 / np.sqrt(var + 1e-5)).astype(np.float32)
    dx, dweight, dbias = backward(p.dy, p.x, p.weight)
    sums = fastbn.batch_norm_backward_reduce(p.dy, p.x, mean, invstd)
    near_gradient(sums[0], dbias, np.sqrt(64 * 7))
    near_gradient(sums[1] * invstd, dweight, np.sqrt(64 * 7))
    near_gradient(fastbn.batch_norm_backward_elemt(p.dy, p.x, mean, invstd, p.weight, *sums, 64 * 7), dx)
    near(fastbn.batch_norm_elemt(p.x, mean, invstd, p.weight, p.bias), forward(p.x, p.weight, p.bias))


@pinned
def test_what_merging_rounds_away_is_kept() -> None:
    x = problem((64, 3), mean=1e6, seed=3).x
    empty = fastbn.batch_norm_stats(x[:0])
    parts = [fastbn.batch_norm_stats(x[i : i + 8]) for i in range(0, 64, 8)]
    truth = x.astype(np.longdouble)
    for merged in (empty.merge(*parts), parts[0].merge(empty, *parts[1:]), empty.merge(parts[0]).merge(*parts[1:], empty)):
        assert merged.count == 64
        assert merged.mean_lo is not None
        np.testing.assert_allclose(merged.mean + merged.mean_lo.astype(np.longdouble), truth.mean(0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(merged.var, truth.var(0), rtol=1e-6)


@pinned
def test_an_empty_batch_is_no_origin_for_the_others() -> None:
    x = 1e15 + rng().integers(-8, 9, (64, 2)).astype(np.float64)
    parts = [fastbn.batch_norm_stats(part) for part in (x[:0], x[:7], x[7:30], x[30:])]
    np.testing.assert_allclose(parts[0].merge(*parts[1:]).var, (x - 1e15).var(0), rtol=1e-12)


@pinned
def test_merging_what_has_no_rest_is_as_exact() -> None:
    a, b = (fastbn.Stats(4, np.array([1e6 + i], np.float32), np.array([0.0], np.float32)) for i in (0, 1))
    assert a.merge(b).var == 0.25
    assert a.merge(b).mean == np.float32(1e6 + 0.5)


@pinned
def test_an_infinite_running_mean_gives_infinity() -> None:
    mean, ones = np.array([np.inf, -np.inf]), np.ones(2)
    x = np.zeros((3, 2), np.float32)
    for y in (
        fastbn.FrozenBatchNorm(mean, ones)(x),
        fastbn.batch_norm_elemt(x, mean, ones),
        fastbn.batch_norm(x, mean.astype(np.float32), ones),
    ):
        assert np.array_equal(y, np.tile(np.array([-np.inf, np.inf], np.float32), (3, 1)))


@pinned
def test_an_infinite_scale_gives_infinity_beside_the_mean() -> None:
    frozen = fastbn.FrozenBatchNorm([1.0], [0.0], eps=0.0)
    y = frozen(np.array([[0.0], [2.0]], np.float32))
    assert np.array_equal(y, [[-np.inf], [np.inf]])


@pinned
def test_an_infinite_mean_rounds_nothing_away() -> None:
    x = np.ones((3, 2), np.float32)
    x[0, 0] = np.inf
    saved = fastbn.batch_norm_forward(x)[1]
    assert saved.mean_lo is not None
    assert (saved.mean[0], saved.mean_lo[0]) == (np.inf, 0)


# --- core: gradients that are seldom asked for


@pinned
@wide
def test_the_residuals_gradient_alone(dtype: np.dtype[Any]) -> None:
    p = problem((4, 3, 5), dtype)
    residual = rng(5).standard_normal(p.x.shape).astype(dtype)
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, activation="silu", residual=residual)[1]
    alone = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=["residual"])
    together = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=["x", "weight", "bias", "residual"])
    assert alone.dx is None
    assert alone.dweight is None
    assert alone.dresidual is not None
    z = forward(p.x, p.weight, p.bias) + residual
    sigmoid = 1 / (1 + np.exp(-z))
    for gradients in (alone, together):
        near_gradient(gradients.dresidual, p.dy * (sigmoid * (1 + z * (1 - sigmoid))))


@pinned
@wide
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "relu"])
def test_in_place_over_x_is_as_right_as_over_dy(dtype: np.dtype[Any], activation: str | None) -> None:
    p = problem((6, 3, 5), dtype)
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, activation=activation)[1]
    want = fastbn.batch_norm_backward(p.dy, p.x, saved)
    for name in ("x", "dy"):
        given = {"x": p.x.copy(), "dy": p.dy.copy()}
        got = fastbn.batch_norm_backward(given["dy"], given["x"], saved, out=given[name])
        for a, b in zip(got[:3], want[:3], strict=True):
            assert a is not None
            near_gradient(a, b.astype(np.float64))


@pinned
@wide
def test_from_the_output_with_a_large_mean(dtype: np.dtype[Any]) -> None:
    p = problem((32, 3, 5), dtype, mean=1e4)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, activation=("leaky_relu", 0.5))
    plain = fastbn.batch_norm_backward(p.dy, p.x, saved)
    other = fastbn.batch_norm_backward(p.dy, y, saved, from_output=True)
    near_gradients(other, tuple(a.astype(np.float64) for a in plain[:3]))  # type: ignore[union-attr, arg-type]


@pinned
@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_a_slope_that_cannot_be_undone_is_refused(slope: float) -> None:
    x = rng().standard_normal((4, 3)).astype(np.float32)
    y, saved = fastbn.batch_norm_forward(x, activation=("leaky_relu", slope))
    with pytest.raises(ValueError, match="from_output"):
        fastbn.batch_norm_backward(x, y, saved, from_output=True)


@pinned
@pytest.mark.parametrize("values", [(7, 7), (1e-40, 2e-40)], ids=str)
def test_why_a_channel_that_hardly_varies_cannot_be_had_from_its_output(values: tuple[float, float]) -> None:
    """Its weight may be anything: one over the deviation is what is not a number."""
    x = np.array([[1, values[0]], [3, values[1]]], np.float32)
    y, saved = fastbn.batch_norm_forward(x, np.array([1, 1e-3]), np.array([1.0, 1.0]), eps=0.0)
    with pytest.raises(ValueError, match=r"from_output needs channels that vary, or an eps above 0, .* of channel 1 is 0, or"):
        fastbn.batch_norm_backward(x, y, saved, from_output=True)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 40, 40)], ids=str)
def test_without_a_pin_an_output_may_overlap_no_array_of_the_call_in_part(shape: tuple[int, ...]) -> None:
    memory = rng().standard_normal((shape[0] + 1, *shape[1:])).astype(np.float32)
    given, out, other = memory[:-1], memory[1:], np.ones(shape, np.float32)
    before, zero, one = memory.copy(), np.zeros(3, np.float32), np.ones(3, np.float32)
    saved = fastbn.batch_norm_forward(other)[1]
    frozen = fastbn.FrozenBatchNorm(zero, one)
    frozen(given)
    calls: list[tuple[str, Any]] = [
        ("x", lambda: fastbn.batch_norm(given, zero, one, out=out)),
        ("x", lambda: fastbn.batch_norm(given, None, None, training=True, out=out)),
        ("x", lambda: fastbn.batch_norm_forward(given, zero, one, out=out)),
        ("x", lambda: frozen(given, out=out)),
        ("x", lambda: fastbn.batch_norm_backward(other, given, saved, out=out)),
        ("dy", lambda: fastbn.batch_norm_backward(given, other, saved, out=out)),
        ("residual", lambda: fastbn.batch_norm(other, zero, one, residual=given, out=out)),
        ("residual", lambda: fastbn.batch_norm_forward(other, residual=given, out=out)),
        ("residual", lambda: frozen(other, given, out=out)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"out overlaps {name} in part"):
            call()
        np.testing.assert_array_equal(memory, before)


# --- core and layers: a frozen layer


def test_a_frozen_layer_is_as_exact_in_every_dtype() -> None:
    mean, var, weight, bias = rng().uniform(0.5, 2.0, (4, 3))
    frozen = fastbn.FrozenBatchNorm(mean, var, weight, bias)
    for _ in range(2):
        for dtype in (np.float32, np.float64, np.float16, np.float32):
            x = rng(1).standard_normal((4, 3)).astype(dtype)
            near(frozen(x), (x - mean) / np.sqrt(var + 1e-5) * weight + bias)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_a_frozen_layer_copies_what_it_is_given(name: str) -> None:
    given = {key: np.array([1.5, 2.5]) for key in ("running_mean", "running_var", "weight", "bias")}
    x = rng().standard_normal((4, 2)).astype(np.float32)
    want = fastbn.FrozenBatchNorm(**given)(x)
    frozen = fastbn.FrozenBatchNorm(**given)
    given[name][...] = 99
    assert np.array_equal(frozen(x), want)


def test_pins_hold_for_frozen_layers_and_plain_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = dispatch.KERNELS["reference"].module()
    original = kernel.normalize
    monkeypatch.setattr(kernel, "normalize", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    frozen = fastbn.FrozenBatchNorm(v, v)
    frozen(x)
    fastbn.core.whole_calls.cache_clear()
    fastbn.batch_norm(x, v, v)
    with fastbn.use_kernel("reference"):
        frozen(x)
        assert len(calls) == 1
        fastbn.batch_norm(x, v, v)
        assert len(calls) == 2
    fastbn.core.whole_calls.cache_clear()


def test_a_frozen_layer_reads_no_further_than_its_channels() -> None:
    frozen = fastbn.FrozenBatchNorm(np.zeros(4), np.ones(4))
    for shape in ((2, 4, 3), (2, 4), (1, 4, 2, 2)):
        frozen(np.ones(shape, np.float32))
        for channels in (3, 5, 6):
            other = (shape[0], channels, *shape[2:])
            with pytest.raises(ValueError, match=f"x has {channels} channels"):
                frozen(np.ones(other, np.float32))


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_frozen_layer_finds_the_channels_of_an_array_with_other_axes(layout: Any) -> None:
    """What it has prepared for the last one is for as many axes."""
    mean = np.arange(4.0)
    frozen = fastbn.FrozenBatchNorm(mean, np.ones(4), eps=0.0, layout=layout)
    for shape in ((2, 4, 4, 4), (4, 4), (4, 4, 4), (2, 4, 4, 4, 4), (4, 4, 4)):
        channels = mean.reshape(-1, *[1] * (len(shape) - 2 if layout == "channels_first" else 0))
        assert np.array_equal(frozen(np.zeros(shape, np.float32)), np.broadcast_to(-channels, shape))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("read", ["x", "residual"])
def test_a_statistic_is_moved_in_no_array_that_the_call_reads(read: str, name: str) -> None:
    arrays = {"x": np.arange(12, dtype=np.float32).reshape(4, 3), "residual": np.ones((4, 3), np.float32)}
    before = arrays[read].copy()
    for activation in (None, "relu"):
        with pytest.raises(ValueError, match=f"{name} and {read} share memory"):
            fastbn.batch_norm_forward(**arrays, **{name: arrays[read][1]}, activation=activation)
        assert np.array_equal(arrays[read], before)


@pytest.mark.parametrize("name", ["mean", "mean_lo", "invstd", "scale", "shift"])
def test_a_gradient_is_written_over_nothing_that_a_forward_saved(name: str) -> None:
    x = np.arange(3, dtype=np.float32)[None]
    _, saved = fastbn.batch_norm_forward(x, correction=0)
    place = getattr(saved, name)[None]
    with pytest.raises(ValueError, match=rf"out and saved\.{name} share memory"):
        fastbn.batch_norm_backward(x, x, saved, out=place)


# --- layers


def test_loading_keeps_the_layers_arrays() -> None:
    """Who holds them, an optimizer for one, sees the new values."""
    layer, other = fastbn.BatchNorm1d(2), fastbn.BatchNorm1d(2)
    held = {key: getattr(layer, key) for key in layer.state_dict()}
    other(rng().standard_normal((5, 2)).astype(np.float32))
    layer.load_state_dict(other.state_dict())
    for key, value in held.items():
        assert getattr(layer, key) is value
        assert np.array_equal(value, getattr(other, key))


def test_the_last_forwards_arrays_are_no_part_of_a_layer() -> None:
    x = rng().standard_normal((1000, 2)).astype(np.float32)
    layer = fastbn.BatchNorm1d(2)
    size = len(pickle.dumps(layer))
    y = layer(x)
    assert len(pickle.dumps(layer)) < size + 1000
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        with pytest.raises(RuntimeError, match="forward"):
            again.backward(x)
        assert np.array_equal(again(x), y)


def test_a_layer_without_statistics_cannot_be_frozen() -> None:
    layer = fastbn.BatchNorm1d(2, track_running_stats=False)
    with pytest.raises(ValueError, match="running statistics"):
        layer.freeze()
    assert not layer.frozen
    assert layer.freeze(False) is layer


def test_gradients_of_a_frozen_layer_are_those_of_x_alone() -> None:
    x = rng().standard_normal((5, 2)).astype(np.float32)
    layer = fastbn.BatchNorm1d(2).freeze()
    layer(x)
    assert [g is None for g in layer.backward(x)] == [False, True, True, True]
    layer = fastbn.BatchNorm1d(2, affine=False)
    layer(x)
    assert [g is None for g in layer.backward(x)] == [False, True, True, True]


# --- threads


def cgroup_files(root: Path, **text: str) -> tuple[str, str]:
    membership = root / "membership"
    membership.write_text("0::/outer/inner\n")
    for folder, value in {"outer": text.get("outer"), "outer/inner": text.get("inner")}.items():
        (root / folder).mkdir()
        if value is not None:
            (root / folder / "cpu.max").write_text(value)
    return str(root), str(membership)


def test_the_smallest_quota_on_the_way_counts(tmp_path: Path) -> None:
    assert threads.quota(*cgroup_files(tmp_path, outer="150000 100000", inner="400000 100000")) == 1.5
    (tmp_path / "outer/cpu.max").write_text("300000 100000")
    (tmp_path / "outer/inner/cpu.max").write_text("50000 100000")
    assert threads.quota(str(tmp_path), str(tmp_path / "membership")) == 0.5


@pytest.mark.parametrize(("quota", "expected"), [(1.5, 2), (2.0, 2), (0.5, 1), (3.01, 4), (None, 8)])
def test_a_part_of_a_processor_is_a_thread(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(threads, "limits", lambda: {"affinity": 8, "quota": quota, "FASTBN_NUM_THREADS": None})
    monkeypatch.setattr(threads, "_default", None)
    monkeypatch.setattr(threads, "_threads", None)
    assert fastbn.get_num_threads() == expected


def test_a_call_of_the_worthwhile_size_has_threads() -> None:
    with fastbn.num_threads(3):
        for op, size in threads.WORTH_THREADS.items():
            for dtype in ("float16", "float32", "float64"):  # 16 bits count as the floats that they are computed as
                counted = max(np.dtype(dtype).itemsize, 4)
                assert threads.for_call(op, np.empty(size // counted, dtype)) == 3
                assert threads.for_call(op, np.empty(size // counted - 1, dtype)) == 1


# --- cpu


@pytest.mark.parametrize(
    ("features", "usable"),
    [
        ({"sse4.2", "popcnt"}, "v2"),
        ({"avx2", "fma", "f16c", "bmi2"}, "v3"),
        ({"avx512f", "avx512bw", "avx512dq", "avx512vl"}, ""),
        ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "f16c", "bmi2"}, ""),
        ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi2"}, "v3 v4"),
        ({"neon"}, "neon"),
    ],
)
def test_a_level_needs_all_its_features(monkeypatch: pytest.MonkeyPatch, features: set[str], usable: str) -> None:
    monkeypatch.setattr(cpu, "features", lambda: frozenset(features))
    monkeypatch.setattr(cpu, "_unknown", None)
    assert sorted(level for level in cpu.LEVELS if not cpu.unsupported(level)) == usable.split()


def test_caches_as_the_system_describes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for i, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "64K"), ("2", "Unified", "2048K"), ("3", "Unified", "24576K")]
    ):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in {"level": level, "type": kind, "size": size}.items():
            (folder / name).write_text(text + "\n")
    (tmp_path / "index9").mkdir()  # which says nothing
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path)
    cpu.caches.cache_clear()
    try:
        assert cpu.caches() == (48 << 10, 2 << 20, 24 << 20)
    finally:
        monkeypatch.undo()
        cpu.caches.cache_clear()


def test_caches_of_a_system_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path)
    monkeypatch.setattr(cpu, "os", SimpleNamespace(sysconf_names={"SC_LEVEL2_CACHE_SIZE": 1}, sysconf=lambda name: 777))
    cpu.caches.cache_clear()
    try:
        assert cpu.caches() == (32 << 10, 777, 8 << 20)
    finally:
        monkeypatch.undo()
        cpu.caches.cache_clear()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_the_pool_has_so_many_workers_and_no_more() -> None:
    pytest.importorskip("fastbn.kernels._pool", reason="built without a compiler")
    script = """
        import os, time, numpy as np, fastbn
        from fastbn.kernels import _plan
        x = np.random.default_rng(0).standard_normal((1000, 64, 16)).astype(np.float32)
        want = fastbn.batch_norm(x, None, None, training=True)
        before = len(os.listdir("/proc/self/task"))
        _plan.set_caches(512, 2048, 4096)  # thousands of units of work
        with fastbn.num_threads(5000):
            for _ in range(60):  # the pool rests now and then
                assert np.array_equal(fastbn.batch_norm(x, None, None, training=True), want)
                fastbn.batch_norm(x, want[0, :, 0], want[0, :, 0] ** 2)
                time.sleep(0.01)
        assert len(os.listdir("/proc/self/task")) <= before + 255
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


# --- layout and memory


def test_one_channel_is_one_run_however_it_is_called() -> None:
    for x in (np.zeros((4, 1, 5)), np.zeros((4, 5, 1)).transpose(0, 2, 1)):
        assert layout.view(x, 1).dims == (1, 1, 20)


def test_an_unaligned_array_is_copied() -> None:
    raw = np.zeros(4 * 3 * 4 + 1, np.uint8)
    x = raw[1:].view(np.float32).reshape(4, 3)
    assert not layout.view(x, 1).dense
    assert layout.view(x.copy(), 1).dense


def test_what_is_lent_counts_against_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.release()
    monkeypatch.setattr(memory, "_limit", 4 << 20)
    x = np.empty((2 << 20) // 4, np.float32)
    first, second, third = (memory.empty_like(x) for _ in range(3))
    del first, second, third
    assert memory.statistics()["idle"] <= 4 << 20
    memory.release()


def test_vectors_in_foreign_byte_order_keep_their_digits() -> None:
    x = (1e6 + rng().standard_normal((100, 2))).astype(np.float32)
    mean = x.mean(0, dtype=np.float64)
    ones = np.ones(2)
    want = fastbn.batch_norm_elemt(x, mean, ones)
    assert np.array_equal(fastbn.batch_norm_elemt(x, mean.astype(mean.dtype.newbyteorder()), ones), want)
