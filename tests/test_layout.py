"""Any layout, any strides: the right answer, and a view instead of a copy where memory allows it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from truth import SHAPES, Problem, axis_of, backward, forward, near, near_gradient, near_gradients, problem, rng, same_bits

import fastbn
from fastbn.layout import LAYOUTS, Array, channel_axis, view

SHAPES_WITH_ONES = [(1, 4, 5, 3), (3, 1, 5, 3), (3, 4, 1, 3), (3, 4, 5, 1), (1, 1, 5, 3), (1, 4, 1, 3), (6, 1, 1, 1), (6, 4, 1, 1)]

kernels = pytest.mark.usefixtures("kernel")


def _channels_last(a: Array) -> Array:
    """The same values with the memory order of channels last."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)


def _strided(a: Array) -> Array:
    roomy = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    roomy[..., ::2] = a
    return roomy[..., ::2]


def _cropped(a: Array) -> Array:
    roomy = np.zeros([n + 2 for n in a.shape], a.dtype)
    inside = tuple(slice(1, -1) for _ in a.shape)
    roomy[inside] = a
    return roomy[inside]


def _unaligned(a: Array) -> Array:
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:]
    moved = np.frombuffer(raw, a.dtype).reshape(a.shape)
    moved[...] = a
    assert not moved.flags.aligned
    return moved


def _read_only(a: Array) -> Array:
    a = a.copy()
    a.flags.writeable = False
    return a


# Each gives the same values in other memory.
STRIDES: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "channels_last": _channels_last,
    "fortran": np.asfortranarray,
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(0, -1)).swapaxes(0, -1),
    "spatial_swapped": lambda a: np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2),
    "strided": _strided,
    "cropped": _cropped,
    "negative": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "channels_reversed": lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "all_reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1],
    "unaligned": _unaligned,
    "read_only": _read_only,
}


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_channel_axis(layout: str | None) -> None:
    ranks = [len(layout)] if layout in SHAPES else range(2, 7)
    for ndim in ranks:
        assert channel_axis(layout, ndim) == axis_of(layout) % ndim


@pytest.mark.parametrize("layout", SHAPES)
def test_wrong_rank(layout: str) -> None:
    for ndim in {1, 2, 3, 4, 5, 6} - {len(layout)}:
        with pytest.raises(ValueError, match=f"'{layout}' is for arrays with {len(layout)} axes, but x has {ndim}"):
            channel_axis(layout, ndim)


@kernels
@pytest.mark.parametrize("layout", SHAPES)
def test_every_layout(layout: str) -> None:
    axis = axis_of(layout)
    p = problem(SHAPES[layout], axis=axis)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout)
    near(y, forward(p.x, p.weight, p.bias, axis=axis))
    assert y.flags.c_contiguous
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved), backward(p.dy, p.x, p.weight, axis=axis))


@kernels
@pytest.mark.parametrize("ndim", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("layout", [None, "channels_first", "channels_last"])
def test_layouts_of_any_rank(layout: str | None, ndim: int) -> None:
    axis = axis_of(layout)
    p = problem((5, 4, 3, 2, 3, 2)[:ndim], axis=axis)
    near(fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias, True, layout=layout), forward(p.x, p.weight, p.bias, axis=axis))


def test_channels_last_strides_are_seen_without_a_copy() -> None:
    x = _channels_last(problem((2, 4, 5, 3)).x)
    v = view(x, 1)
    assert v.dense
    assert v.pattern == "nspc"
    assert v.dims == (2 * 5 * 3, 4, 1)
    assert np.shares_memory(v.of(x), x)
    assert v.of(x).flags.c_contiguous
    np.testing.assert_array_equal(v.of(x)[:, :, 0], np.moveaxis(x, 1, -1).reshape(-1, 4))


def test_channels_first_memory_of_a_channels_last_shape_is_seen_without_a_copy() -> None:
    x = np.moveaxis(problem((2, 4, 5, 3)).x, 1, -1)
    v = view(x, 3)
    assert (v.dense, v.pattern, v.dims) == (True, "ncsp", (2, 4, 15))
    assert np.shares_memory(v.of(x), x)


@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 1), (7, 4, 1, 1)])
def test_without_space_memory_is_channels_last(shape: tuple[int, ...]) -> None:
    v = view(np.zeros(shape, np.float32), 1)
    assert (v.dense, v.pattern, v.dims) == (True, "nspc", (7, 4, 1))


