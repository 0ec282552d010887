"""Fold batch norms into neighboring convolutions and linear layers for inference, which saves a pass over each output."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized

from fastbn.torch.arrays import LAST, is_channels_last
from fastbn.torch.deferred import hooks_of_others
from fastbn.torch.freezing import is_frozen
from fastbn.torch.graph import OF_ROWS, Graph, check, check_called, copied, dtype_name, is_batch_norm, norms, trace, unseen
from fastbn.torch.sync import unusual

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
DIMENSIONS = {
    nn.Linear: 2, nn.Conv1d: 3, nn.ConvTranspose1d: 3, nn.Conv2d: 4, nn.ConvTranspose2d: 4, nn.Conv3d: 5, nn.ConvTranspose3d: 5,
}  # fmt: skip
# Of the inputs that a batch norm takes, where it refuses all others.
OWN_DIMENSIONS: dict[Any, int] = {nn.BatchNorm2d._check_input_dim: 4, nn.BatchNorm3d._check_input_dim: 5}


class Folded(NamedTuple):
    """The result of `fold`.

    Attributes
    ----------
    model : Module
        A copy, in which an `nn.Identity` replaces each folded batch norm. It has the layer's numbers, such as `num_features`
        and `eps`, but none of its tensors.
    folded : dict of str to str
        Path of a batch norm -> path of the layer into which it was folded.
    left : dict of str to str
        Path of a normalization layer that stays -> why; path of a part whose normalizations are not layers -> what they are.
    """

    model: nn.Module
    folded: dict[str, str]
    left: dict[str, str]

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """It is no model."""
        raise TypeError("this is the result of fold, not a model: call its attribute model")

    def __str__(self) -> str:
        """A line for each layer."""
        lines = [f"{path}: folded into {into}" for path, into in self.folded.items()]
        return "\n".join(lines + [f"{path or 'the model'}: left, {why}" for path, why in self.left.items()]) or "no normalization layers"


@fx.wrap  # a condition, which torch.fx cannot trace
def _checked(input: Tensor, dimensions: int) -> Tensor:  # noqa: A002  as nn.Identity
    if input.dim() != dimensions:
        raise ValueError(f"a batch norm was folded for inputs of {dimensions} dimensions, got {input.dim()}")
    return input


class Checked(nn.Identity):
    """What stands for a batch norm that takes inputs of several numbers of dimensions: in one alone it and the layer agree on channels."""

    def __init__(self, dimensions: int):
        super().__init__()
        self.dimensions = dimensions

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as nn.Identity
        """Return the input."""
        return _checked(input, self.dimensions)


def _own_dimensions(layer: Any) -> int | None:
    return OWN_DIMENSIONS.get(type(layer)._check_input_dim)


def _stand_in(layer: Any, other: nn.Module) -> nn.Module:
    """What stands for a batch norm that another layer took, with what the model's code may ask a batch norm for."""
    made = (Checked(DIMENSIONS[type(other)]) if _own_dimensions(layer) is None else nn.Identity()).train(layer.training)
    for name in _NormBase.__constants__:
        setattr(made, name, getattr(layer, name))
    return made


def changed(layer: nn.Module) -> str:
    """Why a layer is not what its class says, or nothing."""
    if hooks_of_others(layer):
        return "has hooks"
    if is_parametrized(layer):
        return "is parametrized"
    return "has a forward of its own" if "forward" in layer.__dict__ else ""


def _overlaid(layer: nn.Module) -> str:
    """Why new numbers in a layer would lose what the class of its tensors adds, such as quantization, or nothing."""
    for name, t in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if type(t) not in (Tensor, nn.Parameter):
            return f"has a {name} of class {type(t).__name__}"
    return ""


