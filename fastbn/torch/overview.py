"""The normalization layers of a model as a table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastbn.tables import counted, table
from fastbn.torch.folding import target
from fastbn.torch.freezing import is_frozen
from fastbn.torch.graph import Listed, all_norms, check, in_evaluation, size, trace, unseen

DEAD = 1e-5  # a weight, relative to the largest of its layer, that lets nothing through


class Layer(NamedTuple):
    """One normalization layer of a model.

    Attributes
    ----------
    path : str
        Its name in the model.
    kind : str
        Its class.
    channels : int
        Number of channels; for a layer norm, the number of values of a row.
    eps : float or None
        None for an RMSNorm whose eps depends on the input's dtype.
    momentum : float or None
        Weight of the new value; None means the cumulative average, or a layer without momentum.
    mode : str
        "train", "eval" or "frozen"; "-" for layers that compute the same in all modes.
    variance : tuple of float, or None
        The smallest and the largest running variance.
    dead : int
        Number of channels whose weight is nearly 0.
    before, after : str
        The neighbor that torch.fx finds: a class, a function, "several" or "unknown"; "the input" and "the output" of the model, or
        of a part that was traced by itself.
    fold : str
        Which neighbor can absorb it in inference, or why none can.
    """

    path: str
    kind: str
    channels: int
    eps: float | None
    momentum: float | None
    mode: str
    variance: tuple[float, float] | None
    dead: int
    before: str
    after: str
    fold: str

    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        variance = "-" if self.variance is None else f"{self.variance[0]:.3g} to {self.variance[1]:.3g}"
        momentum = "-" if self.mode == "-" else "average" if self.momentum is None else f"{self.momentum:g}"
        eps = "of dtype" if self.eps is None else f"{self.eps:g}"
        numbers = str(self.channels), eps, momentum, self.mode, variance, str(self.dead)
        return self.path or "(the model)", self.kind, *numbers, self.before, self.after, self.fold


class Summary(Listed[Layer]):
    """Layers of a model, in its order; printed, a table.

    Attributes
    ----------
    unseen : dict of str to str
        By path, the parts of the model whose normalizations are not layers, and what these parts are.
    """

    def __str__(self) -> str:
        """A table of columns, and what it counts in all."""
        header = "path", "kind", "channels", "eps", "momentum", "mode", "running variance", "dead", "before", "after", "in inference"
        rows = [header, *(layer.cells() for layer in self)]
        can = sum(layer.fold.startswith("folds") for layer in self)
        channels = counted(sum(layer.channels for layer in self), "channel")
        return self.of([*table(rows), f"{counted(len(self), 'layer')}, {channels}, {can} can be folded"])


def summary(model: nn.Module) -> Summary:
    """List the normalization layers of a model: their settings, their values, and whether they can be folded in inference.

    Parameters
    ----------
    model : Module

    Returns
    -------
    Summary
        A tuple of `Layer`. Printed, it is a table.

    Raises
    ------
    TypeError
        If model is no Module.

    See Also
    --------
    fold : fold the layers, as the last column says.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> for layer in fastbn.torch.summary(model):
    ...     print(layer.path, layer.kind, layer.channels, layer.mode, layer.before, layer.after, layer.fold, sep=", ")
    1, BatchNorm2d, 8, train, Conv2d, ReLU, folds into 0
    """
    check(model)
    graph = trace(model)
    with in_evaluation(model):
        inferred = trace(model)
    found = []
    for path, layer in all_norms(model):
        into, why = target(model, inferred, path, inference=False)
        place = graph.places[path] if graph.places[path].calls else inferred.places[path]
        found.append(
            Layer(
                path, type(layer).__name__, size(layer), layer.eps, getattr(layer, "momentum", None), _mode(layer), _variance(layer),
                _dead(layer), place.before_is, place.after_is, f"folds into {into}" if into else why,
            )
        )  # fmt: skip
    return Summary(found, unseen(model))


def _mode(layer: Any) -> str:
    if not isinstance(layer, _NormBase):
        return "-"
    return "frozen" if is_frozen(layer) else "train" if layer.training else "eval"


def _known(vector: Any) -> bool:
    return vector is not None and not nn.parameter.is_lazy(vector) and not vector.is_meta and vector.numel() > 0


def _variance(layer: Any) -> tuple[float, float] | None:
    if not _known(getattr(layer, "running_var", None)):
        return None
    low, high = torch.aminmax(layer.running_var.detach().double())
    return float(low), float(high)


def _dead(layer: Any) -> int:
    if not _known(layer.weight):
        return 0
    weight = layer.weight.detach().double().abs()
    return int((weight <= DEAD * weight.max()).sum())
