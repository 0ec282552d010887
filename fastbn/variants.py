"""Variants of batch normalization for small and large batches: batch-channel norm, batch renorm, ghost batch norm.

Each consists of `batch_norm_forward` or `parts`, and of algebra on vectors of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastbn import checks, core, extremes, functional, memory, norm_calls, parts, parts_gradient
from fastbn.activations import Epilogue
from fastbn.composed import split, update_running
from fastbn.floating import default_mode
from fastbn.functional import USUAL, ActivationLike, Number
from fastbn.layout import Array, LayoutName, view
from fastbn.results import Function, Gradients, MixedGradients, Saved, variance


@dataclass(frozen=True, eq=False)
class SavedMix:
    """What `batch_channel_norm_forward` saves. It is equal only to itself.

    Attributes
    ----------
    shape, dtype, axis
        Of the forward's x: its shape, its dtype, and the axis of its channels.
    training : bool
        Whether the batch's statistics are its own.
    mean, mean_lo, invstd : ndarray of shape (C,)
        Of the batch, or the running ones, in float64.
    layer_mean, layer_mean_lo, layer_invstd : ndarray of shape (N, 1)
        Of each image, in float64.
    weight, bias, mix : ndarray of shape (C,)
        Copies, in float64.
    activation, residual, has_residual
        As in `Saved`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axis: int
    training: bool
    mean: Array
    mean_lo: Array
    invstd: Array
    layer_mean: Array
    layer_mean_lo: Array
    layer_invstd: Array
    weight: Array
    bias: Array
    mix: Array
    activation: Function
    residual: Array | None
    has_residual: bool

    @default_mode
    def vectors(self, compute: np.dtype[Any]) -> tuple[Array, Array, Array]:
        """Center, scale and shift of each channel of each image, one after the other.

        Each center is between the batch's mean and the image's: where the two are far apart, it is near to that which counts;
        where one is not finite, it is the other, so that sums over the batch are of the channel alone, and those over an image of it.
        """
        of_batch, of_layer = self.mix * self.invstd, (1 - self.mix) * self.layer_invstd
        share = np.nan_to_num(np.abs(of_batch) / (np.abs(of_batch) + np.abs(of_layer)), nan=0.5)
        centers = share * self.mean + (1 - share) * self.layer_mean
        centers = np.where(np.isfinite(self.mean), centers, self.layer_mean)
        centers = np.where(np.isfinite(self.layer_mean), centers, self.mean).astype(compute)
        from_batch, from_layer = self.offsets(centers)
        scale = self.weight * (of_batch + of_layer)
        shift = self.weight * (of_batch * from_batch + of_layer * from_layer) + self.bias
        return centers.ravel(), scale.astype(compute).ravel(), shift.astype(compute).ravel()

    def offsets(self, centers: Array) -> tuple[Array, Array]:
        """How far the centers are from the batch's mean and from the image's."""
        return (centers - self.mean) - self.mean_lo, (centers - self.layer_mean) - self.layer_mean_lo


