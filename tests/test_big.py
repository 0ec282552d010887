"""More elements than 31 bits count: right at both ends, and where such a number would overflow."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn.layout import Array

pytestmark = pytest.mark.slow

ROW = 2048
ROWS = (1 << 20) + 1  # so that there are 2**31 + 2048 elements
# Where signed numbers of elements and of bytes end, and the ends of the array.
PLACES = (0, 1 << 29, 1 << 30, 1 << 31, ROW * ROWS)


def available() -> int:
    """Bytes of memory that can be had without swapping."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return 0
    return int(lines["MemAvailable"].split()[0]) * 1024


@pytest.mark.parametrize(
    ("shape", "dtype_name"),
    [((1, 1, ROW * ROWS), "float16"), ((ROWS, 2, ROW // 2), "float16"), ((ROWS * ROW // 2, 2), "bfloat16")],
    ids=["one plane", "planes", "columns"],
)
def test_more_than_two_billion_elements(shape: tuple[int, ...], dtype_name: str) -> None:
    """All in place: one array of 4 GiB is all there is."""
    needed = 2 * ROW * ROWS + (1 << 30)
    if available() < needed:
        pytest.skip(f"{needed >> 20} MiB of memory are needed, {available() >> 20} MiB are available")
    dtype: np.dtype[Any] = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype_name == "bfloat16" else dtype_name)
    channels = shape[1]
    pattern = np.random.default_rng(0).integers(-4, 5, ROW).astype(dtype)
    first, last = (np.arange(ROW) % 23).astype(dtype), (np.arange(ROW) % 19 - 9).astype(dtype)
    x = np.empty(shape, dtype)
    rows = x.reshape(ROWS, ROW)
    rows[...] = pattern
    rows[0], rows[-1] = first, last

    # Sums of small integers are exact in Python.
    count = x.size // channels
    mean, var = np.empty(channels), np.empty(channels)
    for c in range(channels):
        parts = [(channel_of(row, shape, c), times) for row, times in ((pattern, ROWS - 2), (first, 1), (last, 1))]
        one = sum(int(part.sum()) * times for part, times in parts)
        two = sum(int(np.square(part).sum()) * times for part, times in parts)
        mean[c], var[c] = one / count, float(Fraction(two, count) - Fraction(one, count) ** 2)

    stats = fastbn.batch_norm_stats(x)
    assert stats.count == count
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(stats.var, var, rtol=1e-6)

    weight, bias = np.linspace(0.5, 1.5, channels), np.linspace(1.0, 2.0, channels)
    running_mean, running_var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    y, _ = fastbn.batch_norm_forward(x, weight, bias, running_mean, running_var, momentum=1.0, out=x)
    assert y is x
    np.testing.assert_allclose(running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(running_var, var, rtol=1e-6)
    scale = weight / np.sqrt(var + 1e-5)
    expected = {row.tobytes(): in_channels(row, shape, lambda v: (v - mean) * scale + bias) for row in (pattern, first, last)}
    check(rows, expected, (pattern, first, last))

    # A gradient with constant statistics: y times the scale, over y.
    _, saved = fastbn.batch_norm_forward(x, weight, np.zeros(channels), np.zeros(channels), np.ones(channels), False, eps=0.0, out=x)
    fastbn.batch_norm_backward(x, x, saved, wrt=["x"], out=x)
    twice = {key: in_channels(row.astype(dtype), shape, lambda v: v * weight * weight) for key, row in expected.items()}
    check(rows, twice, (pattern, first, last), 3)


def channel_of(row: Array, shape: tuple[int, ...], channel: int) -> Array:
    """The values of a row that belong to a channel."""
    values = row.astype(np.int64)
    if len(shape) == 2:
        return values[channel :: shape[1]]
    return values if shape[1] == 1 else values.reshape(2, -1)[channel]


def in_channels(row: Array, shape: tuple[int, ...], function: Any) -> Array:
    """A function of vectors of channels, applied to a row."""
    values = row.astype(np.float64)
    if len(shape) == 2:
        return np.asarray(function(values.reshape(-1, shape[1]))).reshape(-1)
    return np.asarray(function(values.reshape(shape[1], -1).T)).T.reshape(-1)


def check(rows: Array, expected: dict[bytes, Array], kinds: tuple[Array, Array, Array], ulps: int = 1) -> None:
    pattern, first, last = (expected[kind.tobytes()] for kind in kinds)
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[rows.dtype.name]

    def near(got: Array, truth: Array) -> None:
        error = np.abs(got.astype(np.float64) - truth) / (np.maximum(np.abs(truth), 2.0**-6) * step)
        assert error.max() <= ulps

    near(rows[0], first)
    near(rows[-1], last)
    for place in PLACES:
        near(rows[min(max(place // ROW, 1), len(rows) - 2)], pattern)
    # And nothing else lies in between.
    some, between = rows[1].view(np.uint16), rows[1:-1].view(np.uint16)
    assert not any((between[i : i + 4096] != some).any() for i in range(0, len(between), 4096))