@pytest.mark.parametrize("name", STRIDES)
def test_only_dense_aligned_memory_is_used_as_it_is(name: str) -> None:
    dense = name in ("contiguous", "channels_last", "read_only", "fortran", "transposed", "spatial_swapped")
    x = STRIDES[name](problem((2, 4, 5, 3)).x)
    v = view(x, 1)
    assert v.dense == dense
    if dense:
        assert np.shares_memory(v.of(x), x)
    else:  # then this describes a copy in the same order
        assert (v.perm, v.dims) == (None, (2, 4, 15))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_every_order_of_memory_is_used_as_it_is(order: tuple[int, ...], axis: int) -> None:
    x = np.ascontiguousarray(problem((2, 4, 5, 3)).x.transpose(order)).transpose(np.argsort(order))
    v = view(x, axis)
    assert v.dense
    assert np.shares_memory(v.of(x), x)
    assert v.of(x).flags.c_contiguous
    mean = np.float64(v.of(x)).mean((0, 2))
    np.testing.assert_allclose(mean, np.float64(x).mean(tuple(i for i in range(4) if i != axis)), rtol=1e-12)


@kernels
@pytest.mark.parametrize("name", STRIDES)
def test_results_keep_the_memory_order(name: str) -> None:
    p = problem((2, 4, 5, 3))
    for x in (STRIDES[name](p.x), STRIDES[name](_channels_last(p.x))):
        y, saved = fastbn.batch_norm_forward(x, p.weight, p.bias)
        dx = fastbn.batch_norm_backward(p.dy, x, saved).dx
        evaluated = fastbn.batch_norm(x, p.mean, p.var)
        frozen = fastbn.FrozenBatchNorm(p.mean, p.var)(x)
        assert dx is not None
        for result in (y, dx, evaluated, frozen):
            assert result.strides == np.empty_like(x).strides
            assert not np.shares_memory(result, x)


@kernels
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("name", STRIDES)
def test_channels_on_any_axis(name: str, axis: int) -> None:
    p = problem((4, 5, 3, 6), axis=axis)
    x = STRIDES[name](p.x)
    y, saved = fastbn.batch_norm_forward(x, p.weight, p.bias, axis=axis)
    near(y, forward(p.x, p.weight, p.bias, axis=axis))
    near_gradients(fastbn.batch_norm_backward(p.dy, x, saved), backward(p.dy, p.x, p.weight, axis=axis))
    given = fastbn.batch_norm(x, p.mean, p.var, axis=axis)
    same_bits(fastbn.FrozenBatchNorm(p.mean, p.var, axis=axis)(x), given)
    assert given.strides == np.empty_like(x).strides


