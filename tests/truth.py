"""What the tests share: random problems, the float64 truth about them, and how near a result must be to it."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastbn import Gradients, reference
from fastbn.dtypes import DTYPES
from fastbn.kernels.protocol import Affine, Running, Statistics
from fastbn.layout import Array

# One below, at and above the vector lengths and their multiples; 49 and 100 are real spatial and class counts.
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 49, 63, 65, 97, 100)

# Every layout name with a shape: 4 channels, and no two axes alike.
SHAPES = {
    "NC": (6, 4),
    "NCL": (2, 4, 5),
    "NCHW": (2, 4, 5, 3),
    "NCDHW": (2, 4, 3, 5, 6),
    "NLC": (2, 5, 4),
    "NHWC": (2, 5, 3, 4),
    "NDHWC": (2, 3, 5, 6, 4),
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def axis_of(layout: str | None) -> int:
    """Axis of the channels, found by reading the name; not by asking the library."""
    return -1 if layout is not None and layout.endswith(("C", "last")) and layout != "NC" else 1


def columns(v: Array, x: Array, axis: int) -> Array:
    """A vector of channels, shaped to broadcast against x."""
    return v.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


class Problem(NamedTuple):
    x: Array
    dy: Array
    weight: Array
    bias: Array
    mean: Array
    var: Array
    axis: int


def problem(shape: tuple[int, ...], dtype: Any = np.float32, axis: int = 1, mean: float = 0.5, std: float = 1.0, seed: int = 0) -> Problem:
    """Input, gradient, parameters and running statistics; `mean` and `std` are about those of every channel of x."""
    r = rng(seed)
    dtype = np.dtype(dtype)
    channels = shape[axis]
    compute = np.float64 if dtype == np.float64 else np.float32
    x = r.standard_normal(shape)
    spread, offset = columns(r.uniform(0.5, 2.0, channels), x, axis), columns(r.uniform(0.9, 1.1, channels), x, axis)
    x = ((x * spread + mean * offset) * std).astype(dtype)
    dy = r.standard_normal(shape).astype(dtype)
    vectors = (r.uniform(0.5, 2.0, channels), r.standard_normal(channels), r.standard_normal(channels), r.uniform(0.5, 2.0, channels))
    return Problem(x, dy, *(v.astype(compute) for v in vectors), axis)


def forward(
    x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, axis: int = 1, mask: Array | None = None
) -> Array:
    """The float64 result of training."""
    _, mean, var = reference.batch_norm_stats(x, axis, mask)
    return reference.batch_norm(x, mean, var, weight, bias, eps, axis)


def backward(
    dy: Array, x: Array, weight: Array | None = None, eps: float = 1e-5, axis: int = 1, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """The float64 gradients of training."""
    _, mean, var = reference.batch_norm_stats(x, axis, mask)
    return reference.batch_norm_backward(dy, x, mean, var, weight, eps, axis, True, mask)


# Bits of the fraction, and exponent of the smallest normal number.
_FORMATS = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126), "float64": (52, -1022)}


def ulp(a: Array, dtype: Any) -> Array:
    """Distance between neighbors of `a` in `dtype`."""
    bits, smallest = _FORMATS[np.dtype(dtype).name]
    _, exponent = np.frexp(np.abs(a))
    return np.ldexp(1.0, np.maximum(exponent - 1, smallest) - bits)


def near(y: Array, truth: Array) -> None:
    """The contract of y: 5e-6 in float32, 1e-13 in float64, of max(1, |y|); one last place in 16 bits.

    16-bit results are computed in float32: where weight and bias cancel, what counts is its rounding of the terms,
    2^-20 for terms of at most 8, and not the last place of a y that happens to be nearly zero.
    """
    assert y.shape == truth.shape
    allowed = {"float32": 5e-6, "float64": 1e-13}.get(y.dtype.name)
    bound = np.maximum(ulp(truth, y.dtype), 2.0**-20) if allowed is None else allowed * np.maximum(1.0, np.abs(truth))
    within(y, truth, bound)


def near_gradient(gradient: Array | None, truth: Array, scale: float = 0.0) -> None:
    """The contract of gradients: 1e-5 in float32, 1e-13 in float64, of the largest or of `scale`; one last place more in 16 bits."""
    assert gradient is not None
    assert gradient.shape == truth.shape
    largest = np.max(np.abs(truth), initial=scale)
    bound = (1e-13 if gradient.dtype == np.float64 else 1e-5) * largest
    if gradient.dtype.itemsize == 2:
        bound = bound + ulp(truth, gradient.dtype)
    within(gradient, truth, bound)


def near_gradients(gradients: Gradients, truth: tuple[Array, Array, Array]) -> None:
    """The same of dx, dweight and dbias.

    The last two are sums of M terms of about 1, and so about sqrt(M); where one happens to be nearly zero, the
    rounding of its terms is not.
    """
    dx, dweight, dbias = truth
    near_gradient(gradients.dx, dx)
    near_gradient(gradients.dweight, dweight, np.sqrt(dx.size / dbias.size))
    near_gradient(gradients.dbias, dbias, np.sqrt(dx.size / dbias.size))


def within(actual: Array, truth: Array, bound: Any) -> None:
    """Differ by no more than `bound`, and by no NaN."""
    error = np.abs(actual.astype(truth.dtype) - truth)
    wrong = ~(error <= bound)
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, error / bound, 0.0)), error.shape)
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {error.size} are too far off; the worst at {tuple(map(int, worst))}: "
            f"{actual[worst]} instead of {truth[worst]}, {float((error / bound)[worst]):.3g} times what is allowed"
        )


def same_bits(a: Array, b: Array) -> None:
    """Equal to the last bit, zeros' signs and all, wherever neither is NaN."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    bits = np.dtype(f"u{a.dtype.itemsize}")
    differ = (np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)) & ~(np.isnan(a) & np.isnan(b))
    assert not differ.any(), f"{np.count_nonzero(differ)} of {a.size} differ, the first at {np.argwhere(differ)[0]}"


def count(shape: tuple[int, ...], axis: int) -> int:
    """Number of values per channel."""
    return prod(shape) // shape[axis]


def of_whole_calls(module: Any, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> list[bytes]:
    """The bits of all results of a kernel's whole calls, or of a composition of its operations."""
    draw, compute = rng(), DTYPES[dtype.name].compute
    x, dy = (draw.normal(100, 3, shape).astype(dtype) for _ in range(2))
    w, b, m, v = (draw.uniform(0.5, 2, shape[1]).astype(compute) for _ in range(4))
    y, z, dx = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    running = m.copy(), v.copy()
    saved = module.forward(x, y, Affine(w, b), 1e-5, Running(*running, 0.3, 1), compute, 1)
    sums = module.backward(dy, x, dx, Statistics(*saved[:3]), w, 1)
    module.inference(x, z, Statistics(m, None, v, 1e-3), Affine(w, b), 1)
    return [a.tobytes() for a in (*saved, *running, *sums, y, z, dx)]
