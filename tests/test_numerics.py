"""How accurate results are: far from zero, near overflow, among subnormals, and exactly where nothing needs rounding."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from truth import axis_of, backward, columns, forward, near, near_gradients, problem, rng, same_bits, ulp, within

import fastbn
from fastbn import reference
from fastbn.dispatch import Kernel
from fastbn.layout import Array

pytestmark = pytest.mark.usefixtures("kernel")

# Enough values per channel for several tiles of partial sums, a tail in every loop, and one very long channel.
SHAPES = {"NCHW": (6, 5, 63, 65), "NHWC": (6, 63, 65, 5), "NC": (40_001, 3), "NCL": (2, 3, 20_011)}
OFFSETS = [0.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6]
offsets = pytest.mark.parametrize("offset", OFFSETS, ids=lambda offset: f"mean-{offset:.0e}")
layouts = pytest.mark.parametrize("layout", SHAPES)
single = pytest.mark.parametrize("dtype", ["float32"], indirect=True)
double = pytest.mark.parametrize("dtype", ["float64"], indirect=True)
half = pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
wide = pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)


# The contract


@offsets
@layouts
@single
def test_float32(layout: str, offset: float, dtype: np.dtype[Any]) -> None:
    p = problem(SHAPES[layout], dtype, axis_of(layout), mean=offset)
    near(fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)[0], forward(p.x, p.weight, p.bias, axis=p.axis))
    _, mean, var = reference.batch_norm_stats(p.x, p.axis)
    stats = fastbn.batch_norm_stats(p.x, layout=layout)
    within(stats.var, var, 1e-6 * var)
    assert stats.mean_lo is not None
    within(stats.mean + stats.mean_lo.astype(np.float64), mean, 1e-6 * np.sqrt(var))


@offsets
@layouts
@single
def test_float32_gradients(layout: str, offset: float, dtype: np.dtype[Any]) -> None:
    p = problem(SHAPES[layout], dtype, axis_of(layout), mean=offset)
    saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)[1]
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), backward(p.dy, p.x, p.weight, axis=p.axis))


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="long double is no wider than double here")
@offsets
@layouts
@double
def test_float64(layout: str, offset: float, dtype: np.dtype[Any]) -> None:
    p = problem(SHAPES[layout], dtype, axis_of(layout), mean=offset)
    rest = tuple(i for i in range(p.x.ndim) if i != p.axis % p.x.ndim)
    # Sums of deviations from a double that is nearly the mean: a sum of values would lose more than is allowed here.
    deviation = p.x.astype(np.longdouble) - p.x.mean(rest, keepdims=True)
    deviation -= deviation.mean(rest, keepdims=True)
    var = np.square(deviation).mean(rest, keepdims=True)
    truth = deviation / np.sqrt(var + np.longdouble(1e-5)) * columns(p.weight, p.x, p.axis) + columns(p.bias, p.x, p.axis)
    within(fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)[0], truth, 1e-13 * np.maximum(1, np.abs(truth)))
    within(fastbn.batch_norm_stats(p.x, layout=layout).var, var.ravel(), 1e-13 * var.ravel())


@pytest.mark.parametrize("offset", [0.0, 10.0])
@layouts
@half
def test_16_bit(layout: str, offset: float, dtype: np.dtype[Any]) -> None:
    p = problem(SHAPES[layout], dtype, axis_of(layout), mean=offset)
    near(fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)[0], forward(p.x, p.weight, p.bias, axis=p.axis))
    near(
        fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, layout=layout),
        reference.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, axis=p.axis),
    )


@layouts
@half
def test_16_bit_results_are_nearly_always_the_nearest(layout: str, dtype: np.dtype[Any]) -> None:
    """Truncation instead of rounding to nearest would pass the test above."""
    p = problem(SHAPES[layout], dtype, axis_of(layout))
    y = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)[0]
    truth = forward(p.x, p.weight, p.bias, axis=p.axis)
    assert np.mean(np.abs(y.astype(np.float64) - truth) <= 0.501 * ulp(truth, dtype)) > 0.98


@layouts
@wide
def test_inference_far_from_zero(layout: str, dtype: np.dtype[Any]) -> None:
    p = problem(SHAPES[layout], dtype, axis_of(layout), mean=1e6)
    mean = np.full_like(p.mean, 1e6)
    y = fastbn.batch_norm(p.x, mean, p.var * 1e10, p.weight, p.bias, layout=layout)
    near(y, reference.batch_norm(p.x, mean, p.var * 1e10, p.weight, p.bias, axis=p.axis))


@single
def test_frozen_gives_float64_statistics_their_digits(dtype: np.dtype[Any]) -> None:
    x = problem((6, 5, 63), dtype, mean=1e6).x
    _, mean, var = reference.batch_norm_stats(x)
    near(fastbn.FrozenBatchNorm(mean, var)(x), reference.batch_norm(x, mean, var))
    near(fastbn.batch_norm_elemt(x, mean, 1 / np.sqrt(var + 1e-5)), reference.batch_norm(x, mean, var))


# Skewed data: the mean of a tile is not where one element, or a few, would have it


SKEWED = {
    "normal": lambda r, shape: r.standard_normal(shape),
    "behind a ReLU": lambda r, shape: np.maximum(r.standard_normal(shape), 0),
    "exponential": lambda r, shape: r.exponential(1, shape),
    "lognormal": lambda r, shape: r.lognormal(0, 1, shape),
    "rarely not zero": lambda r, shape: np.where(r.random(shape) < 0.02, 1.0, 0.0) + 0.3,
    "with outliers": lambda r, shape: np.where(r.random(shape) < 0.002, 100.0, 0.0) + r.standard_normal(shape),
    "sorted": lambda r, shape: np.sort(r.exponential(1, shape), 0),
}
# A tile of few rows has the fewest values; 4096 channels have an unlucky one among them.
SKEWED_SHAPES = {
    "128 rows": ("NC", (128, 4096)), "192 rows": ("NC", (192, 4096)), "256 rows": ("NC", (256, 4096)),
    "many rows": ("NHWC", (2, 40, 40, 33)), "runs": ("NCL", (128, 512, 3)), "few values": ("NC", (9, 4096)),
    "planes": ("NCHW", (2, 512, 15, 15)), "small planes": ("NCHW", (4, 1024, 7, 7)), "long planes": ("NCHW", (2, 64, 64, 64)),
}  # fmt: skip


def _two_passes(x: Array, axis: int) -> tuple[Array, Array]:
    """Mean and variance in long double."""
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).astype(np.longdouble)
    mean = rows.mean(0)
    mean += (rows - mean).mean(0)
    return mean, np.square(rows - mean).mean(0)


@pytest.mark.parametrize("data", SKEWED)
@pytest.mark.parametrize("where", SKEWED_SHAPES)
@wide
def test_skewed_data(where: str, data: str, dtype: np.dtype[Any]) -> None:
    layout, shape = SKEWED_SHAPES[where]
    x = SKEWED[data](rng(3), shape).astype(dtype)
    mean, var = _two_passes(x, axis_of(layout))
    stats = fastbn.batch_norm_stats(x, layout=layout)
    allowed = 1e-6 if dtype == np.float32 else 1e-13
    within(stats.var, var, allowed * var)
    assert stats.mean_lo is not None
    within(stats.mean.astype(np.longdouble) + stats.mean_lo, mean, allowed * np.sqrt(var))


@pytest.mark.parametrize("layout", ["NC", "NCHW"])
@single
def test_an_unlucky_sample_costs_no_digits(layout: str, dtype: np.dtype[Any]) -> None:
    """A few elements are far from the others, and wherever a kernel takes its sample, some channel has them just there."""
    shape, n = ((256, 1024), 256) if layout == "NC" else ((1, 1024, 16, 16), 256)
    x = rng(4).standard_normal((1024, n))
    for c in range(1024):
        x[c, (c + np.arange(4) * (1 + c // n * 16)) % n] = 50
    x = (x.T if layout == "NC" else x).reshape(shape).astype(dtype)
    mean, var = _two_passes(x, 1)
    stats = fastbn.batch_norm_stats(x)
    within(stats.var, var, 1e-6 * var)
    np.testing.assert_allclose(stats.mean, mean.astype(np.float64), rtol=1e-6)


# Exact data: deviations are small integers in pairs of opposite sign, so every partial sum of pairs is exact.


def _paired(shape: tuple[int, ...], axis: int, dtype: Any, center: Array, seed: int = 0) -> tuple[Array, Array]:
    """Values whose neighbors in memory sum to twice the center; and the sum of their squared deviations."""
    r = rng(seed)
    outer, channels, inner = (shape[0], shape[1], int(np.prod(shape[2:]))) if axis == 1 else (int(np.prod(shape[:-1])), shape[-1], 1)
    if inner == 1:
        half = r.integers(0, 8, (outer // 2, channels, 1))
        deviation = np.stack([half, -half], 1).reshape(outer, channels, 1)
    else:
        half = r.integers(0, 8, (outer, channels, inner // 2))
        deviation = np.stack([half, -half], 3).reshape(outer, channels, inner)
    x = (deviation + center[:, None]).astype(dtype).reshape(shape)
    return x, np.square(deviation).sum((0, 2))


EXACT = [
    ("NC", (2, 3)), ("NC", (64, 100)), ("NC", (4096, 33)), ("NC", (50_000, 3)), ("NC", (1000, 1)),
    ("NCL", (1, 3, 2)), ("NCL", (3, 5, 98)), ("NCL", (2, 2, 30_000)), ("NCHW", (4, 17, 8, 8)), ("NCHW", (2, 3, 112, 112)),
    ("NHWC", (1, 2, 3, 1)), ("NHWC", (4, 7, 8, 65)), ("NHWC", (2, 112, 112, 3)), ("NDHWC", (2, 4, 5, 6, 31)),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "shape"), EXACT)
def test_exact_statistics(layout: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    center = rng(9).integers(-64, 65, shape[axis])
    x, m2 = _paired(shape, axis, dtype, center)
    stats = fastbn.batch_norm_stats(x, layout=layout)
    np.testing.assert_array_equal(stats.mean, center)
    np.testing.assert_array_equal(stats.mean_lo, np.zeros_like(stats.mean))
    np.testing.assert_array_equal(stats.var, (m2 / stats.count).astype(stats.var.dtype))


@pytest.mark.parametrize(("layout", "shape"), EXACT)
def test_exact_sums(layout: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    center = rng(9).integers(-8, 9, shape[axis])
    x, _ = _paired(shape, axis, dtype, center)
    dy = rng(2).integers(-4, 5, shape)
    want_dy = np.moveaxis(dy, axis, 0).reshape(shape[axis], -1)
    deviation = np.moveaxis(x.astype(np.int64), axis, 0).reshape(shape[axis], -1) - center[:, None]
    sums = fastbn.batch_norm_backward_reduce(dy.astype(dtype), x, center.astype(np.float32), np.ones(shape[axis]), layout=layout)
    np.testing.assert_array_equal(sums[0], want_dy.sum(1))
    np.testing.assert_array_equal(sums[1], (want_dy * deviation).sum(1))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.3, 1e6 + 0.1, 1e30, 1e-30, 1e-42])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7), (2, 5, 63, 65)], ids=str)
@wide
def test_constant_channels(shape: tuple[int, ...], value: float, dtype: np.dtype[Any]) -> None:
    x = np.full(shape, value, dtype)
    bias = rng().standard_normal(5).astype(dtype)
    for layout in ("channels_first", "channels_last"):
        vector = bias if layout == "channels_first" else np.resize(bias, shape[-1])
        stats = fastbn.batch_norm_stats(x, layout=layout)
        np.testing.assert_array_equal(stats.var, np.zeros_like(vector))
        np.testing.assert_array_equal(stats.mean, np.full_like(vector, value))
        running_var = np.ones_like(vector)
        y, saved = fastbn.batch_norm_forward(x, bias=vector, running_var=running_var, momentum=1.0, layout=layout)
        np.testing.assert_array_equal(y, np.broadcast_to(columns(vector, x, axis_of(layout)), shape))
        np.testing.assert_array_equal(running_var, np.zeros_like(vector))
        np.testing.assert_allclose(saved.invstd, 1 / np.sqrt(1e-5), rtol=1e-7)


@half
def test_constant_channels_of_16_bits(dtype: np.dtype[Any]) -> None:
    x = np.full((3, 5, 7), 0.1, dtype)
    bias = np.arange(5, dtype=np.float32)
    y = fastbn.batch_norm_forward(x, bias=bias)[0]
    np.testing.assert_array_equal(y.astype(np.float32), np.broadcast_to(bias[:, None], x.shape))
    assert not fastbn.batch_norm_stats(x).var.any()


# The ends of the range


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e15, 1e-15])
@layouts
@single
def test_large_and_small_values(layout: str, size: float, dtype: np.dtype[Any]) -> None:
    """The variance is out of float32's range, but y and the gradients are not."""
    p = problem(SHAPES[layout], dtype, axis_of(layout), std=size, mean=3.0)
    eps = 0.0
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, eps=eps, layout=layout)
    near(y, forward(p.x, p.weight, p.bias, eps, p.axis))
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), backward(p.dy, p.x, p.weight, eps, p.axis))


