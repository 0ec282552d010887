"""The public functions of batch normalization. `checks` checks their arguments, `core` does the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from fastbn import checks, core
from fastbn.activations import Activation
from fastbn.checks import Channels
from fastbn.core import Request, Total
from fastbn.dtypes import DTYPES
from fastbn.kernels.protocol import Running
from fastbn.layout import Array, LayoutName, view
from fastbn.results import Gradients, Saved, Stats

ActivationName = Literal["relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh"]
ActivationLike = ActivationName | tuple[str, float | str] | Activation | Callable[[float], float] | None
Number = float | np.floating | np.integer
GRADIENTS = ("x", "weight", "bias", "residual")
USUAL = GRADIENTS[:3]
MOST_VALUES = 1e300  # per channel: any count that Stats have added up to, and none that no float holds


def _request(
    x: object, layout: object, axis: object, threads: object, activation: object = None, residual: object = None, mask: object = None
) -> tuple[Request, Channels]:
    """Check the array of a call and what goes with it; with the channels it has."""
    array, dtype = checks.array(x)
    channels = checks.channel(array, layout, axis)
    f = checks.activation(activation)
    r = None if residual is None else checks.same("residual", residual, array)
    m = checks.mask(mask, array, channels)
    n = checks.threads(threads)
    return Request(array, channels, dtype, view(array, channels), None, f, r, m, n), checks.channels_of(array, channels)


def _into(r: Request, out: object, dy: Array | None = None, /, **used: object) -> Request:
    """Check where the result goes, against all that the call uses."""
    if out is None:
        return r
    target = checks.output(out, r.x, {"dy": dy, "x": r.x, "residual": r.residual})
    checks.apart({"out": target}, {"mask": r.mask} | used)
    return r._replace(out=target)


def _more_than_one(r: Request, correction: int) -> None:
    """An unbiased variance needs more than one value per channel, unless there is nothing at all."""
    if r.x.size == 0 or (correction == 0 and r.mask is None):
        return
    count = _held(r.x, r.axis, r.mask)
    if count < 1 + correction:
        what = f"x of shape {r.x.shape}" if r.mask is None else f"x of shape {r.x.shape} with {count} True positions in mask"
        raise ValueError(f"Expected more than {correction} value per channel when training, got {what}")


def _of_batch(stats: object, r: Request, channels: Channels, correction: int) -> Stats:
    """Check the statistics of a batch of which x is all or a part."""
    if not isinstance(stats, Stats):
        raise TypeError(f"stats must be a Stats, as batch_norm_stats returns, got {type(stats).__name__}")
    if stats.mean.size != channels[0]:
        raise checks.misfit(channels, f"stats have {stats.mean.size}", stats.mean.size)
    held = _held(r.x, r.axis, r.mask)
    if stats.count < held:
        had = held if r.mask is None else f"{held} at True positions of mask"
        raise ValueError(f"stats must be of a batch that holds x: they count {stats.count} values per channel, but x has {had}")
    # With a mask, others that share the batch may have values of which none counts: they refuse it, and so must a part without any.
    if (stats.count or r.x.size or r.mask is not None) and stats.count < 1 + correction:
        raise ValueError(f"Expected more than {correction} value per channel when training, got stats with a count of {stats.count}")
    return stats


def _forward(
    r: Request, channels: Channels, vectors: tuple[object, object, object, object], numbers: tuple[object, object, object],
    training: object, stats: object, out: object, keep: bool,
) -> tuple[Array, Any]:  # fmt: skip
    """Check what `batch_norm` and `batch_norm_forward` are given, then run; `vectors` in the order of the latter."""
    weight, bias, running_mean, running_var = vectors
    momentum, eps = checks.number("momentum", numbers[0]), checks.number("eps", numbers[2], 0.0)
    correction = checks.integer("correction", numbers[1], 0, 1)
    compute = r.dtype.compute
    used = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    if checks.switch("training", training):
        w, b = checks.optional("weight", weight, channels, compute), checks.optional("bias", bias, channels, compute)
        mean, var = checks.running("running_mean", running_mean, channels), checks.running("running_var", running_var, channels)
        r = _into(r, out, **used)
        checks.apart({"running_mean": mean, "running_var": var}, {"x": r.x, "residual": r.residual, "mask": r.mask})
        running = Running(mean, var, momentum, correction)
        if keep and r.mask is not None:
            r = r._replace(mask=r.mask.copy())  # the backward's; before anything is written
        if stats is not None:
            return core.forward_with(r, _of_batch(stats, r, channels, correction), w, b, eps, running, keep)
        _more_than_one(r, correction)
        return core.forward(r, w, b, eps, running, keep)
    if stats is not None:
        raise ValueError("stats are of the batch, and training is False; give training=True, or running_mean and running_var alone")
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must be given when training is False")
    mean = checks.precise("running_mean", running_mean, channels, compute)
    var = checks.precise("running_var", running_var, channels, compute)
    w = None if weight is None else checks.precise("weight", weight, channels, compute)
    b = None if bias is None else checks.precise("bias", bias, channels, compute)
    r = _into(r, out, **used)
    r = r if r.mask is None else r._replace(mask=None)
    saved = core.fixed(r, mean, var, w, b, eps) if keep else None
    return core.inference(r, mean, var, w, b, eps), saved


@core.direct
def batch_norm_forward(
    x: Array,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    training: bool = True,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    mask: Array | None = None,
    correction: int = 1,
    stats: Stats | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Batch normalization that also returns what the backward pass needs.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        float32, float64, float16 or bfloat16, with any strides.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; None means 1 and 0.
    running_mean, running_var : ndarray of shape (C,), optional
        When training: updated in place, in any floating dtype; may be None. When not training: array_like, the statistics
        to normalize by; float64 values keep all their digits.
    training : bool
        Whether to normalize by the batch's own statistics.
    momentum : float
        Weight of the batch in the update of the running statistics, as in PyTorch.
    eps : float
        Added to the variance; not negative.
    layout : str, optional
        "NC", "NCL", "NCHW", "NCDHW", "NLC", "NHWC", "NDHWC", "channels_first" or "channels_last"; None means
        channels first.
    axis : int, optional
        The axis of the channels, instead of a layout; any axis of x.
    activation : str, tuple, function or Activation, optional
        Function to apply to the result: "relu", "relu6", "leaky_relu" (a slope of 0.01, or
        ``("leaky_relu", slope)``), "hardswish", "sigmoid", "silu", "tanh", "gelu" or "gelu_tanh" (also
        ``("gelu", "tanh")``). Or a function of a float, compiled by ``numba.njit``, or an `Activation`, which also has
        the derivative: fastbn compiles these into the Numba kernels.
    residual : ndarray of the shape and dtype of x, optional
        Added before the activation; its strides may differ from those of x.
    mask : ndarray of bool, optional
        Broadcastable to the shape of x without the channel axis. The statistics, and the sums in the gradient, leave out
        the False positions; these are normalized, too. Only used when training.
    correction : int
        1: the running variance moves towards the batch's unbiased variance, as in PyTorch, and training needs two values
        per channel. 0: it moves towards the population variance, as in ONNX, Keras and Flax, and one value per channel is
        enough.
    stats : Stats, optional
        Known statistics of the batch (with a mask: of its True positions). Training uses them instead of computing them.
        They may be those of a larger batch of which x is a part, as with several processes. Then the gradient of x
        needs sums over the larger batch: see `fastbn.sync` and `batch_norm_backward_reduce`.
    threads : int, optional
        Number of threads of this call. None means as many as `num_threads` allows, if the call is large enough.
    out : ndarray of the shape and dtype of x, optional
        Where to write the result; may be x.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : Saved
        For `batch_norm_backward`.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape does not fit or a number is out of range; if `out` is read-only, partly overlaps an array like x, or
        shares memory with any other argument; if running statistics are missing when not training; if training has too few
        values per channel; or if `stats` are given when not training, or count fewer values than x has. Nothing is modified
        in this case.

    Notes
    -----
    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``: Ioffe and Szegedy, "Batch
    Normalization", ICML 2015; the activations are those of ``torch.nn.functional``. The backward recomputes the
    derivative of the activation from x; the forward copies a residual only if that derivative depends on it.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, saved = fastbn.batch_norm_forward(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> fastbn.batch_norm_backward(y, x, saved).dbias
    array([0., 0.])
    """
    r, channels = _request(x, layout, axis, threads, activation, residual, mask)
    given = (weight, bias, running_mean, running_var), (momentum, correction, eps)
    return _forward(r, channels, *given, training, stats, out, keep=True)


