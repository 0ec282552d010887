"""The layer: Keras' BatchNormalization, of which the kernels compute what they take."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import keras

from fastbn import checks
from fastbn.activations import Builtin
from fastbn.conventions import KERAS
from fastbn.dtypes import DTYPES
from fastbn.keras import composed
from fastbn.keras.arrays import Plan, computed

ops = keras.ops
BACKENDS = ("numpy", "torch", "tensorflow", "jax")
_loaded: dict[str, Any] = {}  # no functools.cache: torch.compile warns of it, and looks through it


def backend() -> Any:
    """The module that runs the operation on the backend that Keras has chosen.

    Raises
    ------
    RuntimeError
        If it is none that fastbn knows.
    """
    name = keras.backend.backend()
    if name not in _loaded:
        if name not in BACKENDS:
            raise RuntimeError(f"fastbn.keras runs on the backends {', '.join(BACKENDS)}, and Keras' is {name}")
        _loaded[name] = import_module(f"fastbn.keras.in_{name}")
    return _loaded[name]


def _activation(given: Any) -> tuple[Any, Builtin | None]:
    """An activation as Keras' function or as a tuple, and what the kernels know of it."""
    if isinstance(given, (list, tuple)):
        found = checks.activation(tuple(given))
        assert isinstance(found, Builtin)  # noqa: S101  it has a name
        return tuple(given), found
    function = keras.activations.get(given)
    if function is keras.activations.linear:
        return None, None
    name = getattr(function, "__name__", "")
    known = name in KERAS and function is getattr(keras.activations, name)
    found = checks.activation(KERAS[name]) if known else None
    return function, found if isinstance(found, Builtin) else None


def known(activation: Any) -> bool:
    """Whether the kernels know an activation."""
    return _activation(activation)[1] is not None


