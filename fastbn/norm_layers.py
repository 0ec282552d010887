"""Layers for the functions of `norms` and `variants`, with PyTorch's arguments and state_dict."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
from numpy.typing import DTypeLike

from fastbn import checks, norm_calls, norms, variants
from fastbn import layout as layouts
from fastbn.dtypes import DTYPES, resolve
from fastbn.functional import ActivationLike, Number
from fastbn.layout import Array, LayoutName, channel_axis
from fastbn.results import Gradients
from fastbn.states import FIRST, OVERWRITTEN, Context, Layer, Tracking, is_written_over, without_copy


class _Functions(NamedTuple):
    """What a layer calls: without and with what a backward needs, and that."""

    plain: Callable[..., Array]
    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., Gradients]


def _forward_again(functions: _Functions, given: tuple[Any, ...], options: dict[str, Any], x: Array, residual: Array) -> tuple[Array, Any]:
    """The forward of a layer in eval once more, for its backward."""
    return functions.forward(x, *given, **options, residual=residual)


class _Layer(Layer):
    """What all of these share: an activation, a dtype, and what the last forward has saved."""

    _functions: _Functions
    bias: Array | None = None

    def __init__(self, activation: ActivationLike, dtype: DTypeLike):
        checks.activation(activation)
        self.activation = activation
        self.dtype = resolve(dtype)
        self._compute = DTYPES[self.dtype.name].compute
        self.training = True

    def _given(self) -> tuple[Any, ...]:
        """What the functions are given after x."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """What else they are given."""
        return {"activation": self.activation}

    def _moved(self, x: Array) -> None:
        """Take note of a forward in which nothing failed."""

    def _check(self, x: Array) -> None:
        """Check x against the layer."""
        if isinstance(x, np.ndarray):
            self._check_dtype(x)

    def forward(self, x: Array, residual: Array | None = None, *, threads: int | None = None, out: Array | None = None) -> Array:
        """Normalize x, and remember it for `backward`. Do not change x until then.

        Parameters
        ----------
        x : ndarray
            In the dtype and layout of the layer.
        residual : ndarray of the shape and dtype of x, optional
            Added before the activation.
        threads : int, optional
            Number of threads of this call.
        out : ndarray of the shape and dtype of x, optional
            Where to write the result. If it is x, no backward is possible.

        Returns
        -------
        ndarray of the shape, dtype and memory order of x

        Raises
        ------
        TypeError, ValueError
            If x does not fit this layer, or as the function.

        Notes
        -----
        In training, the layer keeps x itself: do not change it before the backward. In eval, the layer does not keep x
        alive; a backward is possible as long as the caller keeps it.
        """
        self._check(x)
        given, options = self._given(), self._options()
        call: dict[str, Any] = {"residual": residual, "threads": threads, "out": out}
        other, saved = None, None  # type: tuple[weakref.ref[Array] | None, Any]
        if not self.training and without_copy(residual, self.activation, out):
            y = self._functions.plain(x, *given, **options, **call)
            fixed = tuple(v.copy() if isinstance(v, np.ndarray) else v for v in given)
            other, saved = weakref.ref(cast("Array", residual)), partial(_forward_again, self._functions, fixed, options)
        else:
            y, saved = self._functions.forward(x, *given, **options, **call)
        self._moved(x)
        if is_written_over(out, x):
            self._context = OVERWRITTEN
        else:
            self._context = Context(x if self.training else weakref.ref(x), other, saved, residual is not None)
        return y

    def backward(self, dy: Array, *, wrt: Sequence[str] | None = None, threads: int | None = None, out: Array | None = None) -> Gradients:
        """Gradients of the last `forward`.

        Parameters
        ----------
        dy : ndarray of the shape and dtype of x
        wrt : sequence of str, optional
            Which gradients; None means all that exist.
        threads : int, optional
            Number of threads of this call.
        out : ndarray of the shape and dtype of x, optional
            Where to write dx; may be dy.

        Returns
        -------
        Gradients

        Raises
        ------
        RuntimeError
            If `forward` was not called before, or overwrote its input.
        TypeError, ValueError
            As the function.
        """
        context = self._remembered()
        x, saved = context.found()
        if wrt is None:
            wrt = context.gradients(("weight", "bias", "mix"), self)
        return self._functions.backward(dy, x, saved, wrt=wrt, threads=threads, out=out)


def _affine(compute: np.dtype[Any], shape: int | tuple[int, ...], weight: bool, bias: bool) -> tuple[Array | None, Array | None]:
    """The weight, and with it the bias."""
    return np.ones(shape, compute) if weight else None, np.zeros(shape, compute) if checks.switch("bias", bias) and weight else None


class _OnChannels(_Layer):
    """A layer of images with channels."""

    _ranks: tuple[int, ...] = ()

    _size = "num_features"  # what the number of channels is called
    _of_images = True  # which are on axis 0

    def __init__(self, channels: int, layout: LayoutName | None, axis: int | None, activation: ActivationLike, dtype: DTypeLike):
        super().__init__(activation, dtype)
        setattr(self, self._size, checks.integer(self._size, channels, 1, 2**40))
        self.layout, self.axis = layout, axis
        layouts.check(layout, axis)
        at = channel_axis(layout, self._ranks[0], axis) if self._ranks else axis
        if self._of_images:
            norm_calls.check_images(at)

    @property
    def affine(self) -> bool:
        """Whether there is a weight or a bias."""
        return self.weight is not None or self.bias is not None

    def _check(self, x: Array) -> None:
        super()._check(x)
        layouts.plain("x", x)
        if self._ranks and x.ndim not in self._ranks:
            raise ValueError(f"{type(self).__name__} takes arrays with {self._ranks[0]} axes, but x has shape {x.shape}")
        axis = channel_axis(self.layout, x.ndim, self.axis)
        if x.shape[axis] != (own := getattr(self, self._size)):
            raise checks.misfit(checks.channels_of(x, axis), f"the layer has {own}", own)

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"layout": self.layout, "axis": self.axis}


class _Tracked(Tracking, _OnChannels):
    """A layer of images with channels that may have running statistics."""

    num_features: int
    _counts = True  # the batches
    _usual: ClassVar[dict[str, Any]] = {"track_running_stats": True, "axis": None, "activation": None}

    def __init__(
        self, num_features: int, eps: Number, momentum: Number | None, affine: bool, track_running_stats: bool, **options: Any
    ):
        super().__init__(num_features, options["layout"], options["axis"], options["activation"], options["dtype"])
        self.eps = checks.number("eps", eps, 0.0)
        self.momentum = None if momentum is None else checks.number("momentum", momentum)
        n, compute = self.num_features, self._compute
        self.weight, self.bias = _affine(compute, n, checks.switch("affine", affine), options["bias"])
        self.track_running_stats = tracked = checks.switch("track_running_stats", track_running_stats)
        self.running_mean: Array | None = np.zeros(n, compute) if tracked else None
        self.running_var: Array | None = np.ones(n, compute) if tracked else None
        self.num_batches_tracked: Array | None = np.array(0, np.int64) if tracked else None

    def __repr__(self) -> str:
        numbers = f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, layout={self.layout!r}"
        return self._shown(f"{self.num_features}, {numbers}", **self._usual)

    @property
    def _moves(self) -> bool:
        """Whether a call moves the running statistics that there are."""
        return self.training and self.track_running_stats

    def _statistics(self, own: bool) -> tuple[Array | None, Array | None]:
        """The running statistics that a call is given: to use, or where it uses its own, to move."""
        return (self.running_mean, self.running_var) if self._moves or not own else (None, None)

    def _check(self, x: Array) -> None:
        super()._check(x)
        if self._counts and self._moves:
            self._check_count()

    def _moved(self, x: Array) -> None:
        if self._counts and self._moves and x.size and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


class InstanceNorm(_Tracked):
    """The common base of InstanceNorm1d, 2d and 3d, which differ in the number of axes that they accept."""

    _functions = _Functions(norms.instance_norm, norms.instance_norm_forward, norms.instance_norm_backward)
    _counts = False  # as in PyTorch
    _usual: ClassVar[dict[str, Any]] = _Tracked._usual | {"track_running_stats": False}

    def __init__(
        self,
        num_features: int,
        eps: Number = 1e-5,
        momentum: Number | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        layout: LayoutName | None = None,
        axis: int | None = None,
        activation: ActivationLike = None,
        dtype: DTypeLike = np.float32,
    ):
        options = {"bias": bias, "layout": layout, "axis": axis, "activation": activation, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)

    @property
    def _moves(self) -> bool:
        # As PyTorch, whose layer gives its function all that there is, also when its tracking was switched off: to move it.
        return self.training or not self.track_running_stats

    def _given(self) -> tuple[Any, ...]:
        own = self._moves or self.running_mean is None or self.running_var is None
        momentum = 0.0 if self.momentum is None else self.momentum  # as PyTorch, which counts no batches here
        return (*self._statistics(own), self.weight, self.bias, own, momentum, self.eps)


class InstanceNorm1d(InstanceNorm):
    """Instance normalization of (N, C, L) arrays, as ``torch.nn.InstanceNorm1d``.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the new values in the update of the running statistics; None means no update, as in PyTorch.
    affine : bool
        Whether there is a weight and, if `bias` is True, a bias.
    track_running_stats : bool
        Whether there are running statistics; eval then uses them.
    bias : bool
        Whether there is a bias.
    layout, axis, activation
        As in `batch_norm_forward`.
    dtype : dtype
        The dtype of the input. Parameters and statistics are float64 for float64 inputs, else float32.

    Examples
    --------
    >>> import numpy as np
    >>> InstanceNorm1d(1, eps=0.0)(np.array([[[1.0, 3.0]]], np.float32))
    array([[[-1.,  1.]]], dtype=float32)
    """

    _ranks = (3,)


class InstanceNorm2d(InstanceNorm):
    """Instance normalization of (N, C, H, W) arrays, as ``torch.nn.InstanceNorm2d``.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, layout, axis, activation, dtype
        As in `InstanceNorm1d`.

    Examples
    --------
    >>> import numpy as np
    >>> InstanceNorm2d(3)(np.ones((1, 3, 2, 2), np.float32)).shape
    (1, 3, 2, 2)
    """

    _ranks = (4,)


class InstanceNorm3d(InstanceNorm):
    """Instance normalization of (N, C, D, H, W) arrays, as ``torch.nn.InstanceNorm3d``.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, layout, axis, activation, dtype
        As in `InstanceNorm1d`.

    Examples
    --------
    >>> import numpy as np
    >>> InstanceNorm3d(3, activation="leaky_relu")(np.ones((1, 3, 2, 2, 2), np.float32)).shape
    (1, 3, 2, 2, 2)
    """

    _ranks = (5,)


class GroupNorm(_OnChannels):
    """Group normalization, as ``torch.nn.GroupNorm``.

    Parameters
    ----------
    num_groups : int
        Number of groups into which the channels are divided.
    num_channels : int
        Number of channels.
    eps : float
        Added to the variance.
    affine : bool
        Whether there is a weight and, if `bias` is True, a bias.
    bias : bool
        Whether there is a bias.
    layout, axis, activation
        As in `batch_norm_forward`.
    dtype : dtype
        The dtype of the input. Parameters are float64 for float64 inputs, else float32.

    Examples
    --------
    >>> import numpy as np
    >>> GroupNorm(2, 4, eps=0.0)(np.array([[1.0, 3.0, 10.0, 30.0]], np.float32))
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    _functions = _Functions(norms.group_norm, norms.group_norm_forward, norms.group_norm_backward)
    _size = "num_channels"
    num_channels: int

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: Number = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        layout: LayoutName | None = None,
        axis: int | None = None,
        activation: ActivationLike = None,
        dtype: DTypeLike = np.float32,
    ):
        super().__init__(num_channels, layout, axis, activation, dtype)
        self.num_groups = checks.integer("num_groups", num_groups, 1)
        if self.num_channels % self.num_groups:
            raise ValueError(f"num_groups must divide num_channels, got {num_groups} and {num_channels}")
        self.eps = checks.number("eps", eps, 0.0)
        self.weight, self.bias = _affine(self._compute, self.num_channels, checks.switch("affine", affine), bias)

    def __repr__(self) -> str:
        sizes = f"{self.num_groups}, {self.num_channels}"
        return self._shown(f"{sizes}, eps={self.eps}, affine={self.affine}, layout={self.layout!r}", axis=None, activation=None)

    def _given(self) -> tuple[Any, ...]:
        return self.num_groups, self.weight, self.bias, self.eps


