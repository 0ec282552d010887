"""Checked calls: from a Request to a kernel's whole calls, and from their results to what users get.

Who computes a whole call is decided here: the kernel itself, or `composed.ComposedKernel` from the kernel's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache, update_wrapper
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

from fastbn import activations, dispatch, extremes, memory, parts, threads
from fastbn.activations import BUILTINS, Activation, Epilogue
from fastbn.composed import ComposedKernel, deviation, fold, input_gradient, split, update_running
from fastbn.dtypes import DTYPES, DType, lookup
from fastbn.floating import default_mode
from fastbn.kernels.protocol import Affine, Running, Statistics
from fastbn.layout import Array, View, channel_axis, view
from fastbn.results import Function, Gradients, Saved, SavedParts, Stats, of_rows, rounded, variance

if TYPE_CHECKING:
    from fastbn.kernels.protocol import Calls

_WIDE = np.dtype(np.float64)
F = TypeVar("F", bound=Callable[..., Any])
Total = Callable[[Array], Array]  # adds up float64 sums of shape (2, C) over all parts of a batch


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
    threads : int or None
        How many were asked for.
    """

    x: Array
    axis: int
    dtype: DType
    view: View
    out: Array | None = None
    activation: Function = None
    residual: Array | None = None
    mask: Array | None = None
    threads: int | None = None

    def team(self, op: str, a: Array | None = None) -> int:
        """How many threads run an operation on x, or on a part of it: those asked for, or as many as are worth it."""
        return self.threads or threads.for_call(op, self.x if a is None else a)


def parameters(
    mean: Array, invstd: Array, weight: Array | None, bias: Array | None, dtype: np.dtype[Any]
) -> tuple[Array, Array, Array, Array]:
    """Mean, what it rounds away, scale and shift of given statistics, from all the digits these have."""
    high, low = split(mean.astype(np.float64), np.zeros(1), dtype)
    return high, low.astype(dtype), *fold(low, invstd, weight, bias, dtype)


def _finish_parts(
    module: Any, arrays: tuple[Array, Array, Array | None], group: int, affine: tuple[Any, Any], eps: float, centered: bool,
    activation: Function, made: Array,
) -> None:  # fmt: skip
    """Compute the parts that a plain call has left: x, y and residual are (batch, outer, channels, inner), `made` is what it found."""
    x, y, residual = arrays
    weight, bias = (None if v is None else v.reshape(-1) for v in affine)
    epilogue = None if residual is None and activation is None else Epilogue(activation, residual)
    batch, outer, channels, inner = x.shape
    shape = parts.Shape(batch, outer, channels, inner, group)
    parts.finish(module, x, y, shape, parts.Norm(weight, bias, eps, centered, made.dtype, 1), parts.Vectors(*made), epilogue)


@cache
def whole_calls(kernel: dispatch.Kernel) -> Calls:
    """What runs a kernel's whole calls: its module, or a composition of the module's operations."""
    module: Any = kernel.module()
    composed = ComposedKernel(module)
    if hasattr(module, "connect"):
        module.connect(
            composed=composed, part=extremes.Part, epilogue=Epilogue, finish_parts=_finish_parts, axis_of=channel_axis,
            threads_of=threads.for_call, memory_for=memory.empty_like, small=min(threads.WORTH_THREADS.values()),
        )  # fmt: skip
    return module if hasattr(module, "forward") else composed


def _kernel(dtype: DType, activation: Function) -> dispatch.Kernel:
    return dispatch.select(dtype.storage, activation is not None and activation.custom)


def calls_of(dtype: DType, activation: Function = None) -> Calls:
    """What runs the whole calls on arrays of a dtype."""
    return whole_calls(_kernel(dtype, activation))


def copied(a: Array) -> Array:
    """A dense copy, in the same order of memory."""
    copy = memory.empty_like(a)
    copy[...] = a
    return copy


def _direct_calls(x: Array, custom: bool) -> Any:
    """What takes the direct path for arrays like x; None where nothing does."""
    row = lookup(x.dtype)
    module: Any = None if row is None else whole_calls(dispatch.select(row.storage, custom))
    return module if isinstance(module, _calls.Calls) else getattr(module, "direct_calls", None)


