"""What arguments must be. Each check names the argument, what was expected and what came; none of them modifies anything."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastbn import activations
from fastbn.dtypes import DTYPES, DType, lookup
from fastbn.environment import MOST_THREADS
from fastbn.floating import default_mode
from fastbn.layout import Array, channel_axis, plain
from fastbn.shown import short as short

if TYPE_CHECKING:
    from fastbn.results import Function


def came(dtype: np.dtype[Any]) -> str:
    """Name of a dtype in an error; of one in the other byte order, its code."""
    return short(dtype, str(dtype))


def array(x: object) -> tuple[Array, DType]:
    """Check x; return it with its row in the table of dtypes."""
    x = plain("x", x)
    dtype = lookup(x.dtype)
    if dtype is None:
        raise TypeError(f"x must have dtype {', '.join(DTYPES)} in native byte order, got {came(x.dtype)}")
    return (x if type(x) is np.ndarray else x.view(np.ndarray)), dtype


def same(name: str, a: object, x: Array) -> Array:
    """Check an array that must be like x."""
    a = plain(name, a)
    if a.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {x.shape}, got {a.shape}")
    if a.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {came(x.dtype)}, got {came(a.dtype)}")
    return a


class Channels(NamedTuple):
    """How many there are, the words that say so in an error, and the shape of the array where its layout may be a wrong one."""

    number: int
    words: str
    shape: tuple[int, ...] = ()


def channels_of(x: Array, axis: int) -> Channels:
    """The channels of x."""
    return Channels(x.shape[axis], f"x has {x.shape[axis]} channels on axis {axis}", x.shape)


def misfit(channels: Channels, but: str, wanted: int) -> ValueError:
    """The error where something is for another number of channels; says which layout would fit."""
    last = len(channels.shape) - 1
    for axis, layout in ((last, "channels_last"), (1, "channels_first")):
        if last > 1 and channels.shape[axis] == wanted != channels.number:
            but += f"; axis {axis} has {wanted}: did you mean layout={layout!r}?"
            break
    return ValueError(f"{channels.words} but {but}")


def threads(n: object) -> int | None:
    """Check how many threads a call is to have; None says nothing of that."""
    return None if n is None else integer("threads", n, 1, MOST_THREADS)


def real(name: str, a: object) -> Array:
    """Check that something is an array of real numbers, or can be made one."""
    if isinstance(a, np.ndarray):
        plain(name, a)
    try:
        v = np.asarray(a)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be an array of real numbers: {error}") from None
    if v.dtype.kind not in "fiu" and lookup(v.dtype) is None:
        # None has no dtype of its own; its shape says more.
        raise TypeError(f"{name} must hold real numbers, got {'None' if a is None else f'dtype {came(v.dtype)}'}")
    return v


def vector(name: str, a: object, channels: Channels, dtype: np.dtype[Any]) -> Array:
    """Check a vector of channels; return it aligned and contiguous, in `dtype`."""
    if type(a) is np.ndarray and a.dtype is dtype and a.shape == channels[:1] and a.flags.carray:
        return a  # as it nearly always is; the rest takes longer than a small call
    return _cast(_sized(name, a, channels), dtype)


def precise(name: str, a: object, channels: Channels, compute: np.dtype[Any]) -> Array:
    """Check a vector of channels; return it in `compute` where that holds its digits, else in float64."""
    if type(a) is np.ndarray and a.dtype is compute and a.shape == channels[:1] and a.flags.carray:
        return a
    v = _sized(name, a, channels)
    narrow = np.can_cast(v.dtype, compute) or (lookup(v.dtype) is not None and v.dtype.itemsize <= compute.itemsize)
    return _cast(v, compute if narrow else np.dtype(np.float64))


def _sized(name: str, a: object, channels: Channels) -> Array:
    if a is None:
        raise ValueError(f"{name} must not be None: {channels.words}")
    v = real(name, a)
    if v.shape != channels[:1]:
        raise misfit(channels, f"{name} has shape {v.shape}", v.size)
    return v


@default_mode
def _cast(v: Array, dtype: np.dtype[Any]) -> Array:
    return np.require(v, dtype, ["C", "A"])  # what overflows becomes infinite, as in the kernels


def optional(name: str, a: object, channels: Channels, dtype: np.dtype[Any]) -> Array | None:
    """As `vector`, or None."""
    return None if a is None else vector(name, a, channels, dtype)


def running(name: str, a: object, channels: Channels) -> Array | None:
    """Check running statistics that training will update in place."""
    if a is None:
        return None
    a = plain(name, a)
    if a.shape != channels[:1]:
        raise misfit(channels, f"{name} has shape {a.shape}", a.size)
    if a.dtype.kind != "f" and lookup(a.dtype) is None:
        raise TypeError(f"{name} is updated in place and must have a floating dtype, got {came(a.dtype)}")
    return writable(name, a, f"{name} is updated in place but is read-only")


def writable(name: str, a: Array, message: str) -> Array:
    """Check that an array can be written, each element on its own."""
    if not a.flags.writeable:
        raise ValueError(message)
    if a.flags.c_contiguous:
        return a
    extent = a.itemsize
    for stride, n in sorted((abs(stride), n) for n, stride in zip(a.shape, a.strides, strict=True) if n > 1):
        if stride < extent and a.size:
            raise ValueError(f"{name} has several elements in one place of memory: shape {a.shape}, strides {a.strides}")
        extent += stride * (n - 1)
    return a


def output(out: object, x: Array, inputs: Mapping[str, Array | None]) -> Array | None:
    """Check `out`: like x, writable, and either exactly one of the arrays like x or apart from all that the call uses."""
    if out is None:
        return None
    out = writable("out", same("out", out, x), "out is read-only")
    for name, a in inputs.items():
        if a is None or a is out or not np.may_share_memory(out, a):
            continue
        if _place(a) != _place(out) and overlap(out, a):
            raise ValueError(f"out overlaps {name} in part; give {name} itself or memory of its own")
    return out


def _place(a: Array) -> tuple[Any, ...]:
    """Where each element of an array lies; an axis of one may have any stride."""
    return a.ctypes.data, a.dtype, a.shape, tuple(stride for n, stride in zip(a.shape, a.strides, strict=True) if n != 1)


def apart(written: Mapping[str, object], used: Mapping[str, object] | None = None) -> None:
    """Check that arrays which a call writes share no memory with each other, nor with others that it uses."""
    arrays = {name: a for name, a in written.items() if isinstance(a, np.ndarray)}
    if not arrays:
        return
    others = {name: _memory(a) for name, a in (used or {}).items()}
    pairs = [*combinations(arrays.items(), 2), *product(arrays.items(), others.items())]
    for (first, a), (second, b) in pairs:
        if b is not None and np.may_share_memory(a, b) and overlap(a, b):
            raise ValueError(f"{first} and {second} share memory, and the call writes {first}; give each memory of its own")


def _memory(a: object) -> Array | None:
    """The memory of what is given as an array: its own, or that of which NumPy makes a view, as of a buffer or a tensor."""
    if a is None or isinstance(a, (np.ndarray, list, tuple)):
        return a if isinstance(a, np.ndarray) else None  # of a list, NumPy makes a copy
    with suppress(Exception):  # a stranger's; where it is no array, another check says so
        return np.asarray(a)
    return None


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory, as far as that can be found out in short time."""
    try:
        return bool(np.shares_memory(a, b, max_work=10_000))  # type: ignore[arg-type]  # any int, says NumPy's documentation
    except np.exceptions.TooHardError:
        return True


