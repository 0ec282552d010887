"""From a case to rows of results: hold every contender's result against the reference, and time those that are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

import fastbn
from bench import data
from bench.cases import Case
from bench.peers import OPS, Call, Contender, choose
from bench.timing import Budget, Times, race
from fastbn import reference

# What a result may be off, in units of `Row.error`; a contender that is farther off computes something else, and is not timed.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


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
        Of the copy and of each contender that takes part.
    left_out : dict of str to str
        Contenders that were not timed, and why: a wrong result, or an error.
    says : dict of str to str
        What contenders say of how they compute.
    threads : int
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
    left_out: Mapping[str, str] = {}
    says: Mapping[str, str] = {}
    threads: int = 0

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


class Ready(NamedTuple):
    """The contenders of one row: calls of those that are right, why others are left out, what they say, and fastbn's error."""

    calls: dict[str, Call]
    left_out: dict[str, str]
    says: dict[str, str]
    error: float


def prepare(op: str, inputs: data.Inputs, out: data.Array, contenders: Sequence[Contender]) -> Ready:
    """Make the calls, and hold their results against the reference; an error of a peer's is no reason to stop."""
    channels = data.sample(inputs.x, inputs.layout)
    ready = Ready({}, {}, {}, float("nan"))
    for contender in contenders:
        try:
            call = contender.call(op, inputs, out)
            if call is None:
                continue
            if contender.kind != "bound":
                error = _error(op, inputs, contender.array(call(), inputs), channels)
                if contender.name == "fastbn":
                    ready = ready._replace(error=error)
                elif not error <= TOLERANCE[inputs.x.dtype.name]:
                    ready.left_out[contender.name] = f"off by {error:.1e}"
                    continue
        except Exception as error:
            if contender.kind == "ours":
                raise
            ready.left_out[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            continue
        ready.calls[contender.name] = call
        if name := getattr(call, "name", ""):
            ready.says[contender.name] = name
    return ready


def measure(case: Case, layout: str, dtype: str, budget: Budget, contenders: Sequence[Contender] | None = None) -> Iterator[Row]:
    """Measure the operations on one layer, with the threads that fastbn is set to.

    Parameters
    ----------
    case : Case
    layout, dtype : str
        Of the input.
    budget : Budget
        Each operation is one part of its work. Preparing contenders does not count.
    contenders : sequence of Contender, optional
        None means all that are installed and quick to prepare.

    Yields
    ------
    Row
        One for each of `OPS`; none where the time is over.
    """
    if not budget.left():
        return
    with budget.paused():
        inputs, origin = data.inputs(case, layout, dtype), data.parameters(case).origin
    checked = len(data.sample(inputs.x, layout))
    out = np.empty_like(inputs.x)  # the same for all, so that no one has the better place in memory
    for op in OPS:
        with budget.paused():
            ready = prepare(op, inputs, out, choose() if contenders is None else contenders)
        times = race(ready.calls, budget.share())
        yield Row(
            *case, layout, dtype, op, inputs.x.nbytes, origin, ready.error, checked, times, ready.left_out, ready.says,
            fastbn.get_num_threads(),
        )  # fmt: skip
