"""Replace Keras' batch norms by fastbn's, in a copy of a model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import keras

from fastbn import checks
from fastbn.keras.layer import BatchNormalization, known

layers = keras.layers
_REPLACED = (layers.BatchNormalization, BatchNormalization)
_OURS = {"module": BatchNormalization.__module__, "class_name": "BatchNormalization", "registered_name": "fastbn>BatchNormalization"}

_OWN_CODE = "and only its own code knows its layers: use fastbn.keras.BatchNormalization there in place of keras.layers.BatchNormalization"


class Place(NamedTuple):
    """What stands beside a layer in its model, by the names of the layers there.

    Attributes
    ----------
    calls : int
        How often the model calls it.
    before, after : list of str
        Where its inputs come from and where its outputs go; the model's own output is "".
    """

    calls: int
    before: list[str]
    after: list[str]


def check(model: Any) -> Any:
    """Check that something is a model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}")
    return model


def norms(model: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any, Any]]:
    """The batch norms of a model, each once, with its path and what holds it."""
    seen = set() if seen is None else seen
    for layer in model._flatten_layers(include_self=False, recursive=False):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        name = f"{path}{layer.name}"
        if isinstance(layer, layers.BatchNormalization):
            yield name, layer, model
        else:
            yield from norms(layer, f"{name}/", seen)