@keras.saving.register_keras_serializable("fastbn")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """``keras.layers.BatchNormalization``, computed by fastbn, with an activation in the same pass.

    Its arguments, weights, configuration and results are those of Keras. On every backend, the variance is computed from centered data.

    Parameters
    ----------
    *args, **kwargs
        As ``keras.layers.BatchNormalization``.
    activation : str, function or tuple, optional
        Applied after the normalization: anything that ``keras.layers.Activation`` takes, ``("leaky_relu", slope)`` or
        ``("gelu", "tanh")``. The kernels compute relu, relu6, leaky_relu, hard_silu, sigmoid, silu, tanh and gelu in the
        same pass. The configuration has it only if it was given.

    Raises
    ------
    TypeError, ValueError
        As Keras' layer, and if the activation is unknown.
    RuntimeError
        If Keras runs on a backend that fastbn does not know.

    Notes
    -----
    The kernels compute training on all backends, and inference on torch and numpy. The rest is composed of the backend's
    own operations, also from centered data: masks, renorm, one value per channel on torch, inference in the graphs of
    TensorFlow and JAX (so that these can be exported), what XLA compiles for TensorFlow, and devices other than the CPU.
    With ``synchronized=True`` and several replicas, Keras' own code computes it.

    Examples
    --------
    >>> import keras, fastbn.keras
    >>> layer = fastbn.keras.BatchNormalization(activation="relu")
    >>> layer(keras.ops.ones((2, 4, 4, 3)), training=True).shape[-1]
    3
    """

    def __init__(self, *args: Any, activation: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        backend()  # says now what it does not know
        self.activation, self._builtin = _activation(activation)

    def get_config(self) -> dict[str, Any]:
        """Keras' own configuration, and the activation where there is one."""
        config: dict[str, Any] = super().get_config()
        if self.activation is not None:
            known = isinstance(self.activation, tuple)
            config["activation"] = list(self.activation) if known else keras.activations.serialize(self.activation)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """A layer from its configuration; of the class that ``custom_objects`` names, where a file is read with these.

        Parameters
        ----------
        config : dict

        Returns
        -------
        BatchNormalization
        """
        chosen = keras.saving.get_registered_object("BatchNormalization")
        if cls is BatchNormalization and chosen not in (None, cls):
            return chosen.from_config(config)
        return super().from_config(config)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize, as Keras' layer does.

        Parameters
        ----------
        inputs : tensor
        training : bool, optional
        mask : tensor of the shape of inputs without the last axis, optional
            Positions that count in the statistics.

        Returns
        -------
        tensor
            Of the shape of inputs.
        """
        if not ops.is_tensor(inputs):  # `stateless_call` hands on arrays of NumPy as they are
            inputs = ops.convert_to_tensor(inputs)
        if mask is not None:
            if not hasattr(mask, "shape"):
                raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
            if len(mask.shape) != len(inputs.shape) - 1:
                raise ValueError(f"mask must have one axis less than inputs, of shape {tuple(inputs.shape)}, got {tuple(mask.shape)}")
        if self.synchronized and backend().replicas() > 1:
            return self._after(super().call(inputs, training=training, mask=mask))
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        x = inputs if dtype in DTYPES else ops.cast(inputs, "float32")
        plan = Plan(self.axis % len(x.shape), self.epsilon, self._builtin)
        wide = computed(dtype)
        y = self._train(plan, x, wide, mask) if training and self.trainable else self._infer(plan, x, wide)
        return ops.cast(y if self._builtin is not None else self._after(y), self.compute_dtype)

    def _after(self, z: Any) -> Any:
        """The activation as a step of its own."""
        if self.activation is None:
            return z
        return composed.activate(Plan(0, 0.0, self._builtin), z) if self._builtin is not None else self.activation(z)

    def _scale_and_shift(self, x: Any, wide: str) -> tuple[Any, Any]:
        """Gamma and beta in the type of the arithmetic; where there are none, what changes nothing."""
        n = x.shape[self.axis]
        gamma = ops.cast(self.gamma, wide) if self.scale else ops.ones((n,), wide)
        beta = ops.cast(self.beta, wide) if self.center else ops.zeros((n,), wide)
        return gamma, beta

    def _infer(self, plan: Plan, x: Any, wide: str) -> Any:
        gamma, beta = self._scale_and_shift(x, wide)
        mean, var = ops.cast(self.moving_mean, wide), ops.cast(self.moving_variance, wide)
        y = backend().infer(plan, x, gamma, beta, mean, var)
        if y is not None:
            return y
        gamma, beta, mean, var = (composed.along(plan, v, len(x.shape)) for v in (gamma, beta, mean, var))
        return composed.scaled(plan, ops.cast(x, wide) - mean, var, gamma, beta)

    def _train(self, plan: Plan, x: Any, wide: str, mask: Any) -> Any:
        gamma, beta = self._scale_and_shift(x, wide)
        empty = 0 in x.shape  # statistics of no values say nothing
        some = ops.size(x) > 0 if None in x.shape else True  # which only the program knows
        renorm = getattr(self, "renorm", False) and not empty  # older Keras has none
        found = None if renorm or mask is not None else backend().train(plan, x, gamma, beta)
        if found is not None:
            y, mean, var = found
            self._move(self.moving_mean, mean, self.momentum, some)
            self._move(self.moving_variance, var, self.momentum, some)
            return y
        rank = len(x.shape)
        counts = None if mask is None else ops.broadcast_to(ops.cast(ops.expand_dims(mask, -1), "bool"), ops.shape(x))
        centered, broadcast_mean, broadcast_var = composed.center(backend(), plan, ops.cast(x, wide), counts)
        mean, var = ops.reshape(broadcast_mean, (-1,)), ops.reshape(broadcast_var, (-1,))
        if renorm:
            gamma, beta = self._renormalize(mean, var, gamma, beta, wide, some)
        elif not empty:
            self._move(self.moving_mean, mean, self.momentum, some)
            self._move(self.moving_variance, var, self.momentum, some)
        return composed.scaled(plan, centered, broadcast_var, composed.along(plan, gamma, rank), composed.along(plan, beta, rank))

    def _move(self, variable: Any, new: Any, momentum: float, some: Any) -> Any:
        """Move a running statistic, in the type of the arithmetic; Keras' operations would cut 64 bits to 32. By no values, it stays."""
        old = ops.cast(variable, keras.backend.standardize_dtype(new.dtype))
        return self._set(variable, old, old * momentum + new * (1.0 - momentum), some)

    def _set(self, variable: Any, old: Any, new: Any, some: Any) -> Any:
        variable.assign(new if some is True else ops.where(some, new, old))
        return new

    def _renormalize(self, mean: Any, var: Any, gamma: Any, beta: Any, wide: str, some: Any) -> tuple[Any, Any]:
        """Scale and shift of batch renormalization (Ioffe 2017, arXiv:1702.03275), whose statistics are moved."""
        deviation = (var + self.epsilon) ** 0.5
        least = self.epsilon**0.5
        old_mean, old = ops.cast(self.renorm_mean, wide), ops.maximum(ops.cast(self.renorm_stddev, wide), least)
        r, d = deviation / old, (mean - old_mean) / old
        bounds = self.renorm_clipping or {}
        if (low := bounds.get("rmin")) is not None:
            r = ops.maximum(r, low)
        if (high := bounds.get("rmax")) is not None:
            r = ops.minimum(r, high)
        if (far := bounds.get("dmax")) is not None:
            d = ops.clip(d, -far, far)
        r, d = ops.stop_gradient(r), ops.stop_gradient(d)
        self._move(self.renorm_mean, mean, self.renorm_momentum, some)
        self._move(self.renorm_stddev, deviation, self.renorm_momentum, some)
        self._move(self.moving_mean, mean, self.momentum, some)
        moved = self._move(self.moving_stddev, deviation, self.momentum, some)
        self._set(self.moving_variance, ops.cast(self.moving_variance, wide), ops.relu(moved * moved - self.epsilon), some)
        return r * gamma, d * gamma + beta