try:
    from fastbn.kernels import _calls
except ImportError:  # built without a compiler
    library = None
else:
    library = _calls.Library(
        pin=dispatch.PIN, calls_of=_direct_calls, activations=(BUILTINS, activations.lookup, Activation), copied=copied,
        results=(Saved, SavedParts, Gradients, of_rows), steps=tuple(DTYPES[name].compute_step for name in _calls.STORAGES),
    )  # fmt: skip


def direct(function: F) -> F:
    """A public function whose plain calls go from its arguments straight to a kernel, where kernels were compiled."""
    return function if library is None else cast("F", update_wrapper(_calls.Direct(function, library), function))


def dense(a: Array, v: View) -> Array:
    """`a` as (outer, channels, inner); a copy where its memory is not dense."""
    return v.of(a if v.dense else copied(a))


def _lies_like_x(a: Array, r: Request) -> bool:
    own = view(a, r.axis)
    return own.dense and (own.perm, own.dims) == (r.view.perm, r.view.dims)


def _like(a: Array, r: Request) -> Array:
    """`a`, of the shape of x, as (outer, channels, inner) in the memory order of x."""
    if _lies_like_x(a, r):
        return r.view.of(a)
    ordered = memory.empty_like(r.x)
    ordered[...] = a
    return r.view.of(ordered)


def _target(r: Request) -> Array:
    """The array that the kernel writes: `out` where its memory order is that of x, else a new one."""
    return r.out if r.out is not None and _lies_like_x(r.out, r) else memory.empty_like(r.x)


def deliver(y: Array, out: Array | None) -> Array:
    """The result, in the array that the caller gets."""
    if out is None or out is y:
        return y
    out[...] = y
    return out


def _counted(a: Array, axis: int, mask: Array) -> Array:
    """The positions of `a` where the mask is True, as (rows, channels, 1)."""
    return np.moveaxis(a, axis, -1)[mask][:, :, None]


def _epilogue(r: Request) -> Epilogue | None:
    """What follows the normalization; the residual lies in memory as x does."""
    if r.activation is None and r.residual is None:
        return None
    return Epilogue(r.activation, None if r.residual is None else _like(r.residual, r))


def kept_residual(residual: Array | None, activation: Function) -> Array | None:
    """A copy of a residual, where the backward needs it: the derivative of an activation depends on it."""
    return None if residual is None or activation is None else copied(residual)


def residual_gradient(dy: Array, out: Array | None) -> Array:
    """The gradient of what was added to a sum: dy itself, unless dx is about to be written over it."""
    return dy if out is None or not np.may_share_memory(out, dy) else copied(dy)


@default_mode
def inference(r: Request, mean: Array, spread: Array, weight: Array | None, bias: Array | None, eps: float | None) -> Array:
    """Normalize with given statistics; `spread` is the variance, or with eps None one over the deviation.

    Each vector is in the type of the arithmetic, or in float64, of which no digit is lost.
    """
    y, compute = _target(r), r.dtype.compute
    if r.x.size:
        module = calls_of(r.dtype, r.activation)
        x, n = dense(r.x, r.view), r.team("normalize")
        epilogue = _epilogue(r)
        wide = (weight is not None and weight.dtype != compute) or (bias is not None and bias.dtype != compute)
        if not wide and mean.dtype == compute and spread.dtype == compute:
            module.inference(x, r.view.of(y), Statistics(mean, None, spread, eps), Affine(weight, bias), n, epilogue)
        else:
            high, _, scale, shift = parameters(mean, spread if eps is None else deviation(spread, eps), weight, bias, compute)
            module.normalize(x, r.view.of(y), high, scale, shift, n, epilogue)
    return deliver(y, r.out)


