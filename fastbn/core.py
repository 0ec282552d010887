"""The algebra of batch normalization: eps, momentum, folding, merging, and the order of the four operations.

Everything here works on vectors of C channels or calls a kernel. The SIMD modules run a whole call (`inference`,
`forward`, `backward`) as one C function with the same algebra, because a dozen NumPy calls on C elements cost
more than a small tensor; `Composed` does the same with NumPy for modules that only have the four operations.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastbn import dispatch, extremes, memory, threads
from fastbn.activations import Epilogue
from fastbn.dtypes import DType, lookup
from fastbn.floating import default_mode
from fastbn.layout import Array, View, channel_axis, view
from fastbn.results import Function, Gradients, Saved, Stats, rounded, variance

_WIDE = np.dtype(np.float64)


class Request(NamedTuple):
    """One call, checked: its array, how that lies in memory, and what follows the normalization.

    Attributes
    ----------
    x : ndarray
    axis : int
        Of the channels.
    dtype : DType
    view : View
    out : ndarray or None
        Where the result goes.
    activation : Builtin, Activation or None
    residual : ndarray or None
    mask : ndarray of bool, or None
        Of the shape of x without the channels.
    """

    x: Array
    axis: int
    dtype: DType
    view: View
    out: Array | None = None
    activation: Function = None
    residual: Array | None = None
    mask: Array | None = None


class Running(NamedTuple):
    """Running statistics that training moves, and how.

    Attributes
    ----------
    mean, var : ndarray or None
        Changed in place.
    momentum : float
        Weight of the batch.
    correction : int
        What is taken from the count under the variance: 1 for the unbiased one, 0 for the population's.
    """

    mean: Array | None
    var: Array | None
    momentum: float
    correction: int


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
    # Where x is the mean, 0 times the scale must be 0: a finite one is none too large for the type.
    most = np.finfo(dtype).max
    return np.where(np.isinf(scale), scale, np.clip(scale, -most, most)).astype(dtype), shift.astype(dtype)


def update_running(running: Array, weighed: Array, momentum: float) -> None:
    """Move running statistics towards the batch's; these are weighed: times momentum, a number though they may be none."""
    running[...] = (1.0 - momentum) * running.astype(np.float64) + weighed


def deviation(var: Array, eps: float) -> Array:
    """One over the standard deviation, in float64."""
    return 1.0 / np.sqrt(var.astype(np.float64) + eps)


def parameters(
    mean: Array, invstd: Array, weight: Array | None, bias: Array | None, dtype: np.dtype[Any]
) -> tuple[Array, Array, Array, Array]:
    """Mean, what it rounds away, scale and shift of given statistics, from all the digits these have."""
    high, low = split(mean.astype(np.float64), np.zeros(1), dtype)
    return high, low.astype(dtype), *fold(low, invstd, weight, bias, dtype)


