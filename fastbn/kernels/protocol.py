"""What a module of kernels must offer, and what it may.

`Operations` is enough to run everything: `composed.py` makes whole calls of them. A module that has `WholeCalls` of its own
runs these instead. Arrays like x are dense, of shape (outer, channels, inner); vectors have one element for each channel, in
the type of the arithmetic: float64 for float64, else float32. What arguments must be was checked before; a module writes
what it is told to, and returns sums in float64. `reference.py` says what each operation computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Operations(Protocol):
    """The four operations: two that reduce, two that map. An epilogue is what follows the normalization, or None."""

    def stats(self, x: Array, threads: int = 1) -> tuple[Array, Array, Array]:
        """Mean, what it rounds away, and the sum of squared deviations."""

    def normalize(self, x: Array, y: Array, mean: Array, scale: Array, shift: Array, threads: int = 1, epilogue: Any = None) -> None:
        """``y = (x - mean) * scale + shift``."""

    def grad_sums(self, dy: Array, x: Array, mean: Array, threads: int = 1, epilogue: Any = None) -> tuple[Array, Array]:
        """Sums of dy and of ``dy * (x - mean)``."""

    def grad_input(
        self, dy: Array, x: Array, dx: Array, mean: Array, scale: Array, g0: Array, g1: Array, threads: int = 1, epilogue: Any = None
    ) -> None:
        """``dx = scale * (dy - g0 - (x - mean) * g1)``."""


class WholeCalls(Protocol):
    """Whole calls: operations, and the vectors between them."""

    def inference(
        self, x: Array, y: Array, mean: Array, mean_lo: Array | None, spread: Array, weight: Array | None, bias: Array | None,
        eps: float | None, threads: int, epilogue: Any = None,
    ) -> None:  # fmt: skip
        """Normalize with given statistics; `spread` is the variance, or without eps one over the deviation."""

    def forward(
        self, x: Array, y: Array, weight: Array | None, bias: Array | None, eps: float, running_mean: Array | None,
        running_var: Array | None, momentum: float, correction: int, compute: np.dtype[Any], threads: int, epilogue: Any = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        """Normalize with the statistics of x and move the running ones; return mean, mean_lo, invstd, scale and shift."""

    def backward(
        self, dy: Array, x: Array, dx: Array | None, mean: Array, mean_lo: Array | None, invstd: Array, scale: Array | None,
        threads: int, epilogue: Any = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """The sums, and dx unless it is None; only then is a scale needed."""


class Calls(Operations, WholeCalls, Protocol):
    """What `core` runs: a module, or `composed.ComposedKernel` of one."""


class Warmable(Protocol):
    """A module that can prepare itself for its first call."""

    def warmup(self, storage: str, patterns: Iterable[str], activation: Any = None) -> None:
        """Prepare for the dtype of a name, for memory patterns, "ncsp" or "nspc", and for an activation."""


if TYPE_CHECKING:
    from fastbn import composed, reference
    from fastbn.kernels import numba

    _operations: tuple[Operations, ...] = (reference, numba)
    _calls_of_numba: WholeCalls = numba
    _warmable: Warmable = numba

    def _calls(made: composed.ComposedKernel) -> Calls:
        return made
