"""What a module of kernels must offer, and what it may.

`Operations` is enough to run everything: `composed.py` makes whole calls of them. A module that has `WholeCalls` of its own
runs these instead. Arrays like x are dense, of shape (outer, channels, inner); vectors have one element for each channel, in
the type of the arithmetic: float64 for float64, else float32. What arguments must be was checked before; a module writes
what it is told to, and returns sums in float64. `reference.py` says what each operation computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Affine(NamedTuple):
    """What a normalized value is multiplied by, and what is added."""

    weight: Array | None = None
    bias: Array | None = None


class Statistics(NamedTuple):
    """Mean, what it rounds away, and the spread: one over the deviation or, where eps is given, the variance without it."""

    mean: Array
    mean_lo: Array | None
    spread: Array
    eps: float | None = None


class Running(NamedTuple):
    """Running statistics that training moves, and how.

    Attributes
    ----------
    mean, var : ndarray or None
        Changed in place.
    momentum : float
        Weight of the batch.
    correction : int
        What is taken from the count under the variance: 1 for the unbiased one, 0 for the population's.
    """

    mean: Array | None
    var: Array | None
    momentum: float
    correction: int


class Grouping(NamedTuple):
    """How many channels share statistics, and whether their mean is subtracted, or taken to be 0."""

    group: int
    centered: bool


class Operations(Protocol):
    """The four operations: two that reduce, two that map. An epilogue is what follows the normalization, or None."""

    def stats(self, x: Array, threads: int = 1) -> tuple[Array, Array, Array]:
        """Mean, what it rounds away, and the sum of squared deviations."""

    def normalize(self, x: Array, y: Array, mean: Array, scale: Array, shift: Array, threads: int = 1, epilogue: Any = None) -> None:
        """``y = (x - mean) * scale + shift``."""

    def grad_sums(self, dy: Array, x: Array, mean: Array, threads: int = 1, epilogue: Any = None) -> tuple[Array, Array]:
        """Sums of dy and of ``dy * (x - mean)``."""

    def grad_input(
        self, dy: Array, x: Array, dx: Array, mean: Array, scale: Array, line: tuple[Array, Array], threads: int = 1, epilogue: Any = None
    ) -> None:
        """``dx = scale * (dy - g0 - (x - mean) * g1)``, where the line is g0 and g1."""


class WholeCalls(Protocol):
    """Whole calls: operations, and the vectors between them."""

    def inference(self, x: Array, y: Array, given: Statistics, affine: Affine, threads: int, epilogue: Any = None) -> None:
        """Normalize with given statistics."""

    def forward(
        self, x: Array, y: Array, affine: Affine, eps: float, running: Running, compute: np.dtype[Any], threads: int, epilogue: Any = None
    ) -> tuple[Array, ...]:
        """Normalize with the statistics of x and move the running ones; return mean, mean_lo, invstd, scale and shift."""

    def backward(
        self, dy: Array, x: Array, dx: Array | None, kept: Statistics, scale: Array | None, threads: int, epilogue: Any = None
    ) -> tuple[Array, Array]:
        """The sums, and dx unless it is None; only then is a scale needed."""


class PartsCalls(Protocol):
    """Whole calls over parts of images, of (batch, outer, channels, inner) arrays; without these, `parts` makes them of operations."""

    def parts_forward(
        self, x: Array, y: Array, affine: Affine, eps: float, grouping: Grouping, threads: int, epilogue: Any = None
    ) -> tuple[Array, bool] | None:
        """Normalize each part with its own statistics; return mean, what it rounds away and invstd, and whether any part is left.

        A part that is left has an invstd of -1; the caller must compute it. None where the module takes no such shape.
        """

    def parts_backward(
        self, dy: Array, x: Array, dx: Array | None, kept: Statistics, affine: Affine, grouping: Grouping, threads: int,
        epilogue: Any = None,
    ) -> tuple[Array, ...] | None:  # fmt: skip
        """Gradients of x, into dx, and of weight and bias, which are returned; None where the module cannot."""


class Calls(Operations, WholeCalls, Protocol):
    """What `core` runs: a module, or `composed.ComposedKernel` of one."""


class Warmable(Protocol):
    """A module that can prepare itself for its first call."""

    def warmup(self, storage: str, patterns: Iterable[str], activation: Any = None) -> None:
        """Prepare for the dtype of a name, for memory patterns, "ncsp" or "nspc", and for an activation."""


if TYPE_CHECKING:
    from fastbn import composed, reference

    _operations: Operations = reference

    def _calls(made: composed.ComposedKernel) -> Calls:
        return made
