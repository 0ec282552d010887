"""Batch normalization over several processes: each has a part of the batch, and all use the statistics of the whole.

A `Communicator`, an object with two methods, carries the numbers: `fastbn.mpi.Communicator` over MPI,
`fastbn.torch.Communicator` over torch.distributed, or one of your own. A forward sends one message and a backward another.

a) The forward gathers the statistics of all processes and merges them in the order of the ranks: the same bits on every
   process.
b) The backward adds up two sums per channel. Gradients of weight and bias belong to the process's own part: whatever adds
   up or averages the gradients of all other parameters must do it for these, too.
c) A variance is sent as one float64. So float64 inputs may have standard deviations from 1e-150 to 1e150 only, without the
   full range that one process takes. Inputs of the other dtypes may have any.
d) A process without data sends the empty batch and sums of zero. All processes must call, in the same order; otherwise the
   others wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from fastbn import functional
from fastbn.checks import is_iterable, short
from fastbn.functional import ActivationLike, Number
from fastbn.layout import Array, LayoutName
from fastbn.results import Gradients, Saved, Stats, of_rows


class Communicator(Protocol):
    """Carries numbers between the processes that share a batch.

    All processes call both methods, in the same order, with a contiguous float64 array of the same shape. The methods may
    return a read-only array, and should raise if a process is gone.
    """

    def all_gather(self, array: Array) -> Array:
        """Return the arrays of all processes, in the order of the ranks, with the same bits: of shape (ranks, *array.shape)."""

    def all_reduce(self, array: Array) -> Array:
        """Return the sum of the arrays of all processes, of the same shape."""


class OfProcess:
    """A communicator that belongs to its process: copies of what holds it hold the same one, and nothing can send it."""

    def __copy__(self) -> OfProcess:
        return self

    def __deepcopy__(self, memo: object) -> OfProcess:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__module__}.{type(self).__name__} belongs to its process and cannot be pickled; set it anew there")


class Alone(OfProcess):
    """The communicator of a single process, which has the whole batch: code for many processes then runs on one, too.

    Examples
    --------
    >>> Alone().all_gather(np.array([1.0, 2.0]))
    array([[1., 2.]])
    """

    def all_gather(self, array: Array) -> Array:
        """Its own array, of shape (1, *array.shape)."""
        return array[None]

    def all_reduce(self, array: Array) -> Array:
        """Its own array."""
        return array


def check(communicator: object) -> Communicator:
    """Check that something has both methods."""
    if not all(callable(getattr(communicator, name, None)) for name in ("all_gather", "all_reduce")):
        raise TypeError(f"communicator must have the methods all_gather and all_reduce, got {short(communicator)}")
    found: Communicator = communicator  # type: ignore[assignment]
    return found


def merge(parts: Sequence[Stats], communicator: Communicator) -> list[Stats]:
    """Merge statistics with those that the other processes have, in one message.

    Parameters
    ----------
    parts : sequence of Stats
        As many on every process, with the same channels, in the same order: of the layers of a model, say.
    communicator : Communicator

    Returns
    -------
    list of Stats
        In float64, with the same bits on every process.

    Raises
    ------
    TypeError, ValueError
        If something else is given, or the communicator returns something else than the arrays of all.

    Examples
    --------
    >>> from fastbn import sync
    >>> sync.merge([Stats(2, [1.0], [0.25])], sync.Alone())
    [Stats(count=2, mean=array([1.]), var=array([0.25]))]
    """
    if not is_iterable(parts):
        raise TypeError(f"parts must be a sequence of Stats, got {type(parts).__name__}")
    given = list(parts)
    for part in given:
        if not isinstance(part, Stats):
            raise TypeError(f"parts must be a sequence of Stats, got {type(part).__name__} in it")
    return _merge(given, communicator, 4)


def _merge(parts: list[Stats], communicator: Communicator, rows: int) -> list[Stats]:
    """Merge all ranks' statistics; of each, so many vectors travel: mean and var, or all four."""
    sent = [np.concatenate([[float(part.count)], part.vectors[:rows].astype(np.float64).ravel()]) for part in parts]
    message = np.concatenate(sent) if sent else np.zeros(0)
    ranks = returned("all_gather", check(communicator).all_gather(message), message, gathered=True)
    merged, start = [], 0
    for part, own in zip(parts, sent, strict=True):
        found = [received(row, rows) for row in ranks[:, start : start + own.size]]
        merged.append(found[0].merge(*found[1:]) if part.mean.size else Stats(sum(s.count for s in found), part.mean, part.var))
        start += own.size
    return merged