@pytest.mark.parametrize("size", [1e-40, 1e-43])
@layouts
@single
def test_subnormals(layout: str, size: float, dtype: np.dtype[Any]) -> None:
    x = problem(SHAPES[layout], dtype, axis_of(layout), std=size).x
    truth = forward(x, axis=axis_of(layout))
    y = fastbn.batch_norm_forward(x, layout=layout)[0]
    quantum = 2.0**-149 / np.sqrt(1e-5)  # what rounding to the nearest subnormal moves the result by
    assert np.max(np.abs(truth)) > 30 * quantum
    assert np.max(np.abs(y - truth)) <= quantum


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
def test_subnormals_pass_unharmed(layout: str, dtype: np.dtype[Any]) -> None:
    smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}[dtype.name]
    x = (rng().integers(-100, 101, SHAPES[layout]) * smallest).astype(dtype)
    assert np.count_nonzero(x) > 0.9 * x.size
    channels = x.shape[axis_of(layout)]
    zero, one = np.zeros(channels), np.ones(channels)
    np.testing.assert_array_equal(fastbn.batch_norm(x, zero, one, eps=0.0, layout=layout), x)
    np.testing.assert_array_equal(fastbn.FrozenBatchNorm(zero, one, eps=0.0, layout=layout)(x), x)
    saved = fastbn.batch_norm_forward(np.zeros_like(x), running_mean=zero, running_var=one, training=False, eps=0.0, layout=layout)[1]
    np.testing.assert_array_equal(fastbn.batch_norm_backward(x, x, saved).dx, x)


