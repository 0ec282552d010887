"""From layout names and strides to one of two memory patterns.

Every dense array is a view of ``(outer, channels, inner)`` in memory order:

- ``ncsp``: inner, the product of the sizes of the axes that vary faster than the channels, is more than 1; so it is
  for channels first;
- ``nspc``: inner = 1, the channels vary fastest, as for channels last.

The shape says which axis holds the channels, the strides say in which order the axes lie in memory. So an array of
shape (N, C, H, W) with channels-last strides is ``nspc`` without a copy, and one in Fortran order is ``ncsp``.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from fastbn.shown import short

Array = np.ndarray[Any, Any]

LayoutName = Literal["NC", "NCL", "NCHW", "NCDHW", "NLC", "NHWC", "NDHWC", "channels_first", "channels_last"]

_CHANNELS_FIRST = {"NC": 2, "NCL": 3, "NCHW": 4, "NCDHW": 5}
_CHANNELS_LAST = {"NLC": 3, "NHWC": 4, "NDHWC": 5}
LAYOUTS = (*_CHANNELS_FIRST, *_CHANNELS_LAST, "channels_first", "channels_last")


def channel_axis(layout: str | None, ndim: int, axis: int | None = None) -> int:
    """Axis of the channels in an array of `ndim` axes.

    Parameters
    ----------
    layout : str or None
        One of `LAYOUTS`; None means channels first.
    ndim : int
        Number of axes of the array.
    axis : int, optional
        The axis itself, in place of a layout; negative ones count from the end.

    Returns
    -------
    int
        1 for channels first, ``ndim - 1`` for channels last.

    Raises
    ------
    TypeError
        If axis is no int.
    ValueError
        If the layout is unknown or is for another number of axes, if there is no such axis, or if both are given.
    """
    check(layout, axis)
    rank = _CHANNELS_FIRST.get(layout or "", 0) or _CHANNELS_LAST.get(layout or "", 0)
    if rank and ndim != rank:
        raise ValueError(f"layout {layout!r} is for arrays with {rank} axes, but x has {ndim}")
    if ndim < 2:
        raise ValueError(f"x must have at least 2 axes (batch and channels), got {ndim}")
    if axis is not None:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axis must be one of the {ndim} axes of x, got {short(axis)}")
        return int(axis) % ndim
    return ndim - 1 if layout in _CHANNELS_LAST or layout == "channels_last" else 1


def check(layout: object, axis: object = None) -> None:
    """Check what says where the channels are, as far as that can be done before there is an array.

    Raises
    ------
    TypeError
        If axis is no int.
    ValueError
        If the layout is unknown, or if both are given.
    """
    if layout is not None and (not isinstance(layout, str) or layout not in LAYOUTS):
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)} or None, got {_shown(layout)}")
    if axis is None:
        return
    if layout is not None:
        raise ValueError(f"give axis or layout, not both: got axis={short(axis)} and layout={short(layout)}")
    if isinstance(axis, (bool, np.bool_, np.timedelta64)) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis must be an int, got {short(axis)}")


def _shown(layout: object) -> str:
    """What came in place of a layout, with the one that was meant where that is clear: of other case, or nearly the same."""
    text = short(layout)
    if not isinstance(layout, str) or len(layout) > 40:
        return text
    from difflib import get_close_matches  # not needed where all is well

    cased = {name.upper(): name for name in LAYOUTS}
    near = get_close_matches(layout.upper().replace(" ", "_").replace("-", "_"), cased, 2, 0.7)
    also = [f"{cased[name]!r}" for name in near if len(name) == len(near[0])]
    return f"{text}; did you mean {' or '.join(also[: 1 if near[0] == layout.upper() else 2])}?" if near else text


def pattern(layout: str) -> str:
    """Name of the pattern of a contiguous array in a layout, which is one of `LAYOUTS`."""
    return "nspc" if layout in _CHANNELS_LAST or layout in ("NC", "channels_last") else "ncsp"


# Subclasses change what an array's buffer means (masked arrays, units) or how it is indexed (matrices). This one does not.
_PLAIN = (np.ndarray, np.memmap)


def plain(name: str, a: object) -> Array:
    """Check that something is an array, and of no subclass with a meaning of its own."""
    if type(a) in _PLAIN:
        return a  # type: ignore[return-value]
    if isinstance(a, np.ndarray):
        raise TypeError(f"{name} must be a plain numpy.ndarray, got {type(a).__name__}")
    tensor = "; fastbn.torch is for tensors" if type(a).__module__.partition(".")[0] == "torch" else ""
    raise TypeError(f"{name} must be a numpy.ndarray, got {type(a).__name__}{tensor}")


class View(NamedTuple):
    """How an array's memory maps to a pattern.

    Attributes
    ----------
    dims : tuple of int
        ``(outer, channels, inner)``.
    perm : tuple of int or None
        Order of the axes that makes the array C-contiguous; None if it is so already.
    dense : bool
        False where the memory has gaps, repeats, runs backwards or is not aligned: the array must be copied first,
        in NumPy's order "K", and `dims` and `perm` describe the copy.
    """

    dims: tuple[int, int, int]
    perm: tuple[int, ...] | None
    dense: bool

    @property
    def pattern(self) -> str:
        """Name of the memory pattern: "ncsp" or "nspc"."""
        return "ncsp" if self.dims[2] > 1 else "nspc"

    def of(self, a: Array) -> Array:
        """View of a dense array as ``(outer, channels, inner)``, C-contiguous, without a copy."""
        return (a if self.perm is None else a.transpose(self.perm)).reshape(self.dims)


def view(x: Array, axis: int) -> View:
    """Find the memory pattern of `x`, whose channels are on axis `axis`."""
    return _view(x.shape, x.strides, x.itemsize, x.flags.aligned, axis)


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, aligned: bool, axis: int) -> View:
    identity = tuple(range(len(shape)))
    order = identity
    if not _contiguous(shape, strides, itemsize, identity):
        # As NumPy's order "K". Axes of one may have any stride; they stand where they do not part others.
        order = tuple(sorted(identity, key=lambda i: (shape[i] != 1, -abs(strides[i]), i)))
        order = identity if order == (*(i for i in identity if shape[i] == 1), *(i for i in identity if shape[i] != 1)) else order
    dense = aligned and _contiguous(shape, strides, itemsize, order)
    return View(_dims(shape, axis, order), None if order == identity else order, dense)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, order: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    expected = itemsize
    for i in reversed(order):
        if shape[i] != 1 and strides[i] != expected:
            return False
        expected *= shape[i]
    return True


def _dims(shape: tuple[int, ...], axis: int, order: tuple[int, ...]) -> tuple[int, int, int]:
    """What lies before the channels in memory, the channels, and what lies within each."""
    at = order.index(axis)
    outer, channels, inner = prod(shape[i] for i in order[:at]), shape[axis], prod(shape[i] for i in order[at + 1 :])
    return (1, 1, outer * inner) if channels == 1 else (outer, channels, inner)  # one channel is one long run