def _sources(node: Any) -> Iterator[str]:
    """Names of the layers whose outputs the arguments of a call hold."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            yield node["config"]["keras_history"][0]
        else:
            for value in node.values():
                yield from _sources(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _sources(value)


def _names(outputs: Any) -> Iterator[str]:
    """Names in what a configuration says of a model's outputs: ``[name, node, tensor]``, in any structure."""
    if isinstance(outputs, (list, tuple)) and len(outputs) == 3 and isinstance(outputs[0], str):
        yield outputs[0]
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from _names(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _names(value)


def places(model: Any) -> dict[str, Place]:
    """What stands where, as far as the configuration of a model says it."""
    if isinstance(model, keras.Sequential):
        names = [layer.name for layer in model.layers]
        around = ["", *names, ""]
        return {name: Place(1, [around[i]] if i else [], [around[i + 2]]) for i, name in enumerate(names)}
    if not is_functional(model):
        return {}
    try:
        config = model.get_config()
        if "layers" not in config:  # of a class with a constructor of its own, it is this one's arguments
            config = keras.Model(model.inputs, model.outputs).get_config()
    except NotImplementedError:  # of a layer in it
        return {}
    found = {layer["name"]: Place(len(layer["inbound_nodes"]), list(_sources(layer["inbound_nodes"])), []) for layer in config["layers"]}
    for name, place in found.items():
        for source in place.before:
            found[source].after.append(name)
    for name in _names(config["output_layers"]):
        found[name].after.append("")
    return found


def is_functional(model: Any) -> bool:
    """Whether a model is a graph of layers."""
    return isinstance(model, keras.Model) and not isinstance(model, keras.Sequential) and hasattr(model, "operations")


def operation(model: Any, name: str) -> Any:
    """A layer of a model by its name, or an operation, such as ``keras.ops.add``, which a graph of layers may have among them."""
    return next(one for one in (model.operations if is_functional(model) else model.layers) if one.name == name)


def _follows(layer: Any) -> Any:
    """What a layer computes, where it is an activation that the kernels know."""
    if type(layer) is layers.Activation:
        return layer.activation if known(layer.activation) else None
    if type(layer) is layers.LeakyReLU:
        return ("leaky_relu", float(layer.negative_slope))
    if type(layer) is layers.ReLU and layer.threshold == 0:
        if layer.max_value is None:
            return ("leaky_relu", float(layer.negative_slope)) if layer.negative_slope else "relu"
        return "relu6" if layer.max_value == 6 and not layer.negative_slope else None
    return None


def _holders(model: Any) -> Counter[int]:
    """In how many models and layers each layer is, by its id."""
    found: Counter[int] = Counter()
    waiting = [model]
    while waiting:
        inside = {id(layer): layer for layer in waiting.pop()._flatten_layers(include_self=False, recursive=False)}
        waiting += [layer for key, layer in inside.items() if key not in found]
        found.update(inside.keys())
    return found


def _pairs(model: Any) -> dict[int, Any]:
    """Activations that may become part of a batch norm, by the ids of both layers; that of the activation has None."""
    found: dict[int, Any] = {}
    holders = _holders(model)  # of another one of these, a layer here says nothing
    for _, layer, holder in norms(model):
        if type(layer) not in _REPLACED:
            continue
        place = places(holder).get(layer.name) if isinstance(holder, keras.Model) else None
        if place is None or (place.calls, len(place.after)) != (1, 1) or not place.after[0] or getattr(layer, "activation", None):
            continue
        after = operation(holder, place.after[0])
        function = _follows(after)
        if function is None or places(holder)[after.name].calls != 1 or after.compute_dtype != layer.compute_dtype:
            continue
        if holders[id(layer)] > 1 or holders[id(after)] > 1 or layer.activity_regularizer or after.activity_regularizer:
            continue
        found |= {id(layer): function, id(after): None}
    return found


def _ours(config: Any) -> Any:
    """A configuration in which every batch norm of Keras' is ours."""
    if isinstance(config, dict):
        if (config.get("module"), config.get("class_name")) == ("keras.layers", "BatchNormalization"):
            return config | _OURS
        return {key: _ours(value) for key, value in config.items()}
    return type(config)(map(_ours, config)) if type(config) in (list, tuple) else config


def _copy_adapted(old: Any, new: Any) -> None:
    """What `adapt` found: Keras keeps vocabularies beside the weights, and numbers made of these, and copies both by files alone."""
    store: dict[str, Any] = {}
    old.save_own_variables(store)
    new.load_own_variables(store)
    if hasattr(old, "save_assets"):
        with TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


def _unused(given: Any) -> Any:
    """What a model was compiled with, for another model: what has a state is made anew, functions and losses are the same."""
    if isinstance(given, dict):
        return {key: _unused(value) for key, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(map(_unused, given))
    if not isinstance(given, (keras.Metric, keras.optimizers.Optimizer)):
        return given
    config = given.get_config()
    schedule = getattr(given, "_learning_rate", None)
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        config["learning_rate"] = schedule
    return type(given).from_config(config)


def _is_compiled_by_keras(model: Any) -> bool:
    kind, plain = type(model), keras.Model
    return bool(model.compiled and kind.compile == plain.compile and kind.compile_from_config == plain.compile_from_config)


def _models(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.Model)]


def _clone(model: Any, clone: Any) -> Any:
    """A copy of a model and those in it, compiled as they are: Keras would look up a loss of the user's by its name, in vain."""
    compiled = [one for one in _models(model) if _is_compiled_by_keras(one)]
    for one in compiled:
        one.compiled = False
    try:
        copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    finally:
        for one in compiled:
            one.compiled = True
    for old, new in zip(_models(model), _models(copy), strict=True) if compiled else ():
        if old in compiled:
            try:
                options = _unused(old._compile_config.config)
            except Exception as error:  # of somebody else's class, whose configuration does not make it again
                text = f"the copy of {old.name} is not compiled, because an optimizer or a metric cannot be made again: {error!r}"
                warnings.warn(f"{text}; call its method compile", stacklevel=3)
                continue
            new.compile(**options)
            if new.optimizer is not None:
                new.optimizer.build(new.trainable_variables)
    return copy


def convert(model: Any, *, fuse: bool = False) -> Any:
    """Copy a model, and replace Keras' batch norms by fastbn's `BatchNormalization`.

    Parameters
    ----------
    model : keras.Model
        A Sequential or Functional model; it may contain other such models, shared layers and wrappers.
    fuse : bool
        Whether to move an activation layer into a batch norm if it is the only layer that follows. A layer that does
        nothing remains in its place.

    Returns
    -------
    keras.Model
        Made by ``keras.models.clone_model``, with the same names and copies of the weights, compiled as the model was, but
        without the state of its optimizer; not compiled, which a warning says, where the configuration of an optimizer or a
        metric does not make it again. The model itself is not changed.

    Raises
    ------
    TypeError
        If model is not a keras.Model, or fuse is neither True nor False.
    ValueError
        If the model, or one in it, is a class of its own, whose layers only its code knows, or if it is not built.

    Notes
    -----
    Batch norms that a layer of another class creates in its own code are not replaced, nor are classes derived from Keras'
    `BatchNormalization`; `summary` shows them. If the model's class is derived from Sequential, or from Model with a
    constructor of its own, the copy is a plain Sequential or Functional model, as ``clone_model`` makes it.

    Examples
    --------
    >>> import keras, fastbn.keras
    >>> layers = [keras.layers.Input((8, 8, 3)), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    >>> converted = fastbn.keras.convert(keras.Sequential(layers), fuse=True)
    >>> converted.layers[0].activation.__name__
    'relu'
    """
    check(model)
    fuse = checks.switch("fuse", fuse)
    if not isinstance(model, keras.Sequential) and not is_functional(model):
        raise ValueError(f"{type(model).__name__} is neither Sequential nor Functional, {_OWN_CODE}")
    for one in _models(model):
        if (isinstance(one, keras.Sequential) or is_functional(one)) and not str(type(one).call.__module__).startswith("keras."):
            raise ValueError(f"{type(one).__name__} has a call of its own, {_OWN_CODE}")
    if not model.built:
        raise ValueError("model must be built, so that it has weights to copy: call it, or give it an Input")
    pairs = _pairs(model) if fuse else {}
    adapted: list[tuple[Any, Any]] = []

    def clone(layer: Any) -> Any:
        config = layer.get_config()
        if type(layer) in _REPLACED:
            activation = pairs.get(id(layer))
            return BatchNormalization.from_config(config if activation is None else config | {"activation": activation})
        if id(layer) in pairs:
            return layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)
        made = type(layer).from_config(_ours(config))
        if hasattr(layer, "adapt"):
            adapted.append((layer, made))
        return made

    converted = _clone(model, clone)
    converted.set_weights(model.get_weights())
    for pair in adapted:
        _copy_adapted(*pair)
    return converted
