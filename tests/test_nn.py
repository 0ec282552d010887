"""tf.nn's functions on NumPy arrays, against the formula; and against TensorFlow, where it is installed, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import nn
from fastbn.layout import Array

X = np.random.default_rng(0).normal(3.0, 2.0, (4, 3, 5, 2))


def formula(x: Array, mean: Any, variance: Any, offset: Any, scale: Any, eps: float) -> Array:
    y = (x.astype(float) - mean) / np.sqrt(np.asarray(variance) + eps) * (1.0 if scale is None else scale)
    return y + (0.0 if offset is None else offset)


@pytest.mark.parametrize(
    "shape", [(2,), (1, 1, 1, 2), (3, 1, 1), (4, 1, 1, 1), (5, 1), (), (1,), (4, 3, 5, 2), (3, 5, 2), (4, 1, 1, 2), (7, 4, 3, 5, 2)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_statistics_broadcast_as_in_tensorflow(shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(1)
    mean, scale, offset = (rng.normal(size=shape) for _ in range(3))
    variance, x = rng.uniform(0.5, 2.0, shape), X.astype(dtype)
    tolerance = {"float32": 1e-6, "float64": 1e-14, "float16": 1e-3}[dtype]
    for w, b in ((scale, offset), (None, offset), (scale, None), (None, None)):
        y = fastbn.nn.batch_normalization(x, mean, variance, b, w, 1e-3)
        want = formula(x, mean, variance, b, w, 1e-3)
        assert (y.dtype, y.shape) == (x.dtype, want.shape)
        np.testing.assert_allclose(y, want, rtol=tolerance, atol=tolerance)


def test_vectors_may_run_along_different_axes_and_x_may_be_a_vector_or_a_number() -> None:
    y = fastbn.nn.batch_normalization(X, np.ones((3, 1, 1)), np.full(2, 4.0), None, None, 0.0)
    np.testing.assert_allclose(y, (X - 1.0) / 2.0)
    np.testing.assert_allclose(fastbn.nn.batch_normalization(np.array([1.0, 3.0]), [1.0, 2.0], 4.0, None, None, 0.0), [0.0, 0.5])
    assert fastbn.nn.batch_normalization(np.array(3.0), 1.0, 4.0, 0.5, 2.0, 0.0) == 2.5
    assert fastbn.nn.batch_normalization(np.zeros((0, 2)), [0.0, 0.0], [1.0, 1.0], None, None, 0.0).shape == (0, 2)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0,), 0, -1, (1, 2), (2, 0), (), (0, 1, 2, 3), (3, 1)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_moments_are_numpys(axes: Any, keepdims: bool) -> None:
    for dtype, tolerance in (("float64", 1e-14), ("float32", 1e-6), ("float16", 2e-3)):
        x = X.astype(dtype)
        over = axes if isinstance(axes, int) else tuple(axes)
        mean, variance = fastbn.nn.moments(x, axes, keepdims=keepdims)
        assert mean.dtype == variance.dtype == x.dtype
        wide = x.astype(float)
        for found, want in ((mean, wide.mean(over, keepdims=keepdims)), (variance, wide.var(over, keepdims=keepdims))):
            assert found.shape == want.shape
            np.testing.assert_allclose(found, want, rtol=tolerance, atol=tolerance)


def test_moments_of_nothing_are_not_numbers() -> None:
    assert all(np.isnan(v).all() and v.shape == (3,) for v in fastbn.nn.moments(np.zeros((0, 3)), [0]))


@pytest.mark.parametrize("form", ["NHWC", "NCHW", "NDHWC", "NCDHW"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_fused_function_returns_tensorflows_running_statistics(form: str, factor: float) -> None:
    shape = (2, *(3 if letter == "C" else 4 for letter in form[1:]))
    x = np.random.default_rng(2).normal(3.0, 2.0, shape)
    axes = tuple(i for i, letter in enumerate(form) if letter != "C")
    old = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
    kept = [v.copy() for v in old]
    y, mean, variance = fastbn.nn.fused_batch_norm(x, None, None, *old, 1e-3, form, True, None, factor)
    around = [-1 if letter == "C" else 1 for letter in form]
    np.testing.assert_allclose(y, (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-3), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mean, (1.0 - factor) * old[0] + factor * x.mean(axes), rtol=1e-13)
    np.testing.assert_allclose(variance, (1.0 - factor) * old[1] + factor * x.var(axes, ddof=1), rtol=1e-13)
    y, mean, variance = fastbn.nn.fused_batch_norm(x, [2.0] * 3, [1.0] * 3, *old, data_format=form, is_training=False)
    np.testing.assert_allclose(y, formula(x, *(v.reshape(around) for v in old), 1.0, 2.0, 1e-3), rtol=1e-12, atol=1e-12)
    for a, b, before in zip((mean, variance), old, kept, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(b, before)
        assert a is not b


def test_one_value_has_a_variance_of_zero() -> None:
    _, mean, variance = fastbn.nn.fused_batch_norm(X[:1, :1, :1].astype(np.float32), None, None)
    np.testing.assert_array_equal(mean, X[0, 0, 0].astype(np.float32))
    np.testing.assert_array_equal(variance, 0.0)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "x must be", lambda: nn.batch_normalization([1.0], 0.0, 1.0, None, None, 0.0)),
        (TypeError, "x must have dtype", lambda: nn.moments(np.ones(3, int), [0])),
        (TypeError, "mean must be an array of real numbers, got None", lambda: nn.batch_normalization(X, None, 1.0, None, None, 0.0)),
        (ValueError, r"variance must broadcast with x .* got \(3,\)", lambda: nn.batch_normalization(X, 0.0, [1.0] * 3, None, None, 0.0)),
        (ValueError, "variance_epsilon must be", lambda: nn.batch_normalization(X, 0.0, 1.0, None, None, -1.0)),
        (ValueError, "axes must be at most 3, got 4", lambda: nn.moments(X, [4])),
        (ValueError, "axes must name each axis once", lambda: nn.moments(X, [1, -3])),
        (TypeError, "axes must be an int or a sequence", lambda: nn.moments(X, "0")),
        (TypeError, "axes must be an int, got array", lambda: nn.moments(X, np.array(0.5))),
        (ValueError, "data_format must be one of", lambda: nn.fused_batch_norm(X, None, None, data_format=np.array("NHWC"))),
        (ValueError, "data_format must be one of NHWC", lambda: nn.fused_batch_norm(X, None, None, data_format="NWHC")),
        (ValueError, "data_format 'NDHWC' is for arrays with 5 axes", lambda: nn.fused_batch_norm(X, None, None, data_format="NDHWC")),
        (ValueError, "mean and variance must be given", lambda: nn.fused_batch_norm(X, None, None, is_training=False)),
        (ValueError, "mean and variance must be given", lambda: nn.fused_batch_norm(X, None, None, exponential_avg_factor=0.1)),
        (ValueError, "scale has shape", lambda: nn.fused_batch_norm(X, [1.0], None)),
    ],
)
def test_errors_name_the_argument(error: type[Exception], text: str, call: Any) -> None:
    with pytest.raises(error, match=text):
        call()


IN_TENSORFLOW = """
import numpy as np, tensorflow as tf, fastbn
rng = np.random.default_rng(0)
x = rng.normal(3, 2, (4, 3, 5, 2))
def same(a, b, tolerance):
    for p, q in zip(a, b, strict=True):
        q = q.numpy()
        assert (p.shape, p.dtype) == (q.shape, q.dtype), (p.shape, p.dtype, q.shape, q.dtype)
        np.testing.assert_allclose(p.astype(float), q.astype(float), rtol=tolerance, atol=tolerance)