SUBNORMALS_SURVIVE = """
import sys
import numpy as np

def check(when):
    single, double = np.full(64, 1e-40, np.float32), np.full(64, 1e-310)
    assert np.all(single * np.float32(1) == single), f"denormals-are-zero {when}"
    assert np.all(double * 1.0 == double), f"denormals-are-zero {when}"
    assert np.all(np.full(64, 1e-38, np.float32) * np.float32(0.01) > 0), f"flush-to-zero {when}"
    assert np.all(np.full(64, 1e-307) * 1e-3 > 0), f"flush-to-zero {when}"

check("before the import")
import fastbn
check("after the import")
with fastbn.use_kernel(sys.argv[1]), fastbn.num_threads(2):
    for shape in ((2, 3, 4), (8, 16, 64, 64)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        y, saved = fastbn.batch_norm_forward(x)
        fastbn.batch_norm_backward(y, x, saved)
check("after calls")
"""


def test_the_process_keeps_its_subnormals(kernel: Kernel) -> None:
    done = subprocess.run([sys.executable, "-c", SUBNORMALS_SURVIVE, kernel.name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The same bits every time


@layouts
def test_runs_are_alike(layout: str, dtype: np.dtype[Any]) -> None:
    p = problem(SHAPES[layout], dtype, axis_of(layout))
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)
    gradients = fastbn.batch_norm_backward(p.dy, p.x, saved)
    moved = np.empty(p.x.size + 3, dtype)[3:].reshape(p.x.shape)  # other alignment, same values
    moved[...] = p.x
    again, saved_again = fastbn.batch_norm_forward(moved, p.weight, p.bias, layout=layout)
    same_bits(again, y)
    for a, b in zip(fastbn.batch_norm_backward(p.dy, moved, saved_again)[:3], gradients[:3], strict=True):
        assert a is not None
        assert b is not None
        same_bits(a, b)
