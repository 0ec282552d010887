"""Layers: parameters and running statistics over the functions of `functional`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn import core, functional
from fastbn.core import Gradients, Saved
from fastbn.dtypes import DTYPES, lookup
from fastbn.layout import Array, channel_axis

if TYPE_CHECKING:
    from numpy.typing import DTypeLike
    from typing_extensions import Self


class _BatchNorm:
    """What BatchNorm1d, 2d and 3d share; they differ in the numbers of axes they take."""

    _ranks: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        layout: str | None = None,
        activation: functional.ActivationLike = None,
        dtype: DTypeLike = np.float32,
    ):
        if isinstance(num_features, bool) or not isinstance(num_features, (int, np.integer)):
            raise TypeError(f"num_features must be an int, got {num_features!r}")
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        row = lookup(np.dtype(dtype))
        if row is None:
            raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {np.dtype(dtype)}")
        functional._activation(activation)
        self._check_layout(layout)
        compute = row.compute
        self.num_features = int(num_features)
        self.eps = functional._number("eps", eps)
        self.momentum = None if momentum is None else functional._number("momentum", momentum)
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.layout = layout
        self.activation = activation
        self.dtype = np.dtype(dtype)
        self.training = True
        self.frozen = False
        self.weight: Array | None = np.ones(num_features, compute) if affine else None
        self.bias: Array | None = np.zeros(num_features, compute) if affine else None
        self.running_mean: Array | None = None
        self.running_var: Array | None = None
        self.num_batches_tracked: Array | None = None
        if track_running_stats:
            self.running_mean = np.zeros(num_features, compute)
            self.running_var = np.ones(num_features, compute)
            self.num_batches_tracked = np.array(0, np.int64)
        self._context: tuple[Array, Saved, bool] | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, layout={self.layout!r}, activation={self.activation!r})"
        )

    def _check_layout(self, layout: str | None) -> None:
        for rank in self._ranks:
            try:
                channel_axis(layout, rank)
            except ValueError:
                continue
            return
        channel_axis(layout, self._ranks[-1])  # raises the reason

    def forward(self, x: Array, residual: Array | None = None, *, mask: Array | None = None, out: Array | None = None) -> Array:
        """Normalize x, and remember it for `backward`.

        Parameters
        ----------
        x : ndarray
            In the dtype and layout of the layer.
        residual : ndarray of the shape and dtype of x, optional
            Added before the activation.
        mask : ndarray of bool, optional
            Positions that count in the statistics, broadcastable to the shape of x without the channel axis.
        out : ndarray of the shape and dtype of x, optional
            Where to write the result. If it is x, `backward` works from the output instead, which must not be changed
            until then; see `from_output` in `batch_norm_backward` for which layers can.

        Returns
        -------
        ndarray of the shape, dtype and memory order of x

        Raises
        ------
        TypeError, ValueError
            If x is not for this layer, or as `batch_norm_forward`.
        """
        if isinstance(x, np.ndarray):
            if x.ndim not in self._ranks:
                ranks = " or ".join(map(str, self._ranks))
                raise ValueError(f"{type(self).__name__} takes arrays with {ranks} axes, but x has shape {x.shape}")
            if x.dtype != self.dtype:
                raise TypeError(f"x must have the dtype of the layer, {self.dtype}, got {x.dtype}")
            axis = channel_axis(self.layout, x.ndim)
            if x.shape[axis] != self.num_features:
                raise ValueError(f"x has {x.shape[axis]} channels on axis {axis} but the layer has num_features={self.num_features}")
        batch = self.running_mean is None or (self.training and not self.frozen)
        track = batch and self.running_mean is not None
        statistics = (self.running_mean, self.running_var) if track or not batch else (None, None)
        y, saved = functional.batch_norm_forward(
            x, self.weight, self.bias, *statistics, training=batch, momentum=self._weight_of_new(), eps=self.eps,
            layout=self.layout, activation=self.activation, residual=residual, mask=mask, out=out,
        )  # fmt: skip
        if track and x.size and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        overwritten = out is not None and x.size > 0 and out.ctypes.data == x.ctypes.data
        self._context = None if overwritten and not saved.invertible else (x, saved, overwritten)
        return y

    __call__ = forward

    def _weight_of_new(self) -> float:
        """Momentum of the next batch; None is the cumulative average."""
        if self.momentum is not None:
            return self.momentum
        seen = 0 if self.num_batches_tracked is None else int(self.num_batches_tracked)
        return 1.0 / (seen + 1)

    def backward(self, dy: Array, *, wrt: tuple[str, ...] | None = None, out: Array | None = None) -> Gradients:
        """Gradients of the last `forward`.

        Parameters
        ----------
        dy : ndarray of the shape and dtype of x
        wrt : sequence of str, optional
            Which gradients: "x", "weight", "bias", "residual". None means all that there are; those of weight and
            bias not for a frozen layer.
        out : ndarray of the shape and dtype of x, optional
            Where to write dx; may be dy.

        Returns
        -------
        Gradients

        Raises
        ------
        RuntimeError
            If `forward` was not called before, or overwrote an input that cannot be had from its output.
        TypeError, ValueError
            As `batch_norm_backward`.
        """
        if self._context is None:
            raise RuntimeError("backward needs a forward before it, whose input was not overwritten or can be had from its output")
        x, saved, from_output = self._context
        if wrt is None:
            parameters = ("weight", "bias") if self.affine and not self.frozen else ()
            wrt = ("x", *parameters, *(("residual",) if saved.residual is not None else ()))
        return functional.batch_norm_backward(dy, x, saved, wrt=wrt, from_output=from_output, out=out)

    def train(self, mode: bool = True) -> Self:
        """Use the batch's statistics from now on, and update the running ones; a frozen layer stays frozen.

        Parameters
        ----------
        mode : bool
            False is the same as `eval`.

        Returns
        -------
        The layer itself.
        """
        self.training = mode
        return self

    def eval(self) -> Self:
        """Use the running statistics from now on.

        Returns
        -------
        The layer itself.
        """
        return self.train(False)

    def freeze(self, mode: bool = True) -> Self:
        """Use the running statistics in training too, and leave them and the parameters alone.

        Parameters
        ----------
        mode : bool
            False makes the layer an ordinary one again.

        Returns
        -------
        The layer itself.

        Raises
        ------
        ValueError
            If the layer has no running statistics.
        """
        if mode and self.running_mean is None:
            raise ValueError("a layer with track_running_stats=False has no running statistics to freeze")
        self.frozen = mode
        return self

    _keys = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters and running statistics, under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
        """
        return {key: value.copy() for key in self._keys if (value := getattr(self, key)) is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load parameters and running statistics.

        Parameters
        ----------
        state : mapping of str to array_like
            With the keys of `state_dict`; "num_batches_tracked" may be missing, as in old PyTorch files.

        Raises
        ------
        KeyError
            If a key is missing or unknown.
        ValueError
            If a shape does not fit or a value is no number. Nothing is loaded then.
        """
        own = {key: value for key in self._keys if (value := getattr(self, key)) is not None}
        missing = own.keys() - state.keys() - {"num_batches_tracked"}
        unknown = state.keys() - own.keys()
        if missing or unknown:
            raise KeyError(f"state_dict lacks {sorted(missing)} and has unknown {sorted(unknown)}")
        loaded = {key: np.asarray(state[key], value.dtype) for key, value in own.items() if key in state}
        for key, value in loaded.items():
            if value.shape != own[key].shape:
                raise ValueError(f"{key} must have shape {own[key].shape}, got {value.shape}")
        for key, value in loaded.items():
            own[key][...] = value


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, L) arrays, as ``torch.nn.BatchNorm1d``.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of a batch in the update of the running statistics; None is the cumulative average.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether there are running statistics; without them, the batch's own are always used.
    layout : str, optional
        "NC", "NCL" or "channels_first" (as None), "NLC" or "channels_last".
    activation : str, tuple, function or Activation, optional
        As in `batch_norm_forward`.
    dtype : dtype
        Of the input; parameters and statistics are float64 for float64, else float32.

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


class BatchNorm2d(_BatchNorm):
    """Batch normalization of (N, C, H, W) arrays, as ``torch.nn.BatchNorm2d``.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, activation, dtype
        As in `BatchNorm1d`.
    layout : str, optional
        "NCHW" or "channels_first" (as None), "NHWC" or "channels_last".

    Examples
    --------
    >>> import numpy as np
    >>> bn = BatchNorm2d(3).eval()
    >>> bn(np.ones((1, 3, 2, 2), np.float32)).shape
    (1, 3, 2, 2)
    """

    _ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch normalization of (N, C, D, H, W) arrays, as ``torch.nn.BatchNorm3d``.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, activation, dtype
        As in `BatchNorm1d`.
    layout : str, optional
        "NCDHW" or "channels_first" (as None), "NDHWC" or "channels_last".

    Examples
    --------
    >>> import numpy as np
    >>> bn = BatchNorm3d(3, layout="NDHWC")
    >>> bn(np.zeros((1, 2, 2, 2, 3), np.float32)).shape
    (1, 2, 2, 2, 3)
    """

    _ranks = (5,)


class FrozenBatchNorm:
    """Inference with everything folded once: the serving path.

    Parameters
    ----------
    running_mean, running_var : array_like of shape (C,)
    weight, bias : array_like of shape (C,), optional
        None means 1 and 0.
    eps : float
        Added to the variance.
    layout : str, optional
        As in `batch_norm_forward`.
    activation : str, tuple, function or Activation, optional
        As in `batch_norm_forward`.

    Raises
    ------
    ValueError
        If the vectors have different shapes.

    Examples
    --------
    >>> import numpy as np
    >>> bn = FrozenBatchNorm([2.0], [4.0], eps=0.0)
    >>> bn(np.array([[1.0], [3.0]], np.float32))
    array([[-0.5],
           [ 0.5]], dtype=float32)
    """

    def __init__(
        self,
        running_mean: Array,
        running_var: Array,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        *,
        layout: str | None = None,
        activation: functional.ActivationLike = None,
    ):
        self.activation = activation
        self._activation = functional._activation(activation)
        mean = np.array(running_mean, np.float64)
        if mean.ndim != 1:
            raise ValueError(f"running_mean must have shape (C,), got {mean.shape}")
        var = np.array(running_var, np.float64)
        w, b = (None if v is None else np.array(v, np.float64) for v in (weight, bias))
        for name, vector in {"running_var": var, "weight": w, "bias": b}.items():
            if vector is not None and vector.shape != mean.shape:
                raise ValueError(f"running_mean has {mean.size} channels but {name} has shape {vector.shape}")
        self.eps = functional._number("eps", eps)
        self.layout = layout
        self.num_features = mean.size
        self._folded = core.Folded(mean, var, w, b, self.eps)

    def __repr__(self) -> str:
        return f"FrozenBatchNorm({self.num_features} channels, eps={self.eps}, layout={self.layout!r}, activation={self.activation!r})"

    def __call__(self, x: Array, residual: Array | None = None, out: Array | None = None) -> Array:
        """Normalize x.

        Parameters
        ----------
        x : ndarray of shape (N, C, *spatial), or (N, *spatial, C)
            float32, float64, float16 or bfloat16.
        residual : ndarray of the shape and dtype of x, optional
            Added before the activation.
        out : ndarray of the shape and dtype of x, optional
            Where to write the result; may be x.

        Returns
        -------
        ndarray of the shape, dtype and memory order of x

        Raises
        ------
        TypeError, ValueError
            As `batch_norm`.
        """
        if (y := self._folded.plain(x, residual, out)) is not None:
            return y
        x, axis, dtype = functional._input(x, self.layout)
        if x.shape[axis] != self.num_features:
            raise ValueError(f"x has {x.shape[axis]} channels on axis {axis} but the layer has {self.num_features}")
        r = functional._residual(residual, x)
        return core.apply(self._folded, x, axis, dtype, self._activation, r, functional._output(out, x, x=x, residual=r))