class LayerNorm(_Layer):
    """Layer normalization over the last axes, as ``torch.nn.LayerNorm``.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the last axes of the input, over which it normalizes.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether there is a weight and, if `bias` is True, a bias, of this shape.
    bias : bool
        Whether there is a bias.
    activation
        As in `batch_norm_forward`.
    dtype : dtype
        The dtype of the input. Parameters are float64 for float64 inputs, else float32.

    Examples
    --------
    >>> import numpy as np
    >>> LayerNorm(2, eps=0.0)(np.array([[1.0, 3.0]], np.float32))
    array([[-1.,  1.]], dtype=float32)
    """

    _functions = _Functions(norms.layer_norm, norms.layer_norm_forward, norms.layer_norm_backward)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: Number = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        activation: ActivationLike = None,
        dtype: DTypeLike = np.float32,
    ):
        super().__init__(activation, dtype)
        self.normalized_shape = norm_calls.row_shape(normalized_shape)
        self.eps: float | None = checks.number("eps", eps, 0.0)
        affine = checks.switch("elementwise_affine", elementwise_affine)
        self.weight, self.bias = _affine(self._compute, self.normalized_shape, affine, bias)

    @property
    def elementwise_affine(self) -> bool:
        """Whether there is a weight or a bias."""
        return self.weight is not None or self.bias is not None

    def __repr__(self) -> str:
        return self._shown(f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}", activation=None)

    def _given(self) -> tuple[Any, ...]:
        return self.normalized_shape, self.weight, self.bias, self.eps


