"""Instance, group, layer and RMS normalization: the statistics are those of a channel, a group of channels, or a row.

The functions have the names and arguments of ``torch.nn.functional``. `parts` does the work, with the kernels of batch
normalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastbn import checks, core, functional, parts, parts_gradient
from fastbn.composed import update_running
from fastbn.dtypes import lookup
from fastbn.floating import default_mode
from fastbn.functional import GRADIENTS, USUAL, ActivationLike, Number
from fastbn.layout import Array, LayoutName
from fastbn.norm_calls import OF_ROWS, Call, on_backward, on_channels, on_rows, row_vector, targets
from fastbn.results import Gradients, Saved, SavedParts


class _Given(NamedTuple):
    """A call as a user gives it.

    Attributes
    ----------
    divided
        What divides x into parts: a normalized_shape; or the number of groups or None, layout and axis.
    """

    kind: str
    x: Array
    divided: Any
    weight: Any
    bias: Any
    eps: Any
    activation: Any
    residual: Any
    threads: Any
    out: Any


def _forward(call: Call, norm: parts.Norm, keep: bool, weight: object, bias: object) -> tuple[Array, Any]:
    """Run a checked call, and keep SavedParts or None; weight and bias are what was given, of which `norm` may have copies."""
    if call.out is not None:
        checks.apart({"out": call.out}, {"weight": weight, "bias": bias})
    y, memory_of_y = call.target(call.out)
    kept = core.kept_residual(call.residual, call.activation) if keep else None
    empty = np.zeros((call.shape.batch, call.shape.parts), norm.compute)
    found = parts.Vectors(empty, empty, empty)
    if call.x.size:
        module = core.calls_of(call.dtype, call.activation)
        residual = None if call.residual is None else call.dense(call.residual)
        found = parts.forward(module, call.dense(call.x), memory_of_y, call.shape, norm, call.activation, residual)
    y = call.deliver(y, memory_of_y, call.out)
    if not keep:
        return y, None
    w, b = (None if v is None else v.copy() for v in (norm.weight, norm.bias))
    return y, SavedParts(
        call.kind, call.x.shape, call.x.dtype, call.axis, call.shape.group, found.mean, found.low, found.invstd, w, b,
        call.activation, kept, call.residual is not None,
    )  # fmt: skip


def _backward(kind: str, dy: object, x: object, saved: object, wrt: object, out: object, threads: object) -> Gradients:
    """Check the arguments of a backward, then run it."""
    if not isinstance(saved, SavedParts) or not isinstance(saved.kind, str) or saved.kind != kind:
        got = f"one of {checks.short(saved.kind, str(saved.kind))}" if isinstance(saved, SavedParts) else type(saved).__name__
        raise TypeError(f"saved must be what {kind}_forward returned, got {got}")
    wanted = checks.names("wrt", wrt, GRADIENTS)
    call, given, target = on_backward(kind, dy, x, saved, wanted, out, threads, saved.group)
    shape, compute = call.shape, call.dtype.compute
    divided = shape.batch, shape.parts
    for name in ("mean", "mean_lo", "invstd"):
        checks.saved_vector(name, getattr(saved, name), divided, f"x has parts of shape {divided}", compute)
    for name in ("weight", "bias"):
        if (v := getattr(saved, name)) is not None:
            checks.saved_vector(name, v, (shape.channels,), f"there are {shape.channels} weights", compute)
    checks.apart({"out": target}, {f"saved.{name}": getattr(saved, name) for name in ("mean", "mean_lo", "invstd", "weight", "bias")})
    return _gradients(call, given, saved, wanted, target)


def _gradients(call: Call, dy: Array, saved: SavedParts, wanted: tuple[str, ...], out: Array | None) -> Gradients:
    """Run a checked backward."""
    shape, compute = call.shape, call.dtype.compute
    dx, written, dresidual, written_residual = targets(call, dy, wanted, out)
    zero = np.zeros(shape.channels, compute)
    sums = parts_gradient.Sums(zero, zero.copy())
    if call.x.size:
        norm = parts.Norm(saved.weight, saved.bias, 0.0, call.kind != "rms_norm", compute, call.threads)
        vectors = parts.Vectors(saved.mean, saved.mean_lo, saved.invstd)
        kernels = core.calls_of(call.dtype, call.activation)
        arrays = call.dense(dy), call.dense(call.x), written
        sums = parts_gradient.backward(kernels, *arrays, shape, norm, vectors, call.undone(saved.residual, written_residual))
    if dresidual is not None and written_residual is not None:
        dresidual = call.deliver(dresidual, written_residual, None)
    if dx is not None and written is not None:
        dx = call.deliver(dx, written, out if "x" in wanted else None)
    dweight, dbias = sums
    if call.kind in OF_ROWS:
        dweight, dbias = (v.reshape(call.x.shape[call.axis :]) for v in sums)
    return core.only(wanted, dx, dweight, dbias, dresidual)


@core.direct
def instance_norm_forward(
    x: Array,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, SavedParts | Saved]:
    """Instance normalization that also returns what the backward pass needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, layout, axis, activation, residual, threads, out
        As in `instance_norm`.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : SavedParts, or Saved if `use_input_stats` is False
        For `instance_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `instance_norm`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[[1.0, 3.0]], [[10.0, 30.0]]])
    >>> y, saved = fastbn.instance_norm_forward(x, eps=0.0)
    >>> y
    array([[[-1.,  1.]],
           [[-1.,  1.]]])
    >>> fastbn.instance_norm_backward(y, x, saved).dweight
    array([4.])
    """
    given = _Given("instance_norm", x, (None, layout, axis), weight, bias, eps, activation, residual, threads, out)
    return _instance_norm(given, (running_mean, running_var), use_input_stats, momentum, True)


@default_mode
def _instance_norm(given: _Given, running: tuple[Any, Any], use_input_stats: Any, momentum: Any, keep: bool) -> tuple[Array, Any]:
    """Check, run, and move the running statistics."""
    running_mean, running_var = running
    kind, x, divided, weight, bias, eps, activation, residual, threads, out = given
    call, channels = on_channels(kind, x, divided, activation, residual, out, threads)
    if not checks.switch("use_input_stats", use_input_stats):
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var must be given when use_input_stats is False")
        options = {"axis": call.axis, "activation": activation, "residual": residual, "threads": threads}
        if keep:
            return functional.batch_norm_forward(x, weight, bias, *running, training=False, eps=eps, out=out, **options)
        return functional.batch_norm(x, *running, weight, bias, eps=eps, out=out, **options), None
    new, e = checks.number("momentum", momentum), checks.number("eps", eps, 0.0)
    w, b = (checks.optional(name, v, channels, call.dtype.compute) for name, v in (("weight", weight), ("bias", bias)))
    mean, var = checks.running("running_mean", running_mean, channels), checks.running("running_var", running_var, channels)
    if mean is not None or var is not None:
        read = {"x": call.x, "residual": call.residual, "weight": weight, "bias": bias}
        checks.apart({"running_mean": mean, "running_var": var}, {"out": call.out} | read)
    if call.x.size and call.shape.values == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got x of shape {call.x.shape}")
    tracked = mean is not None or var is not None
    if tracked and call.x.size:
        moments = parts.running(core.calls_of(call.dtype), call.dense(call.x), call.shape, new, call.threads)
    y, saved = _forward(call, parts.Norm(w, b, e, True, call.dtype.compute, call.threads), keep, weight, bias)
    if tracked and call.x.size:
        for old, found in zip((mean, var), moments, strict=True):
            if old is not None:
                update_running(old, found, new)
    return y, saved


@core.direct
def instance_norm(
    x: Array,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Instance normalization, with the arguments of ``torch.nn.functional.instance_norm``.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        float32, float64, float16 or bfloat16, with any strides. Each channel of each image has its own statistics.
    running_mean, running_var : ndarray of shape (C,), optional
        Updated in place, towards the mean of the images' statistics. If `use_input_stats` is False: array_like, the
        statistics to normalize by.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; None means 1 and 0.
    use_input_stats : bool
        Whether to normalize by the statistics of x.
    momentum : float
        Weight of the new values in the update of the running statistics, as in PyTorch.
    eps : float
        Added to the variance; not negative.
    layout, axis, activation, residual, threads, out
        As in `batch_norm_forward`.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape does not fit, a number is out of range, `out` partly overlaps another argument, or an image has one
        value per channel. Nothing is modified in this case.

    Notes
    -----
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.instance_norm(np.array([[[1.0, 3.0]], [[10.0, 30.0]]]), eps=0.0)
    array([[[-1.,  1.]],
           [[-1.,  1.]]])
    """
    given = _Given("instance_norm", x, (None, layout, axis), weight, bias, eps, activation, residual, threads, out)
    return _instance_norm(given, (running_mean, running_var), use_input_stats, momentum, False)[0]


@core.direct
def instance_norm_backward(
    dy: Array, x: Array, saved: SavedParts | Saved, *, wrt: Sequence[str] = USUAL, threads: int | None = None, out: Array | None = None
) -> Gradients:
    """Gradients of `instance_norm_forward`.

    Parameters
    ----------
    dy : ndarray of the shape and dtype of x
        Gradient of the loss with respect to y.
    x : ndarray
        The input of the forward pass.
    saved : SavedParts or Saved
        The second result of the forward.
    wrt : sequence of str
        Which gradients: "x", "weight", "bias", "residual".
    threads : int, optional
        Number of threads of this call.
    out : ndarray of the shape and dtype of x, optional
        Where to write dx; may be dy or x.

    Returns
    -------
    Gradients

    Raises
    ------
    TypeError, ValueError
        If `saved` belongs to another call, an array does not match x, or `wrt` has another name.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[[1.0, 3.0]]])
    >>> _, saved = fastbn.instance_norm_forward(x, eps=0.0)
    >>> fastbn.instance_norm_backward(np.ones_like(x), x, saved).dbias
    array([2.])
    """
    if isinstance(saved, Saved):
        return functional.batch_norm_backward(dy, x, saved, wrt=wrt, threads=threads, out=out)
    return _backward("instance_norm", dy, x, saved, wrt, out, threads)


@core.direct
def group_norm_forward(
    x: Array,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: Number = 1e-5,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, SavedParts]:
    """Group normalization that also returns what the backward pass needs.

    Parameters
    ----------
    x, num_groups, weight, bias, eps, layout, axis, activation, residual, threads, out
        As in `group_norm`.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : SavedParts
        For `group_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, saved = fastbn.group_norm_forward(x, 2, eps=0.0)
    >>> fastbn.group_norm_backward(y, x, saved).dweight
    array([1., 1., 1., 1.])
    """
    return _group_norm(_Given("group_norm", x, (num_groups, layout, axis), weight, bias, eps, activation, residual, threads, out), True)


def _group_norm(given: _Given, keep: bool) -> tuple[Array, Any]:
    if given.divided[0] is None:
        raise TypeError("num_groups must be an int, got None")
    kind, x, divided, weight, bias, eps, activation, residual, threads, out = given
    call, channels = on_channels(kind, x, divided, activation, residual, out, threads)
    w, b = (checks.optional(name, v, channels, call.dtype.compute) for name, v in (("weight", weight), ("bias", bias)))
    if 0 < call.x.size == call.shape.parts:  # one image, as in PyTorch
        raise ValueError(f"Expected more than 1 value per group when training, got x of shape {call.x.shape} and num_groups={divided[0]}")
    norm = parts.Norm(w, b, checks.number("eps", eps, 0.0), True, call.dtype.compute, call.threads)
    return _forward(call, norm, keep, weight, bias)


@core.direct
def group_norm(
    x: Array,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: Number = 1e-5,
    *,
    layout: LayoutName | None = None,
    axis: int | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Group normalization, with the arguments of ``torch.nn.functional.group_norm``.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        float32, float64, float16 or bfloat16, with any strides.
    num_groups : int
        Number of groups into which the channels of an image are divided; each group has its own statistics.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; None means 1 and 0.
    eps : float
        Added to the variance; not negative.
    layout, axis, activation, residual, threads, out
        As in `batch_norm_forward`.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape does not fit, `num_groups` does not divide the number of channels, a number is out of range, `out` partly
        overlaps another argument, or x is one image whose groups have a single value each. Nothing is modified in this case.

    Notes
    -----
    Wu and He, "Group Normalization", ECCV 2018.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    return _group_norm(_Given("group_norm", x, (num_groups, layout, axis), weight, bias, eps, activation, residual, threads, out), False)[0]


@core.direct
def group_norm_backward(
    dy: Array, x: Array, saved: SavedParts, *, wrt: Sequence[str] = USUAL, threads: int | None = None, out: Array | None = None
) -> Gradients:
    """Gradients of `group_norm_forward`.

    Parameters
    ----------
    dy, x, saved, wrt, threads, out
        As in `instance_norm_backward`.

    Returns
    -------
    Gradients

    Raises
    ------
    TypeError, ValueError
        As `instance_norm_backward`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> _, saved = fastbn.group_norm_forward(x, 2, eps=0.0)
    >>> fastbn.group_norm_backward(np.ones_like(x), x, saved).dx
    array([[0., 0., 0., 0.]])
    """
    return _backward("group_norm", dy, x, saved, wrt, out, threads)


@core.direct
def layer_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: Number = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, SavedParts]:
    """Layer normalization that also returns what the backward pass needs.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps, activation, residual, threads, out
        As in `layer_norm`.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : SavedParts
        For `layer_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> y, saved = fastbn.layer_norm_forward(x, 2, eps=0.0)
    >>> fastbn.layer_norm_backward(y, x, saved).dweight
    array([2., 2.])
    """
    return _layer_norm(_Given("layer_norm", x, normalized_shape, weight, bias, eps, activation, residual, threads, out), True)


def _layer_norm(given: _Given, keep: bool) -> tuple[Array, Any]:
    kind, x, normalized_shape, weight, bias, eps, activation, residual, threads, out = given
    call, shape = on_rows(kind, x, normalized_shape, activation, residual, out, threads)
    compute = call.dtype.compute
    w, b = row_vector("weight", weight, shape, compute), row_vector("bias", bias, shape, compute)
    norm = parts.Norm(w, b, checks.number("eps", eps, 0.0), kind == "layer_norm", compute, call.threads)
    return _forward(call, norm, keep, weight, bias)


@core.direct
def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: Number = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Layer normalization, with the arguments of ``torch.nn.functional.layer_norm``.

    Parameters
    ----------
    x : ndarray of shape (*rows, *normalized_shape)
        float32, float64, float16 or bfloat16, with any strides.
    normalized_shape : int or sequence of int
        The sizes of the last axes of x, over which the statistics of a row are computed.
    weight, bias : array_like of shape normalized_shape, optional
        Scale and shift of each element of a row; None means 1 and 0.
    eps : float
        Added to the variance; not negative.
    activation, residual, threads, out
        As in `batch_norm_forward`.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape does not fit, a number is out of range, or `out` partly overlaps another argument. Nothing is
        modified in this case.

    Notes
    -----
    Ba, Kiros and Hinton, "Layer Normalization", 2016.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, [1.0, 2.0], eps=0.0)
    array([[-1.,  2.],
           [-1.,  2.]])
    """
    return _layer_norm(_Given("layer_norm", x, normalized_shape, weight, bias, eps, activation, residual, threads, out), False)[0]


@core.direct
def layer_norm_backward(
    dy: Array, x: Array, saved: SavedParts, *, wrt: Sequence[str] = USUAL, threads: int | None = None, out: Array | None = None
) -> Gradients:
    """Gradients of `layer_norm_forward`.

    Parameters
    ----------
    dy, x, saved, wrt, threads, out
        As in `instance_norm_backward`.

    Returns
    -------
    Gradients
        dweight and dbias have the shape normalized_shape.

    Raises
    ------
    TypeError, ValueError
        As `instance_norm_backward`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> _, saved = fastbn.layer_norm_forward(x, 2, eps=0.0)
    >>> fastbn.layer_norm_backward(np.ones_like(x), x, saved).dbias
    array([2., 2.])
    """
    return _backward("layer_norm", dy, x, saved, wrt, out, threads)


def _eps(eps: Any, x: object) -> Any:
    """What is added to a mean square: where it is None, the difference of 1 and the next number of the arithmetic, as in PyTorch."""
    row = lookup(x.dtype) if eps is None and isinstance(x, np.ndarray) else None
    return eps if row is None else row.compute_step


@core.direct
def rms_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: Number | None = None,
    *,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, SavedParts]:
    """Normalization by the root mean square that also returns what the backward pass needs.

    Parameters
    ----------
    x, normalized_shape, weight, eps, activation, residual, threads, out
        As in `rms_norm`.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : SavedParts
        For `rms_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `rms_norm`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[3.0, -3.0]])
    >>> y, saved = fastbn.rms_norm_forward(x, 2, eps=0.0)
    >>> fastbn.rms_norm_backward(y, x, saved).dweight
    array([1., 1.])
    """
    return _layer_norm(_Given("rms_norm", x, normalized_shape, weight, None, _eps(eps, x), activation, residual, threads, out), True)


@core.direct
def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: Number | None = None,
    *,
    activation: ActivationLike = None,
    residual: Array | None = None,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Normalization by the root mean square, with the arguments of ``torch.nn.functional.rms_norm``.

    Parameters
    ----------
    x : ndarray of shape (*rows, *normalized_shape)
        float32, float64, float16 or bfloat16, with any strides.
    normalized_shape : int or sequence of int
        The sizes of the last axes of x, over which the mean square of a row is computed.
    weight : array_like of shape normalized_shape, optional
        Scale of each element of a row; None means 1.
    eps : float, optional
        Added to the mean square. None means the machine epsilon of float64 for float64, else that of float32, as in PyTorch.
    activation, residual, threads, out
        As in `batch_norm_forward`.

    Returns
    -------
    ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        As `layer_norm`.

    Notes
    -----
    Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.rms_norm(np.array([[3.0, -3.0]]), 2, [1.0, 2.0], eps=0.0)
    array([[ 1., -2.]])
    """
    return _layer_norm(_Given("rms_norm", x, normalized_shape, weight, None, _eps(eps, x), activation, residual, threads, out), False)[0]


@core.direct
def rms_norm_backward(
    dy: Array, x: Array, saved: SavedParts, *, wrt: Sequence[str] = ("x", "weight"), threads: int | None = None, out: Array | None = None
) -> Gradients:
    """Gradients of `rms_norm_forward`.

    Parameters
    ----------
    dy, x, saved, threads, out
        As in `instance_norm_backward`.
    wrt : sequence of str
        Which gradients: "x", "weight", "residual".

    Returns
    -------
    Gradients
        dweight has the shape normalized_shape.

    Raises
    ------
    TypeError, ValueError
        As `instance_norm_backward`.

    Examples
    --------
    >>> import fastbn
    >>> x = np.array([[3.0, -3.0]])
    >>> _, saved = fastbn.rms_norm_forward(x, 2, eps=0.0)
    >>> fastbn.rms_norm_backward(np.ones_like(x), x, saved).dweight
    array([ 1., -1.])
    """
    wanted = checks.names("wrt", wrt, GRADIENTS)
    if "bias" in wanted:
        raise ValueError("wrt names 'bias', but rms_norm has none")
    return _backward("rms_norm", dy, x, saved, wanted, out, threads)