@default_mode
def batch_channel_norm_forward(
    x: Array,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    mix: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    correction: int = 1,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, SavedMix]:
    """Batch-channel normalization that also returns what the backward pass needs.

    Parameters
    ----------
    x, running_mean, running_var, mix, weight, bias, training, momentum, eps
        As in `batch_channel_norm`.
    layout, axis, activation, residual, correction, threads, out
        As in `batch_channel_norm`.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : SavedMix
        For `batch_channel_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `batch_channel_norm`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[[1.0, 3.0]], [[10.0, 30.0]]])
    >>> y, saved = fastbn.batch_channel_norm_forward(x, None, None, [0.0], training=True, eps=0.0)
    >>> y
    array([[[-1.,  1.]],
           [[-1.,  1.]]])
    >>> fastbn.batch_channel_norm_backward(np.ones_like(x), x, saved).dmix
    array([0.])
    """
    call, channels = norm_calls.on_channels("batch_channel_norm", x, (1, layout, axis), activation, residual, out, threads)
    compute, wide = call.dtype.compute, np.dtype(np.float64)
    one = np.ones(channels[0])
    given = {"mix": mix, "weight": one if weight is None else weight, "bias": 0 * one if bias is None else bias}
    m, w, b = (checks.vector(name, v, channels, wide).copy() for name, v in given.items())
    new, e = checks.number("momentum", momentum), checks.number("eps", eps, 0.0)
    unbiased = checks.integer("correction", correction, 0, 1)
    trained = checks.switch("training", training)
    mean, var = running_mean, running_var
    if trained:
        mean, var = checks.running("running_mean", running_mean, channels), checks.running("running_var", running_var, channels)
        checks.apart({"running_mean": mean, "running_var": var}, {"out": call.out, "x": call.x, "residual": call.residual})
        count = call.x.size // max(channels[0], 1)
        if call.x.size and count < 1 + unbiased:
            raise ValueError(f"Expected more than {unbiased} value per channel when training, got x of shape {call.x.shape}")
    elif mean is None or var is None:
        raise ValueError("running_mean and running_var must be given when training is False")
    checks.apart({"out": call.out}, {"mix": mix, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var})
    saved, stats = _mixed(call, (mean, var), (w, b, m), e, trained)
    y, written = call.target(call.out)
    if call.x.size:
        r = None if call.residual is None else call.dense(call.residual)
        after = None if r is None and call.activation is None else Epilogue(call.activation, r)
        kernels, vectors = core.calls_of(call.dtype, call.activation), saved.vectors(compute)
        parts.normalize(kernels, call.dense(call.x), written, call.shape, vectors, call.threads, after)
    y = call.deliver(y, written, call.out)
    if stats is not None and stats.count:
        for old, found in ((mean, stats.mean + stats.mean_lo), (var, variance(stats, unbiased))):
            if isinstance(old, np.ndarray):
                update_running(old, new * found, new)
    return y, saved


def _mixed(
    call: norm_calls.Call, running: tuple[Any, Any], affine: tuple[Array, Array, Array], eps: float, training: bool
) -> tuple[SavedMix, Any]:
    """The statistics of a forward, and in training those of the batch as Stats."""
    axis, wide, stats = call.axis, np.dtype(np.float64), None
    if training:
        stats = functional.wide_stats(call.x, None, axis, None, call.threads)
        mean, low, var = stats.mean, stats.mean_lo, variance(stats)
        invstd = 1 / np.sqrt(var + eps)
        usual = extremes.are_usual(var * stats.count, var + eps, invstd, wide)
        if call.x.size and not usual.all():
            found = functional.batch_norm_forward(call.x, eps=eps, axis=axis, correction=0)[1]  # which finds it in units
            invstd = np.where(usual, invstd, found.invstd)
    else:
        channels, names = checks.channels_of(call.x, axis), ("running_mean", "running_var")
        mean, var = (checks.vector(name, v, channels, wide) for name, v in zip(names, running, strict=True))
        low, invstd = np.zeros_like(mean), 1 / np.sqrt(var + eps)
    nothing = np.zeros((call.shape.batch, 1))
    of_layer = nothing, nothing.copy(), np.full_like(nothing, 1 / np.sqrt(eps))
    if call.x.size:
        own, lost, spread, units = parts.moments(core.calls_of(call.dtype), call.dense(call.x), call.shape, eps, call.threads)
        inverse = np.ldexp(1 / np.sqrt(spread + np.ldexp(eps, -2 * units)), -units)
        of_layer = np.ldexp(own, units), np.ldexp(lost, units), inverse
    high, rest = split(mean, low, call.dtype.compute)
    kept = core.kept_residual(call.residual, call.activation)
    return SavedMix(
        call.x.shape, call.x.dtype, axis, training, high.astype(wide), rest, invstd, *of_layer, *affine, call.activation,
        kept, call.residual is not None,
    ), stats  # fmt: skip