class Folded:
    """Mean, scale and shift of given statistics, folded once for each arithmetic type that is used."""

    def __init__(self, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float):
        self._invstd = default_mode(deviation)(var, eps)
        self._mean, self._weight, self._bias = mean, weight, bias
        self._parameters: dict[np.dtype[Any], tuple[Array, Array, Array]] = {}
        self.ready: tuple[Any, object] | None = None  # calls for arrays like the last one, and what was pinned then

    def __getstate__(self) -> dict[str, Any]:
        """What is found again when it is needed is no part of the state, and could not be pickled."""
        return self.__dict__ | {"_parameters": {}, "ready": None}

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
            module = calls_of(r.dtype, r.activation)
            vectors = self.parameters(r.dtype.compute)
            module.normalize(dense(r.x, r.view), r.view.of(y), *vectors, r.team("normalize"), _epilogue(r))
            if library is not None and hasattr(module, "prepared"):
                prepared = module.prepared(*vectors, r.activation, r.x, r.axis)
                self.ready = None if prepared is None else (prepared, library.pinned())
        return deliver(y, r.out)


@default_mode
def stats(r: Request, dtype: np.dtype[Any] | None = None) -> Stats:
    """Statistics of x, of which only the positions in the mask count; in the type of the arithmetic, or in float64."""
    dtype = dtype or r.dtype.compute
    rows = dense(r.x, r.view) if r.mask is None else _counted(r.x, r.axis, r.mask)
    if rows.size == 0:
        return Stats.identity(r.x.shape[r.axis], dtype)
    count = rows.shape[0] * rows.shape[2]
    module, n = calls_of(r.dtype), r.team("stats", rows)
    mean, mean_lo, m2 = module.stats(rows, n)
    var = m2 / count
    if (part := extremes.unusual(rows, m2 < 2.0**1000)) is not None:
        found = module.stats(part.in_units(rows), n)
        mean[part.channels], mean_lo[part.channels] = (part.from_units(v) for v in found[:2])
        var[part.channels] = part.from_units(found[2] / count, 2)
    return rounded(count, mean, mean_lo, var, dtype)


@default_mode
def forward(
    r: Request, weight: Array | None, bias: Array | None, eps: float, running: Running, keep: bool = True
) -> tuple[Array, Saved | None]:
    """Normalize x with its own statistics; return the output and, where it is to be kept, what the backward needs."""
    compute, x = r.dtype.compute, r.x
    y = _target(r)
    if x.size == 0:
        zero = np.zeros(x.shape[r.axis], compute)
        nothing = zero, None, zero.copy(), zero.copy(), zero.copy()
        return deliver(y, r.out), _saved(r, nothing, 0, True, kept_residual(r.residual, r.activation)) if keep else None
    module: Calls = calls_of(r.dtype, r.activation)
    n = r.team("forward")
    kept = kept_residual(r.residual, r.activation) if keep else None
    mean, var = (_own(a, compute, r.mask is not None) for a in (running.mean, running.var))
    count = x.size // x.shape[r.axis]
    if r.mask is not None:
        rows = _counted(x, r.axis, r.mask)
        module, count = ComposedKernel(_kernel(r.dtype, r.activation).module(), rows), len(rows)
    arrays, own = (dense(x, r.view), r.view.of(y)), Running(mean, var, running.momentum, running.correction)
    vectors = module.forward(*arrays, Affine(weight, bias), eps, own, compute, n, _epilogue(r))
    saved = _saved(r, vectors, count, True, kept) if keep else None
    y = deliver(y, r.out)
    for old, moved in ((running.mean, mean), (running.var, var)):  # nothing that can fail comes after it
        if old is not None and moved is not None and moved is not old:
            if _is_wider(old):
                update_running(old, moved, running.momentum)
            else:
                old[...] = moved
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
    kept = kept_residual(r.residual, r.activation) if keep else None
    if r.x.size:
        arrays, n = (dense(r.x, r.view), r.view.of(y)), r.team("normalize")
        calls_of(r.dtype, r.activation).normalize(*arrays, high, *vectors[3:], n, _epilogue(r))
    saved = _saved(r, vectors, batch.count, True, kept) if keep else None
    y = deliver(y, r.out)
    if batch.count:
        for old, new in ((running.mean, batch.mean.astype(np.float64) + batch.mean_lo), (running.var, variance(batch, running.correction))):
            if old is not None:
                update_running(old, running.momentum * new, running.momentum)  # nothing that can fail comes after it
    return y, saved