@kernels
@pytest.mark.parametrize("axis", [1, 3], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", STRIDES)
def test_any_strides(name: str, axis: int) -> None:
    p = problem((2, 4, 5, 3), axis=axis)
    x = STRIDES[name](p.x)
    before = x.copy()
    layout = "NCHW" if axis == 1 else "NHWC"
    y, saved = fastbn.batch_norm_forward(x, p.weight, p.bias, layout=layout)
    near(y, forward(p.x, p.weight, p.bias, axis=axis))
    stats = fastbn.batch_norm_stats(x, layout=layout)
    np.testing.assert_allclose(stats.mean, np.float64(p.x).mean(tuple(i for i in range(4) if i != axis)), rtol=1e-6)
    near_gradients(fastbn.batch_norm_backward(p.dy, x, saved), backward(p.dy, p.x, p.weight, axis=axis))
    same_bits(x, before)


@kernels
@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("x_name", ["contiguous", "channels_last", "strided"])
def test_dy_in_other_memory_than_x(x_name: str, name: str) -> None:
    p = problem((2, 4, 5, 3))
    x, dy = STRIDES[x_name](p.x), STRIDES[name](p.dy)
    saved = fastbn.batch_norm_forward(x, p.weight, p.bias)[1]
    near_gradients(fastbn.batch_norm_backward(dy, x, saved), backward(p.dy, p.x, p.weight))
    frozen = fastbn.batch_norm_forward(x, p.weight, p.bias, p.mean, p.var, training=False)[1]
    near_gradient(fastbn.batch_norm_backward(dy, x, frozen).dx, p.dy * (p.weight / np.sqrt(p.var + 1e-5))[:, None, None].astype(np.float64))


@kernels
@pytest.mark.parametrize("name", [name for name in STRIDES if name != "read_only"])
@pytest.mark.parametrize("x_name", ["contiguous", "channels_last", "strided"])
def test_out_in_other_memory_than_x(x_name: str, name: str) -> None:
    p = problem((2, 4, 5, 3))
    x = STRIDES[x_name](p.x)
    want, saved = fastbn.batch_norm_forward(x, p.weight, p.bias)
    out = STRIDES[name](np.full_like(p.x, np.nan))
    assert fastbn.batch_norm_forward(x, p.weight, p.bias, out=out)[0] is out
    same_bits(out, want)
    dx = fastbn.batch_norm_backward(p.dy, x, saved).dx
    assert dx is not None
    out[...] = np.nan
    assert fastbn.batch_norm_backward(p.dy, x, saved, out=out).dx is out
    same_bits(out, dx)


@kernels
def test_writes_to_a_strided_out_only_where_it_should() -> None:
    p = problem((2, 4, 5, 3))
    roomy = np.full((2, 4, 5, 6), np.float32(7))
    fastbn.batch_norm(p.x, p.mean, p.var, out=roomy[..., ::2])
    assert np.all(roomy[..., 1::2] == 7)


@kernels
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_broadcast_input(axis: int) -> None:
    """A stride of zero: one value stands for many."""
    shape = [3, 4, 5, 6]
    shape[axis] = 1
    small = problem(tuple(shape)).x
    x = np.broadcast_to(small, (3, 4, 5, 6))
    y, saved = fastbn.batch_norm_forward(x)
    near(y, forward(x))
    dy = np.broadcast_to(np.float32(2), x.shape)
    _, dweight, dbias, _ = fastbn.batch_norm_backward(dy, x, saved)
    assert dweight is not None
    assert dbias is not None
    np.testing.assert_array_equal(dbias, np.full(4, 180.0))
    assert np.all(np.abs(dweight) < 1e-4)


@kernels
@pytest.mark.parametrize("shape", SHAPES_WITH_ONES)
@pytest.mark.parametrize("name", ["contiguous", "channels_last", "fortran", "negative", "strided"])
def test_axes_of_one(name: str, shape: tuple[int, ...]) -> None:
    p: Problem = problem(shape)
    x = STRIDES[name](p.x)
    y, saved = fastbn.batch_norm_forward(x, p.weight, p.bias)
    near(y, forward(p.x, p.weight, p.bias))
    near_gradients(fastbn.batch_norm_backward(p.dy, x, saved), backward(p.dy, p.x, p.weight))


@kernels
def test_axes_of_one_with_absurd_strides() -> None:
    """NumPy lets an axis of one have any stride, and they do occur."""
    small = rng().standard_normal((5, 4)).astype(np.float32)
    x = np.lib.stride_tricks.as_strided(small, (5, 4, 1, 1), (16, 4, 12345, 0))
    assert view(x, 1).dense
    near(fastbn.batch_norm_forward(x)[0], forward(small)[:, :, None, None])


@kernels
@pytest.mark.parametrize("name", ["strided", "negative", "unaligned"])
def test_strided_vectors(name: str) -> None:
    p = problem((3, 4, 5))
    vectors = [STRIDES[name](v[None])[0] if name != "negative" else np.ascontiguousarray(v[::-1])[::-1] for v in p[2:6]]
    weight, bias, mean, var = vectors
    y = fastbn.batch_norm(p.x, mean, var, weight, bias)
    same_bits(y, fastbn.batch_norm(p.x, p.mean, p.var, p.weight, p.bias))
    fastbn.batch_norm(p.x, mean, var, weight, bias, training=True)
    want_mean, want_var = p.mean.copy(), p.var.copy()
    fastbn.batch_norm(p.x, want_mean, want_var, training=True)
    same_bits(mean, want_mean)
    same_bits(var, want_var)


@kernels
def test_subclasses_become_plain_arrays() -> None:
    x = problem((3, 4, 5)).x
    y = fastbn.batch_norm_forward(x.view(np.memmap))[0]
    assert type(y) is np.ndarray


def test_out_may_be_x_whatever_the_strides_of_its_axes_of_one() -> None:
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("f")[::2, ::2][:, :, None]
    out = np.lib.stride_tricks.as_strided(x, x.shape, (*x.strides[:2], 4))
    before, m, v = x.copy(), np.zeros(3, "f"), np.ones(3, "f")
    _, saved = fastbn.batch_norm_forward(before)
    calls: tuple[Any, ...] = (
        lambda a, out: fastbn.batch_norm(a, m, v, out=out),
        lambda a, out: fastbn.batch_norm_forward(a, activation="silu", residual=a, out=out)[0],
        lambda a, out: fastbn.batch_norm_backward(a, before, saved, out=out).dx,
        lambda a, out: fastbn.FrozenBatchNorm(m, v)(a, out=out),
        lambda a, out: fastbn.group_norm(a, 1, out=out),
        lambda a, out: fastbn.layer_norm(a, (3, 1), out=out),
    )
    for call in calls:
        x[...] = before
        wanted = call(before.copy(), None)
        assert call(x, out) is out
        np.testing.assert_array_equal(x, wanted)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nhwc", "got 'nhwc'; did you mean 'NHWC'?"), ("Channels-Last", "did you mean 'channels_last'?"),
        ("channel_first", "did you mean 'channels_first'?"), ("NHCW", "did you mean 'NHWC' or 'NCHW'?"), ("last", "got 'last'"),
        (3, "got 3"), ("x" * 10**6, "xxx..."),
    ],
)  # fmt: skip
def test_a_layout_that_was_nearly_right_is_named(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match="layout must be one of NC, ") as caught:
        fastbn.batch_norm(np.ones((2, 3, 4, 4), np.float32), None, None, training=True, layout=given)
    assert str(caught.value).endswith(said)
    with pytest.raises(ValueError, match="layout must be one of NC, ") as caught:
        fastbn.BatchNorm2d(3, layout=given)
    assert str(caught.value).endswith(said)
