"""Layers of batch normalization: parameters and running statistics, on top of the functions of `functional`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastbn import checks, core, functional, sync
from fastbn import layout as layouts
from fastbn.activations import Activation, Builtin
from fastbn.checks import Channels
from fastbn.conventions import Found, FromOthers
from fastbn.core import Request
from fastbn.dtypes import DTYPES, resolve
from fastbn.functional import ActivationLike, Number
from fastbn.hints import Self
from fastbn.layout import Array, LayoutName, channel_axis, view
from fastbn.results import Gradients, Stats
from fastbn.states import OVERWRITTEN, Context, Tracking, is_written_over, loaded_array, without_copy
from fastbn.sync import Communicator


class BatchNorm(Tracking, FromOthers):
    """The common base of BatchNorm1d, 2d and 3d, which differ in the numbers of axes that they accept."""

    _ranks: tuple[int, ...] = ()

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
        correction: int = 1,
        skip_nonfinite: bool = False,
        communicator: Communicator | None = None,
        dtype: DTypeLike = np.float32,
    ):
        checks.activation(activation)
        self.dtype = resolve(dtype)
        self.num_features = checks.integer("num_features", num_features, 1, 2**40)
        self.eps = checks.number("eps", eps, 0.0)
        self.momentum = None if momentum is None else checks.number("momentum", momentum)
        self.track_running_stats = checks.switch("track_running_stats", track_running_stats)
        self.layout, self.axis = layout, axis
        self._check_layout()
        self.activation = activation
        self.correction = checks.integer("correction", correction, 0, 1)
        self.skip_nonfinite = checks.switch("skip_nonfinite", skip_nonfinite)
        self.communicator = None if communicator is None else sync.check(communicator)
        self.training = True
        self.frozen = False
        self.num_batches_skipped = 0
        n, tracked, compute = self.num_features, self.track_running_stats, DTYPES[self.dtype.name].compute
        self.weight: Array | None = np.ones(n, compute) if checks.switch("affine", affine) else None
        self.bias: Array | None = np.zeros(n, compute) if checks.switch("bias", bias) and affine else None
        self.running_mean: Array | None = np.zeros(n, compute) if tracked else None
        self.running_var: Array | None = np.ones(n, compute) if tracked else None
        self.num_batches_tracked: Array | None = np.array(0, np.int64) if tracked else None

    @classmethod
    def _of(cls, found: Found, options: dict[str, Any]) -> Self:
        if found.trained:
            raise ValueError(f"the layer is trained by {found.trained}, which is not what {cls.__name__} does; FrozenBatchNorm takes it")
        given = dict(zip(found.names, found.vectors, strict=True))
        sizes = [checks.real(name, v).shape for name, v in given.items() if v is not None]
        if not sizes:
            raise ValueError("a layer without parameters and statistics does not say how many channels it has")
        if len(sizes[0]) != 1:
            raise ValueError(f"{next(name for name, v in given.items() if v is not None)} must have shape (C,), got {sizes[0]}")
        if (found.vectors[0] is None) != (found.vectors[1] is None):
            raise ValueError(f"{found.names[0]} and {found.names[1]} must both be given, or both be None")
        taken = {
            "eps": checks.number("epsilon" if found.correction == 0 else "eps", found.eps, 0.0), "momentum": found.momentum,
            "affine": any(v is not None for v in found.vectors[2:]), "track_running_stats": found.vectors[0] is not None,
            "correction": found.correction, "activation": found.activation, "dtype": found.dtype,
        }  # fmt: skip
        layer = cls(sizes[0][0], **taken | dict(found.options) | found.where(options) | options)
        own = ("running_mean", "running_var", "weight", "bias")
        channels = Channels(layer.num_features, f"the layer has {layer.num_features} channels")
        for key, (name, value) in zip(own, given.items(), strict=True):
            first = getattr(layer, key)
            setattr(layer, key, None if value is None or first is None else checks.vector(name, value, channels, first.dtype).copy())
        layer.track_running_stats &= found.tracks or "track_running_stats" in options
        if layer.num_batches_tracked is not None and found.batches is not None:
            layer.num_batches_tracked = loaded_array("num_batches_tracked", found.batches, layer.num_batches_tracked)
        return layer.train(found.training).freeze(found.frozen)

    @property
    def affine(self) -> bool:
        """Whether there is a weight or a bias."""
        return self.weight is not None or self.bias is not None

    def __repr__(self) -> str:
        text = self._shown(
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, layout={self.layout!r}, activation={self.activation!r}",
            axis=None, correction=1, skip_nonfinite=False, communicator=None,
        )  # fmt: skip
        return text + (".freeze()" if self.frozen else "")

    def _check_layout(self) -> None:
        for rank in self._ranks:
            try:
                channel_axis(self.layout, rank, self.axis)
            except ValueError:
                continue
            return
        channel_axis(self.layout, self._ranks[-1], self.axis)  # raises the reason

    def forward(
        self, x: Array, residual: Array | None = None, *, mask: Array | None = None, stats: Stats | None = None,
        threads: int | None = None, out: Array | None = None,
    ) -> Array:  # fmt: skip
        """Normalize x, and remember it for `backward`.

        Parameters
        ----------
        x : ndarray
            In the dtype and layout of the layer.
        residual : ndarray of the shape and dtype of x, optional
            Added before the activation.
        mask : ndarray of bool, optional
            True at the positions that count in the statistics; broadcastable to the shape of x without the channel axis.
        stats : Stats, optional
            Known statistics of the batch; only in training. They take the place of those that a communicator would gather.
        threads : int, optional
            Number of threads of this call. None means as many as `num_threads` allows, if the call is large enough.
        out : ndarray of the shape and dtype of x, optional
            Where to write the result. If it is x, `backward` works from the output, which must not be changed until
            then; `from_output` in `batch_norm_backward` says which layers can do so.

        Returns
        -------
        ndarray of the shape, dtype and memory order of x

        Raises
        ------
        TypeError, ValueError
            If x does not fit this layer, or as `batch_norm_forward`.

        Notes
        -----
        In training, the layer keeps x itself: do not change it before the backward. In eval, the layer does not keep x
        alive; a backward is possible as long as the caller keeps it.
        """
        if isinstance(x, np.ndarray):
            if x.ndim not in self._ranks:
                ranks = " or ".join(map(str, self._ranks))
                raise ValueError(f"{type(self).__name__} takes arrays with {ranks} axes, but x has shape {x.shape}")
            self._check_dtype(x)
            axis = channel_axis(self.layout, x.ndim, self.axis)
            if x.shape[axis] != self.num_features:
                raise checks.misfit(checks.channels_of(x, axis), f"the layer has num_features={self.num_features}", self.num_features)
        batch = (self.training and not self.frozen) or self.running_mean is None or self.running_var is None
        if not batch and not self.training and stats is None and without_copy(residual, self.activation, out):
            given = (self.running_mean, self.running_var, self.weight, self.bias)
            options: dict[str, Any] = {"layout": self.layout, "axis": self.axis, "activation": self.activation, "threads": threads}
            y = functional.batch_norm(x, *given, eps=self.eps, residual=residual, mask=mask, out=out, **options)
            names = ("running_mean", "running_var", "weight", "bias")
            fixed: dict[str, Any] = {name: None if v is None else np.array(v) for name, v in zip(names, given, strict=True)}
            again = partial(functional.batch_norm_forward, **fixed, training=False, eps=self.eps, **options)
            kept = Context(weakref.ref(x), weakref.ref(cast("Array", residual)), again, True)
            self._context = OVERWRITTEN if is_written_over(out, x) else kept  # nothing with a residual is had from its output
            return y
        asked = self.communicator if batch and self.training else None
        if asked is not None and stats is None:
            stats = sync.batch_norm_stats(x, asked, layout=self.layout, axis=self.axis, mask=mask, threads=threads)
        moves = self.track_running_stats and self.training and not self.frozen
        mean = var = None
        if not batch or moves:
            mean, var = self.running_mean, self.running_var
            if batch:
                self._check_count()
        before = [v if v is None else v.copy() for v in (mean, var)] if batch and self.skip_nonfinite else None
        y, saved = functional.batch_norm_forward(
            x, self.weight, self.bias, mean, var, batch, self._weight_of_new(), self.eps, layout=self.layout, axis=self.axis,
            activation=self.activation, residual=residual, mask=mask, correction=self.correction, stats=stats, threads=threads, out=out,
        )  # fmt: skip
        if batch and (y.size or saved.count):
            self._count((mean, var), before, moves)
        overwritten = is_written_over(out, x)
        kept = Context(x if self.training else weakref.ref(x), None, saved, residual is not None, overwritten, asked)
        self._context = OVERWRITTEN if overwritten and not saved.invertible else kept
        return y

    def _count(self, statistics: tuple[Array | None, ...], before: list[Array | None] | None, moves: bool) -> None:
        """Count the batch, where batches move statistics; or where it may not count, set the statistics back to what they were before."""
        if before and not all(v is None or np.isfinite(v).all() for v in statistics):
            self.num_batches_skipped += 1
            for moved, old in zip(statistics, before, strict=True):
                if moved is not None:
                    moved[...] = old
            return
        if moves and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1

    def backward(self, dy: Array, *, wrt: Sequence[str] | None = None, threads: int | None = None, out: Array | None = None) -> Gradients:
        """Gradients of the last `forward`.

        Parameters
        ----------
        dy : ndarray of the shape and dtype of x
        wrt : sequence of str, optional
            Which gradients: "x", "weight", "bias", "residual". None means all that exist, without weight and bias for a
            frozen layer.
        threads : int, optional
            As in `forward`.
        out : ndarray of the shape and dtype of x, optional
            Where to write dx; may be dy.

        Returns
        -------
        Gradients

        Raises
        ------
        RuntimeError
            If `forward` was not called before; if it overwrote an input that cannot be recomputed from the output; or if its
            input, in eval, no longer exists.
        TypeError, ValueError
            As `batch_norm_backward`.
        """
        context = self._remembered()
        x, saved = context.found()
        from_output, communicator = context.from_output, context.communicator
        if wrt is None:
            wrt = context.gradients(() if self.frozen else ("weight", "bias"), self)
        if communicator is not None:
            options: dict[str, Any] = {"from_output": from_output, "threads": threads, "out": out}
            return sync.batch_norm_backward(dy, x, saved, communicator=communicator, wrt=wrt, **options)
        return functional.batch_norm_backward(dy, x, saved, wrt=wrt, from_output=from_output, threads=threads, out=out)

    def freeze(self, mode: bool = True) -> Self:
        """Use the running statistics in training, too, and change neither them nor the parameters.

        Parameters
        ----------
        mode : bool
            False undoes it.

        Returns
        -------
        The layer itself.

        Raises
        ------
        ValueError
            If the layer has no running statistics.
        """
        if checks.switch("mode", mode) and (self.running_mean is None or self.running_var is None):
            raise ValueError("a layer with track_running_stats=False has no running statistics to freeze")
        self.frozen = bool(mode)
        return self


class BatchNorm1d(BatchNorm):
    """Batch normalization of (N, C) or (N, C, L) arrays, as ``torch.nn.BatchNorm1d``.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of a batch in the update of the running statistics; None means the cumulative average.
    affine : bool
        Whether there is a weight and, if `bias` is True, a bias.
    track_running_stats : bool
        Whether there are running statistics. Without them, the layer always uses the batch's own statistics.
    bias : bool
        Whether there is a bias.
    layout : str, optional
        "NC", "NCL" or "channels_first" (the default), "NLC" or "channels_last".
    axis : int, optional
        The axis of the channels, instead of a layout.
    activation : str, tuple, function or Activation, optional
        As in `batch_norm_forward`.
    correction : int
        As in `batch_norm_forward`; 0 is the convention of ONNX, Keras and Flax.
    skip_nonfinite : bool
        Whether to leave all running statistics unchanged if a batch would make one of them infinite or NaN;
        ``num_batches_skipped`` counts these batches.
    communicator : Communicator, optional
        Connects the processes that share a batch (see `fastbn.sync`). Training then uses the statistics of the whole batch,
        and all processes must call. It is also an attribute; copies of the layer share it.
    dtype : dtype
        The dtype of the input. Parameters and statistics are float64 for float64 inputs, else float32.

    Examples
    --------
    >>> import numpy as np
    >>> bn = BatchNorm1d(1, eps=0.0)
    >>> bn(np.array([[1.0], [3.0]], np.float32))
    array([[-1.],
           [ 1.]], dtype=float32)
    >>> bn.running_mean
    array([0.2], dtype=float32)
    """

    _ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """Batch normalization of (N, C, H, W) arrays, as ``torch.nn.BatchNorm2d``.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, axis, activation, correction, skip_nonfinite, communicator, dtype
        As in `BatchNorm1d`.
    layout : str, optional
        "NCHW" or "channels_first" (the default), "NHWC" or "channels_last".

    Examples
    --------
    >>> import numpy as np
    >>> bn = BatchNorm2d(3).eval()
    >>> bn(np.ones((1, 3, 2, 2), np.float32)).shape
    (1, 3, 2, 2)
    """

    _ranks = (4,)


class BatchNorm3d(BatchNorm):
    """Batch normalization of (N, C, D, H, W) arrays, as ``torch.nn.BatchNorm3d``.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, axis, activation, correction, skip_nonfinite, communicator, dtype
        As in `BatchNorm1d`.
    layout : str, optional
        "NCDHW" or "channels_first" (the default), "NDHWC" or "channels_last".

    Examples
    --------
    >>> import numpy as np
    >>> bn = BatchNorm3d(3, layout="NDHWC")
    >>> bn(np.zeros((1, 2, 2, 2, 3), np.float32)).shape
    (1, 2, 2, 2, 3)
    """

    _ranks = (5,)


class FrozenBatchNorm(FromOthers):
    """Inference with all parameters folded once, for serving. It is immutable: its attributes cannot be set.

    A subclass may have attributes of its own.

    Parameters
    ----------
    running_mean, running_var : array_like of shape (C,)
    weight, bias : array_like of shape (C,), optional
        None means 1 and 0.
    eps : float
        Added to the variance; not negative.
    layout, axis
        As in `batch_norm_forward`.
    activation : str, tuple, function or Activation, optional
        As in `batch_norm_forward`.

    Attributes
    ----------
    scale, shift : ndarray of shape (C,)
        The factors of ``y = x * scale + shift``, in float64; a convolution before the layer can absorb them.

    Raises
    ------
    TypeError, ValueError
        If the vectors have different shapes or do not contain real numbers, or if another argument is invalid.

    Examples
    --------
    >>> import numpy as np
    >>> bn = FrozenBatchNorm([2.0], [4.0], eps=0.0)
    >>> bn(np.array([[1.0], [3.0]], np.float32))
    array([[-0.5],
           [ 0.5]], dtype=float32)
    >>> bn.scale, bn.shift
    (array([0.5]), array([-1.]))
    """

    activation: ActivationLike
    eps: float
    layout: LayoutName | None
    axis: int | None
    num_features: int
    _activation: Builtin | Activation | None
    _folded: core.Folded

    def __init__(
        self,
        running_mean: ArrayLike,
        running_var: ArrayLike,
        weight: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        *,
        eps: Number = 1e-5,
        layout: LayoutName | None = None,
        axis: int | None = None,
        activation: ActivationLike = None,
    ):
        after = checks.activation(activation)
        m, v, w, b = _vectors(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
        eps = checks.number("eps", eps, 0.0)
        layouts.check(layout, axis)
        self.__dict__.update(
            activation=activation, eps=eps, layout=layout, axis=axis, num_features=m.size,
            _activation=after, _folded=core.Folded(m, v, w, b, eps),
        )  # fmt: skip

    def __setattr__(self, name: str, value: object) -> None:
        self._check_own(name, "set")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._check_own(name, "deleted")
        super().__delattr__(name)

    def _check_own(self, name: str, what: str) -> None:
        """Check that an attribute is one of a subclass, and neither computed with nor, as a weight would be, without any effect."""
        folded = {*FrozenBatchNorm.__annotations__, "scale", "shift", "running_mean", "running_var", "weight", "bias"}
        if type(self) is FrozenBatchNorm or name in folded:
            raise AttributeError(f"a FrozenBatchNorm was folded when it was made, and {name} cannot be {what}: make another one")

    @classmethod
    def _of(cls, found: Found, options: dict[str, Any]) -> Self:
        vectors = _vectors(**dict(zip(found.names, found.vectors, strict=True)))
        eps = options.get("eps", checks.number("epsilon" if found.correction == 0 else "eps", found.eps, 0.0))
        return cls(*vectors, **{"activation": found.activation} | found.where(options) | options | {"eps": eps})

    @property
    def scale(self) -> Array:
        """The scale of ``y = x * scale + shift``, in float64."""
        return self._folded.scale

    @property
    def shift(self) -> Array:
        """The shift of ``y = x * scale + shift``, in float64."""
        return self._folded.shift

    def __repr__(self) -> str:
        where = f"layout={self.layout!r}" if self.axis is None else f"axis={self.axis}"
        return f"{type(self).__name__}({self.num_features} channels, eps={self.eps}, {where}, activation={self.activation!r})"

    @core.direct
    def __call__(self, x: Array, residual: Array | None = None, out: Array | None = None, threads: int | None = None) -> Array:
        """Normalize x.

        Parameters
        ----------
        x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
            float32, float64, float16 or bfloat16.
        residual : ndarray of the shape and dtype of x, optional
            Added before the activation.
        out : ndarray of the shape and dtype of x, optional
            Where to write the result; may be x.
        threads : int, optional
            Number of threads of this call. None means as many as `num_threads` allows, if the call is large enough.

        Returns
        -------
        ndarray of the shape, dtype and memory order of x

        Raises
        ------
        TypeError, ValueError
            As `batch_norm`.
        """
        array, dtype = checks.array(x)
        axis = channel_axis(self.layout, array.ndim, self.axis)
        if array.shape[axis] != self.num_features:
            raise checks.misfit(checks.channels_of(array, axis), f"the layer has {self.num_features}", self.num_features)
        r = None if residual is None else checks.same("residual", residual, array)
        target = checks.output(out, array, {"x": array, "residual": r})
        lies, n = view(array, axis), checks.threads(threads)
        return self._folded.apply(Request(array, axis, dtype, lies, target, self._activation, r, threads=n))


def _vectors(**given: Any) -> tuple[Array, Array, Array | None, Array | None]:
    """Check mean, variance, weight and bias, under the names that the caller knows; return copies in float64."""
    (name, first), *_ = given.items()
    mean = checks.real(name, first)
    if mean.ndim != 1:
        raise ValueError(f"{name} must have shape (C,), got {mean.shape}")
    channels, wide = Channels(mean.size, f"{name} has {mean.size} channels"), np.dtype(np.float64)
    m, v = (checks.vector(name, a, channels, wide).copy() for name, a in list(given.items())[:2])
    w, b = (None if a is None else checks.vector(name, a, channels, wide).copy() for name, a in list(given.items())[2:])
    return m, v, w, b