def received(message: Array, rows: int) -> Stats:
    """Statistics as a process has sent them, in so many vectors."""
    vectors = np.zeros((4, (message.size - 1) // rows))
    vectors[:rows] = message[1:].reshape(rows, -1)
    count = float(message[0])
    if not (count >= 0 and count.is_integer()):
        raise ValueError(f"communicator.all_gather must return what each process sent, which begins with a count, got {count:g} there")
    return of_rows(int(count), vectors)


def returned(method: str, found: object, sent: Array, *, gathered: bool = False) -> Array:
    """Check what a communicator returned."""
    try:
        a = np.asarray(found)
    except ValueError:  # lists of different lengths
        a = np.asarray(None)
    shape = a.shape[:1] + sent.shape if gathered else sent.shape
    if a.dtype != np.float64 or a.shape != shape or a.shape[:1] == (0,):
        wanted = f"(ranks, {', '.join(map(str, sent.shape))})" if gathered else str(sent.shape)
        raise ValueError(f"communicator.{method} must return a float64 array of shape {wanted}, got {a.dtype} and {a.shape}")
    return a


def batch_norm_stats(
    x: Array, communicator: Communicator, *, layout: LayoutName | None = None, axis: int | None = None, mask: Array | None = None,
    threads: int | None = None,
) -> Stats:  # fmt: skip
    """Compute the statistics of the whole batch, of which each process has a part, with one message.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        The part of this process; N may be 0. All processes have the same channels and dtype.
    communicator : Communicator
    layout, axis, mask, threads
        As in `fastbn.batch_norm_stats`.

    Returns
    -------
    Stats
        In float64, with the same bits on every process.

    Raises
    ------
    TypeError, ValueError
        As `fastbn.batch_norm_stats`, or if the communicator lacks a method. Exceptions of the communicator are passed on.

    Examples
    --------
    >>> from fastbn import sync
    >>> sync.batch_norm_stats(np.array([[1.0], [3.0]]), sync.Alone())
    Stats(count=2, mean=array([2.]), var=array([1.]))
    """
    check(communicator)
    own = functional.wide_stats(x, layout, axis, mask, threads)
    # What a float64 rounds away of a mean counts for float64 values alone.
    return _merge([own], communicator, 4 if x.dtype == np.float64 else 2)[0]


def batch_norm_forward(
    x: Array,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    communicator: Communicator,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    mask: Array | None = None,
    correction: int = 1,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Compute the training forward of a part of a batch, with the statistics of the whole batch.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        The part of this process; N may be 0. All processes have the same channels and dtype.
    weight, bias, running_mean, running_var, momentum, eps, layout, axis, activation, residual, mask, correction, threads, out
        As in `fastbn.batch_norm_forward`. The whole batch updates the running statistics, to the same bits on every
        process.
    communicator : Communicator

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : Saved
        For `batch_norm_backward` of this module.

    Raises
    ------
    TypeError, ValueError
        As `fastbn.batch_norm_forward`, or if the communicator lacks a method. Exceptions of the communicator are passed on.

    Examples
    --------
    >>> from fastbn import sync
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = sync.batch_norm_forward(x, eps=0.0, communicator=sync.Alone())
    >>> y
    array([[-1.],
           [ 1.]])
    """
    stats = batch_norm_stats(x, communicator, layout=layout, axis=axis, mask=mask, threads=threads)
    return functional.batch_norm_forward(
        x, weight, bias, running_mean, running_var, True, momentum, eps, layout=layout, axis=axis, activation=activation,
        residual=residual, mask=mask, correction=correction, stats=stats, threads=threads, out=out,
    )  # fmt: skip


def batch_norm_backward(
    dy: Array,
    x: Array,
    saved: Saved,
    *,
    communicator: Communicator,
    wrt: Sequence[str] = functional.USUAL,
    from_output: bool = False,
    threads: int | None = None,
    out: Array | None = None,
) -> Gradients:
    """Gradients of `batch_norm_forward` of this module.

    Parameters
    ----------
    dy, x, saved, wrt, from_output, threads, out
        As in `fastbn.batch_norm_backward`; `wrt` must be the same on every process. Without "x" in it, nothing is sent.
    communicator : Communicator

    Returns
    -------
    Gradients
        dx goes through the statistics of the whole batch. dweight and dbias are sums over this part alone, and zero if it
        is empty; the gradients of the whole batch are their sums over all processes.

    Raises
    ------
    TypeError, ValueError
        As `fastbn.batch_norm_backward`, or if the communicator lacks a method. Exceptions of the communicator are passed
        on.

    Examples
    --------
    >>> from fastbn import sync
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = sync.batch_norm_forward(x, eps=0.0, communicator=sync.Alone())
    >>> sync.batch_norm_backward(y, x, saved, communicator=sync.Alone(), wrt=["x", "weight"])
    Gradients(dx=array([[0.],
           [0.]]), dweight=array([2.]), dbias=None, dresidual=None)
    """
    channel = check(communicator)

    def total(sums: Array) -> Array:
        return returned("all_reduce", channel.all_reduce(sums), sums)

    return functional.gradients(dy, x, saved, wrt, from_output, threads, out, total)
