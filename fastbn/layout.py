"""From layout names and strides to one of two memory patterns.

Every dense array is a view of ``(outer, channels, inner)`` in memory order:

- ``ncsp``, channels first: outer = N, inner = the product of the spatial sizes, more than 1;
- ``nspc``, channels last: outer = N times the spatial sizes, inner = 1.

The shape says which axis holds the channels, the strides say which pattern the memory follows. So an
array of shape (N, C, H, W) with channels-last strides is ``nspc`` without a copy.
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

_CHANNELS_FIRST = {"NC": 2, "NCL": 3, "NCHW": 4, "NCDHW": 5}
_CHANNELS_LAST = {"NLC": 3, "NHWC": 4, "NDHWC": 5}
LAYOUTS = (*_CHANNELS_FIRST, *_CHANNELS_LAST, "channels_first", "channels_last")


@cache
def channel_axis(layout: str | None, ndim: int) -> int:
    """Axis of the channels in an array of `ndim` axes.

    Parameters
    ----------
    layout : str or None
        One of `LAYOUTS`; None means channels first.
    ndim : int
        Number of axes of the array.

    Returns
    -------
    int
        1 for channels first, ``ndim - 1`` for channels last.

    Raises
    ------
    ValueError
        If the layout is unknown or is for another number of axes.
    """
    rank = _CHANNELS_FIRST.get(layout or "", 0) or _CHANNELS_LAST.get(layout or "", 0)
    if rank == 0 and layout not in (None, "channels_first", "channels_last"):
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)} or None, got {layout!r}")
    if rank and ndim != rank:
        raise ValueError(f"layout {layout!r} is for arrays with {rank} axes, but x has {ndim}")
    if ndim < 2:
        raise ValueError(f"x must have at least 2 axes (batch and channels), got {ndim}")
    return ndim - 1 if layout in _CHANNELS_LAST or layout == "channels_last" else 1


def pattern(layout: str) -> str:
    """Name of the pattern of a contiguous array in a layout; ValueError if the layout is unknown."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return "nspc" if layout in _CHANNELS_LAST or layout in ("NC", "channels_last") else "ncsp"


class View(NamedTuple):
    """How an array's memory maps to a pattern.

    Attributes
    ----------
    axis : int
        Axis of the channels in the array's shape.
    dims : tuple of int
        ``(outer, channels, inner)``.
    perm : tuple of int or None
        Order of the axes that makes the array C-contiguous; None if it is so already.
    dense : bool
        False where the strides follow neither pattern: the array must be copied first, and `dims` and `perm`
        describe the copy.
    """

    axis: int
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

    def channel_shape(self, ndim: int) -> tuple[int, ...]:
        """Shape that broadcasts a vector of channels against the array."""
        return tuple(-1 if i == self.axis else 1 for i in range(ndim))


def view(x: Array, axis: int) -> View:
    """Find the memory pattern of `x`, whose channels are on axis `axis`."""
    return _view(x.shape, x.strides, x.itemsize, x.flags.aligned, axis)


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, aligned: bool, axis: int) -> View:
    spatial = [i for i in range(1, len(shape)) if i != axis]
    first, last = (0, axis, *spatial), (0, *spatial, axis)
    identity = tuple(range(len(shape)))
    for order in (identity, last, first):
        if aligned and _contiguous(shape, strides, itemsize, order):
            return View(axis, _dims(shape, axis, order == last), None if order == identity else order, True)
    return View(axis, _dims(shape, axis, identity == last), None, False)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, order: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    expected = itemsize
    for i in reversed(order):
        if shape[i] != 1 and strides[i] != expected:
            return False
        expected *= shape[i]
    return True


def _dims(shape: tuple[int, ...], axis: int, channels_last: bool) -> tuple[int, int, int]:
    channels = shape[axis]
    inner = prod(shape[i] for i in range(1, len(shape)) if i != axis)
    if channels == 1:  # one channel is one long run, however it is called
        return 1, 1, shape[0] * inner
    if channels_last:
        return shape[0] * inner, channels, 1
    return shape[0], channels, inner