@core.direct
def batch_norm(
    x: Array,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
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
    mask: Array | None = None,
    correction: int = 1,
    stats: Stats | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Batch normalization, with the arguments of ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        float32, float64, float16 or bfloat16, with any strides.
    running_mean, running_var : ndarray of shape (C,) or None
        When not training: array_like, the statistics to normalize by. When training: updated in place, or None.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; None means 1 and 0.
    training : bool
        Whether to normalize by the batch's own statistics.
    momentum : float
        Weight of the batch in the update of the running statistics, as in PyTorch.
    eps : float
        Added to the variance.
    layout, axis, activation, residual, mask, correction, stats, threads, out
        As in `batch_norm_forward`.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_forward`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
    >>> fastbn.batch_norm(x, np.array([2.0, 20.0]), np.array([1.0, 100.0]), eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """
    r, channels = _request(x, layout, axis, threads, activation, residual, mask)
    given = (weight, bias, running_mean, running_var), (momentum, correction, eps)
    return _forward(r, channels, *given, training, stats, out, keep=False)[0]


@core.direct
def batch_norm_backward(
    dy: Array,
    x: Array,
    saved: Saved,
    *,
    wrt: Sequence[str] = USUAL,
    from_output: bool = False,
    threads: int | None = None,
    out: Array | None = None,
) -> Gradients:
    """Gradients of `batch_norm_forward`.

    Parameters
    ----------
    dy : ndarray of the shape and dtype of x
        Gradient of the loss with respect to y; its strides may differ from those of x.
    x : ndarray
        The input of the forward pass.
    saved : Saved
        The second result of `batch_norm_forward`. After ``training=False`` the statistics are constants, so the
        gradient is cheaper.
    wrt : sequence of str
        Which gradients to compute: "x", "weight", "bias", "residual". If the forward was given `stats` of a larger
        batch, the gradients of weight and bias are sums over x alone, and the gradient of x is not available here.
    from_output : bool
        Whether `x` is the output of the forward instead of its input. This allows the forward to overwrite its input
        (``out=x``), so that training keeps one array per layer instead of two. It needs a forward without a residual, and
        without an activation or with a leaky_relu whose slope is above 0. The weights must not be 0. The input is
        recomputed from the output, and so only as precise as the output's dtype.
    threads : int, optional
        As in `batch_norm_forward`.
    out : ndarray of the shape and dtype of x, optional
        Where to write dx; may be dy or x.

    Returns
    -------
    Gradients
        dx and dresidual in the dtype and memory order of x; dweight and dbias in the dtype of the statistics; None
        if not in `wrt`. Without a weight or bias, they are the gradients of an implied 1 and 0. Without an
        activation, dresidual is dy itself.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape does not fit; if `wrt` has an unknown name, "residual" although there was none, or "x" although the forward
        was given statistics of more values than x has; if the forward's input cannot be recomputed from its output; or if
        `out` is read-only or partly overlaps an input.

    Notes
    -----
    With a mask, dy at False positions affects dx only directly, not through the statistics. This is the exact
    gradient if a masked loss makes dy zero there.

    Ioffe and Szegedy 2015, section 3. Gradients from the output: Rota Bulò, Porzi and Kontschieder, "In-Place
    Activated BatchNorm for Memory-Optimized Training of DNNs", CVPR 2018.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> _, saved = fastbn.batch_norm_forward(x, eps=0.0)
    >>> fastbn.batch_norm_backward(np.array([[1.0], [0.0]]), x, saved, wrt=["weight", "bias"])
    Gradients(dx=None, dweight=array([-1.]), dbias=array([1.]), dresidual=None)
    """
    return gradients(dy, x, saved, wrt, from_output, threads, out)


def gradients(
    dy: Array, x: Array, saved: Saved, wrt: Sequence[str], from_output: object, threads: object, out: Array | None,
    total: Total | None = None,
) -> Gradients:  # fmt: skip
    """As `batch_norm_backward`; `total` adds up sums over all parts of the batch, of which x is one."""
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what batch_norm_forward returned, got {type(saved).__name__}")
    r = _of_saved(x, saved)._replace(threads=checks.threads(threads))
    dy = checks.same("dy", dy, r.x)
    wanted = checks.names("wrt", wrt, GRADIENTS)
    held = _held(r.x, r.axis, saved.mask)
    if "x" in wanted and saved.training and total is None and saved.count != held:
        had = held if saved.mask is None else f"{held} where saved.mask is True"
        raise ValueError(
            f"saved has the statistics of {saved.count} values per channel, of which x has {had}: the gradient of x needs sums over "
            "all of them. Use fastbn.sync.batch_norm_backward; or add up the sums of batch_norm_backward_reduce, and pass them to "
            "batch_norm_backward_elemt"
        )
    checks.gradients(saved, wanted, out)
    if checks.switch("from_output", from_output):
        _can_be_inverted(saved, r.x.dtype)
    kept = {f"saved.{name}": getattr(saved, name) for name in ("mean", "mean_lo", "invstd", "scale", "shift", "mask", "residual")}
    return core.backward(_into(r, out, dy, **kept), dy, saved, wanted, bool(from_output), total)


def _of_saved(x: object, saved: Saved) -> Request:
    """Check x against what a forward saved, and that itself: kernels read it without looking."""
    array, dtype = checks.array(x)
    checks.like_saved(array, saved.shape, saved.dtype)
    axis = checks.channel(array, None, saved.axis)
    channels = checks.channels_of(array, axis)
    for name in ("mean", "invstd", "mean_lo", "scale", "shift"):
        v = getattr(saved, name)
        if v is None and name == "mean_lo":
            continue
        checks.saved_vector(name, v, (channels.number,), channels.words, dtype.compute)
    checks.switch("saved.training", saved.training)
    checks.integer("saved.count", saved.count, 0, MOST_VALUES)
    checks.saved_after(saved, array)
    mask = checks.mask(saved.mask, array, axis)
    if saved.training and saved.count < (held := _held(array, axis, mask)):
        if mask is not None:
            raise ValueError(f"saved.mask has {held} True positions, but saved.count is {saved.count}")
        raise ValueError(f"saved.count is {saved.count}, but x has {held} values per channel")
    return Request(array, axis, dtype, view(array, axis))


def _held(x: Array, axis: int, mask: Array | None = None) -> int:
    """How many values per channel of x count."""
    if mask is not None:
        return int(np.count_nonzero(mask)) if x.size else 0
    return int(x.size // max(x.shape[axis], 1))


def _can_be_inverted(saved: Saved, dtype: np.dtype[Any]) -> None:
    """Check that the forward's input can be had from its output, to some digits at least."""
    if not saved.invertible:
        raise ValueError(
            "from_output needs a forward without a residual, and without an activation or with a leaky_relu whose slope is "
            f"above 0, got {saved.activation} {'with' if saved.has_residual else 'without'} a residual"
        )
    if saved.count and (infinite := np.isinf(saved.invstd)).any():
        c = int(np.argmax(infinite))
        raise ValueError(
            f"from_output needs channels that vary, or an eps above 0, to compute the input from the output: the standard deviation "
            f"of channel {c} is 0, or one over it is too large for {saved.invstd.dtype}"
        )
    with np.errstate(all="ignore"):
        weight = np.abs(saved.scale / saved.invstd.astype(np.float64))
        # The output is known to its last place, which is one of the bias; the input times the weight must be larger.
        lost = np.isfinite(saved.shift) & (np.abs(saved.shift) * DTYPES[dtype.name].step >= weight / 8)
    if lost.any() and saved.count:
        c = int(np.argmax(lost))
        raise ValueError(
            f"from_output needs weights that are not 0, and not tiny compared with the biases, to compute the input from the "
            f"output: weight[{c}] is {weight[c]:g}, bias[{c}] about {saved.shift[c]:g}"
        )
    if saved.activation is not None and saved.count:
        # Of what it makes smaller than the dtype's smallest number, nothing is left.
        with np.errstate(all="ignore"):
            lost = np.spacing(np.zeros((), dtype)) / np.float64(saved.activation.parameter) >= weight / 8
        if lost.any():
            c = int(np.argmax(lost))
            raise ValueError(
                f"from_output needs a slope of leaky_relu that is not tiny, to compute the input from the output in {dtype}: "
                f"the slope is {saved.activation.parameter:g}, weight[{c}] {weight[c]:g}"
            )


@core.direct
def batch_norm_stats(
    x: Array | Iterable[Array], *, layout: LayoutName | None = None, axis: int | None = None, mask: Array | None = None,
    threads: int | None = None,
) -> Stats:  # fmt: skip
    """Count, mean and population variance of each channel.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C); or an iterable of these
        An iterable of batches with the same channels may be larger than memory: it is read once, one batch at a time.
    layout, axis
        As in `batch_norm_forward`.
    mask : ndarray of bool, optional
        True at the positions that count; broadcastable to the shape of x without the channel axis. Only for a single
        array. If you have several, merge ``batch_norm_stats(x, mask=mask)`` of each.
    threads : int, optional
        As in `batch_norm_forward`.

    Returns
    -------
    Stats
        It can be merged with the statistics of other batches. Without values, count, mean and var are 0.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype or shape; if an iterable is empty or comes with a mask; or if its batches have
        different numbers of channels.

    Notes
    -----
    The variance is never computed as ``E[x^2] - E[x]^2``, but by sums around a pivot over fixed tiles, merged in float64.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> fastbn.batch_norm_stats(x)
    Stats(count=2, mean=array([2., 5.]), var=array([1., 0.]))
    >>> fastbn.batch_norm_stats(x[i : i + 1] for i in range(2))
    Stats(count=2, mean=array([2., 5.]), var=array([1., 0.]))
    """
    # What can turn into an array is meant as one.
    if not isinstance(x, Iterable) or isinstance(x, (str, bytes, bytearray, Mapping)) or hasattr(type(x), "__array__"):
        return core.stats(_request(x, layout, axis, threads, mask=mask)[0])
    if mask is not None:
        raise ValueError("mask goes with a single array x; merge the statistics of each batch and its mask")
    checks.threads(threads)  # no fault of any batch
    found: Stats | None = None
    for i, batch in enumerate(x):
        try:
            r, channels = _request(batch, layout, axis, threads)
        except (TypeError, ValueError) as error:
            raise type(error)(f"item {i} of x: {error}") from None
        if found is not None and found.mean.size != channels[0]:
            raise ValueError(f"item {i} of x: {channels.words}, but those before it have {found.mean.size}")
        found = core.stats(r) if found is None else found.merge(core.stats(r))
    if found is None:
        raise ValueError("x is an iterable without any array, so that its channels are not known")
    return found


def wide_stats(x: Array, layout: LayoutName | None, axis: int | None, mask: Array | None, threads: int | None) -> Stats:
    """As `batch_norm_stats` of an array, in float64 whatever its dtype: a variance has twice the range of a value."""
    return core.stats(_request(x, layout, axis, threads, mask=mask)[0], np.dtype(np.float64))


@core.direct
def batch_norm_elemt(
    x: Array,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize with given statistics: ``(x - mean) * invstd * weight + bias``.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
    mean, invstd : array_like of shape (C,)
        Mean, and one over the standard deviation. float64 values keep all their digits, even if x is float32.
    weight, bias, layout, axis, activation, residual, threads, out
        As in `batch_norm_forward`.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_forward`.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.batch_norm_elemt(np.array([[1.0], [3.0]]), [2.0], [0.5])
    array([[-0.5],
           [ 0.5]])
    """
    r, channels = _request(x, layout, axis, threads, activation, residual)
    compute = r.dtype.compute
    m, scale = checks.precise("mean", mean, channels, compute), checks.precise("invstd", invstd, channels, compute)
    w = None if weight is None else checks.precise("weight", weight, channels, compute)
    b = None if bias is None else checks.precise("bias", bias, channels, compute)
    return core.inference(_into(r, out, mean=mean, invstd=invstd, weight=weight, bias=bias), m, scale, w, b, None)


def batch_norm_backward_reduce(
    dy: Array, x: Array, mean: ArrayLike, invstd: ArrayLike, *, layout: LayoutName | None = None, axis: int | None = None,
    threads: int | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Compute the two sums per channel that the gradients need.

    Parameters
    ----------
    dy, x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        Gradient of y, and the input of the forward pass.
    mean, invstd : array_like of shape (C,)
        The statistics that the forward used.
    layout, axis, threads
        As in `batch_norm_forward`.

    Returns
    -------
    sum_dy, sum_dy_xmu : ndarray of shape (C,)
        Sums of dy and of ``dy * (x - mean)``. The first is dbias; the second times invstd is dweight.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype or shape.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> fastbn.batch_norm_backward_reduce(np.ones_like(x), x, [2.0], [1.0])
    (array([2.]), array([0.]))
    """
    r, channels = _request(x, layout, axis, threads)
    dy = checks.same("dy", dy, r.x)
    compute = r.dtype.compute
    return core.backward_reduce(r, dy, checks.precise("mean", mean, channels, compute), checks.vector("invstd", invstd, channels, compute))


def batch_norm_backward_elemt(
    dy: Array,
    x: Array,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None,
    sum_dy: ArrayLike,
    sum_dy_xmu: ArrayLike,
    count: int,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of x from the sums of `batch_norm_backward_reduce`.

    Parameters
    ----------
    dy, x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
    mean, invstd : array_like of shape (C,)
        The statistics that the forward used.
    weight : array_like of shape (C,) or None
    sum_dy, sum_dy_xmu : array_like of shape (C,)
        Summed over all processes that share the statistics.
    count : int
        Number of values per channel that the statistics count, over all processes.
    layout, axis, threads, out
        As in `batch_norm_forward`.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape or value.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> dy = np.array([[1.0], [0.0]])
    >>> sums = fastbn.batch_norm_backward_reduce(dy, x, [2.0], [1.0])
    >>> fastbn.batch_norm_backward_elemt(dy, x, [2.0], [1.0], None, *sums, 2)
    array([[0.],
           [0.]])
    """
    r, channels = _request(x, layout, axis, threads)
    dy = checks.same("dy", dy, r.x)
    compute, wide = r.dtype.compute, np.dtype(np.float64)
    m, scale = checks.precise("mean", mean, channels, compute), checks.vector("invstd", invstd, channels, compute)
    w = checks.optional("weight", weight, channels, compute)
    sums = checks.vector("sum_dy", sum_dy, channels, wide), checks.vector("sum_dy_xmu", sum_dy_xmu, channels, wide)
    n = checks.integer("count", count, 1 if r.x.size else 0, MOST_VALUES)
    r = _into(r, out, dy, mean=mean, invstd=invstd, weight=weight, sum_dy=sum_dy, sum_dy_xmu=sum_dy_xmu)
    return core.backward_elemt(r, dy, m, scale, w, *sums, n)
