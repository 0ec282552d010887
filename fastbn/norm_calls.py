"""Checked calls of the normalizations in `norms` and `variants`: images with channels, or rows; forward or backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastbn import checks, core, memory, parts
from fastbn import threads as threading
from fastbn.activations import Epilogue
from fastbn.dtypes import DType
from fastbn.layout import Array
from fastbn.results import Function

OF_ROWS = ("layer_norm", "rms_norm")  # the normalizations of rows; all others are of images


class Call(NamedTuple):
    """One call, checked."""

    kind: str
    x: Array
    dtype: DType
    axis: int
    shape: parts.Shape
    threads: int
    activation: Function = None
    residual: Array | None = None
    out: Array | None = None

    def dense(self, a: Array) -> Array:
        """`a`, of the shape of x, as (batch, outer, channels, inner) in the memory order of this call."""
        if self.shape.direct and (a is self.x or self._lies_like_x(a)):
            return self.shape.of(a)
        order = self.shape.order
        return np.require(a if order is None else a.transpose(order), None, ["C", "A"]).reshape(self.shape.dims)

    def _lies_like_x(self, a: Array) -> bool:
        if a.strides == self.x.strides and a.flags.aligned:
            return True
        group = self.shape.group
        own = parts.shape_of(a, self.axis, group) if self.kind not in OF_ROWS else parts.rows_of(a, a.ndim - self.axis)
        return own.direct and own.order == self.shape.order and own.dims == self.shape.dims

    def target(self, out: Array | None) -> tuple[Array, Array]:
        """Where the kernel writes: the array, and the same as (batch, outer, channels, inner)."""
        if self.shape.direct and out is not None and out.flags.writeable and self._lies_like_x(out):
            return out, self.shape.of(out)
        y = memory.empty_like(self.x)
        if self.shape.direct or (self.shape.order is None and y.flags.c_contiguous):
            return y, self.shape.of(y)
        return y, np.empty(self.shape.dims, self.x.dtype)

    def undone(self, residual: Array | None, dresidual: Array | None) -> Epilogue | None:
        """What a backward takes back: the activation of the sum with a residual, and where that one's gradient goes."""
        if self.activation is None:
            return None
        return Epilogue(self.activation, None if residual is None else self.dense(residual), dresidual=dresidual)

    def deliver(self, y: Array, written: Array, out: Array | None) -> Array:
        """The result: what was written, in the array that the caller gets."""
        order = self.shape.order
        if not np.may_share_memory(y, written):
            seen = y if order is None else y.transpose(order)
            seen[...] = written.reshape(seen.shape)
        return core.deliver(y, out)


def thread_count(threads: object, op: str, x: object) -> int:
    """How many threads a call has: as many as it was given, or as are worth it."""
    return checks.threads(threads) or threading.for_call(op, x)


def channel_of_images(x: Array, layout: object, axis: object) -> int:
    """Axis of the channels of x, which has images on its axis 0."""
    at = checks.channel(x, layout, axis)
    check_images(at)
    return at


def check_images(axis: int | None) -> None:
    """Check that an axis of channels is not that of the images."""
    if axis == 0:
        raise ValueError("axis must not be 0, the axis of the images")


def on_channels(
    kind: str, x: object, divided: tuple[object, object, object], activation: object, residual: object, out: object, threads: object
) -> tuple[Call, checks.Channels]:
    """Check a call on images, divided by a number of groups or None, which is single channels, and by what tells their axis."""
    groups, layout, axis = divided
    array, dtype = checks.array(x)
    at = channel_of_images(array, layout, axis)
    channels = checks.channels_of(array, at)
    group = 1
    if groups is not None:
        n = checks.integer("num_groups", groups, 1)
        if channels[0] % n:
            raise ValueError(f"num_groups must divide the channels, and {channels.words}, got num_groups={n}")
        group = channels[0] // n
    shape = parts.shape_of(array, at, group)
    return _after(Call(kind, array, dtype, at, shape, 1), activation, residual, out, threads), channels


def on_rows(
    kind: str, x: object, normalized_shape: object, activation: object, residual: object, out: object, threads: object
) -> tuple[Call, tuple[int, ...]]:
    """Check a call on rows, which are the last axes of x."""
    array, dtype = checks.array(x)
    shape = row_shape(normalized_shape)
    if array.shape[max(array.ndim - len(shape), 0) :] != shape:
        raise ValueError(f"x must have a shape that ends in normalized_shape, {shape}, got {array.shape}")
    call = Call(kind, array, dtype, array.ndim - len(shape), parts.rows_of(array, len(shape)), 1)
    return _after(call, activation, residual, out, threads), shape


