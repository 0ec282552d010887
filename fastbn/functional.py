"""The functions users call: argument checks and documentation. The work is in `core`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastbn import activations, core
from fastbn.activations import Activation
from fastbn.core import Function, Gradients, Saved, Stats
from fastbn.dtypes import DTYPES, DType, lookup
from fastbn.layout import Array, channel_axis

ActivationLike = str | tuple[str, float | str] | Activation | Callable[[float], float] | None


def _array(name: str, a: object) -> Array:
    if not isinstance(a, np.ndarray):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(a).__name__}")
    return a


def _input(x: object, layout: str | None) -> tuple[Array, int, DType]:
    """Check x; return it with the axis of its channels and its row in the table of dtypes."""
    x = _array("x", x)
    dtype = lookup(x.dtype)
    if dtype is None:
        came = x.dtype.str if x.dtype.kind == "f" else x.dtype
        raise TypeError(f"x must have dtype {', '.join(DTYPES)} in native byte order, got {came}")
    return x, channel_axis(layout, x.ndim), dtype


def _same(name: str, a: object, x: Array) -> Array:
    """Check an array that must be like x."""
    a = _array(name, a)
    if a.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {x.shape}, got {a.shape}")
    if a.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {a.dtype}")
    return a


def _vector(name: str, a: object, x: Array, axis: int, dtype: np.dtype[Any] | None = None) -> Array:
    """Check a vector of channels; return it contiguous and, where given, in `dtype`."""
    if type(a) is np.ndarray and a.dtype is dtype and a.ndim == 1 and len(a) == x.shape[axis] and a.flags.c_contiguous and a.flags.aligned:
        return a  # as it nearly always is; the rest takes longer than a small call
    v = np.asarray(a)
    if v.shape != (x.shape[axis],):
        raise ValueError(f"x has {x.shape[axis]} channels on axis {axis} but {name} has shape {v.shape}")
    if v.dtype.kind not in "fiu" and lookup(v.dtype) is None:
        raise TypeError(f"{name} must hold real numbers, got dtype {v.dtype}")
    return np.require(v, dtype, ["C", "A"])


def _optional(name: str, a: object, x: Array, axis: int, dtype: np.dtype[Any]) -> Array | None:
    return None if a is None else _vector(name, a, x, axis, dtype)


def _running(name: str, a: object, x: Array, axis: int) -> Array | None:
    """Check running statistics that training will update in place."""
    if a is None:
        return None
    a = _array(name, a)
    _vector(name, a, x, axis, a.dtype)
    if lookup(a.dtype) is None:
        raise TypeError(f"{name} is updated in place and must have a floating dtype, got {a.dtype}")
    if not a.flags.writeable:
        raise ValueError(f"{name} is updated in place but is read-only")
    return a


def _output(out: object, x: Array, /, **inputs: Array | None) -> Array | None:
    """Check `out`: like x, writable, and either exactly one of the inputs or apart from all of them."""
    if out is None:
        return None
    out = _same("out", out, x)
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if 0 in out.strides and out.size and any(n > 1 and s == 0 for n, s in zip(out.shape, out.strides, strict=True)):
        raise ValueError(f"out has several elements in one place of memory: shape {out.shape}, strides {out.strides}")
    for name, a in inputs.items():
        if a is None or a is out or not np.may_share_memory(out, a):
            continue
        if (a.ctypes.data, a.strides, a.shape, a.dtype) != (out.ctypes.data, out.strides, out.shape, out.dtype) and _overlap(out, a):
            raise ValueError(f"out overlaps {name} in part; give {name} itself or memory of its own")
    return out


def _overlap(a: Array, b: Array) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=10_000))  # type: ignore[arg-type]  # any int, says NumPy's documentation
    except np.exceptions.TooHardError:
        return True


def _mask(mask: object, x: Array, axis: int) -> Array | None:
    """Check a mask; return it with the shape of x without the channel axis."""
    if mask is None:
        return None
    mask = _array("mask", mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, got dtype {mask.dtype}")
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"mask must broadcast to {shape}, the shape of x without the channel axis, got {mask.shape}") from None


def _number(name: str, value: object) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _activation(activation: object) -> Function:
    return None if activation is None else activations.lookup(activation)


def _residual(residual: object, x: Array) -> Array | None:
    return None if residual is None else _same("residual", residual, x)


def _more_than_one(x: Array, axis: int, mask: Array | None) -> None:
    """Training needs a variance, and so more than one value per channel, unless there is nothing at all."""
    if x.size == 0:
        return
    count = x.size // x.shape[axis] if mask is None else int(np.count_nonzero(mask))
    if count < 2:
        what = f"x of shape {x.shape}" if mask is None else f"x of shape {x.shape} with {count} True positions in mask"
        raise ValueError(f"Expected more than 1 value per channel when training, got {what}")


def _train(
    x: Array, axis: int, dtype: DType, weight: Array | None, bias: Array | None, running_mean: Array | None,
    running_var: Array | None, momentum: float, eps: float, activation: Function, residual: Array | None,
    mask: Array | None, out: Array | None,
) -> tuple[Array, Array, Array | None, Array, Array, Array, int]:  # fmt: skip
    """Make the checks of training, then train."""
    mean, var = _running("running_mean", running_mean, x, axis), _running("running_var", running_var, x, axis)
    _more_than_one(x, axis, mask)
    return core.forward(x, axis, dtype, weight, bias, mean, var, momentum, eps, activation, residual, mask, out)


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    mask: Array | None = None,
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
        Statistics to use when not training, to update in place when training (the unbiased variance, as in
        PyTorch). May be None when training.
    training : bool
        Whether to use the batch's own statistics.
    momentum : float
        Weight of the batch in the update of the running statistics, as in PyTorch.
    eps : float
        Added to the variance.
    layout : str, optional
        "NC", "NCL", "NCHW", "NCDHW", "NLC", "NHWC", "NDHWC", "channels_first" or "channels_last"; None means
        channels first.
    activation : str, tuple, function or Activation, optional
        Function that is applied to the result: "relu", "relu6", "leaky_relu" (a slope of 0.01, or
        ``("leaky_relu", slope)``), "hardswish", "sigmoid", "silu", "tanh", "gelu" or "gelu_tanh" (also
        ``("gelu", "tanh")``). Or a function of a float, compiled by ``numba.njit``, or an `Activation`, which knows
        the derivative too: these become part of the Numba kernels.
    residual : ndarray of the shape and dtype of x, optional
        Added before the activation; its strides may differ from those of x.
    mask : ndarray of bool, optional
        Broadcastable to the shape of x without the channel axis. False positions are left out of the statistics
        and of the sums in the gradient; they are normalized all the same. Only used when training.
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
        If a shape does not fit, if `out` is read-only or overlaps an input in part, if running statistics are
        missing when not training, or if training has one value per channel. Nothing is modified then.

    Notes
    -----
    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``: Ioffe and Szegedy, "Batch
    Normalization", ICML 2015; the activations are those of ``torch.nn.functional``. The backward computes the
    activation's derivative anew from x: no mask and no copy is kept.

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
    if activation is None and residual is None and mask is None and training:
        found = core.plain("forward", x, layout, out, weight, bias, running_mean, running_var, momentum, 1, eps)
        if found is not None:
            y, mean, mean_lo, invstd, scale, shift, count = found
            return y, Saved(mean, invstd, mean_lo, count, True, scale, shift, layout, None, None, None)
    x, axis, dtype = _input(x, layout)
    compute = dtype.compute
    w = _optional("weight", weight, x, axis, compute)
    b = _optional("bias", bias, x, axis, compute)
    momentum, eps = _number("momentum", momentum), _number("eps", eps)
    f, r = _activation(activation), _residual(residual, x)
    m = _mask(mask, x, axis)
    out = _output(out, x, x=x, residual=r)
    if training:
        y, mean, mean_lo, invstd, scale, shift, count = _train(
            x, axis, dtype, w, b, running_mean, running_var, momentum, eps, f, r, m, out
        )
        return y, Saved(mean, invstd, mean_lo, count, True, scale, shift, layout, m, f, r)
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must be given when training is False")
    mean, var = _vector("running_mean", running_mean, x, axis, compute), _vector("running_var", running_var, x, axis, compute)
    y = core.inference(x, axis, dtype, mean, None, var, w, b, eps, f, r, out)
    invstd, scale, shift = core.fixed(var, eps, w, b)
    count = x.size // max(x.shape[axis], 1)
    return y, Saved(mean.copy(), invstd, None, count, False, scale, shift, layout, None, f, r)


def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    mask: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Batch normalization, with the arguments of ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        float32, float64, float16 or bfloat16, with any strides.
    running_mean, running_var : ndarray of shape (C,) or None
        Statistics to use when not training, to update in place when training (the unbiased variance, as in
        PyTorch). May be None when training.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; None means 1 and 0.
    training : bool
        Whether to use the batch's own statistics.
    momentum : float
        Weight of the batch in the update of the running statistics, as in PyTorch.
    eps : float
        Added to the variance.
    layout, activation, residual, mask, out
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
    if activation is None and residual is None and mask is None:
        y: Array | None
        if training:
            found = core.plain("forward", x, layout, out, weight, bias, running_mean, running_var, momentum, 1, eps)
            y = found and found[0]
        else:
            y = core.plain("normalize", x, layout, out, running_mean, running_var, weight, bias, eps)
        if y is not None:
            return y
    x, axis, dtype = _input(x, layout)
    compute = dtype.compute
    w = _optional("weight", weight, x, axis, compute)
    b = _optional("bias", bias, x, axis, compute)
    momentum, eps = _number("momentum", momentum), _number("eps", eps)
    f, r = _activation(activation), _residual(residual, x)
    m = _mask(mask, x, axis)
    out = _output(out, x, x=x, residual=r)
    if training:
        return _train(x, axis, dtype, w, b, running_mean, running_var, momentum, eps, f, r, m, out)[0]
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must be given when training is False")
    mean, var = _vector("running_mean", running_mean, x, axis, compute), _vector("running_var", running_var, x, axis, compute)
    return core.inference(x, axis, dtype, mean, None, var, w, b, eps, f, r, out)


def batch_norm_backward(
    dy: Array,
    x: Array,
    saved: Saved,
    *,
    wrt: Sequence[str] = ("x", "weight", "bias"),
    from_output: bool = False,
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
        What `batch_norm_forward` returned. After ``training=False`` the statistics are constants, and so the
        gradient is the cheaper frozen one.
    wrt : sequence of str
        Which gradients to compute: "x", "weight", "bias", "residual".
    from_output : bool
        Whether `x` is what the forward returned. So the forward may write its output over its input
        (``out=x``), and training keeps one array for each layer where it would keep two. Only for no activation
        or a leaky_relu with a slope above 0, without a residual. The weights must not be 0, and x is known no
        better than the dtype of the output tells.
    out : ndarray of the shape and dtype of x, optional
        Where to write dx; may be dy or x.

    Returns
    -------
    Gradients
        dx and dresidual in the dtype and memory order of x; dweight and dbias in the dtype of the statistics; None
        where not in `wrt`. Without a weight or bias they are the gradients of an implied 1 and 0. Where there is
        no activation, dresidual is dy itself.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape does not fit, `wrt` has an unknown name or "residual" without there being one, the forward's input
        cannot be had from its output, or `out` is read-only or overlaps an input in part.

    Notes
    -----
    With a mask, dy at False positions reaches dx only directly, not through the statistics. That is the exact
    gradient where a masked loss makes those dy zero.

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
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what batch_norm_forward returned, got {type(saved).__name__}")
    plain = saved.training and saved.activation is None and saved.residual is None and saved.mask is None and not from_output
    if plain and type(wrt) is tuple and wrt == ("x", "weight", "bias"):
        found = core.plain("backward", x, saved.layout, out, dy, saved.mean, saved.mean_lo, saved.invstd, saved.scale)
        if found is not None:
            dx, dweight, dbias = found
            return Gradients(dx, dweight, dbias, None)
    x, axis, dtype = _input(x, saved.layout)
    dy = _same("dy", dy, x)
    _vector("saved.mean", saved.mean, x, axis)
    if saved.mean.dtype != dtype.compute:
        raise TypeError(f"saved is for x with statistics in {saved.mean.dtype}, but x has dtype {x.dtype}")
    wanted = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in wanted:
        if name not in ("x", "weight", "bias", "residual"):
            raise ValueError(f"wrt may name 'x', 'weight', 'bias' and 'residual', got {name!r}")
    if isinstance(saved.activation, Activation) and saved.activation.derivative is None:
        raise ValueError(f"the backward needs the derivative of {saved.activation}: give fastbn.Activation(forward, derivative)")
    if saved.residual is not None:
        _same("saved.residual", saved.residual, x)
    elif "residual" in wanted:
        raise ValueError("wrt names 'residual', but the forward had none")
    if from_output and not saved.invertible:
        raise ValueError(
            "from_output needs a forward without a residual, and without an activation or with a leaky_relu whose slope is "
            f"above 0, got {saved.activation} {'with' if saved.residual is not None else 'without'} a residual"
        )
    _mask(saved.mask, x, axis)
    if out is not None and "x" not in wanted:
        raise ValueError("out is where dx goes, but wrt does not name 'x'")
    out = _output(out, x, dy=dy, x=x, residual=saved.residual)
    sums = "weight" in wanted or "bias" in wanted
    found = core.backward(dy, x, axis, dtype, saved, from_output, "x" in wanted, sums, "residual" in wanted, out)
    return Gradients(found.dx, found.dweight if "weight" in wanted else None, found.dbias if "bias" in wanted else None, found.dresidual)


def batch_norm_stats(x: Array, *, layout: str | None = None, mask: Array | None = None) -> Stats:
    """Count, mean and population variance of each channel.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
    layout : str, optional
        As in `batch_norm_forward`.
    mask : ndarray of bool, optional
        Positions that count, broadcastable to the shape of x without the channel axis.

    Returns
    -------
    Stats
        Mergeable with the statistics of other batches. With no values, the count is 0 and so are mean and var.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype or shape.

    Notes
    -----
    Never ``E[x^2] - E[x]^2``: shifted sums over fixed tiles, merged in float64.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.batch_norm_stats(np.array([[1.0, 5.0], [3.0, 5.0]]))
    Stats(count=2, mean=array([2., 5.]), var=array([1., 0.]))
    """
    x, axis, dtype = _input(x, layout)
    return core.stats(x, axis, dtype, _mask(mask, x, axis))


def _centered(mean: object, invstd: object, x: Array, axis: int, dtype: DType) -> tuple[Array, Array | None, Array]:
    """Check given statistics; a float64 mean keeps the digits that float32 arithmetic would lose."""
    m = _vector("mean", mean, x, axis)
    scale = _vector("invstd", invstd, x, axis, dtype.compute)
    if m.dtype == np.float64 != dtype.compute:
        high, low = core.split(m, np.zeros(1), dtype.compute)
        return high, low.astype(dtype.compute), scale
    return m.astype(dtype.compute, copy=False), None, scale


def batch_norm_elemt(
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    layout: str | None = None,
    activation: ActivationLike = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize with given statistics: ``(x - mean) * invstd * weight + bias``.

    Parameters
    ----------
    x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
    mean, invstd : array_like of shape (C,)
        Mean and one over the standard deviation. A float64 mean is used to all its digits, for float32 x too.
    weight, bias, layout, activation, residual, out
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
    if activation is None and residual is None:
        y: Array | None = core.plain("normalize", x, layout, out, mean, invstd, weight, bias, None)
        if y is not None:
            return y
    x, axis, dtype = _input(x, layout)
    f, r = _activation(activation), _residual(residual, x)
    high, low, scale = _centered(mean, invstd, x, axis, dtype)
    w = _optional("weight", weight, x, axis, dtype.compute)
    b = _optional("bias", bias, x, axis, dtype.compute)
    return core.inference(x, axis, dtype, high, low, scale, w, b, None, f, r, _output(out, x, x=x, residual=r))


def batch_norm_backward_reduce(dy: Array, x: Array, mean: Array, invstd: Array, *, layout: str | None = None) -> tuple[Array, Array]:
    """Sums over each channel that the gradients need.

    Parameters
    ----------
    dy, x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
        Gradient of y, and the input of the forward pass.
    mean, invstd : array_like of shape (C,)
        The statistics the forward used.
    layout : str, optional
        As in `batch_norm_forward`.

    Returns
    -------
    sum_dy, sum_dy_xmu : ndarray of shape (C,)
        Sums of dy and of ``dy * (x - mean)``. dbias is the first, dweight is the second times invstd.

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
    x, axis, dtype = _input(x, layout)
    dy = _same("dy", dy, x)
    return core.backward_reduce(dy, x, axis, dtype, *_centered(mean, invstd, x, axis, dtype))


