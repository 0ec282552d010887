"""From a case to rows of results: time every contender, and compare fastbn's results with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bench import data
from bench.cases import Case
from bench.peers import CONTENDERS, OPS
from bench.timing import Budget, Times, race
from fastbn import reference


class Row(NamedTuple):
    """One operation on one layer.

    Attributes
    ----------
    nbytes : int
        Size of x.
    parameters : str
        Where the parameters come from.
    error : float
        Largest ``|fastbn - reference| / max(1, |reference|)`` of y, or of dx.
    checked : int
        Number of channels compared with the reference.
    times : dict of str to Times
        Of the copy and of each contender that is installed.
    """

    network: str
    layer: str
    shape: tuple[int, int, int, int]
    repeats: int
    layout: str
    dtype: str
    op: str
    nbytes: int
    parameters: str
    error: float
    checked: int
    times: dict[str, Times]

    @property
    def size(self) -> str:
        """The shape in words."""
        return "x".join(map(str, self.shape))

    def median(self, name: str) -> float:
        """Median time of a contender in seconds; NaN where it is not installed."""
        return self.times[name].median if name in self.times else float("nan")

    def ratio(self, over: str, under: str) -> float:
        """Median time of one contender over that of another."""
        return self.median(over) / self.median(under)


def _reference(op: str, inputs: data.Inputs, channels: data.Array) -> data.Array:
    """Compute the result for some channels in float64."""
    axis = data.LAYOUTS[inputs.layout]
    x = inputs.x.take(channels, axis)
    weight, bias, mean, var = (v[channels] for v in inputs[2:6])
    if op != "inference":
        _, mean, var = reference.batch_norm_stats(x, axis)
    if op == "backward":
        return reference.batch_norm_backward(inputs.dy.take(channels, axis), x, mean, var, weight, inputs.eps, axis)[0]
    return reference.batch_norm(x, mean, var, weight, bias, inputs.eps, axis)


def _error(op: str, inputs: data.Inputs, result: data.Array, channels: data.Array) -> float:
    expected = _reference(op, inputs, channels)
    found = result.take(channels, data.LAYOUTS[inputs.layout]).astype(np.float64)
    return float(np.max(np.abs(found - expected) / np.maximum(1.0, np.abs(expected))))


def measure(case: Case, layout: str, dtype: str, budget: Budget) -> Iterator[Row]:
    """Measure the operations on one layer, with the threads that fastbn is set to.

    Parameters
    ----------
    case : Case
    layout, dtype : str
        Of the input.
    budget : Budget
        Each operation is one part of its work.

    Yields
    ------
    Row
        One for each of `OPS`; none where the time is over.
    """
    if not budget.left():
        return
    inputs, origin = data.inputs(case, layout, dtype), data.parameters(case).origin
    channels = data.sample(inputs.x, layout)
    out = np.empty_like(inputs.x)  # the same for all, so that no one has the better place in memory
    for op in OPS:
        calls = {c.name: getattr(c.load(), op)(inputs, None if c.fresh else out) for c in CONTENDERS if c.installed()}
        error = _error(op, inputs, calls["fastbn"](), channels)
        yield Row(*case, layout, dtype, op, inputs.x.nbytes, origin, error, len(channels), race(calls, budget.share()))
