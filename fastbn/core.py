"""The algebra of batch normalization: eps, momentum, folding, merging, and the order of the four operations.

Everything here works on vectors of C channels or calls a kernel. The SIMD modules run a whole call (`inference`,
`forward`, `backward`) as one C function with the same algebra, because a dozen NumPy calls on C elements cost
more than a small tensor; `Composed` does the same with NumPy for modules that only have the four operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastbn import dispatch, memory, threads
from fastbn.activations import Activation, Builtin, Epilogue
from fastbn.dtypes import DType, lookup
from fastbn.layout import Array, View, channel_axis, view

Function = Builtin | Activation | None  # an activation


@dataclass(frozen=True)
class Stats:
    """Statistics of a batch, mergeable with those of other batches.

    Attributes
    ----------
    count : int
        Number of values per channel.
    mean, var : ndarray of shape (C,)
        Mean and population variance; float64 for float64 input, else float32.
    mean_lo : ndarray of shape (C,) or None
        What `mean` rounds away, so that merging and centering lose no digits; None means zero.

    Examples
    --------
    >>> from fastbn import batch_norm_stats
    >>> x = np.array([[1.0], [3.0], [5.0]])
    >>> batch_norm_stats(x[:1]).merge(batch_norm_stats(x[1:]))
    Stats(count=3, mean=array([3.]), var=array([2.66666667]))
    """

    count: int
    mean: Array
    var: Array
    mean_lo: Array | None = field(default=None, repr=False)

    def merge(self, *others: Stats) -> Stats:
        """Statistics of all the batches together.

        Parameters
        ----------
        *others : Stats
            Statistics of other batches with the same channels.

        Returns
        -------
        Stats

        Raises
        ------
        ValueError
            If the numbers of channels differ.

        Notes
        -----
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        Stanford 1979, generalized from two batches to any number.
        """
        batches = [s for s in (self, *others) if s.count > 0]
        for other in others:
            if other.mean.shape != self.mean.shape:
                raise ValueError(f"merge needs statistics of {self.mean.size} channels, got {other.mean.size}")
        if len(batches) < 2:
            return batches[0] if batches else self
        dtype, base = self.mean.dtype, batches[0].mean.astype(np.float64)
        count = sum(s.count for s in batches)
        # Means as offsets from the first one: the difference of two near means is exact.
        offsets = [(s.mean - base) + (0.0 if s.mean_lo is None else s.mean_lo) for s in batches]
        offset = np.sum([s.count * o for s, o in zip(batches, offsets, strict=True)], 0) / count
        m2 = np.sum([s.count * (s.var + np.square(o - offset)) for s, o in zip(batches, offsets, strict=True)], 0)
        mean = (base + offset).astype(dtype)
        return Stats(count, mean, (m2 / count).astype(dtype), ((base - mean) + offset).astype(dtype))


@dataclass(frozen=True)
class Saved:
    """What the forward keeps for the backward.

    Attributes
    ----------
    mean, invstd : ndarray of shape (C,)
        The statistics the forward used: the mean, and one over the standard deviation.
    mean_lo : ndarray of shape (C,) or None
        What `mean` rounds away; None means zero.
    count : int
        Number of values per channel in the statistics.
    training : bool
        Whether the statistics are the batch's own, so that the gradient flows through them.
    scale, shift : ndarray of shape (C,)
        Of the normalization: ``(x - mean) * scale + shift``.
    layout : str or None
    mask : ndarray of bool or None
    activation : Builtin, Activation or None
    residual : ndarray of the shape of x, or None
        The array itself: it must not be changed before the backward, unless there is no activation.
    """

    mean: Array
    invstd: Array
    mean_lo: Array | None
    count: int
    training: bool
    scale: Array
    shift: Array
    layout: str | None
    mask: Array | None
    activation: Function
    residual: Array | None

    @property
    def invertible(self) -> bool:
        """Whether the input of the forward can be had from its output."""
        return self.residual is None and (self.activation is None or self.activation.invertible)


class Gradients(NamedTuple):
    """Gradients of one backward pass; None where not asked for.

    Attributes
    ----------
    dx : ndarray, shape and memory order of x
    dweight, dbias : ndarray of shape (C,)
    dresidual : ndarray, shape of x
        dy itself where there is no activation.
    """

    dx: Array | None
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None


def split(mean: Array, mean_lo: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Round a mean to `dtype`; the second result, float64, is what that rounds away."""
    high = mean.astype(dtype)
    return high, np.where(np.isfinite(high), mean - high, 0.0) + mean_lo


