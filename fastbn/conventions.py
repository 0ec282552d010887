"""The names, orders and meanings of batch norm's parameters in other libraries.

Nothing here imports a library to know its objects: these are known by their attributes, so that each is only needed by
those who have such objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastbn import checks
from fastbn.functional import ActivationLike, Number
from fastbn.hints import Self

# Keras' activations by name, with Keras' defaults.
KERAS: dict[str, str | tuple[str, float]] = {
    "relu": "relu",
    "relu6": "relu6",
    "leaky_relu": ("leaky_relu", 0.2),
    "hard_silu": "hardswish",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "tanh": "tanh",
    "gelu": "gelu",
}


class Found(NamedTuple):
    """A batch norm of another library.

    Attributes
    ----------
    names : tuple of str
        What its mean, variance, weight and bias are called there.
    vectors : tuple
        These four; None is what it has none of.
    eps : float
    momentum : float or None
        Weight of the *new* value, as fastbn has it.
    correction : int
        1 where the running variance is the unbiased one.
    axis : int or None
        Of the channels; None is the first after the batch.
    training : bool
    activation : str, tuple or None
    dtype : str
        Of the input.
    batches : object
        How many were counted.
    trained : str
        What its training is, where that is none of batch normalization.
    layout : str or None
        In place of an axis.
    options : mapping
        What else a layer of fastbn that can be trained has.
    frozen : bool
    tracks : bool
        Whether training moves the running statistics, where there are any.
    """

    names: tuple[str, str, str, str]
    vectors: tuple[Any, Any, Any, Any]
    eps: Any
    momentum: Any
    correction: int
    axis: Any = None
    training: bool = True
    activation: Any = None
    dtype: Any = "float32"
    batches: Any = None
    trained: str = ""
    layout: Any = None
    options: Mapping[str, Any] = {}
    frozen: bool = False
    tracks: bool = True

    def where(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Where the channels are, unless the options say so."""
        return {} if options.keys() & {"layout", "axis"} else {"layout": self.layout, "axis": self.axis}


def _weight_of_new(momentum: object) -> float:
    """The weight of the new value, where a library gives that of the old one."""
    return 1.0 - checks.number("momentum", momentum)


def _dtype(*vectors: Any) -> str:
    """Of the input: float64 where arrays are."""
    return "float64" if any(str(getattr(v, "dtype", "")).endswith("float64") for v in vectors if v is not None) else "float32"


def array_of(value: Any) -> Any:
    """A parameter of any library, as far as NumPy needs help with it."""
    if value is None or isinstance(value, (np.ndarray, np.generic)):
        return value
    if hasattr(value, "detach"):  # a tensor of PyTorch
        if type(value).__name__.startswith("Uninitialized"):
            raise ValueError("module must have been called once, but it is lazy and never was")
        if value.is_meta:
            raise ValueError("module must have numbers, but its tensors lie on meta")
        value = value.detach().cpu()
        return value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()
    if hasattr(value, "numpy"):  # a variable of Keras or TensorFlow
        return value.numpy()
    if hasattr(value, "get_value"):  # a variable of Flax' nnx
        return np.asarray(value.get_value())
    return value if not hasattr(value, "__array__") else np.asarray(value)


def torch(source: Any) -> Found:
    """A layer of PyTorch, of fastbn, or its state_dict."""
    names = ("running_mean", "running_var", "weight", "bias")
    if isinstance(source, Mapping):
        if not {"running_mean", "running_var"} <= source.keys():
            listed = sorted(map(str, source))
            raise TypeError(f"module must be a layer, or a state_dict with running_mean and running_var, got one with {listed}")
        found, numbers = dict(source), {}
    else:
        if missing := [name for name in (*names, "eps") if not hasattr(source, name)]:
            raise TypeError(
                f"module must have running_mean, running_var, weight, bias and eps, or be a state_dict, got {type(source).__name__} "
                f"without {', '.join(missing)}"
            )
        if hasattr(source, "mix"):
            raise TypeError(f"module must be a batch normalization, got {type(source).__name__}, which has a part of another one")
        found = {name: getattr(source, name, None) for name in (*names, "num_batches_tracked")}
        numbers = {name: getattr(source, name) for name in ("eps", "momentum", "training", "correction") if hasattr(source, name)}
    mean, var, weight, bias = (array_of(found.get(name)) for name in names)
    made = Found(
        names, (mean, var, weight, bias), numbers.get("eps", 1e-5), numbers.get("momentum", 0.1), numbers.get("correction", 1),
        training=bool(numbers.get("training", True)), dtype=_dtype(mean, var, weight, bias),
        batches=array_of(found.get("num_batches_tracked")), trained=_trained(source),
        tracks=bool(getattr(source, "track_running_stats", True)),
    )  # fmt: skip
    of_fastbn = all(hasattr(source, name) for name in ("layout", "axis", "activation", "dtype"))
    return made._replace(**_own(source)) if of_fastbn else made