for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-13), ("float16", 2e-2), (tf.bfloat16.as_numpy_dtype, 1e-1)):
    a = x.astype(dtype)
    for axes in ([0, 1, 2], [0], 1, [], [3, 1]):
        for keepdims in (False, True):
            if dtype != tf.bfloat16.as_numpy_dtype:  # of which TensorFlow's mean is off by more
                same(fastbn.nn.moments(a, axes, keepdims=keepdims), tf.nn.moments(a, axes, keepdims=keepdims), tolerance)
    for shape in ((2,), (1, 1, 1, 2), (3, 1, 1), (4, 3, 5, 2), (1,), (6, 4, 3, 5, 2)):
        v = [rng.uniform(0.5, 1.5, shape).astype(dtype) for _ in range(4)]
        for given in (v, [*v[:2], None, v[3]], [*v[:2], v[2], None]):
            same([fastbn.nn.batch_normalization(a, *given, 1e-3)], [tf.nn.batch_normalization(a, *given, 1e-3)], tolerance)
    if dtype != "float64":  # which TensorFlow's fused kernel does not take
        w, b, m, v = (rng.uniform(0.5, 1.5, 2).astype("float32") for _ in range(4))
        for training, factor in ((True, 1.0), (True, 0.3), (False, 1.0)):
            given = (a, w, b, m, v) if factor != 1.0 or not training else (a, w, b)
            options = {"is_training": training, "exponential_avg_factor": factor}
            same(fastbn.nn.fused_batch_norm(*given, **options), tf.compat.v1.nn.fused_batch_norm(*given, **options), tolerance)
"""


@pytest.mark.skipif(find_spec("tensorflow") is None, reason="tensorflow is not installed")
def test_results_are_tensorflows(tmp_path: Path) -> None:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", IN_TENSORFLOW], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_axis_may_be_an_array_without_axes() -> None:
    for ours, theirs in zip(nn.moments(X, np.array(0)), nn.moments(X, 0), strict=True):
        np.testing.assert_array_equal(ours, theirs)
