"""Laws that hold for every input.

Each run tries the same examples. HYPOTHESIS_PROFILE=explore tries others, a thousand for each test, and prints the seed
with which HYPOTHESIS_SEED tries them again; HYPOTHESIS_EXAMPLES is how many.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import hypothesis
import numpy as np
import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st
from truth import SIZES, Problem, backward, forward, near, near_gradients, problem, rng, same_bits

import fastbn
from fastbn.layout import Array

pytestmark = pytest.mark.usefixtures("kernel", "seed_in_the_report")

EXPLORE = os.environ.get("HYPOTHESIS_PROFILE") == "explore"
SEED = int(os.environ.get("HYPOTHESIS_SEED") or int.from_bytes(os.urandom(4), "little"))

Test = TypeVar("Test", bound=Callable[..., Any])


def given(*args: Any, **kwargs: Any) -> Callable[[Test], Test]:
    """Examples as the profile says: always the same ones, or new ones."""

    def decorate(test: Test) -> Test:
        test = given_any(*args, **kwargs)(test)
        if not EXPLORE:
            return test
        examples = int(os.environ.get("HYPOTHESIS_EXAMPLES") or 1000)
        return hypothesis.seed(SEED)(hypothesis.settings(derandomize=False, max_examples=examples, print_blob=True)(test))

    return decorate


@pytest.fixture(scope="session")
def seed_in_the_report(request: pytest.FixtureRequest) -> None:
    if EXPLORE:
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print(f"\nexploring: HYPOTHESIS_PROFILE=explore HYPOTHESIS_SEED={SEED} tries the same again")


single = pytest.mark.parametrize("dtype", ["float32"], indirect=True)
wide = pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from(SIZES)
few = st.integers(2, 5)
spaces = st.lists(st.integers(1, 9), min_size=0, max_size=3)
layouts = st.sampled_from(["channels_first", "channels_last"])


def shape_of(layout: str, n: int, channels: int, space: list[int]) -> tuple[int, ...]:
    return (n, channels, *space) if layout == "channels_first" else (n, *space, channels)


@st.composite
def problems(draw: st.DrawFn, dtype: Any = np.float32) -> tuple[Problem, str]:
    layout = draw(layouts)
    shape = shape_of(layout, draw(few) + 3, draw(sizes), draw(spaces))
    # A truth in double says little about a double far from zero; test_numerics has a better one for that.
    mean = draw(st.sampled_from([0.0, 1.0, -3.0] if dtype == np.float64 else [0.0, 1.0, -30.0, 1e4]))
    return problem(shape, dtype, 1 if layout == "channels_first" else -1, mean, seed=draw(seeds)), layout


@st.composite
def indices(draw: st.DrawFn, ndim: int) -> tuple[slice, ...]:
    return tuple(slice(None, None, draw(st.sampled_from([1, 1, 2, 3, -1, -2]))) for _ in range(ndim))


@given(data=st.data())
@wide
def test_layouts_agree(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """Channels first, channels last, and either's shape over the other's memory."""
    p, layout = data.draw(problems(dtype))
    other = "channels_last" if layout == "channels_first" else "channels_first"
    to = (1, -1) if layout == "channels_first" else (-1, 1)
    view, dy_view = np.moveaxis(p.x, *to), np.moveaxis(p.dy, *to)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)
    dx = fastbn.batch_norm_backward(p.dy, p.x, saved).dx
    near(y, forward(p.x, p.weight, p.bias, axis=p.axis))
    assert dx is not None
    truth = backward(p.dy, p.x, p.weight, axis=p.axis)
    for x, dy in ((view, dy_view), (np.ascontiguousarray(view), np.ascontiguousarray(dy_view))):
        again, saved = fastbn.batch_norm_forward(x, p.weight, p.bias, layout=other)
        near(np.moveaxis(again, to[1], to[0]), forward(p.x, p.weight, p.bias, axis=p.axis))
        gradients = fastbn.batch_norm_backward(dy, x, saved)
        assert gradients.dx is not None
        near_gradients(gradients._replace(dx=np.moveaxis(gradients.dx, to[1], to[0])), truth)
        if x is view:  # the same memory, so the same kernel
            same_bits(np.moveaxis(again, to[1], to[0]), y)
            same_bits(np.moveaxis(gradients.dx, to[1], to[0]), dx)


@given(data=st.data())
@single
def test_strides_do_not_matter(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """A strided array gives the bits of its contiguous copy, or of a copy in the other memory order."""
    p, layout = data.draw(problems(dtype))
    index = (slice(None), *data.draw(indices(p.x.ndim - 1)))
    x, dy = p.x[index], p.dy[index]
    y, saved = fastbn.batch_norm_forward(x, layout=layout)
    near(y, forward(np.ascontiguousarray(x), axis=p.axis))
    gradients = fastbn.batch_norm_backward(dy, x, saved)
    near_gradients(gradients, backward(dy, x, axis=p.axis))


@given(data=st.data())
@wide
def test_split_and_merge(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """Statistics of parts of a batch, cut anywhere and merged in any order and grouping."""
    p, layout = data.draw(problems(dtype))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(p.x)), max_size=4)))
    parts = [fastbn.batch_norm_stats(part, layout=layout) for part in np.split(p.x, cuts)]
    whole = fastbn.batch_norm_stats(p.x, layout=layout)
    parts = data.draw(st.permutations(parts))
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = one_by_one.merge(part)
    rtol = 1e-6 if dtype == np.float32 else 1e-12
    for merged in (parts[0].merge(*parts[1:]), one_by_one):
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(merged.var, whole.var, rtol=rtol)


@given(seed=seeds, channels=sizes, shift=st.integers(-1024, 1024), layout=layouts)
def test_shift_law(dtype: np.dtype[Any], seed: int, channels: int, shift: int, layout: str) -> None:
    """Small integers, sixteen of them per channel: the mean is exact, and y does not see the shift."""
    x = rng(seed).integers(-8, 9, shape_of(layout, 4, channels, [2, 2]))
    shift = shift if dtype.itemsize > 2 else shift % 64  # so that 16 bits hold the sum
    plain, shifted = x.astype(dtype), (x + shift).astype(dtype)
    np.testing.assert_array_equal(shifted.astype(np.int64), x + shift)
    y, saved = fastbn.batch_norm_forward(plain, layout=layout)
    shifted_y, shifted_saved = fastbn.batch_norm_forward(shifted, layout=layout)
    same_bits(shifted_y, y)
    same_bits(shifted_saved.invstd, saved.invstd)
    np.testing.assert_array_equal(shifted_saved.mean, saved.mean + np.float32(shift))


@given(data=st.data(), power=st.integers(-40, 40))
@wide
def test_scale_law(dtype: np.dtype[Any], data: st.DataObject, power: int) -> None:
    """Powers of two, with eps scaled likewise, change no bit of y, and scale dx exactly."""
    p, layout = data.draw(problems(dtype))
    scale = dtype.type(2.0**power)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, eps=1e-5, layout=layout)
    scaled_y, scaled_saved = fastbn.batch_norm_forward(p.x * scale, p.weight, p.bias, eps=1e-5 * 4.0**power, layout=layout)
    same_bits(scaled_y, y)
    gradients = fastbn.batch_norm_backward(p.dy, p.x, saved)
    scaled = fastbn.batch_norm_backward(p.dy, p.x * scale, scaled_saved)
    assert gradients.dx is not None
    assert scaled.dx is not None
    same_bits(scaled.dx * scale, gradients.dx)
    for a, b in ((scaled.dweight, gradients.dweight), (scaled.dbias, gradients.dbias)):
        assert a is not None
        assert b is not None
        same_bits(a, b)


@given(data=st.data(), factor=st.sampled_from([4.0, -1.0, -0.25]))
@wide
def test_gradients_are_linear_in_dy(dtype: np.dtype[Any], data: st.DataObject, factor: float) -> None:
    """Bit by bit for powers of two of either sign; but for the sign of a zero, which adding zero removes."""
    p, layout = data.draw(problems(dtype))
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)[1]
    plain = fastbn.batch_norm_backward(p.dy, p.x, saved)
    scaled = fastbn.batch_norm_backward(p.dy * dtype.type(factor), p.x, saved)
    for a, b in zip(plain[:3], scaled[:3], strict=True):
        assert a is not None
        assert b is not None
        same_bits(a * dtype.type(factor) + dtype.type(0), b + dtype.type(0))


@given(data=st.data())
@wide
def test_gradient_is_orthogonal_to_what_is_normalized_away(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """A shift or a scale of x changes no y (eps = 0), so dx sums to zero, and so does dx times x."""
    p, layout = data.draw(problems(dtype))
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, eps=0.0, layout=layout)[1]
    dx = fastbn.batch_norm_backward(p.dy, p.x, saved).dx
    assert dx is not None
    rest = tuple(i for i in range(dx.ndim) if i != p.axis % dx.ndim)
    x, dx = p.x.astype(np.float64), dx.astype(np.float64)
    x = x - x.mean(rest, keepdims=True)
    precision = 1e-5 if dtype == np.float32 else 1e-12
    largest = np.abs(saved.invstd * p.weight) * np.max(np.abs(p.dy), initial=1.0)
    assert np.all(np.abs(dx.mean(rest)) <= precision * largest)
    assert np.all(np.abs((dx * x).mean(rest)) <= precision * largest / saved.invstd)


def _result(p: Problem, x: Array, dy: Array, order: Any, layout: str) -> tuple[Array, Array]:
    y, saved = fastbn.batch_norm_forward(x, p.weight[order], p.bias[order], layout=layout)
    dx = fastbn.batch_norm_backward(dy, x, saved).dx
    assert dx is not None
    return y, dx


@given(data=st.data())
@single
def test_channels_may_be_permuted(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """Bit by bit: which lane of a vector a channel falls in does not matter."""
    p, layout = data.draw(problems(dtype))
    order = np.random.default_rng(data.draw(seeds)).permutation(len(p.weight))
    x, dy = (np.ascontiguousarray(np.take(a, order, p.axis)) for a in (p.x, p.dy))
    for got, want in zip(_result(p, x, dy, order, layout), _result(p, p.x, p.dy, ..., layout), strict=True):
        same_bits(got, np.ascontiguousarray(np.take(want, order, p.axis)))


@given(data=st.data())
@single
def test_channels_are_independent(dtype: np.dtype[Any], data: st.DataObject) -> None:
    p, layout = data.draw(problems(dtype))
    channel = data.draw(st.integers(0, len(p.weight) - 1))
    x, dy = p.x.copy(), p.dy.copy()
    np.moveaxis(x, p.axis, 0)[channel] = 1e20
    np.moveaxis(dy, p.axis, 0)[channel] = -1e20
    others = np.arange(len(p.weight)) != channel
    for got, want in zip(_result(p, x, dy, ..., layout), _result(p, p.x, p.dy, ..., layout), strict=True):
        same_bits(*(np.ascontiguousarray(np.moveaxis(a, p.axis, 0)[others]) for a in (got, want)))


@given(data=st.data())
def test_inference_is_done_value_by_value(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """A part of the batch gives the part of the result, bit by bit, however it falls into vectors."""
    p, layout = data.draw(problems(dtype))
    y = fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, layout=layout)
    first = data.draw(st.integers(0, len(p.x) - 1))
    same_bits(fastbn.batch_norm(p.x[first:], p.mean, p.var, p.weight, p.bias, layout=layout), y[first:])
    if p.x.ndim > 2:
        spatial = 2 if p.axis == 1 else 1
        part = np.ascontiguousarray(np.take(p.x, [0], spatial))
        same_bits(fastbn.batch_norm(part, p.mean, p.var, p.weight, p.bias, layout=layout), np.ascontiguousarray(np.take(y, [0], spatial)))