def row_shape(normalized_shape: object) -> tuple[int, ...]:
    """Check the sizes of the last axes: an int or several."""
    if isinstance(normalized_shape, (int, np.integer)) and not isinstance(normalized_shape, (bool, np.bool_)):
        normalized_shape = (normalized_shape,)
    if isinstance(normalized_shape, np.ndarray):
        normalized_shape = normalized_shape.reshape(-1).tolist() if normalized_shape.ndim < 2 else None
    if not isinstance(normalized_shape, Sequence) or isinstance(normalized_shape, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"normalized_shape must be an int or a sequence of ints, got {checks.short(normalized_shape)}")
    if not normalized_shape:
        raise ValueError("normalized_shape must have at least one axis, got ()")
    return tuple(checks.integer("normalized_shape", n, 0) for n in normalized_shape)


def _after(call: Call, activation: object, residual: object, out: object, threads: object) -> Call:
    """Check what follows the normalization."""
    f = checks.activation(activation)
    r = None if residual is None else checks.same("residual", residual, call.x)
    target = checks.output(out, call.x, {"x": call.x, "residual": r})
    n = thread_count(threads, "forward", call.x)
    return call._replace(activation=f, residual=r, out=target, threads=n)


def row_vector(name: str, v: object, shape: tuple[int, ...], compute: np.dtype[Any]) -> Array | None:
    """Check a weight or a bias of rows; return it flat."""
    if v is None:
        return None
    a = checks.real(name, v)
    if a.shape != shape:
        raise ValueError(f"{name} must have the shape of normalized_shape, {shape}, got {a.shape}")
    return checks.vector(name, a.reshape(-1), checks.Channels(a.size, ""), compute)


def on_backward(
    kind: str, dy: object, x: object, saved: Any, wanted: tuple[str, ...], out: object, threads: object, group: int
) -> tuple[Call, Array, Array | None]:
    """Check the arrays of a backward against what the forward has saved, and that but for its vectors; with dy, and where dx goes."""
    array, dtype = checks.array(x)
    checks.like_saved(array, saved.shape, saved.dtype)
    rows = kind in OF_ROWS
    axis = checks.integer("saved.axis", saved.axis, 0 if rows else 1, array.ndim - 1)
    channels = checks.channels_of(array, axis)
    together = group if rows else checks.integer("saved.group", group, min(1, channels[0]))
    if not rows and channels[0] % max(1, together):
        raise ValueError(f"saved.group must divide the channels, and {channels[1]}, got {group}")
    shape = parts.rows_of(array, array.ndim - axis) if rows else parts.shape_of(array, axis, together)
    checks.saved_after(saved, array)
    given = checks.same("dy", dy, array)
    checks.gradients(saved, wanted, out)
    target = checks.output(out, array, {"dy": given, "x": array, "residual": saved.residual})
    n = thread_count(threads, "backward", array)
    return Call(kind, array, dtype, axis, shape, n, saved.activation), given, target


def targets(
    call: Call, dy: Array, wanted: tuple[str, ...], out: Array | None
) -> tuple[Array | None, Array | None, Array | None, Array | None]:
    """Where dx and the residual's gradient go: each array, and the same as the kernel sees it, or None."""
    dx = written = dresidual = written_residual = None
    active = call.activation is not None
    if "x" in wanted or ("residual" in wanted and active):
        dx, written = call.target(out)
    if "residual" in wanted and active:
        dresidual, written_residual = call.target(None)
    elif "residual" in wanted:
        dresidual = core.residual_gradient(dy, out)
    return dx, written, dresidual, written_residual


def check_virtual_batches(x: Array, saved: Any, wanted: tuple[str, ...], out: object) -> None:
    """Check all that the backward of any virtual batch would, before that of the first writes."""
    if not isinstance(saved.sizes, tuple) or len(saved.sizes) != len(saved.saved):
        raise ValueError(f"saved.sizes must be {len(saved.saved)} numbers, one of each virtual batch, got {checks.short(saved.sizes)}")
    images = sum(checks.integer("saved.sizes", size, 1) for size in saved.sizes)
    if len(x) != images:
        raise ValueError(f"saved is of a forward of {images} images, but x has shape {x.shape}")
    for size, one in zip(saved.sizes, saved.saved, strict=True):
        if (one.shape, one.dtype) != ((size, *x.shape[1:]), x.dtype):
            had = f"{size} images had shape {checks.short(one.shape)} and dtype {one.dtype}"
            raise ValueError(f"saved is of a forward whose {had}, but x has shape {x.shape} and dtype {x.dtype}")
        checks.gradients(one, wanted, out)
