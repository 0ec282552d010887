"""Small changes of the kernels that no other test would notice: each of these was made, and passed all the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from truth import rng, same_bits

import fastbn
from fastbn.activations import NAMES
from fastbn.dispatch import TABLE, Kernel
from fastbn.layout import Array

FUSED = [k for k in TABLE if k.level in ("v3", "v4") and not k.unusable()]


def _frozen(value: float, activation: str, dtype: Any = np.float32) -> Array:
    """The derivative of an activation at a value, by a backward through constant statistics 0 and 1."""
    x = np.full((3, 2, 40), value, dtype)
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    _, saved = fastbn.batch_norm_forward(x, None, None, zero, one, training=False, eps=0.0, activation=activation)
    dx = fastbn.batch_norm_backward(np.ones_like(x), x, saved).dx
    assert dx is not None
    return dx


@pytest.mark.parametrize(
    ("activation", "value", "slope"),
    [
        ("relu", 0.0, 0.0), ("relu6", 0.0, 0.0), ("relu6", 6.0, 0.0), ("leaky_relu", 0.0, np.float32(0.01)),
        ("hardswish", 3.0, 1.0), ("hardswish", -3.0, 0.0),
    ],
)  # fmt: skip
def test_at_a_kink_the_slope_is_that_of_pytorch(activation: str, value: float, slope: float, kernel: Kernel) -> None:
    np.testing.assert_array_equal(_frozen(value, activation), np.float32(slope))


def test_bfloat16_rounds_a_tie_to_even(kernel: Kernel) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    if kernel.declines("bfloat16"):
        pytest.skip(str(kernel.declines("bfloat16")))
    for layout in ("channels_first", "channels_last"):
        x = np.ones((2, 40, 40), bfloat16)
        zero, one = np.zeros(40, np.float32), np.ones(40, np.float32)
        for weight, want in ((1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-20, 1 + 2**-7)):
            y = fastbn.batch_norm(x, zero, one, np.full(40, weight, np.float32), eps=0.0, layout=layout)
            np.testing.assert_array_equal(y.astype(np.float64), want)


def _one_ahead(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Two arrays of a shape, the second one row ahead of the first."""
    memory = rng(5).standard_normal((shape[0] + 1, *shape[1:])).astype(np.float32)
    return memory[:-1], memory[1:]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 40, 40)], ids=str)
def test_without_a_pin_an_output_may_not_overlap_the_second_input_in_part(shape: tuple[int, ...]) -> None:
    x = rng().standard_normal(shape).astype(np.float32)
    _, saved = fastbn.batch_norm_forward(x)
    dy, out = _one_ahead(shape)
    with pytest.raises(ValueError, match="out overlaps dy in part"):
        fastbn.batch_norm_backward(dy, x, saved, out=out)
    frozen = fastbn.FrozenBatchNorm(np.zeros(3), np.ones(3))
    frozen(x, dy)
    with pytest.raises(ValueError, match="out overlaps residual in part"):
        frozen(x, dy, out=out)


def test_without_a_pin_a_frozen_layer_counts_the_channels_of_each_call() -> None:
    frozen = fastbn.FrozenBatchNorm(np.zeros(4), np.ones(4))
    frozen(np.ones((2, 4, 3), np.float32))
    for channels in (3, 6):
        with pytest.raises(ValueError, match="channels"):
            frozen(np.ones((2, channels, 3), np.float32))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_gradient_may_be_written_over_either_input(activation: str, kernel: Kernel) -> None:
    """What a kernel keeps in the output between two passes must not be what it still has to read."""
    for shape in ((6, 4, 5, 7), (40, 3)):
        x, dy, r = (rng(i).standard_normal(shape) for i in range(3))
        for residual in (None, r):
            _, saved = fastbn.batch_norm_forward(x, activation=activation, residual=residual)
            want = fastbn.batch_norm_backward(dy, x, saved).dx
            for i in range(3 if residual is not None else 2):
                arrays = [x.copy(), dy.copy(), None if residual is None else residual.copy()]
                _, again = fastbn.batch_norm_forward(arrays[0], activation=activation, residual=arrays[2])
                dx = fastbn.batch_norm_backward(arrays[1], arrays[0], again, out=arrays[i]).dx
                assert dx is arrays[i]
                np.testing.assert_allclose(dx, want, rtol=0, atol=1e-13)


# The same bits on every ISA with a fused multiply-add


def _everything(dtype: np.dtype[Any], activation: Any, shape: tuple[int, ...], layout: str) -> list[Array]:
    """The results of every call with an activation and a residual, in place and not."""
    axis = -1 if layout == "channels_last" else 1
    channels = shape[axis]
    compute = np.float64 if dtype == np.float64 else np.float32
    r = rng(7)
    x, dy, residual = ((r.standard_normal(shape) * 3).astype(dtype) for _ in range(3))
    weight, bias, mean, var = (r.uniform(0.5, 2, channels).astype(compute) for _ in range(4))
    found: list[Array] = []
    for added in (None, residual):
        for training in (True, False):
            y, saved = fastbn.batch_norm_forward(
                x, weight, bias, mean.copy(), var.copy(), training, layout=layout, activation=activation, residual=added
            )
            wrt = ("x", "weight", "bias") if added is None else ("x", "weight", "bias", "residual")
            gradients = fastbn.batch_norm_backward(dy, x, saved, wrt=wrt)
            found += [y, *(a for a in gradients if a is not None)]
            over = x.copy()
            found.append(fastbn.batch_norm(over, mean, var, weight, bias, layout=layout, activation=activation, residual=added, out=over))
    return found


@pytest.mark.skipif(len(FUSED) < 2, reason="fewer than two ISA levels with a fused multiply-add can run here")
@pytest.mark.parametrize("activation", [None, *NAMES])
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_activations_give_the_same_bits_on_every_isa(name: str, activation: str | None) -> None:
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    for shape in ((3, 5, 7, 11), (2, 3, 70, 50), (40, 6, 3), (70, 37)):
        for layout in ("channels_first", "channels_last"):
            results = []
            for kernel in FUSED:
                with fastbn.use_kernel(kernel.name):
                    results.append(_everything(dtype, activation, shape, layout))
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    same_bits(a, b)