def fold(mean_lo: Array | None, invstd: Array, weight: Array | None, bias: Array | None, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Scale and shift of ``y = (x - mean) * scale + shift``, computed in float64."""
    scale = invstd.astype(np.float64)
    if weight is not None:
        scale = scale * weight
    shift = np.zeros_like(scale) if bias is None else bias.astype(np.float64)
    if mean_lo is not None:
        shift = shift - np.where(mean_lo == 0, 0.0, mean_lo * scale)  # the scale may be infinite
    return scale.astype(dtype), shift.astype(dtype)


def update_running(running: Array, batch: Array, momentum: float) -> None:
    """Move running statistics towards the batch's: momentum is the weight of the new value."""
    running[...] = (1.0 - momentum) * running.astype(np.float64) + momentum * batch


@np.errstate(all="ignore")
def fixed(var: Array, eps: float, weight: Array | None, bias: Array | None) -> tuple[Array, Array, Array]:
    """One over the standard deviation, scale and shift of given statistics, in the type of `var`."""
    invstd = 1.0 / np.sqrt(var.astype(np.float64) + eps)
    return invstd.astype(var.dtype), *fold(None, invstd, weight, bias, var.dtype)


@np.errstate(all="ignore")
def input_gradient(
    module: Any, dy: Array, x: Array, dx: Array, mean: Array, mean_lo: Array | None, invstd: Array, scale: Array,
    sum_dy: Array, sum_dy_xmu: Array, count: int, threads: int, epilogue: Epilogue | None = None,
) -> None:  # fmt: skip
    """Gradient of x from the two sums."""
    g1 = invstd.astype(np.float64) ** 2 * sum_dy_xmu / count
    g0 = sum_dy / count
    if mean_lo is not None:
        g0 = g0 - mean_lo * g1
    module.grad_input(dy, x, dx, mean, scale, g0.astype(mean.dtype), g1.astype(mean.dtype), threads, epilogue)


class Composed:
    """Whole calls made of the four operations of a kernel module that has no whole calls of its own."""

    def __init__(self, module: Any):
        self.stats = module.stats
        self.normalize = module.normalize
        self.grad_sums = module.grad_sums
        self.grad_input = module.grad_input
        self.keeps = getattr(module, "KEEPS", False)

    @np.errstate(all="ignore")
    def inference(
        self, x: Array, y: Array, mean: Array, mean_lo: Array | None, spread: Array, weight: Array | None, bias: Array | None,
        eps: float | None, threads: int, epilogue: Epilogue | None = None,
    ) -> None:  # fmt: skip
        """Normalize with given statistics; `spread` is the variance, or with eps None one over the deviation."""
        invstd = spread if eps is None else 1.0 / np.sqrt(spread.astype(np.float64) + eps)
        self.normalize(x, y, mean, *fold(mean_lo, invstd, weight, bias, mean.dtype), threads, epilogue)

    @np.errstate(all="ignore")
    def forward(
        self, x: Array, y: Array, weight: Array | None, bias: Array | None, eps: float, running_mean: Array | None,
        running_var: Array | None, momentum: float, correction: int, compute: np.dtype[Any], threads: int,
        epilogue: Epilogue | None = None,
    ) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
        """Normalize with the batch's statistics; return the mean, what it rounds away, invstd, scale and shift."""
        count = x.shape[0] * x.shape[2]
        mean, mean_lo, m2 = self.stats(x, threads)
        high, low = split(mean, mean_lo, compute)
        invstd = 1.0 / np.sqrt(m2 / count + eps)
        scale, shift = fold(low, invstd, weight, bias, compute)
        self.normalize(x, y, high, scale, shift, threads, epilogue)
        if running_mean is not None:
            update_running(running_mean, mean, momentum)
        if running_var is not None:
            update_running(running_var, m2 / (count - correction), momentum)
        return high, low.astype(compute), invstd.astype(compute), scale, shift

    @np.errstate(all="ignore")
    def backward(
        self, dy: Array, x: Array, dx: Array | None, mean: Array, mean_lo: Array | None, invstd: Array, scale: Array, threads: int,
        epilogue: Epilogue | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Sums of dy and of dy (x - mean), and dx where it is asked for."""
        if epilogue is not None and dx is not None and (kept := self._place_to_keep(epilogue, dy, x, dx)) is not None:
            zero = np.zeros_like(mean)
            self.grad_input(dy, x, kept, mean, np.ones_like(mean), zero, zero, threads, epilogue._replace(dresidual=None))
            dy, epilogue = kept, None
        sum_dy, sum_dy_xmu = self.grad_sums(dy, x, mean, threads, epilogue)
        if mean_lo is not None:
            sum_dy_xmu = sum_dy_xmu - mean_lo * sum_dy
        if dx is not None:
            count = x.shape[0] * x.shape[2]
            input_gradient(self, dy, x, dx, mean, mean_lo, invstd, scale, sum_dy, sum_dy_xmu, count, threads, epilogue)
        return sum_dy, sum_dy_xmu

    def _place_to_keep(self, epilogue: Epilogue, dy: Array, x: Array, dx: Array) -> Array | None:
        """Where to keep dy before the activation, so that sums and map need not both evaluate a costly derivative."""
        if not self.keeps or epilogue.activation is None or not epilogue.activation.costly or epilogue.from_output:
            return None
        if epilogue.dresidual is not None:
            return epilogue.dresidual
        inputs = (dy, x, epilogue.residual)
        return None if any(a is not None and np.may_share_memory(dx, a) for a in inputs) else dx


@cache
def whole(kernel: dispatch.Kernel) -> Any:
    """What runs a kernel's whole calls: its module, or a composition of the module's operations."""
    module = kernel.module()
    return module if hasattr(module, "forward") else Composed(module)


def _module(dtype: DType, activation: Function = None) -> Any:
    """What runs the whole calls on arrays of a dtype."""
    return whole(dispatch.select(dtype.storage, activation is not None and activation.custom))


def plain(op: str, x: object, layout: str | None, out: object, *arguments: object) -> Any:
    """Run an operation by one call of a kernel, checks and all; None where `x` or an argument is not plain."""
    if type(x) is not np.ndarray or dispatch.pinned() is not None:
        return None
    run, axis = _plain(op, x.dtype, layout, x.ndim)
    return None if run is None else run(x, axis, _recycled(out, x), threads.for_call(op, x.nbytes), *arguments)


@cache
def _plain(op: str, dtype: np.dtype[Any], layout: str | None, ndim: int) -> tuple[Any, int]:
    row = lookup(dtype)
    run = None if row is None else getattr(dispatch.select(row.storage).module(), f"plain_{op}", None)
    return run, channel_axis(layout, ndim)


def _recycled(out: object, x: Array) -> object:
    """`out`, or where a kernel would have to make a large one, recycled memory."""
    return memory.empty_like(x, "C") if out is None and x.nbytes >= memory.SMALLEST and x.flags.c_contiguous else out


def _dense(a: Array, v: View) -> Array:
    """`a` as (outer, channels, inner); a copy where its strides follow no pattern."""
    return v.of(a if v.dense else np.ascontiguousarray(a))


def _like(a: Array, x: Array, v: View) -> Array:
    """`a`, of the shape of `x`, in the memory order that `v` describes."""
    va = view(a, v.axis)
    if va.dense and (va.perm, va.dims) == (v.perm, v.dims):
        return v.of(a)
    ordered = _empty(x, v)
    ordered[...] = a
    return v.of(ordered)


def _empty(x: Array, v: View) -> Array:
    """New array of the shape and dtype of `x`, in the memory order that `v` describes."""
    return memory.empty_like(x, "K" if v.dense else "C")


def _target(out: Array | None, x: Array, v: View) -> Array:
    """The array that the kernel writes: `out` where its memory order is that of `v`, else a new one."""
    if out is not None:
        if v.dense and out.strides == x.strides and out.flags.aligned:
            return out
        vo = view(out, v.axis)
        if vo.dense and (vo.perm, vo.dims) == (v.perm, v.dims):
            return out
    return _empty(x, v)


def _deliver(y: Array, out: Array | None) -> Array:
    if out is None or out is y:
        return y
    out[...] = y
    return out


def _counted(a: Array, axis: int, mask: Array) -> Array:
    """The positions of `a` where the mask is True, as (rows, channels, 1)."""
    return np.moveaxis(a, axis, -1)[mask][:, :, None]


def _epilogue(activation: Function, residual: Array | None, x: Array, v: View) -> Epilogue | None:
    """What follows the normalization, the residual in the memory order of `x`."""
    if activation is None and residual is None:
        return None
    return Epilogue(activation, None if residual is None else _like(residual, x, v))


def inference(
    x: Array, axis: int, dtype: DType, mean: Array, mean_lo: Array | None, spread: Array, weight: Array | None,
    bias: Array | None, eps: float | None, activation: Function, residual: Array | None, out: Array | None,
) -> Array:  # fmt: skip
    """Normalize `x` with given statistics."""
    v = view(x, axis)
    y = _target(out, x, v)
    if x.size:
        module = _module(dtype, activation)
        n = threads.for_call("normalize", x.nbytes)
        epilogue = _epilogue(activation, residual, x, v)
        module.inference(_dense(x, v), v.of(y), mean, mean_lo, spread, weight, bias, eps, n, epilogue)
    return _deliver(y, out)


class Folded:
    """Mean, scale and shift of given statistics, folded once for each arithmetic type that is used."""

    def __init__(self, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float):
        with np.errstate(all="ignore"):
            self._invstd = 1.0 / np.sqrt(var + eps)
        self._mean, self._weight, self._bias = mean, weight, bias
        self._parameters: dict[np.dtype[Any], tuple[Array, Array, Array]] = {}
        self._plain: Any = None

    def plain(self, x: object, residual: object, out: object) -> Array | None:
        """Normalize by one call of a kernel a plain array like the last one of `apply`; None where it is not like that."""
        if self._plain is None or dispatch.pinned() is not None:
            return None
        y: Array | None = self._plain(x, residual, out)  # a small one: even to ask for its size takes long
        if y is None and type(x) is np.ndarray:
            y = self._plain(x, residual, _recycled(out, x), threads.for_call("normalize", x.nbytes))
        return y

    def parameters(self, compute: np.dtype[Any]) -> tuple[Array, Array, Array]:
        """Mean, scale and shift for arithmetic in `compute`."""
        if compute not in self._parameters:
            with np.errstate(all="ignore"):
                high, low = split(self._mean, np.zeros_like(self._mean), compute)
                self._parameters[compute] = (high, *fold(low, self._invstd, self._weight, self._bias, compute))
        return self._parameters[compute]


def apply(
    folded: Folded, x: Array, axis: int, dtype: DType, activation: Function, residual: Array | None, out: Array | None
) -> Array:  # fmt: skip
    """Normalize `x` with folded statistics."""
    v = view(x, axis)
    y = _target(out, x, v)
    if x.size:
        module = _module(dtype, activation)
        parameters = folded.parameters(dtype.compute)
        n = threads.for_call("normalize", x.nbytes)
        module.normalize(_dense(x, v), v.of(y), *parameters, n, _epilogue(activation, residual, x, v))
        if x.flags.c_contiguous and dispatch.pinned() is None and hasattr(module, "Plain"):
            folded._plain = module.Plain(*parameters, activation, x, axis, threads.WORTH_THREADS["normalize"])
    return _deliver(y, out)


def stats(x: Array, axis: int, dtype: DType, mask: Array | None) -> Stats:
    """Statistics of `x`, of which only the positions in the mask count."""
    v = view(x, axis)
    rows = _dense(x, v) if mask is None else _counted(x, axis, mask)
    channels = x.shape[axis]
    if rows.size == 0:
        zero = np.zeros(channels, dtype.compute)
        return Stats(0, zero, zero.copy(), zero.copy())
    count = rows.shape[0] * rows.shape[2]
    mean, mean_lo, m2 = _module(dtype).stats(rows, threads.for_call("stats", rows.nbytes))
    with np.errstate(all="ignore"):
        high, low = split(mean, mean_lo, dtype.compute)
        return Stats(count, high, (m2 / count).astype(dtype.compute), low.astype(dtype.compute))


def forward(
    x: Array, axis: int, dtype: DType, weight: Array | None, bias: Array | None, running_mean: Array | None,
    running_var: Array | None, momentum: float, eps: float, activation: Function, residual: Array | None,
    mask: Array | None, out: Array | None,
) -> tuple[Array, Array, Array | None, Array, Array, Array, int]:  # fmt: skip
    """Normalize `x` with its own statistics; return y, mean, mean_lo, invstd, scale, shift and count."""
    compute = dtype.compute
    v = view(x, axis)
    y = _target(out, x, v)
    if x.size == 0:
        zero = np.zeros(x.shape[axis], compute)
        return _deliver(y, out), zero, None, zero.copy(), zero.copy(), zero.copy(), 0
    module = _module(dtype, activation)
    n = threads.for_call("forward", x.nbytes)
    epilogue = _epilogue(activation, residual, x, v)
    new = _as_compute(running_mean, compute), _as_compute(running_var, compute)
    if mask is None:
        count = x.size // x.shape[axis]
        vectors = module.forward(_dense(x, v), v.of(y), weight, bias, eps, *new, momentum, 1, compute, n, epilogue)
    else:
        # One pass over the positions that count, written to a scratch array: its output is not used.
        rows = _counted(x, axis, mask)
        count = len(rows)
        mean, low, invstd, _, _ = module.forward(rows, rows, None, None, eps, *new, momentum, 1, compute, n, None)
        with np.errstate(all="ignore"):
            vectors = mean, low, invstd, *fold(low, invstd, weight, bias, compute)
        module.normalize(_dense(x, v), v.of(y), mean, *vectors[3:], n, epilogue)
    if running_mean is not None and new[0] is not running_mean:
        running_mean[...] = new[0]
    if running_var is not None and new[1] is not running_var:
        running_var[...] = new[1]
    return _deliver(y, out), *vectors, count


def _as_compute(a: Array | None, compute: np.dtype[Any]) -> Array | None:
    return None if a is None else np.require(a, compute, ["C", "A"])


def backward(
    dy: Array, x: Array, axis: int, dtype: DType, saved: Saved, from_output: bool, want_x: bool, want_sums: bool,
    want_residual: bool, out: Array | None,
) -> Gradients:  # fmt: skip
    """Gradients of x, weight, bias and residual; only what is wanted is computed."""
    v = view(x, axis)
    compute = saved.mean.dtype
    active = saved.activation is not None
    dx = _target(out, x, v) if want_x or (want_residual and active) else None
    dresidual = None if not want_residual else _empty(x, v) if active else dy
    if x.size == 0:
        nothing = np.zeros((2, x.shape[axis]), compute) if want_sums else (None, None)
        return Gradients(None if dx is None else _deliver(dx, out), nothing[0], nothing[1], dresidual)
    module = _module(dtype, saved.activation)
    n = threads.for_call("backward", x.nbytes)
    arrays = _like(dy, x, v), _dense(x, v)
    mean, mean_lo, invstd, scale = saved.mean, saved.mean_lo, saved.invstd, saved.scale
    if from_output:
        # Before the activation, the output is z = (x - mean) scale + shift: statistics of z in place of those of x.
        mean = saved.shift
        with np.errstate(all="ignore"):
            invstd = (saved.invstd / saved.scale.astype(np.float64)).astype(compute)
            mean_lo = None if mean_lo is None else (mean_lo * saved.scale).astype(compute)
    epilogue = None
    if active:
        residual = None if saved.residual is None else _like(saved.residual, x, v)
        target = None if dresidual is None else v.of(dresidual)
        epilogue = Epilogue(saved.activation, residual, saved.scale, saved.shift, target, from_output)

    totals = None
    if saved.training and dx is not None and saved.mask is None:
        totals = module.backward(*arrays, v.of(dx), mean, mean_lo, invstd, scale, n, epilogue)
    elif want_sums or (saved.training and dx is not None):
        counted, after = arrays, epilogue and epilogue._replace(dresidual=None)
        if saved.mask is not None:
            counted = _counted(dy, axis, saved.mask), _counted(x, axis, saved.mask)
            if after is not None and saved.residual is not None:
                after = after._replace(residual=_counted(saved.residual, axis, saved.mask))
        totals = module.backward(*counted, None, mean, mean_lo, invstd, scale, n, after)
    if dx is not None and (saved.mask is not None or not saved.training):
        # Statistics that are constants, for all of dx or for the positions that do not count. These are found first,
        # because dx may be x or dy.
        direct = dx if not saved.training else _empty(x, v)
        zero = np.zeros(x.shape[axis], compute)
        if epilogue is None:
            module.normalize(arrays[0], v.of(direct), zero, scale, zero, n)
        else:
            module.grad_input(*arrays, v.of(direct), mean, scale, zero, zero, n, epilogue)
        if saved.mask is not None and totals is not None:
            sum_dy, sum_dy_xmu = totals
            input_gradient(module, *arrays, v.of(dx), mean, mean_lo, invstd, scale, sum_dy, sum_dy_xmu, saved.count, n, epilogue)
            np.copyto(np.moveaxis(dx, axis, -1), np.moveaxis(direct, axis, -1), where=~saved.mask[..., None])
    dweight = dbias = None
    if want_sums and totals is not None:
        with np.errstate(all="ignore"):
            dbias, dweight = totals[0].astype(compute), (totals[1] * invstd).astype(compute)
    return Gradients(_deliver(dx, out) if want_x and dx is not None else None, dweight, dbias, dresidual)


def backward_reduce(dy: Array, x: Array, axis: int, dtype: DType, mean: Array, mean_lo: Array | None, invstd: Array) -> tuple[Array, Array]:
    """Sums over each channel of dy and of dy (x - mean), in the type of `mean`."""
    v = view(x, axis)
    if x.size == 0:
        return np.zeros_like(mean), np.zeros_like(mean)
    module = _module(dtype)
    n = threads.for_call("backward", x.nbytes)
    sums = module.backward(_like(dy, x, v), _dense(x, v), None, mean, mean_lo, invstd, None, n, None)
    return sums[0].astype(mean.dtype), sums[1].astype(mean.dtype)


def backward_elemt(
    dy: Array, x: Array, axis: int, dtype: DType, mean: Array, mean_lo: Array | None, invstd: Array, weight: Array | None,
    sum_dy: Array, sum_dy_xmu: Array, count: int, out: Array | None,
) -> Array:  # fmt: skip
    """Gradient of x from sums that may come from several processes."""
    v = view(x, axis)
    dx = _target(out, x, v)
    if x.size:
        module = _module(dtype)
        n = threads.for_call("backward", x.nbytes)
        with np.errstate(all="ignore"):
            scale, _ = fold(None, invstd, weight, None, mean.dtype)
        arrays = _like(dy, x, v), _dense(x, v), v.of(dx)
        input_gradient(module, *arrays, mean, mean_lo, invstd, scale, sum_dy, sum_dy_xmu, count, n, None)
    return _deliver(dx, out)