def _own(a: Array | None, compute: np.dtype[Any], copy: bool) -> Array | None:
    """Running statistics as a kernel can move them: contiguous, in the type of the arithmetic or in float64.

    In place of those with more digits it moves zeros, which gives what is to be added to them.
    """
    if a is None or (not copy and a.flags.carray and (a.dtype == compute or a.dtype == _WIDE)):
        return a
    return np.zeros(a.shape) if _is_wider(a) else np.array(a, compute if a.dtype == compute else np.float64)


def _is_wider(a: Array) -> bool:
    return bool(a.dtype.kind == "f" and a.dtype.itemsize > _WIDE.itemsize)


def _saved(r: Request, vectors: tuple[Any, ...], count: int, training: bool, kept: Array | None) -> Saved:
    """What the backward needs: the mean, what it rounds away, invstd, scale and shift; and a residual as `kept_residual` has it."""
    mean, low, invstd, scale, shift = vectors
    return Saved(
        mean=mean, invstd=invstd, mean_lo=low, count=count, training=training, scale=scale, shift=shift, shape=r.x.shape,
        dtype=r.x.dtype, axis=r.axis, mask=r.mask, activation=r.activation, residual=kept, has_residual=r.residual is not None,
    )  # fmt: skip


@default_mode
def fixed(r: Request, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float) -> Saved:
    """What a backward through given statistics needs."""
    compute, invstd = r.dtype.compute, deviation(var, eps)
    high, lost, scale, shift = parameters(mean, invstd, weight, bias, compute)
    low = None if mean.dtype == compute else lost
    kept = kept_residual(r.residual, r.activation)
    count = r.x.size // max(r.x.shape[r.axis], 1)
    return _saved(r, (high, low, invstd.astype(compute), scale, shift), count, False, kept)


def _statistics_of_output(saved: Saved) -> Statistics:
    """Of the output in place of x: before the activation, z = (x - mean) scale + shift."""
    dtype, low = saved.invstd.dtype, saved.mean_lo
    invstd = (saved.invstd / saved.scale.astype(np.float64)).astype(dtype)
    return Statistics(saved.shift, None if low is None else (low * saved.scale).astype(dtype), invstd)


class _Pass(NamedTuple):
    """The backward of one call: its arrays as kernels take them, and the four things that a kernel can find of them.

    Each method that has `dx` writes it, and the residual's gradient where that is wanted; `dx` may be x or dy.
    """

    r: Request
    dy: Array
    saved: Saved
    module: Calls
    arrays: tuple[Array, Array]  # views of dy and x
    kept: Statistics
    epilogue: Epilogue | None
    threads: int

    def whole(self, dx: Array) -> tuple[Array, Array]:
        """The gradient, and both sums."""
        return self.module.backward(*self.arrays, self.r.view.of(dx), self.kept, self.saved.scale, self.threads, self.epilogue)

    def sums(self) -> tuple[Array, Array]:
        """Over the positions that count."""
        arrays, after, mask, axis = self.arrays, self.epilogue and self.epilogue._replace(dresidual=None), self.saved.mask, self.r.axis
        if mask is not None:
            if not mask.any():
                return np.zeros(self.kept.mean.size), np.zeros(self.kept.mean.size)
            arrays = _counted(self.dy, axis, mask), _counted(self.r.x, axis, mask)
            if after is not None and self.saved.residual is not None:
                after = after._replace(residual=_counted(self.saved.residual, axis, mask))
        return self.module.backward(*arrays, None, self.kept, self.saved.scale, self.threads, after)

    def through_constants(self, dx: Array) -> None:
        """The gradient where the statistics do not depend on x."""
        to, scale, zero = self.r.view.of(dx), self.saved.scale, np.zeros_like(self.kept.mean)
        if self.epilogue is None:
            self.module.normalize(self.arrays[0], to, zero, scale, zero, self.threads)
        else:
            self.module.grad_input(*self.arrays, to, self.kept.mean, scale, (zero, zero), self.threads, self.epilogue)

    def from_sums(self, dx: Array, sums: tuple[Array, Array]) -> None:
        """The gradient where x is a part of the batch that the sums are of, or not all of x counts."""
        mask, axis, arrays = self.saved.mask, self.r.axis, (*self.arrays, self.r.view.of(dx))
        if mask is not None:  # the positions that do not count are first, because dx may be x or dy
            direct = memory.empty_like(self.r.x)
            self.through_constants(direct)
        input_gradient(self.module, arrays, self.kept, self.saved.scale, sums, self.saved.count, self.threads, self.epilogue)
        if mask is not None:
            np.copyto(np.moveaxis(dx, axis, -1), np.moveaxis(direct, axis, -1), where=~mask[..., None])