@default_mode
def input_gradient(
    module: Any, dy: Array, x: Array, dx: Array, mean: Array, mean_lo: Array | None, invstd: Array, scale: Array,
    sum_dy: Array, sum_dy_xmu: Array, count: int, threads: int, epilogue: Epilogue | None = None,
) -> None:  # fmt: skip
    """Gradient of x from the two sums."""
    wide = invstd.astype(np.float64)
    g1 = wide * (wide * sum_dy_xmu / count)  # the square alone may leave the range
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

    @default_mode
    def inference(
        self, x: Array, y: Array, mean: Array, mean_lo: Array | None, spread: Array, weight: Array | None, bias: Array | None,
        eps: float | None, threads: int, epilogue: Epilogue | None = None,
    ) -> None:  # fmt: skip
        """Normalize with given statistics; `spread` is the variance, or with eps None one over the deviation."""
        invstd = spread if eps is None else 1.0 / np.sqrt(spread.astype(np.float64) + eps)
        self.normalize(x, y, mean, *fold(mean_lo, invstd, weight, bias, mean.dtype), threads, epilogue)

    @default_mode
    def forward(
        self, x: Array, y: Array, weight: Array | None, bias: Array | None, eps: float | Array, running_mean: Array | None,
        running_var: Array | None, momentum: float, correction: int, compute: np.dtype[Any], threads: int,
        epilogue: Epilogue | None = None, counted: Array | None = None,
    ) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
        """Normalize with the batch's statistics; return the mean, what it rounds away, invstd, scale and shift.

        Where not all of x counts, `counted` is what does: (rows, channels, 1). The running statistics, in the type of the
        arithmetic or in float64, are moved last.
        """
        values = x if counted is None else counted
        count = values.shape[0] * values.shape[2]
        mean, mean_lo, m2 = self.stats(values, threads)
        weighed_mean, weighed_var = momentum * mean, momentum * (m2 / (count - correction))
        high, low = split(mean, mean_lo, compute)
        invstd = 1.0 / np.sqrt(m2 / count + eps)
        scale, shift = fold(low, invstd, weight, bias, compute)
        usual = extremes.are_usual(m2, m2 / count + eps, invstd if weight is None else invstd * weight, compute)
        part = extremes.unusual(values, usual, eps)
        # y may be x, or the residual
        again = None if part is None else (part, part.in_units(x), part.epilogue(epilogue), part.in_units(counted))
        self.normalize(x, y, high, scale, shift, threads, epilogue)
        if again is not None:
            part, rows, after, own_counted = again
            c, own_mean, own_var = part.channels, np.zeros(len(part.channels)), np.zeros(len(part.channels))
            own_eps = part.from_units(np.broadcast_to(eps, c.shape), -2)
            own = own_mean, own_var, 1.0, correction
            found = self.forward(rows, rows, part.of(weight), part.of(bias), own_eps, *own, compute, threads, after, own_counted)
            y[:, c] = rows
            weighed_mean[c], weighed_var[c] = part.from_units(momentum * own_mean), part.from_units(momentum * own_var, 2)
            for vector, v, power in zip((high, low, invstd, scale, shift), found, (1, 1, -1, -1, 0), strict=True):
                vector[c] = part.from_units(v.astype(np.float64), power)
        found = high, low.astype(compute), invstd.astype(compute), scale, shift
        if running_mean is not None:
            update_running(running_mean, weighed_mean, momentum)
        if running_var is not None:
            update_running(running_var, weighed_var, momentum)
        return found

    @default_mode
    def backward(
        self, dy: Array, x: Array, dx: Array | None, mean: Array, mean_lo: Array | None, invstd: Array, scale: Array, threads: int,
        epilogue: Epilogue | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Sums of dy and of dy (x - mean), and dx where it is asked for."""
        part = extremes.far_from_one(invstd)
        if part is None:
            return self._backward(dy, x, dx, mean, mean_lo, invstd, scale, threads, epilogue)
        rows = part.of(dy), part.in_units(x), None if dx is None else part.of(x)
        vectors = part.in_units(mean), part.in_units(mean_lo), part.in_units(invstd, -1), part.in_units(scale, -1)
        after = part.epilogue(epilogue)
        sums = self._backward(dy, x, dx, mean, mean_lo, invstd, scale, threads, epilogue)  # dx may be dy or x
        sum_dy, sum_dy_xmu = self._backward(*rows, *vectors, threads, after)
        sums[0][part.channels], sums[1][part.channels] = sum_dy, part.from_units(sum_dy_xmu)
        if dx is not None:
            dx[:, part.channels] = part.from_units(np.asarray(rows[2], np.float64), -1)
        if epilogue is not None and epilogue.dresidual is not None and after is not None:
            epilogue.dresidual[:, part.channels] = after.dresidual
        return sums

    def _backward(
        self, dy: Array, x: Array, dx: Array | None, mean: Array, mean_lo: Array | None, invstd: Array, scale: Array, threads: int,
        epilogue: Epilogue | None,
    ) -> tuple[Array, Array]:  # fmt: skip
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
        """Where to keep dy before the activation, so that sums and map need not both evaluate a costly derivative.

        In place, in memory of its own: other sums would have other bits.
        """
        if not self.keeps or epilogue.activation is None or not epilogue.activation.costly or epilogue.from_output:
            return None
        if epilogue.dresidual is not None:
            return epilogue.dresidual
        inputs = (dy, x, epilogue.residual)
        return memory.empty_like(x) if any(a is not None and np.may_share_memory(dx, a) for a in inputs) else dx


@cache
def whole(kernel: dispatch.Kernel) -> Any:
    """What runs a kernel's whole calls: its module, or a composition of the module's operations."""
    module = kernel.module()
    composed = Composed(module)
    if hasattr(module, "connect"):
        module.connect(
            composed=composed, part=extremes.Part, epilogue=Epilogue, axis_of=channel_axis, threads_of=threads.for_call,
            memory_for=memory.empty_like, small=min(threads.WORTH_THREADS.values()),
        )  # fmt: skip
    return module if hasattr(module, "forward") else composed


def _kernel(dtype: DType, activation: Function) -> dispatch.Kernel:
    return dispatch.select(dtype.storage, activation is not None and activation.custom)


def _module(dtype: DType, activation: Function = None) -> Any:
    """What runs the whole calls on arrays of a dtype."""
    return whole(_kernel(dtype, activation))


def doors(x: object) -> Any:
    """The doors for plain arrays like x; None where x is not one, or its kernel has none, or a kernel is pinned."""
    return None if type(x) is not np.ndarray or dispatch.pinned() is not None else _doors(x.dtype)


@lru_cache(maxsize=64)
def _doors(dtype: np.dtype[Any]) -> Any:
    row = lookup(dtype)
    module = None if row is None else whole(dispatch.select(row.storage))
    return module if hasattr(module, "plain_forward") else None


def _dense(a: Array, v: View) -> Array:
    """`a` as (outer, channels, inner); a copy where its memory is not dense."""
    return v.of(a if v.dense else copied(a))


def copied(a: Array) -> Array:
    """A dense copy, in the same order of memory."""
    copy = memory.empty_like(a)
    copy[...] = a
    return copy


def _like(a: Array, r: Request) -> Array:
    """`a`, of the shape of x, as (outer, channels, inner) in the memory order of x."""
    va = view(a, r.axis)
    if va.dense and (va.perm, va.dims) == (r.view.perm, r.view.dims):
        return r.view.of(a)
    ordered = memory.empty_like(r.x)
    ordered[...] = a
    return r.view.of(ordered)


def _target(r: Request) -> Array:
    """The array that the kernel writes: `out` where its memory order is that of x, else a new one."""
    if r.out is not None:
        vo = view(r.out, r.axis)
        if vo.dense and (vo.perm, vo.dims) == (r.view.perm, r.view.dims):
            return r.out
    return memory.empty_like(r.x)


def _deliver(y: Array, out: Array | None) -> Array:
    if out is None or out is y:
        return y
    out[...] = y
    return out


def _counted(a: Array, axis: int, mask: Array) -> Array:
    """The positions of `a` where the mask is True, as (rows, channels, 1)."""
    return np.moveaxis(a, axis, -1)[mask][:, :, None]


def _epilogue(r: Request, residual: Array | None) -> Epilogue | None:
    """What follows the normalization; the residual lies in memory as x does."""
    return None if r.activation is None and residual is None else Epilogue(r.activation, residual)


@default_mode
def inference(r: Request, mean: Array, spread: Array, weight: Array | None, bias: Array | None, eps: float | None) -> Array:
    """Normalize with given statistics; `spread` is the variance, or with eps None one over the deviation.

    Each vector is in the type of the arithmetic, or in float64, of which no digit is lost.
    """
    y, compute = _target(r), r.dtype.compute
    if r.x.size:
        module = _module(r.dtype, r.activation)
        x, n = _dense(r.x, r.view), threads.for_call("normalize", r.x.nbytes)
        epilogue = _epilogue(r, None if r.residual is None else _like(r.residual, r))
        wide = (weight is not None and weight.dtype != compute) or (bias is not None and bias.dtype != compute)
        if not wide and mean.dtype == compute and spread.dtype == compute:
            module.inference(x, r.view.of(y), mean, None, spread, weight, bias, eps, n, epilogue)
        else:
            high, _, scale, shift = parameters(mean, spread if eps is None else deviation(spread, eps), weight, bias, compute)
            module.normalize(x, r.view.of(y), high, scale, shift, n, epilogue)
    return _deliver(y, r.out)


class Folded:
    """Mean, scale and shift of given statistics, folded once for each arithmetic type that is used."""

    def __init__(self, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float):
        self._invstd = default_mode(deviation)(var, eps)
        self._mean, self._weight, self._bias = mean, weight, bias
        self._parameters: dict[np.dtype[Any], tuple[Array, Array, Array]] = {}
        self._plain: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """What is found again when it is needed is no part of the state, and could not be pickled."""
        return self.__dict__ | {"_parameters": {}, "_plain": None}

    @property
    @default_mode
    def scale(self) -> Array:
        """Of ``y = x * scale + shift``, in float64."""
        scale: Array = self._invstd if self._weight is None else self._invstd * self._weight
        return scale.copy()

    @property
    @default_mode
    def shift(self) -> Array:
        """Of ``y = x * scale + shift``, in float64."""
        shift: Array = (0.0 if self._bias is None else self._bias) - self._mean * self.scale
        return shift

    def plain(self, x: object, residual: object, out: object) -> Array | None:
        """Normalize by one call of a kernel a plain array like the last one of `apply`; None where it is not like that."""
        if self._plain is None or dispatch.pinned() is not None:
            return None
        y: Array | None = self._plain(x, residual, out)
        return y

    @default_mode
    def parameters(self, compute: np.dtype[Any]) -> tuple[Array, Array, Array]:
        """Mean, scale and shift for arithmetic in `compute`."""
        if compute not in self._parameters:
            mean, _, scale, shift = parameters(self._mean, self._invstd, self._weight, self._bias, compute)
            self._parameters[compute] = mean, scale, shift
        return self._parameters[compute]

    @default_mode
    def apply(self, r: Request) -> Array:
        """Normalize an array."""
        y = _target(r)
        if r.x.size:
            module = _module(r.dtype, r.activation)
            vectors = self.parameters(r.dtype.compute)
            n = threads.for_call("normalize", r.x.nbytes)
            epilogue = _epilogue(r, None if r.residual is None else _like(r.residual, r))
            module.normalize(_dense(r.x, r.view), r.view.of(y), *vectors, n, epilogue)
            if dispatch.pinned() is None and hasattr(module, "prepared"):
                self._plain = module.prepared(*vectors, r.activation, r.x, r.axis)
        return _deliver(y, r.out)


@default_mode
def stats(r: Request) -> Stats:
    """Statistics of x, of which only the positions in the mask count."""
    rows = _dense(r.x, r.view) if r.mask is None else _counted(r.x, r.axis, r.mask)
    if rows.size == 0:
        return Stats.identity(r.x.shape[r.axis], r.dtype.compute)
    count = rows.shape[0] * rows.shape[2]
    module, n = _module(r.dtype), threads.for_call("stats", rows.nbytes)
    mean, mean_lo, m2 = module.stats(rows, n)
    var = m2 / count
    if (part := extremes.unusual(rows, m2 < 2.0**1000)) is not None:
        found = module.stats(part.in_units(rows), n)
        mean[part.channels], mean_lo[part.channels] = (part.from_units(v) for v in found[:2])
        var[part.channels] = part.from_units(found[2] / count, 2)
    return rounded(count, mean, mean_lo, var, r.dtype.compute)


@default_mode
def forward(
    r: Request, weight: Array | None, bias: Array | None, eps: float, running: Running, keep: bool = True
) -> tuple[Array, Saved | None]:
    """Normalize x with its own statistics; return the output and, where it is to be kept, what the backward needs."""
    compute, x = r.dtype.compute, r.x
    y = _target(r)
    vectors: tuple[Any, ...]
    if x.size == 0:
        zero = np.zeros(x.shape[r.axis], compute)
        vectors, count = (zero, None, zero.copy(), zero.copy(), zero.copy()), 0
        return _deliver(y, r.out), keep_for_backward(r, vectors, count, True, r.residual) if keep else None
    module = _module(r.dtype, r.activation)
    n = threads.for_call("forward", x.nbytes)
    residual = None if r.residual is None else _like(r.residual, r)
    kept = copied(r.residual) if keep and r.residual is not None and r.activation is not None else None
    mean, var = (_own(a, compute, r.mask is not None) for a in (running.mean, running.var))
    new = mean, var, running.momentum, running.correction
    epilogue = _epilogue(r, residual)
    if r.mask is None:
        count = x.size // x.shape[r.axis]
        vectors = module.forward(_dense(x, r.view), r.view.of(y), weight, bias, eps, *new, compute, n, epilogue)
    else:
        rows = _counted(x, r.axis, r.mask)
        count = len(rows)
        composed = Composed(_kernel(r.dtype, r.activation).module())
        vectors = composed.forward(_dense(x, r.view), r.view.of(y), weight, bias, eps, *new, compute, n, epilogue, rows)
    saved = keep_for_backward(r, vectors, count, True, kept) if keep else None
    y = _deliver(y, r.out)
    for old, moved in ((running.mean, mean), (running.var, var)):
        if old is not None and moved is not None and moved is not old:
            old[...] = moved  # nothing that can fail comes after it
    return y, saved


@default_mode
def forward_with(
    r: Request, batch: Stats, weight: Array | None, bias: Array | None, eps: float, running: Running, keep: bool = True
) -> tuple[Array, Saved | None]:
    """As `forward`, with the statistics of the batch of which x is all or a part."""
    compute, y = r.dtype.compute, _target(r)
    high, low = split(batch.mean.astype(np.float64), batch.mean_lo.astype(np.float64), compute)
    invstd = deviation(variance(batch), eps)
    vectors = high, low.astype(compute), invstd.astype(compute), *fold(low, invstd, weight, bias, compute)
    kept = copied(r.residual) if keep and r.residual is not None and r.activation is not None else None
    if r.x.size:
        epilogue = _epilogue(r, None if r.residual is None else _like(r.residual, r))
        n = threads.for_call("normalize", r.x.nbytes)
        _module(r.dtype, r.activation).normalize(_dense(r.x, r.view), r.view.of(y), high, *vectors[3:], n, epilogue)
    saved = keep_for_backward(r, vectors, batch.count, True, kept) if keep else None
    y = _deliver(y, r.out)
    if batch.count:
        for old, new in ((running.mean, batch.mean.astype(np.float64) + batch.mean_lo), (running.var, variance(batch, running.correction))):
            if old is not None:
                update_running(old, running.momentum * new, running.momentum)  # nothing that can fail comes after it
    return y, saved


def _own(a: Array | None, compute: np.dtype[Any], copy: bool) -> Array | None:
    """Running statistics as a kernel can move them: contiguous, in the type of the arithmetic or in float64."""
    if a is None or (not copy and a.flags.carray and (a.dtype == compute or a.dtype == _WIDE)):
        return a
    return np.array(a, compute if a.dtype == compute else np.float64)


def keep_for_backward(r: Request, vectors: tuple[Any, ...], count: int, training: bool, residual: Array | None) -> Saved:
    """What the backward needs, from the mean, what it rounds away, invstd, scale and shift."""
    mean, low, invstd, scale, shift = vectors
    mask = None if r.mask is None or not training else r.mask.copy()
    kept = residual if r.activation is not None else None
    return Saved(
        mean=mean, invstd=invstd, mean_lo=low, count=count, training=training, scale=scale, shift=shift, shape=r.x.shape,
        dtype=r.x.dtype, axis=r.axis, mask=mask, activation=r.activation, residual=kept, has_residual=r.residual is not None,
    )  # fmt: skip


@default_mode
def fixed(r: Request, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float) -> Saved:
    """What a backward through given statistics needs."""
    compute, invstd = r.dtype.compute, deviation(var, eps)
    high, lost, scale, shift = parameters(mean, invstd, weight, bias, compute)
    low = None if mean.dtype == compute else lost
    kept = None if r.residual is None or r.activation is None else copied(r.residual)
    count = r.x.size // max(r.x.shape[r.axis], 1)
    return keep_for_backward(r, (high, low, invstd.astype(compute), scale, shift), count, False, kept)


@default_mode
def backward(r: Request, dy: Array, saved: Saved, wanted: Collection[str], from_output: bool) -> Gradients:
    """Gradients of x, weight, bias and residual; only what is wanted is computed."""
    x, v, compute = r.x, r.view, r.dtype.compute
    active, want_sums = saved.activation is not None, "weight" in wanted or "bias" in wanted
    dx = _target(r) if "x" in wanted or ("residual" in wanted and active) else None
    dresidual = None
    if "residual" in wanted:
        # dy itself is the gradient of a sum, unless dx is about to be written over it.
        dresidual = memory.empty_like(x) if active else dy if r.out is None or not np.may_share_memory(r.out, dy) else copied(dy)
    if x.size == 0:
        nothing = np.zeros((2, x.shape[r.axis]), compute)
        return _only(wanted, None if dx is None else _deliver(dx, r.out), nothing[0], nothing[1], dresidual)
    module = _module(r.dtype, saved.activation)
    n = threads.for_call("backward", x.nbytes)
    arrays = _like(dy, r), _dense(x, v)
    mean, mean_lo, invstd, scale = saved.mean, saved.mean_lo, saved.invstd, saved.scale
    if from_output:
        # Before the activation, the output is z = (x - mean) scale + shift: statistics of z in place of those of x.
        mean = saved.shift
        invstd = (saved.invstd / saved.scale.astype(np.float64)).astype(compute)
        mean_lo = None if mean_lo is None else (mean_lo * saved.scale).astype(compute)
    epilogue = None
    if active:
        residual = None if saved.residual is None else _like(saved.residual, r)
        target = None if dresidual is None else v.of(dresidual)
        epilogue = Epilogue(saved.activation, residual, saved.scale, saved.shift, target, from_output)

    totals = None
    if saved.training and dx is not None and saved.mask is None:
        totals = module.backward(*arrays, v.of(dx), mean, mean_lo, invstd, scale, n, epilogue)
    elif want_sums or (saved.training and dx is not None):
        counted, after = arrays, epilogue and epilogue._replace(dresidual=None)
        if saved.mask is not None:
            counted = _counted(dy, r.axis, saved.mask), _counted(x, r.axis, saved.mask)
            if after is not None and saved.residual is not None:
                after = after._replace(residual=_counted(saved.residual, r.axis, saved.mask))
        totals = module.backward(*counted, None, mean, mean_lo, invstd, scale, n, after)
    if dx is not None and (saved.mask is not None or not saved.training):
        # Statistics that are constants, for all of dx or for the positions that do not count. These are found first,
        # because dx may be x or dy.
        direct = dx if not saved.training else memory.empty_like(x)
        zero = np.zeros(x.shape[r.axis], compute)
        if epilogue is None:
            module.normalize(arrays[0], v.of(direct), zero, scale, zero, n)
        else:
            module.grad_input(*arrays, v.of(direct), mean, scale, zero, zero, n, epilogue)
        if saved.mask is not None and totals is not None:
            sum_dy, sum_dy_xmu = totals
            input_gradient(module, *arrays, v.of(dx), mean, mean_lo, invstd, scale, sum_dy, sum_dy_xmu, saved.count, n, epilogue)
            np.copyto(np.moveaxis(dx, r.axis, -1), np.moveaxis(direct, r.axis, -1), where=~saved.mask[..., None])
    dweight = dbias = None
    if want_sums and totals is not None:
        dbias, dweight = totals[0].astype(compute), (totals[1] * invstd).astype(compute)
    return _only(wanted, _deliver(dx, r.out) if "x" in wanted and dx is not None else None, dweight, dbias, dresidual)


def _only(wanted: Collection[str], dx: Array | None, dweight: Array | None, dbias: Array | None, dresidual: Array | None) -> Gradients:
    return Gradients(
        dx if "x" in wanted else None, dweight if "weight" in wanted else None, dbias if "bias" in wanted else None, dresidual
    )


def centered(mean: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
    """A mean in the type of the arithmetic, and what that rounds away."""
    if mean.dtype == dtype:
        return mean, None
    high, low = split(mean, np.zeros(1), dtype)
    return high, low.astype(dtype)


@default_mode
def backward_reduce(r: Request, dy: Array, mean: Array, invstd: Array) -> tuple[Array, Array]:
    """Sums over each channel of dy and of dy (x - mean), in the type of the arithmetic."""
    compute = r.dtype.compute
    high, low = centered(mean, compute)
    if r.x.size == 0:
        return np.zeros_like(high), np.zeros_like(high)
    n = threads.for_call("backward", r.x.nbytes)
    sums = _module(r.dtype).backward(_like(dy, r), _dense(r.x, r.view), None, high, low, invstd, None, n, None)
    return sums[0].astype(compute), sums[1].astype(compute)


@default_mode
def backward_elemt(
    r: Request, dy: Array, mean: Array, invstd: Array, weight: Array | None, sum_dy: Array, sum_dy_xmu: Array, count: int
) -> Array:
    """Gradient of x from sums that may come from several processes."""
    dx = _target(r)
    if r.x.size:
        high, low = centered(mean, r.dtype.compute)
        n = threads.for_call("backward", r.x.nbytes)
        scale, _ = fold(None, invstd, weight, None, r.dtype.compute)
        arrays = _like(dy, r), _dense(r.x, r.view), r.view.of(dx)
        input_gradient(_module(r.dtype), *arrays, high, low, invstd, scale, sum_dy, sum_dy_xmu, count, n, None)
    return _deliver(dx, r.out)