def _features(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def target(model: nn.Module, graph: Graph, path: str, *, inference: bool = True) -> tuple[str, str]:
    """The layer that can take a batch norm, or why there is none.

    Parameters
    ----------
    model : Module
    graph : Graph
        Of this model.
    path : str
        Of the batch norm.
    inference : bool
        Whether the layer must be in evaluation mode.

    Returns
    -------
    into, why : str
        One of them is empty.
    """
    layer: Any = model.get_submodule(path)
    place = graph.places[path]
    if not is_batch_norm(layer):
        return "", f"it normalizes each {'row' if isinstance(layer, OF_ROWS) else 'image'} by itself"
    if layer.running_mean is None or layer.running_var is None:
        return "", "it has no running statistics"
    if nn.parameter.is_lazy(layer.running_mean):
        return "", "it was never called"
    if why := unusual(layer):
        return "", why
    if inference and layer.training and not is_frozen(layer):
        return "", "it is in training mode"
    if place.calls == 0:
        return "", "what calls it cannot be traced"
    if place.calls > 1:
        return "", "it is shared by several calls"
    if graph.reads(path):
        return "", "the model's code reads its tensors"
    if why := changed(layer) or _overlaid(layer):
        return "", f"it {why}"
    for other, backwards in ((place.before, False), (place.after, True)):
        if not other:
            continue
        found: Any = model.get_submodule(other)
        if type(found) not in LAYERS:
            continue
        if why := _refuses(found, other, layer, graph, backwards, place.apart):
            return "", why
        if not _can_hold(layer, found, backwards):
            return "", f"the {type(found).__name__} beside it cannot hold the folded numbers in {dtype_name(found.weight.dtype)}"
        return other, ""
    return "", f"it stands between {place.before_is} and {place.after_is}"


def _refuses(other: Any, path: str, layer: Any, graph: Graph, backwards: bool, apart: bool) -> str:
    """Why the layer before a batch norm, or after it, cannot take it."""
    kind = type(other).__name__
    if _own_dimensions(layer) not in (None, DIMENSIONS[type(other)]):
        return f"the {kind} beside it takes another number of dimensions"
    if graph.calls.get(path) != 1:
        return f"the {kind} {'after' if backwards else 'before'} it is shared by several calls"
    if graph.reads(path):
        return f"the model's code reads the weights of the {kind} beside it"
    if why := changed(other) or _overlaid(other):
        return f"the {kind} beside it {why}"
    if backwards:
        if type(other) not in CONVOLUTIONS:
            return f"it stands before a {kind}"
        if other.padding_mode == "zeros" and other.padding != "valid" and any(other.padding):
            return f"the {kind} after it pads what it returns with zeros"
        return "" if other.in_channels == layer.num_features else f"the {kind} after it has another number of features"
    if not apart:
        return f"what the {kind} before it returns is read elsewhere, too"
    return "" if _features(other) == layer.num_features else f"the {kind} before it has another number of features"


def _scale_and_shift(layer: Any) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(layer.running_var.double() + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight.double()
    shift = -layer.running_mean.double() * scale
    return scale, shift if layer.bias is None else shift + layer.bias.double()


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.contiguous(memory_format=_format(like)), like.requires_grad)


def _format(like: Tensor) -> torch.memory_format:
    return LAST[like.dim()] if is_channels_last(like) and not like.is_contiguous() else torch.contiguous_format


@torch.no_grad()
def _together(layer: Any, other: Any, backwards: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that does what a batch norm beside it does, too."""
    scale, shift = _scale_and_shift(layer)
    weight = other.weight.double()
    spatial = [1] * (weight.dim() - 2)
    bias = weight.new_zeros(_features(other)) if other.bias is None else other.bias.double()
    if backwards:
        inputs = weight.shape[1]
        scales = scale.reshape(other.groups, 1, inputs, *spatial)
        shifts = shift.reshape(other.groups, 1, inputs, *spatial)
        grouped = weight.reshape(other.groups, -1, *weight.shape[1:])
        bias = bias + (grouped * shifts).flatten(2).sum(2).flatten()
        weight = (grouped * scales).reshape(weight.shape)
    elif isinstance(other, TRANSPOSED):
        grouped = weight.reshape(other.groups, -1, *weight.shape[1:])
        weight = (grouped * scale.reshape(other.groups, 1, -1, *spatial)).reshape(weight.shape)
        bias = bias * scale + shift
    else:
        weight = weight * scale.reshape(-1, 1, *spatial)
        bias = bias * scale + shift
    return weight.to(other.weight.dtype), bias.to(other.weight.dtype)


def _can_hold(layer: Any, other: Any, backwards: bool) -> bool:
    """Whether the dtype of a layer's weight has room for what it would be; what is elsewhere or nowhere is not looked at."""
    if layer.running_var.is_meta or layer.running_var.device != other.weight.device:
        return True
    return all(bool(t.double().isfinite().all()) for t in _together(layer, other, backwards))


def fold(model: nn.Module) -> Folded:
    """Fold the batch norms of a model in evaluation mode into neighboring convolutions and linear layers.

    A batch norm goes into the convolution or linear layer before it, else into a convolution after it that has no padding. The model
    itself does not change. torch.fx finds the neighbors, in the parts of a model that it can trace. Untraceable code must call
    such a part as a whole: `fold` does not notice code that calls its layers one by one, or reads their weights.

    Parameters
    ----------
    model : Module
        In evaluation mode: `model.eval()`. If it is a DistributedDataParallel, the model inside it is folded, because the wrapper
        shares buffers between processes, and none may be left after folding.

    Returns
    -------
    Folded
        A copy of the model; what was folded into what; what was not folded, and why. Printed, it is a list.

    Raises
    ------
    TypeError
        If model is no Module.
    ValueError
        If it has lazy layers that were never called.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.BatchNorm2d(8))
    >>> print(fastbn.torch.fold(model.eval()))
    1: folded into 0
    3: left, it stands between ReLU and the output
    """
    check(model)
    wrapper = nn.parallel.DistributedDataParallel
    while isinstance(model, wrapper) and type(model).forward is wrapper.forward:
        model = model.module
    check_called(model)
    twin = copied(model)
    graph = trace(twin)
    folded: dict[str, str] = {}
    left = unseen(twin)
    for path, layer in list(norms(twin)):
        into, why = target(twin, graph, path)
        if not into:
            left[path] = why
            continue
        other = twin.get_submodule(into)
        weight, bias = _together(layer, other, into == graph.places[path].after)
        other.weight, other.bias = _parameter(weight, other.weight), nn.Parameter(bias, other.weight.requires_grad)
        stand_in = _stand_in(layer, other)
        for parent in list(twin.modules()):
            for name in [name for name, child in parent._modules.items() if child is layer]:
                setattr(parent, name, stand_in)
        folded[path] = into
    return Folded(twin, folded, left)