def batch_channel_norm(
    x: Array,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    mix: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    correction: int = 1,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Batch-channel normalization: a learned mix of batch and layer normalization.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        float32, float64, float16 or bfloat16, with any strides.
    running_mean, running_var : ndarray of shape (C,) or None
        As in `batch_norm`, for the batch-normalization part.
    mix : array_like of shape (C,)
        Share of the batch's statistics for each channel: 1 is batch normalization, 0 is layer normalization over the
        channels and positions of an image.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; None means 1 and 0.
    training : bool
        Whether to use the batch's own statistics. Each image always uses its own.
    momentum, eps, layout, axis, activation, residual, correction, threads, out
        As in `batch_norm`.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape does not fit, a number is out of range, `out` overlaps another argument, or training has too few values
        per channel. Nothing is modified in this case.

    Notes
    -----
    ``y = weight * (mix * (x - batch mean) / batch deviation + (1 - mix) * (x - layer mean) / layer deviation) + bias``:
    Khaled, Li, Ning and He, "BCN: Batch Channel Normalization for Image Classification", arXiv 2312.00596.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[[1.0, 3.0]], [[10.0, 30.0]]])
    >>> fastbn.batch_channel_norm(x, None, None, [0.0], training=True, eps=0.0)
    array([[[-1.,  1.]],
           [[-1.,  1.]]])
    """
    given = (running_mean, running_var, mix, weight, bias, training, momentum, eps)
    options: dict[str, Any] = {"activation": activation, "residual": residual, "correction": correction, "threads": threads, "out": out}
    return batch_channel_norm_forward(x, *given, layout=layout, axis=axis, **options)[0]


@default_mode
def batch_channel_norm_backward(
    dy: Array, x: Array, saved: SavedMix, *, wrt: Sequence[str] = (*USUAL, "mix"), threads: int | None = None, out: Array | None = None
) -> MixedGradients:
    """Gradients of `batch_channel_norm_forward`.

    Parameters
    ----------
    dy, x, threads, out
        As in `instance_norm_backward`.
    saved : SavedMix
        The second result of `batch_channel_norm_forward`.
    wrt : sequence of str
        Which gradients: "x", "weight", "bias", "residual", "mix".

    Returns
    -------
    MixedGradients
        Gradients, with dmix.

    Raises
    ------
    TypeError, ValueError
        As `instance_norm_backward`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[[1.0, 3.0]], [[10.0, 30.0]]])
    >>> _, saved = fastbn.batch_channel_norm_forward(x, None, None, [0.5], training=True, eps=0.0)
    >>> fastbn.batch_channel_norm_backward(np.ones_like(x), x, saved).dbias
    array([4.])
    """
    if not isinstance(saved, SavedMix):
        raise TypeError(f"saved must be what batch_channel_norm_forward returned, got {type(saved).__name__}")
    wanted = checks.names("wrt", wrt, (*functional.GRADIENTS, "mix"))
    call, given, target = norm_calls.on_backward("batch_channel_norm", dy, x, saved, wanted, out, threads, 1)
    checks.switch("saved.training", saved.training)
    images, channels, wide = len(call.x), checks.channels_of(call.x, call.axis), np.dtype(np.float64)
    of_channels, of_images = ("mean", "mean_lo", "invstd", "weight", "bias", "mix"), ("layer_mean", "layer_mean_lo", "layer_invstd")
    for name in of_channels:
        checks.saved_vector(name, getattr(saved, name), (channels.number,), channels.words, wide)
    for name in of_images:
        checks.saved_vector(name, getattr(saved, name), (images, 1), f"x has {images} images", wide)
    checks.apart({"out": target}, {f"saved.{name}": getattr(saved, name) for name in of_channels + of_images})
    dx, dresidual, sums = _mixed_gradients(call, given, saved, wanted, target)
    compute = call.dtype.compute
    named = zip(("weight", "bias", "mix"), sums, strict=True)
    of_weight, of_bias, of_mix = (v.astype(compute) if name in wanted else None for name, v in named)
    found = MixedGradients(dx, of_weight, of_bias, dresidual)
    found.dmix = of_mix
    return found


def _mixed_gradients(
    call: norm_calls.Call, dy: Array, saved: SavedMix, wanted: tuple[str, ...], out: Array | None
) -> tuple[Array | None, Array | None, tuple[Array, Array, Array]]:
    """Gradients of x and of the residual; and of weight, bias and mix."""
    shape, compute = call.shape, call.dtype.compute
    dx, written, dresidual, written_residual = norm_calls.targets(call, dy, wanted, out)
    if not call.x.size:
        zero = np.zeros(shape.channels)
        return (dx if "x" in wanted else None), dresidual, (zero, zero, zero)
    w, m, s, t = saved.weight, saved.mix, saved.invstd, saved.layer_invstd
    norm = parts.Norm(None, None, 0.0, True, compute, call.threads)
    kernels = core.calls_of(call.dtype, saved.activation)
    maps = parts_gradient.Maps(kernels, shape, norm, *saved.vectors(compute), call.undone(saved.residual, written_residual))
    from_batch, from_layer = saved.offsets(maps.means.reshape(shape.batch, shape.channels))
    arrays = call.dense(dy), call.dense(call.x)
    first, second = maps.sums(*arrays)
    of_batch, of_layer = s * (second + from_batch * first), t * (second + from_layer * first)  # sums of dz times what was normalized
    if written is not None:
        shares = w * m, w * (1 - m)
        values = shape.outer * shape.inner
        b0, b1 = ((shares[0] * v).sum(0) / (shape.batch * values) if saved.training else 0 * s for v in (first, of_batch))
        l0, l1 = ((shares[1] * v).sum(1, keepdims=True) / (shape.channels * values) for v in (first, of_layer))
        larger = np.maximum(s, t)
        factor = np.where((larger > 0) & np.isfinite(larger), larger, 1.0)
        batch_share, layer_share = s / factor, t / factor
        slope = -(batch_share * (s * b1) + layer_share * (t * l1))
        offset = -(batch_share * (b0 + s * from_batch * b1) + layer_share * (l0 + t * from_layer * l1))
        maps.gradient(*arrays, written, (offset, slope, factor), maps.scale)
    if dresidual is not None and written_residual is not None:
        dresidual = call.deliver(dresidual, written_residual, None)
    if dx is not None and written is not None:
        dx = call.deliver(dx, written, out if "x" in wanted else None)
    sums = (m * of_batch + (1 - m) * of_layer).sum(0), first.sum(0), (w * (of_batch - of_layer)).sum(0)
    return (dx if "x" in wanted else None), dresidual, sums


@dataclass(frozen=True, eq=False)
class SavedRenorm:
    """What `batch_renorm_forward` saves. It is equal only to itself.

    Attributes
    ----------
    saved : Saved
        Of the batch normalization that it is made of.
    r, d : ndarray of shape (C,), or None
        The correction of the batch's statistics, in float64; None for given statistics.
    """

    saved: Saved
    r: Array | None
    d: Array | None


@default_mode
def batch_renorm_forward(
    x: Array,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    rmax: Number = 3.0,
    dmax: Number = 5.0,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    correction: int = 1,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, SavedRenorm]:
    """Batch renormalization that also returns what the backward pass needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps, rmax, dmax
        As in `batch_renorm`.
    layout, axis, activation, residual, correction, threads, out
        As in `batch_renorm`.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : SavedRenorm
        For `batch_renorm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `batch_renorm`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = fastbn.batch_renorm_forward(x, np.zeros(1), np.ones(1), training=True, eps=0.0)
    >>> y
    array([[1.],
           [3.]])
    >>> saved.r, saved.d
    (array([1.]), array([2.]))
    """
    checks.apart({"out": out}, {"weight": weight, "bias": bias})
    most_r, most_d = checks.number("rmax", rmax, 1.0), checks.number("dmax", dmax, 0.0)
    options: dict[str, Any] = {"momentum": momentum, "eps": eps, "training": training, "correction": correction}
    options |= {"layout": layout, "axis": axis, "activation": activation, "residual": residual, "threads": threads, "out": out}
    if not checks.switch("training", training):
        y, saved = functional.batch_norm_forward(x, weight, bias, running_mean, running_var, **options)
        return y, SavedRenorm(saved, None, None)
    options["stats"] = stats = functional.wide_stats(x, layout, axis, None, threads)
    array, dtype = checks.array(x)
    at = checks.channel(array, layout, axis)
    channels = checks.channels_of(array, at)
    e, wide = checks.number("eps", eps, 0.0), np.dtype(np.float64)
    mean, var = checks.vector("running_mean", running_mean, channels, wide), checks.vector("running_var", running_var, channels, wide)
    w = np.ones_like(mean) if weight is None else checks.vector("weight", weight, channels, wide)
    b = np.zeros_like(mean) if bias is None else checks.vector("bias", bias, channels, wide)
    of_batch = variance(stats)
    r, d = correct((stats.mean, stats.mean_lo, of_batch), (mean, var), e, (most_r, most_d))
    scale, shift = w * r, b + w * d
    usual = extremes.are_usual(of_batch * stats.count, of_batch + e, scale / np.sqrt(of_batch + e), dtype.compute) | ~np.isfinite(w)
    if stats.count < 2 or (not usual.all() and extremes.unusual(core.dense(array, view(array, at)), usual, e) is not None):
        options["stats"] = None  # it finds them itself: in units, or it says what x lacks
    y, saved = functional.batch_norm_forward(x, scale, shift, running_mean, running_var, **options)
    return y, SavedRenorm(saved, r, d)


@default_mode
def correct(
    batch: tuple[Array, Array, Array], running: tuple[Array, Array], eps: float, most: tuple[float, float]
) -> tuple[Array, Array]:
    """The factor r and the offset d from the batch's mean, what that rounds away, and variance to the running ones, within bounds."""
    mean, low, var = batch
    deviation = np.sqrt(running[1] + eps)
    r = np.clip(np.sqrt(var + eps) / deviation, 1 / most[0], most[0])
    return r, np.clip(((mean - running[0]) + low) / deviation, -most[1], most[1])


def batch_renorm(
    x: Array,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    rmax: Number = 3.0,
    dmax: Number = 5.0,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    correction: int = 1,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Batch renormalization: the batch's statistics, corrected towards the running statistics.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        float32, float64, float16 or bfloat16, with any strides.
    running_mean, running_var : ndarray of shape (C,)
        Running statistics; `running_var` is a variance. In training they are used first and then updated.
    weight, bias, training, momentum, eps, layout, axis, activation, residual, correction, threads, out
        As in `batch_norm`.
    rmax, dmax : float
        Bounds of the correction: of its factor, at least 1, and of its offset, at least 0. 1 and 0 give batch
        normalization; training should begin with these.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`, and if a bound is out of range.

    Notes
    -----
    ``r = clip(batch deviation / running deviation, 1 / rmax, rmax)`` and ``d = clip((batch mean - running mean) / running
    deviation, -dmax, dmax)``, which the gradient treats as constants; ``y = weight * (normalized * r + d) + bias``. Ioffe,
    "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", NeurIPS 2017.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.batch_renorm(np.array([[1.0], [3.0]]), np.zeros(1), np.ones(1), training=True, eps=0.0)
    array([[1.],
           [3.]])
    """
    given = (running_mean, running_var, weight, bias, training, momentum, eps)
    options: dict[str, Any] = {"activation": activation, "residual": residual, "correction": correction, "threads": threads, "out": out}
    return batch_renorm_forward(x, *given, rmax=rmax, dmax=dmax, layout=layout, axis=axis, **options)[0]


@default_mode
def batch_renorm_backward(
    dy: Array, x: Array, saved: SavedRenorm, *, wrt: Sequence[str] = USUAL, threads: int | None = None, out: Array | None = None
) -> Gradients:
    """Gradients of `batch_renorm_forward`; they treat the correction as a constant.

    Parameters
    ----------
    dy, x, wrt, threads, out
        As in `instance_norm_backward`.
    saved : SavedRenorm
        The second result of `batch_renorm_forward`.

    Returns
    -------
    Gradients

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> _, saved = fastbn.batch_renorm_forward(x, np.zeros(1), np.ones(1), training=True, eps=0.0)
    >>> fastbn.batch_renorm_backward(np.ones_like(x), x, saved).dweight
    array([4.])
    """
    if not isinstance(saved, SavedRenorm):
        raise TypeError(f"saved must be what batch_renorm_forward returned, got {type(saved).__name__}")
    wanted = checks.names("wrt", wrt, functional.GRADIENTS)
    for name, v in (("saved.r", saved.r), ("saved.d", saved.d)):
        if v is not None and isinstance(saved.saved, Saved):
            channels = checks.Channels(saved.saved.mean.size, f"saved has {saved.saved.mean.size} channels")
            checks.vector(name, v, channels, np.dtype(np.float64))
    if (saved.r is None) != (saved.d is None):
        raise ValueError("saved.r and saved.d must both be vectors, or both be None")
    both = saved.r is not None and "weight" in wanted and "bias" not in wanted
    g = functional.batch_norm_backward(dy, x, saved.saved, wrt=(*wanted, "bias") if both else wanted, threads=threads, out=out)
    if saved.r is None or saved.d is None or g.dweight is None or g.dbias is None or "weight" not in wanted:
        return g
    dweight = (saved.r * g.dweight + saved.d * g.dbias).astype(g.dweight.dtype)
    return g._replace(dweight=dweight, dbias=g.dbias if "bias" in wanted else None)


@dataclass(frozen=True, eq=False)
class SavedGhosts:
    """What `ghost_batch_norm_forward` saves. It is equal only to itself.

    Attributes
    ----------
    saved : tuple of Saved
        Of each virtual batch.
    sizes : tuple of int
        Images of each.
    """

    saved: tuple[Saved, ...]
    sizes: tuple[int, ...]


@default_mode
def ghost_batch_norm_forward(
    x: Array,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    virtual_batch_size: int = 32,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    correction: int = 1,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, SavedGhosts]:
    """Ghost batch normalization that also returns what the backward pass needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps, virtual_batch_size
        As in `ghost_batch_norm`.
    layout, axis, activation, residual, correction, threads, out
        As in `ghost_batch_norm`.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : SavedGhosts
        For `ghost_batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `ghost_batch_norm`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0], [3.0], [10.0], [30.0]])
    >>> y, saved = fastbn.ghost_batch_norm_forward(x, None, None, training=True, eps=0.0, virtual_batch_size=2)
    >>> saved.sizes
    (2, 2)
    """
    size = checks.integer("virtual_batch_size", virtual_batch_size, 1)
    array, _ = checks.array(x)
    at = norm_calls.channel_of_images(array, layout, axis)
    options: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps, "correction": correction}
    options |= {"axis": at, "activation": activation, "threads": threads}
    r = None if residual is None else checks.same("residual", residual, array)
    target = checks.output(out, array, {"x": array, "residual": r})
    if not checks.switch("training", training) or not array.size:
        given = (weight, bias, running_mean, running_var)
        y, saved = functional.batch_norm_forward(array, *given, residual=r, out=target, **options)
        return y, SavedGhosts((saved,), (len(array),))
    sizes = tuple(len(a) for a in np.array_split(np.empty(len(array), np.bool_), -(-len(array) // size)))
    if min(sizes) * (array.size // len(array) // array.shape[at]) < 1 + checks.integer("correction", correction, 0, 1):
        raise ValueError(
            f"Expected more than {correction} value per channel when training, got virtual batches of {min(sizes)} images from x of "
            f"shape {array.shape}"
        )
    channels = checks.channels_of(array, at)
    moved = {name: checks.running(name, v, channels) for name, v in (("running_mean", running_mean), ("running_var", running_var))}
    checks.apart(moved, {"x": array, "residual": r, "weight": weight, "bias": bias})  # which the next virtual batch needs
    checks.apart({"out": target}, {"weight": weight, "bias": bias, **moved})
    y = memory.empty_like(array)  # not yet `out`, which may be x: the second virtual batch may fail
    mean, var = (v if v is None else v.copy() for v in moved.values())
    found = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        own = slice(end - size, end)
        rest = None if r is None else r[own]
        call = functional.batch_norm_forward(array[own], weight, bias, mean, var, residual=rest, out=y[own], **options)
        found.append(call[1])
    kept = SavedGhosts(tuple(found), sizes)
    for old, new in zip(moved.values(), (mean, var), strict=True):
        if old is not None and new is not None:
            old[...] = new
    return core.deliver(y, target), kept


def ghost_batch_norm(
    x: Array,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    virtual_batch_size: int = 32,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    correction: int = 1,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Batch normalization of virtual batches: a large batch is normalized in parts, each with its own statistics.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        float32, float64, float16 or bfloat16, with any strides.
    running_mean, running_var, weight, bias, training, momentum, eps, layout, axis, activation, residual, correction, threads, out
        As in `batch_norm`; each virtual batch updates the running statistics, in order.
    virtual_batch_size : int
        The most images of a virtual batch. The number of virtual batches is N / `virtual_batch_size`, rounded up; all have
        about the same size.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`, and if the virtual batches are too small.

    Notes
    -----
    Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization gap in large batch training of
    neural networks", NeurIPS 2017, algorithm 1.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0], [3.0], [10.0], [30.0]])
    >>> fastbn.ghost_batch_norm(x, None, None, training=True, eps=0.0, virtual_batch_size=2)
    array([[-1.],
           [ 1.],
           [-1.],
           [ 1.]])
    """
    given = (running_mean, running_var, weight, bias, training, momentum, eps)
    options: dict[str, Any] = {"activation": activation, "residual": residual, "correction": correction, "threads": threads, "out": out}
    return ghost_batch_norm_forward(x, *given, virtual_batch_size=virtual_batch_size, layout=layout, axis=axis, **options)[0]


@default_mode
def ghost_batch_norm_backward(
    dy: Array, x: Array, saved: SavedGhosts, *, wrt: Sequence[str] = USUAL, threads: int | None = None, out: Array | None = None
) -> Gradients:
    """Gradients of `ghost_batch_norm_forward`.

    Parameters
    ----------
    dy, x, wrt, threads, out
        As in `instance_norm_backward`.
    saved : SavedGhosts
        The second result of `ghost_batch_norm_forward`.

    Returns
    -------
    Gradients

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0], [3.0], [10.0], [30.0]])
    >>> _, saved = fastbn.ghost_batch_norm_forward(x, None, None, training=True, eps=0.0, virtual_batch_size=2)
    >>> fastbn.ghost_batch_norm_backward(np.ones_like(x), x, saved).dbias
    array([4.])
    """
    if not isinstance(saved, SavedGhosts):
        raise TypeError(f"saved must be what ghost_batch_norm_forward returned, got {type(saved).__name__}")
    array, _ = checks.array(x)
    given = checks.same("dy", dy, array)
    if not isinstance(saved.saved, tuple) or not saved.saved or not all(isinstance(one, Saved) for one in saved.saved):
        raise TypeError(f"saved.saved must be a tuple of Saved, one of each virtual batch, got {checks.short(saved.saved)}")
    if len(saved.saved) == 1:
        return functional.batch_norm_backward(given, array, saved.saved[0], wrt=wrt, threads=threads, out=out)
    wanted = checks.names("wrt", wrt, functional.GRADIENTS)
    norm_calls.check_virtual_batches(array, saved, wanted, out)
    target = checks.output(out, array, {"dy": given, "x": array})
    dx = memory.empty_like(array) if "x" in wanted else None  # not yet `out`, as in the forward
    dresidual = memory.empty_like(array) if "residual" in wanted else None
    found = []
    for size, end, one in zip(saved.sizes, accumulate(saved.sizes), saved.saved, strict=True):
        own = slice(end - size, end)
        to = None if dx is None else dx[own]
        g = functional.batch_norm_backward(given[own], array[own], one, wrt=wanted, threads=threads, out=to)
        if dresidual is not None:
            dresidual[own] = g.dresidual
        found.append(g._replace(dresidual=None))
    vectors = {"weight": [g.dweight for g in found], "bias": [g.dbias for g in found]}
    sums = [np.sum(np.array(v, np.float64), 0).astype(saved.saved[0].mean.dtype) if name in wanted else None for name, v in vectors.items()]
    return Gradients(None if dx is None else core.deliver(dx, target), sums[0], sums[1], dresidual)
