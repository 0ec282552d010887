"""The operation on NumPy arrays: what the numpy backend runs, and what those of TensorFlow and JAX call back.

A forward returns, beside the output, one array of vectors: all that its backward needs besides its input, and the variance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastbn import functional
from fastbn.activations import Builtin
from fastbn.layout import Array
from fastbn.results import Saved

VECTORS = 6  # mean, what it rounds away, invstd, scale, shift; population variance


class Plan(NamedTuple):
    """What is known of a call before its tensors are.

    Attributes
    ----------
    axis : int
        Of the channels; not negative.
    eps : float
    activation : Builtin or None
        What follows in the same pass.
    """

    axis: int
    eps: float
    activation: Builtin | None

    @property
    def after(self) -> tuple[str, float] | str | None:
        """The activation as the functions of fastbn take it."""
        return None if self.activation is None else self.activation.argument


def computed(dtype: object) -> str:
    """Name of the dtype in which a dtype of this name is computed, and has its vectors."""
    return "float64" if dtype == "float64" else "float32"


def forward(plan: Plan, x: Array, gamma: Array, beta: Array, out: Array | None = None) -> tuple[Array, Array]:
    """Output of training, and the vectors."""
    mean, var = np.zeros(x.shape[plan.axis]), np.zeros(x.shape[plan.axis])
    y, saved = functional.batch_norm_forward(
        x, gamma, beta, mean, var, momentum=1.0, eps=plan.eps, axis=plan.axis, activation=plan.after, correction=0,  # type: ignore[arg-type]
        out=out,
    )  # fmt: skip
    low = np.zeros_like(saved.mean) if saved.mean_lo is None else saved.mean_lo
    return y, np.stack([saved.mean, low, saved.invstd, saved.scale, saved.shift, var.astype(low.dtype)])


def backward(plan: Plan, x: Array, vectors: Array, dy: Array, out: Array | None = None) -> tuple[Array, Array, Array]:
    """Gradients of x, gamma and beta."""
    mean, low, invstd, scale, shift, _ = np.ascontiguousarray(vectors)
    saved = Saved(
        mean=mean, invstd=invstd, mean_lo=low, count=x.size // max(x.shape[plan.axis], 1), training=True, scale=scale, shift=shift,
        shape=x.shape, dtype=x.dtype, axis=plan.axis, mask=None, activation=plan.activation, residual=None, has_residual=False,
    )  # fmt: skip
    dx, dgamma, dbeta, _ = functional.batch_norm_backward(dy, x, saved, out=out)
    assert dx is not None and dgamma is not None and dbeta is not None  # noqa: S101, PT018  wrt names them
    return dx, dgamma, dbeta