class RMSNorm(LayerNorm):
    """Normalization by the root mean square over the last axes, as ``torch.nn.RMSNorm``.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the last axes of the input, over which it normalizes.
    eps : float, optional
        Added to the mean square. None means the machine epsilon of float64 for float64, else that of float32.
    elementwise_affine : bool
        Whether there is a weight of this shape.
    activation, dtype
        As in `LayerNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> RMSNorm(2, eps=0.0)(np.array([[3.0, -3.0]], np.float32))
    array([[ 1., -1.]], dtype=float32)
    """

    _keys = ("weight",)

    _functions = _Functions(norms.rms_norm, norms.rms_norm_forward, norms.rms_norm_backward)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: Number | None = None,
        elementwise_affine: bool = True,
        *,
        activation: ActivationLike = None,
        dtype: DTypeLike = np.float32,
    ):
        super().__init__(normalized_shape, 0.0, elementwise_affine, False, activation=activation, dtype=dtype)
        self.eps = None if eps is None else checks.number("eps", eps, 0.0)

    def _given(self) -> tuple[Any, ...]:
        return self.normalized_shape, self.weight, self.eps


class BatchChannelNorm2d(_Tracked):
    """Batch-channel normalization of (N, C, H, W) arrays: see `batch_channel_norm`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, layout, axis, activation, dtype
        As in `BatchNorm2d`. The learned mix of each channel starts at 0.5.

    Examples
    --------
    >>> import numpy as np
    >>> layer = BatchChannelNorm2d(3)
    >>> layer(np.ones((2, 3, 2, 2), np.float32)).shape
    (2, 3, 2, 2)
    >>> sorted(layer.state_dict())
    ['bias', 'mix', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """

    _ranks = (4,)
    _keys = ("weight", "bias", "mix", "running_mean", "running_var", "num_batches_tracked")

    _functions = _Functions(variants.batch_channel_norm, variants.batch_channel_norm_forward, variants.batch_channel_norm_backward)

    def __init__(
        self,
        num_features: int,
        eps: Number = 1e-5,
        momentum: Number | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        layout: LayoutName | None = None,
        axis: int | None = None,
        activation: ActivationLike = None,
        dtype: DTypeLike = np.float32,
    ):
        options = {"bias": bias, "layout": layout, "axis": axis, "activation": activation, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.mix: Array = np.full(self.num_features, FIRST["mix"], self._compute)

    def _given(self) -> tuple[Any, ...]:
        own = self.training or self.running_mean is None or self.running_var is None
        return (*self._statistics(own), self.mix, self.weight, self.bias, own, self._weight_of_new(), self.eps)


class BatchRenorm2d(_Tracked):
    """Batch renormalization of (N, C, H, W) arrays: see `batch_renorm`.

    Parameters
    ----------
    num_features, eps, momentum, affine, bias, layout, axis, activation, dtype
        As in `BatchNorm2d`.
    rmax, dmax : float
        Bounds of the correction. They are attributes, which you may change during training.

    Examples
    --------
    >>> import numpy as np
    >>> layer = BatchRenorm2d(3, rmax=1.0, dmax=0.0)
    >>> layer(np.ones((2, 3, 2, 2), np.float32)).shape
    (2, 3, 2, 2)
    """

    _ranks = (4,)
    _of_images = False
    _usual: ClassVar[dict[str, Any]] = _Tracked._usual | {"rmax": 3.0, "dmax": 5.0}

    _functions = _Functions(variants.batch_renorm, variants.batch_renorm_forward, variants.batch_renorm_backward)

    def __init__(
        self,
        num_features: int,
        eps: Number = 1e-5,
        momentum: Number | None = 0.1,
        affine: bool = True,
        *,
        rmax: Number = 3.0,
        dmax: Number = 5.0,
        bias: bool = True,
        layout: LayoutName | None = None,
        axis: int | None = None,
        activation: ActivationLike = None,
        dtype: DTypeLike = np.float32,
    ):
        options = {"bias": bias, "layout": layout, "axis": axis, "activation": activation, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, True, **options)
        self.rmax, self.dmax = checks.number("rmax", rmax, 1.0), checks.number("dmax", dmax, 0.0)

    def _given(self) -> tuple[Any, ...]:
        statistics: tuple[Array | None, ...] = (self.running_mean, self.running_var)
        if not self.track_running_stats:  # they correct the batch's all the same, and are not moved
            statistics = tuple(None if v is None else v.copy() for v in statistics)
        return (*statistics, self.weight, self.bias, self.training, self._weight_of_new(), self.eps)

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"rmax": self.rmax, "dmax": self.dmax}