@default_mode
def backward(
    r: Request, dy: Array, saved: Saved, wanted: Collection[str], from_output: bool, total: Total | None = None
) -> Gradients:
    """Gradients of x, weight, bias and residual; only what is wanted is computed.

    Where x is a part of a batch, `total` is called exactly once for the gradient of x, whatever x holds: it may wait for
    other processes to do the same. The other gradients are of x alone.
    """
    x, compute, active = r.x, r.dtype.compute, saved.activation is not None
    want_sums = "weight" in wanted or "bias" in wanted
    dx = _target(r) if "x" in wanted or ("residual" in wanted and active) else None
    dresidual = None
    if "residual" in wanted:
        dresidual = memory.empty_like(x) if active else residual_gradient(dy, r.out)
    if not saved.training or "x" not in wanted:
        total = None
    if x.size == 0:
        nothing = np.zeros((2, x.shape[r.axis]), compute)
        if total is not None:
            total(nothing.astype(np.float64))
        return only(wanted, None if dx is None else deliver(dx, r.out), nothing[0], nothing[1], dresidual)
    kept = _statistics_of_output(saved) if from_output else Statistics(saved.mean, saved.mean_lo, saved.invstd)
    epilogue = None
    if active:
        residual = None if saved.residual is None else _like(saved.residual, r)
        target = None if dresidual is None else r.view.of(dresidual)
        epilogue = Epilogue(saved.activation, residual, saved.scale, saved.shift, target, from_output)
    arrays = _like(dy, r), dense(x, r.view)
    found = _Pass(r, dy, saved, calls_of(r.dtype, saved.activation), arrays, kept, epilogue, r.team("backward"))

    sums = None
    if dx is None or not saved.training:
        sums = found.sums() if want_sums else None  # before dx, which may be x or dy
        if dx is not None:
            found.through_constants(dx)
    elif saved.mask is None and total is None:
        sums = found.whole(dx)
    else:
        sums = found.sums()
        shared = sums if total is None else total(np.array(sums, np.float64))
        found.from_sums(dx, (shared[0], shared[1]))
    dweight = dbias = None
    if want_sums and sums is not None:
        dbias, dweight = sums[0].astype(compute), (sums[1] * kept.spread).astype(compute)
    return only(wanted, deliver(dx, r.out) if "x" in wanted and dx is not None else None, dweight, dbias, dresidual)


def only(wanted: Collection[str], dx: Array | None, dweight: Array | None, dbias: Array | None, dresidual: Array | None) -> Gradients:
    """Those gradients that are wanted; that of the residual is computed for no other reason."""
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
    n = r.team("backward")
    sums = calls_of(r.dtype).backward(_like(dy, r), dense(r.x, r.view), None, Statistics(high, low, invstd), None, n, None)
    return sums[0].astype(compute), sums[1].astype(compute)


@default_mode
def backward_elemt(
    r: Request, dy: Array, mean: Array, invstd: Array, weight: Array | None, sum_dy: Array, sum_dy_xmu: Array, count: int
) -> Array:
    """Gradient of x from sums that may come from several processes."""
    dx = _target(r)
    if r.x.size:
        high, low = centered(mean, r.dtype.compute)
        n = r.team("backward")
        scale, _ = fold(None, invstd, weight, None, r.dtype.compute)
        arrays = _like(dy, r), dense(r.x, r.view), r.view.of(dx)
        input_gradient(calls_of(r.dtype), arrays, Statistics(high, low, invstd), scale, (sum_dy, sum_dy_xmu), count, n)
    return deliver(dx, r.out)