def _trained(source: Any) -> str:
    """What a layer's training is, where that is none of batch normalization."""
    if any("InstanceNorm" in kind.__name__ for kind in type(source).__mro__):
        return "instance normalization"
    return "batch renormalization" if hasattr(source, "rmax") else ""


def _own(layer: Any) -> dict[str, Any]:
    """What a layer of fastbn has besides, as fields of Found."""
    options = {name: getattr(layer, name) for name in ("skip_nonfinite", "communicator") if hasattr(layer, name)}
    fields = {name: getattr(layer, name) for name in ("layout", "axis", "activation")}
    return fields | {"dtype": str(layer.dtype), "options": options, "frozen": getattr(layer, "frozen", False)}


def keras(
    layer: Any, beta: Any, moving_mean: Any, moving_variance: Any, epsilon: Any, momentum: Any, axis: Any, activation: Any
) -> Found:
    """A layer of Keras, or its weights in Keras' order."""
    names = ("moving_mean", "moving_variance", "gamma", "beta")
    gamma, dtype, trained, frozen = layer, None, "", False
    if hasattr(layer, "moving_mean") and hasattr(layer, "epsilon"):
        if any(v is not None for v in (beta, moving_mean, moving_variance)):
            raise TypeError("beta, moving_mean and moving_variance are the layer's own; give a layer, or the vectors")
        if layer.moving_mean is None:
            raise ValueError("layer must be built, so that it has weights: call it, or its build(shape)")
        gamma, beta, moving_mean, moving_variance = (
            array_of(getattr(layer, name)) for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        epsilon = layer.epsilon if epsilon is None else epsilon
        momentum = layer.momentum if momentum is None else momentum
        several = isinstance(layer.axis, (list, tuple))
        if several and len(layer.axis) != 1:
            raise ValueError(f"layer must have one axis of channels, got axis={checks.short(layer.axis)}")
        own = layer.axis[0] if several else layer.axis
        axis = own if axis is None else axis
        activation = _keras_activation(layer) if activation is None else activation
        dtype = str(getattr(layer, "compute_dtype", "float32"))
        trained = "batch renormalization" if getattr(layer, "renorm", False) else ""
        frozen = not getattr(layer, "trainable", True)
    elif moving_mean is None or moving_variance is None:
        raise TypeError(
            "layer must be a BatchNormalization of Keras, or gamma, with beta, moving_mean and moving_variance after it "
            f"(*layer.get_weights(); None for a gamma or beta that it lacks), got {type(layer).__name__}"
        )
    vectors = moving_mean, moving_variance, gamma, beta
    new = _weight_of_new(0.99 if momentum is None else momentum)
    axis = -1 if axis is None else axis
    return Found(
        names, vectors, 1e-3 if epsilon is None else epsilon, new, 0, axis=axis, activation=activation, dtype=dtype or _dtype(*vectors),
        trained=trained, frozen=frozen,
    )  # fmt: skip


def _keras_activation(layer: Any) -> Any:
    given = getattr(layer, "activation", None)
    if given is None or isinstance(given, tuple):
        return given
    name = getattr(given, "__name__", "")
    if name not in KERAS:
        own = checks.short(name or given)
        raise ValueError(f"the layer's activation, {own}, is none of {', '.join(KERAS)}: give activation=, or apply it apart")
    return KERAS[name]


def flax(source: Any, epsilon: Any, momentum: Any, axis: Any) -> Found:
    """A layer of Flax's nnx, or the variables of one of linen."""
    names = ("mean", "var", "scale", "bias")
    if isinstance(source, Mapping):
        held = (source.get("params"), source.get("batch_stats"))
        flat = {key: value for part in held if isinstance(part, Mapping) for key, value in part.items()} or source
        if not {"mean", "var"} <= flat.keys():
            raise TypeError(f"variables must hold the batch_stats of one layer, mean and var, got {sorted(map(str, flat))}")
        found, own = dict(flat), {}
    else:
        if not (hasattr(source, "mean") and hasattr(source, "var") and hasattr(source, "epsilon")):
            kind = type(source).__name__
            raise TypeError(f"variables must be a flax.nnx.BatchNorm, or variables of one flax.linen.BatchNorm, got {kind}")
        found = {name: getattr(source, name, None) for name in names}
        own = {name: getattr(source, name) for name in ("epsilon", "momentum", "axis", "use_running_average") if hasattr(source, name)}
    mean, var, scale, bias = (array_of(found.get(name)) for name in names)
    eps = own.get("epsilon", 1e-5) if epsilon is None else epsilon
    new = _weight_of_new(own.get("momentum", 0.99) if momentum is None else momentum)
    where = own.get("axis", -1) if axis is None else axis
    training = not own.get("use_running_average")
    return Found(names, (mean, var, scale, bias), eps, new, 0, where, training, dtype=_dtype(mean, var, scale, bias))


def onnx(node: Any, given: Any, input_mean: Any, input_var: Any, epsilon: Any, momentum: Any) -> Found:
    """A node of ONNX with its tensors, a model with the name of a node, or a node's inputs in ONNX' order."""
    names = ("input_mean", "input_var", "scale", "B")
    training = False
    if hasattr(node, "op_type") or hasattr(node, "graph"):
        if input_mean is not None or input_var is not None:
            raise TypeError("input_mean and input_var are the node's own; give a node and its tensors, or the vectors")
        node, tensors = _of_model(node, given) if hasattr(node, "graph") else (node, _tensors(given))
        attributes = {a.name: a.i if a.type == 2 else a.f for a in node.attribute}  # 2: an int
        if node.op_type != "BatchNormalization":
            raise ValueError(f"node must be a BatchNormalization, got {node.op_type}")
        if not attributes.get("spatial", 1):
            raise ValueError("node must have one value for each channel, but its attribute spatial is 0")
        if len(node.input) < 5 or not all(node.input[1:5]):
            raise ValueError(f"node must have the inputs X, scale, B, input_mean and input_var, got {checks.short(list(node.input))}")
        if missing := [name for name in node.input[1:5] if name not in tensors]:
            raise ValueError(f"the node's inputs must be initializers or constants, but {', '.join(missing)} is not among those given")
        scale, bias, input_mean, input_var = (tensors[name] for name in node.input[1:5])
        epsilon = attributes.get("epsilon", 1e-5) if epsilon is None else epsilon
        momentum = attributes.get("momentum", 0.9) if momentum is None else momentum
        training = bool(attributes.get("training_mode", 0)) or any(list(node.output)[1:])  # below opset 14, these alone say so
    else:
        scale, bias = node, given
        if input_mean is None or input_var is None:
            raise TypeError(
                "scale, B, input_mean and input_var must be given, or a NodeProto and its tensors, or a ModelProto and the name of "
                f"a node, got {type(node).__name__}"
            )
    vectors = input_mean, input_var, scale, bias
    new = _weight_of_new(0.9 if momentum is None else momentum)
    return Found(names, vectors, 1e-5 if epsilon is None else epsilon, new, 0, training=training, dtype=_dtype(*vectors))


def _tensors(given: Any) -> dict[str, Any]:
    """Tensors by name, from a mapping, or from TensorProtos."""
    if isinstance(given, Mapping):
        return {name: _tensor(value) for name, value in given.items()}
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, np.ndarray)):
        listed = list(given)
        if all(hasattr(tensor, "data_type") for tensor in listed):
            return {tensor.name: _tensor(tensor) for tensor in listed}
    raise TypeError(f"the tensors of a node must be a mapping of names to arrays, or TensorProtos, got {type(given).__name__}")


