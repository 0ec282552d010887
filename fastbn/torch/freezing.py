"""Batch norms that stay in evaluation mode, for fine-tuning."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastbn.torch.graph import check, check_called, is_batch_norm, norms

STATE = "_fastbn_frozen"  # of a frozen layer: whether weight and bias required gradients


def stay_frozen(self: nn.Module, inputs: tuple[Tensor]) -> None:
    """The hook of a frozen layer, before each call: `train()` has no effect. `torch.jit.script` compiles it, too."""
    self.training = False


def is_frozen(layer: nn.Module) -> bool:
    """Whether `freeze` has frozen a layer."""
    return stay_frozen in layer._forward_pre_hooks.values()


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    check(model)
    return [(path, layer) for path, layer in norms(model) if is_batch_norm(layer)]


def _affine(layer: nn.Module) -> list[nn.Parameter]:
    """Weight and bias, or the parameters that they are computed of where they are parametrized, pruned or the like."""
    own = [*layer.named_parameters(recurse=False)]
    if is_parametrized(layer):
        own += [(name, p) for name, made in layer.parametrizations.items() for p in made.parameters()]  # type: ignore[union-attr, operator]
    return [p for vector in ("weight", "bias") for name, p in own if name == vector or name.startswith(f"{vector}_")]


def freeze(model: nn.Module, *, parameters: bool = True) -> int:
    """Keep the batch norms of a model in evaluation mode, even after `model.train()`.

    Use it for fine-tuning with small batches: layers normalize by the running statistics, and do not change them. The layers
    keep their parameters and names. Copies and pickles of the model are frozen, too. Code that is not a layer, such as scripts
    of torch.jit and graphs of torch.export, is not frozen; `summary` names it.

    Parameters
    ----------
    model : Module
    parameters : bool
        Also freeze weight and bias, so that they require no gradients.

    Returns
    -------
    int
        How many layers were newly frozen.

    Raises
    ------
    TypeError
        If model is no Module.
    ValueError
        If a batch norm is lazy and was never called. Nothing is changed then.

    See Also
    --------
    unfreeze

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    >>> fastbn.torch.freeze(model)
    1
    >>> _ = model.train()(torch.randn(5, 3))
    >>> model[0].running_mean
    tensor([0., 0., 0.])
    """
    count = 0
    layers = _layers(model)
    for path, layer in layers:
        check_called(layer, path)
    for _, layer in layers:
        if is_frozen(layer) or layer.running_mean is None:  # without statistics of its own it needs the batch's
            continue
        affine = _affine(layer)
        setattr(layer, STATE, [p.requires_grad for p in affine])
        layer.register_forward_pre_hook(stay_frozen)  # from here on `unfreeze` undoes it, if Ctrl-C comes in between
        for p in affine if parameters else ():
            p.requires_grad_(False)
        layer.eval()
        count += 1
    return count


def unfreeze(model: nn.Module) -> int:
    """Undo `freeze`: batch norms follow `model.train()` again, and parameters require gradients as before.

    Parameters
    ----------
    model : Module

    Returns
    -------
    int
        How many layers were frozen.

    Raises
    ------
    TypeError
        If model is no Module.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    >>> fastbn.torch.freeze(model), fastbn.torch.unfreeze(model), model[0].training
    (1, 1, True)
    """
    count = 0
    for _, layer in _layers(model):
        if not is_frozen(layer):
            continue
        for p, required in zip(_affine(layer), layer.__dict__[STATE], strict=False):
            p.requires_grad_(p.requires_grad or required)  # another layer may share it, and found it frozen
        layer.train(model.training)
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is stay_frozen]:
            del layer._forward_pre_hooks[key]
        del layer.__dict__[STATE]
        count += 1
    return count
