"""The batch norms of a model as a table."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from keras.ops import convert_to_numpy

from fastbn.keras.conversion import check, norms, operation, places
from fastbn.keras.layer import BatchNormalization
from fastbn.tables import counted, table

DEAD = 1e-5  # a gamma, relative to the largest of its layer, that lets nothing through


class Layer(NamedTuple):
    """One batch norm of a model.

    Attributes
    ----------
    path : str
        Its name, after the names of the models and layers that contain it.
    kind : str
        Its class; "fastbn." stands before that of `fastbn.keras`.
    channels : int or None
        None if it is not built.
    axis : int
    epsilon, momentum : float
        As in Keras: momentum is the weight of the old value.
    mode : str
        "train", or "frozen" if it is not trainable and so uses the moving statistics in training, too.
    variance : tuple of float, or None
        The smallest and the largest moving variance.
    dead : int
        Number of channels whose gamma is nearly 0.
    activation : str
        The activation in the same pass, or "-".
    before, after : str
        Classes of the neighboring layers or operations, "several", "input", "output" or "unknown".
    """

    path: str
    kind: str
    channels: int | None
    axis: int
    epsilon: float
    momentum: float
    mode: str
    variance: tuple[float, float] | None
    dead: int
    activation: str
    before: str
    after: str

    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        variance = "-" if self.variance is None else f"{self.variance[0]:.3g} to {self.variance[1]:.3g}"
        numbers = "-" if self.channels is None else str(self.channels), str(self.axis), f"{self.epsilon:g}", f"{self.momentum:g}"
        return self.path, self.kind, *numbers, self.mode, variance, str(self.dead), self.activation, self.before, self.after


class Summary(tuple[Layer, ...]):
    """Batch norms of a model, in its order; printed, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """A table of columns, and what it counts in all."""
        if not self:
            return "the model has no batch norm"
        numbers = "channels", "axis", "epsilon", "momentum"
        header = "path", "kind", *numbers, "mode", "moving variance", "dead", "activation", "before", "after"
        ours = sum(layer.kind.startswith("fastbn.") for layer in self)
        count = f"{counted(len(self), 'layer')}, {counted(sum(layer.channels or 0 for layer in self), 'channel')}, {ours} by fastbn"
        return "\n".join([*table([header, *(layer.cells() for layer in self)]), count])


def summary(model: Any) -> Summary:
    """List the batch norms of a model: their settings, their values and their neighbors.

    Parameters
    ----------
    model : keras.Model

    Returns
    -------
    Summary
        A tuple of `Layer`. Printed, it is a table.

    Raises
    ------
    TypeError
        If model is not a keras.Model.

    Examples
    --------
    >>> import keras, fastbn.keras
    >>> model = keras.Sequential([keras.layers.Input((8, 8, 3)), keras.layers.BatchNormalization(name="bn"), keras.layers.ReLU()])
    >>> for layer in fastbn.keras.summary(model):
    ...     print(layer.path, layer.kind, layer.channels, layer.mode, layer.before, layer.after, sep=", ")
    bn, BatchNormalization, 3, train, input, ReLU
    """
    return Summary(_row(path, layer, holder) for path, layer, holder in norms(check(model)))


def _row(path: str, layer: Any, holder: Any) -> Layer:
    place = places(holder).get(layer.name)
    kind = f"{'fastbn.' if type(layer) is BatchNormalization else ''}{type(layer).__name__}"
    gamma, variance = (None if v is None else convert_to_numpy(v).astype(float) for v in (layer.gamma, layer.moving_variance))
    dead = 0 if gamma is None else int((np.abs(gamma) <= DEAD * np.abs(gamma).max()).sum())
    activation = getattr(layer, "activation", None)
    before, after = ("unknown",) * 2 if place is None else (_beside(place.before, holder, "input"), _beside(place.after, holder, "output"))
    return Layer(
        path, kind, None if variance is None else len(variance), layer.axis, layer.epsilon, layer.momentum,
        "train" if layer.trainable else "frozen", None if variance is None else (float(variance.min()), float(variance.max())), dead,
        "-" if activation is None else str(getattr(activation, "__name__", activation)), before, after,
    )  # fmt: skip


def _beside(names: list[str], holder: Any, end: str) -> str:
    found = {end if not name else _kind(operation(holder, name), end) for name in names}
    return end if not names else found.pop() if len(names) == 1 else "several"


def _kind(layer: Any, end: str) -> str:
    return end if type(layer).__name__ == "InputLayer" else type(layer).__name__