def _tensor(value: Any) -> Any:
    if not hasattr(value, "data_type"):
        return value
    numpy_helper = import_module("onnx.numpy_helper")  # who has a TensorProto has it, and packers need not take it along for others
    try:
        return numpy_helper.to_array(value)
    except Exception as error:  # they lie in another file, or are more or fewer than the shape says
        raise ValueError(f"the numbers of {value.name} cannot be read: {error}") from error


def _of_constant(node: Any) -> dict[str, Any]:
    """What a Constant node holds, by its name; nothing where that is no array of numbers."""
    held = {attribute.name: attribute for attribute in node.attribute}
    if "value" in held:
        return {node.output[0]: _tensor(held["value"].t)}
    return {node.output[0]: np.array(held["value_floats"].floats, np.float32)} if "value_floats" in held else {}


def _of_model(model: Any, name: Any) -> tuple[Any, dict[str, Any]]:
    """A node of a model's graph by its name or that of its output, and the tensors that the graph knows of."""
    if not isinstance(name, str):
        raise TypeError(f"after a model comes the name of a node, a str, got {type(name).__name__}")
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    found = [node for node in nodes if node.name == name] or [node for node in nodes if name in node.output]
    if len(found) != 1:
        listed = checks.short(None, ", ".join(node.name or node.output[0] for node in nodes) or "none")
        raise ValueError(f"the model must have one BatchNormalization called {name!r}, got {len(found)}; those it has: {listed}")
    wanted = set(found[0].input[1:5])
    tensors = {t.name: _tensor(t) for t in model.graph.initializer if t.name in wanted}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in wanted:
            tensors |= _of_constant(node)
    return found[0], tensors