def mask(a: object, x: Array, axis: int) -> Array | None:
    """Check a mask; return it with the shape of x without the channel axis."""
    if a is None:
        return None
    a = plain("mask", a)
    if a.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, got dtype {came(a.dtype)}")
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    try:
        return np.broadcast_to(a, shape)
    except ValueError:
        raise ValueError(f"mask must broadcast to {shape}, the shape of x without the channel axis, got {a.shape}") from None


def number(name: str, value: object, least: float | None = None) -> float:
    """Check a number; one with a least value must be finite too."""
    if type(value) is float and least is None:
        return value
    if isinstance(value, (bool, np.bool_, np.timedelta64)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {short(value)}")
    try:
        v = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, got {short(value)}") from None
    if least is not None and not least <= v < math.inf:
        raise ValueError(f"{name} must be a finite number of at least {least:g}, got {short(value)}")
    return v


def integer(name: str, value: object, least: int, most: float = 2**63 - 1) -> int:
    """Check an int between two bounds; what Python takes as one, as arrays and tensors without axes, is one."""
    try:
        if isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        n = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {short(value)}") from None
    if n < least:
        raise ValueError(f"{name} must be at least {least}, got {short(n)}")
    if n > most:
        raise ValueError(f"{name} must be at most {most}, got {short(n)}")
    return n


def switch(name: str, value: object) -> bool:
    """Check something that is on or off; 1 and 0 will do."""
    if not isinstance(value, (bool, np.bool_)) and not (type(value) is int and value in (0, 1)):
        raise TypeError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def activation(a: object) -> Function:
    """The activation that a user means, or None."""
    return None if a is None else activations.lookup(a)


def like_saved(x: Array, shape: object, dtype: object) -> None:
    """Check x against that of the forward."""
    if not isinstance(shape, tuple) or shape != x.shape:
        raise ValueError(f"saved is of a forward whose x had shape {short(shape)}, but x has shape {x.shape}")
    if isinstance(dtype, np.ndarray) or dtype != x.dtype:
        raise TypeError(f"saved is of a forward whose x had dtype {short(dtype, str(dtype))}, but x has dtype {x.dtype}")


def saved_vector(name: str, v: object, shape: tuple[int, ...], what: str, dtype: np.dtype[Any]) -> Array:
    """Check numbers that a forward saved: kernels read them without looking."""
    v = plain(f"saved.{name}", v)
    if v.shape != shape:
        raise ValueError(f"{what} but saved.{name} has shape {v.shape}")
    if v.dtype != dtype:
        raise TypeError(f"saved.{name} must have dtype {dtype}, got {came(v.dtype)}")
    if not (v.flags.aligned and v.flags.c_contiguous):
        raise ValueError(f"saved.{name} must be aligned and contiguous")
    return v


def saved_after(saved: Any, x: Array) -> None:
    """Check what a forward saved of what follows the normalization."""
    switch("saved.has_residual", saved.has_residual)
    if not (saved.activation is None or activations.is_found(saved.activation)):
        raise TypeError(f"saved.activation must be what the forward made of it, got {short(saved.activation)}")
    if saved.residual is not None:
        same("saved.residual", saved.residual, x)
    elif saved.has_residual and saved.activation is not None:
        raise ValueError("saved.residual must not be None: the activation's derivative depends on it")


def gradients(saved: Any, wanted: Sequence[str], out: object) -> None:
    """Check that a forward saved what the wanted gradients need, and that `out` is for one of them."""
    if "residual" in wanted and not saved.has_residual:
        raise ValueError("wrt names 'residual', but the forward had none")
    if isinstance(saved.activation, activations.Activation) and saved.activation.derivative is None:
        raise ValueError(f"the backward needs the derivative of {saved.activation}: give fastbn.Activation(forward, derivative)")
    if out is not None and "x" not in wanted:
        raise ValueError("out is where dx goes, but wrt does not name 'x'")


def is_iterable(value: object) -> bool:
    """Whether one can go through something; an array without axes counts as an Iterable, and cannot be gone through."""
    return isinstance(value, Iterable) and getattr(value, "ndim", None) != 0


def names(name: str, value: object, known: Sequence[str]) -> tuple[str, ...]:
    """Check one name or several, each of which must be known."""
    try:
        wanted = (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a sequence of names, got {short(value)}") from None
    for one in wanted:
        if not isinstance(one, str) or one not in known:
            listed = f"{', '.join(map(repr, known[:-1]))} and {known[-1]!r}"
            raise ValueError(f"{name} may name {listed}, got {short(one)}")
    return wanted


def channel(x: Array, layout: object, axis: object) -> int:
    """Axis of the channels of x."""
    return channel_axis(layout, x.ndim, axis)  # type: ignore[arg-type]