def batch_norm_backward_elemt(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None,
    sum_dy: Array,
    sum_dy_xmu: Array,
    count: int,
    *,
    layout: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of x from the sums of `batch_norm_backward_reduce`.

    Parameters
    ----------
    dy, x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
    mean, invstd : array_like of shape (C,)
        The statistics the forward used.
    weight : array_like of shape (C,) or None
    sum_dy, sum_dy_xmu : array_like of shape (C,)
        Over all processes that share the statistics.
    count : int
        Number of values per channel in the statistics, over all processes.
    layout, out
        As in `batch_norm_backward`.

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
    x, axis, dtype = _input(x, layout)
    dy = _same("dy", dy, x)
    statistics = _centered(mean, invstd, x, axis, dtype)
    w = _optional("weight", weight, x, axis, dtype.compute)
    wide = np.dtype(np.float64)
    sums = _vector("sum_dy", sum_dy, x, axis, wide), _vector("sum_dy_xmu", sum_dy_xmu, x, axis, wide)
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise TypeError(f"count must be an int, got {count!r}")
    if count < 1 and x.size:
        raise ValueError(f"count must be at least 1, got {count}")
    out = _output(out, x, dy=dy, x=x)
    return core.backward_elemt(dy, x, axis, dtype, *statistics, w, *sums, int(count), out)