class FromOthers:
    """Constructors of a layer from the layers and parameters of other libraries."""

    @classmethod
    def _of(cls, found: Found, options: dict[str, Any]) -> Self:
        raise NotImplementedError

    @classmethod
    def from_torch(cls, module: Any, **options: Any) -> Self:
        """Make a layer from a PyTorch layer or state_dict.

        Parameters
        ----------
        module : torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm, a layer of fastbn, or a mapping
            An object with the attributes running_mean, running_var, weight, bias and eps; or its state_dict. A state_dict
            has no eps and no momentum: pass them as options, or PyTorch's defaults apply. From a layer of fastbn, layout,
            axis, activation and dtype are taken, too.
        **options
            Arguments of the constructor, such as layout, axis, activation and eps. They override what was found.

        Returns
        -------
        The layer, with copies of the vectors.

        Raises
        ------
        TypeError, ValueError
            If attributes are missing; if the new layer can be trained, but the old one trains differently (instance
            normalization, batch renormalization); or as the constructor.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.FrozenBatchNorm.from_torch(fastbn.BatchNorm2d(3))
        FrozenBatchNorm(3 channels, eps=1e-05, layout=None, activation=None)
        """
        return cls._of(torch(module), options)

    @classmethod
    def from_keras(
        cls, gamma: Any, beta: ArrayLike | None = None, moving_mean: ArrayLike | None = None, moving_variance: ArrayLike | None = None, *,
        epsilon: Number | None = None, momentum: Number | None = None, axis: int | None = None, activation: ActivationLike = None,
        **options: Any,
    ) -> Self:  # fmt: skip
        """Make a layer from a Keras layer, or from its weights in Keras' order.

        Parameters
        ----------
        gamma : keras.layers.BatchNormalization, or array_like of shape (C,)
            A built layer of Keras or of `fastbn.keras`; or its first weight.
        beta, moving_mean, moving_variance : array_like of shape (C,), optional
            As ``layer.get_weights()`` lists them; gamma or beta is None if the layer has none. Not allowed with a layer.
        epsilon : float, optional
            Added to the variance. None means the layer's, or 1e-3.
        momentum : float, optional
            As in Keras, the weight of the *old* value. None means the layer's, or 0.99.
        axis : int, optional
            The channel axis. None means the layer's, or the last one.
        activation : str, tuple, function or Activation, optional
            As in `batch_norm_forward`. None means the layer's.
        **options
            Other arguments of the constructor.

        Returns
        -------
        The layer, with copies of the vectors. Its running variance is the population variance (``correction=0``). It is
        frozen if the Keras layer is not trainable.

        Raises
        ------
        TypeError, ValueError
            If a layer is not built, if it has batch renormalization and the new layer can be trained, or as the
            constructor.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.FrozenBatchNorm.from_keras([2.0], [5.0], [1.0], [4.0], epsilon=0.0)
        >>> bn(np.array([[3.0]]))
        array([[7.]])
        """
        found = keras(gamma, beta, moving_mean, moving_variance, epsilon, momentum, axis, activation)
        return cls._of(found, options if axis is None else options | {"axis": axis})

    @classmethod
    def from_flax(
        cls, variables: Any, *, epsilon: Number | None = None, momentum: Number | None = None, axis: int | None = None, **options: Any
    ) -> Self:
        """Make a layer from a Flax layer.

        Parameters
        ----------
        variables : flax.nnx.BatchNorm, or mapping
            A layer, or the variables of one flax.linen.BatchNorm: ``{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}``, or
            these four together.
        epsilon : float, optional
            Added to the variance. None means the layer's, or 1e-5.
        momentum : float, optional
            As in Flax, the weight of the *old* value. None means the layer's, or 0.99.
        axis : int, optional
            The channel axis. None means the layer's, or the last one.
        **options
            Other arguments of the constructor.

        Returns
        -------
        The layer, with copies of the vectors. Its running variance is the population variance (``correction=0``). A layer that
        can be trained is in evaluation if the source is (``use_running_average``).

        Raises
        ------
        TypeError, ValueError
            If mean or var is missing, or as the constructor.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> variables = {"params": {"scale": [2.0], "bias": [5.0]}, "batch_stats": {"mean": [1.0], "var": [4.0]}}
        >>> fastbn.FrozenBatchNorm.from_flax(variables, epsilon=0.0)(np.array([[3.0]]))
        array([[7.]])
        """
        return cls._of(flax(variables, epsilon, momentum, axis), options if axis is None else options | {"axis": axis})

    @classmethod
    def from_onnx(
        cls, scale: Any, B: Any = None, input_mean: ArrayLike | None = None, input_var: ArrayLike | None = None, *,  # noqa: N803  ONNX's name
        epsilon: Number | None = None, momentum: Number | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """Make a layer from a BatchNormalization node of ONNX, or from its inputs in ONNX's order.

        Parameters
        ----------
        scale : NodeProto, ModelProto, or array_like of shape (C,)
        B : mapping, list of TensorProto, str, or array_like of shape (C,)
            With a node: its tensors by name, as arrays or TensorProtos, or a graph's initializers. With a model: the name
            of a node, or of its output; the inputs are found among the initializers and Constant nodes of the graph.
        input_mean, input_var : array_like of shape (C,), optional
            Not allowed with a node or a model.
        epsilon : float, optional
            Added to the variance. None means the node's, or 1e-5.
        momentum : float, optional
            As in ONNX, the weight of the *old* value. None means the node's, or 0.9.
        **options
            Arguments of the constructor.

        Returns
        -------
        The layer, with copies of the vectors. Its running variance is the population variance (``correction=0``). A
        layer that can be trained is in training mode if the node is; from vectors alone it is in evaluation mode.

        Raises
        ------
        TypeError, ValueError
            If a node is not a BatchNormalization, is missing, or has inputs that are not tensors; or as the constructor.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.FrozenBatchNorm.from_onnx([2.0], [5.0], [1.0], [4.0], epsilon=0.0)
        >>> bn(np.array([[3.0]]))
        array([[7.]])
        """
        return cls._of(onnx(scale, B, input_mean, input_var, epsilon, momentum), options)
