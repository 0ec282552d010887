"""The operation on Keras' torch backend: the operators of fastbn.torch, on torch's threads."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

import fastbn.torch  # noqa: F401  which says what is wrong with this PyTorch
from fastbn.keras.arrays import Plan
from fastbn.torch.arrays import is_channels_last
from fastbn.torch.fused import is_ours, run
from fastbn.torch.operators import IDENTITY, Arguments, is_compiled


def mean_of(x: Tensor, axes: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """Mean over axes, which stay with a length of 1, of the positions in a mask; 0 of none."""
    if not axes:  # to torch that would be all
        return x if mask is None else torch.where(mask, x, 0)
    if mask is None:
        return x.mean(axes, keepdim=True)
    return torch.where(mask, x, 0).sum(axes, keepdim=True) / mask.sum(axes, keepdim=True).clamp(min=1)


def _run(plan: Plan, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor | None:
    if x.dim() < 2 or x.numel() == 0 or not is_ours(x, 0) or not is_compiled(x):
        return None
    rest = training, 1.0, plan.eps, plan.activation or IDENTITY
    z = x.movedim(plan.axis, 1)
    if z.is_contiguous() or is_channels_last(z):
        return run(Arguments(z, None, gamma, beta, mean, var, *rest)).movedim(1, plan.axis)
    # The same memory with fewer axes, in an order that the kernels take; a copy where x itself is in none.
    before, after = prod(x.shape[: plan.axis]), prod(x.shape[plan.axis + 1 :])
    z = x.reshape((before, x.shape[plan.axis], after) if after != 1 else (before, x.shape[plan.axis]))
    return run(Arguments(z, None, gamma, beta, mean, var, *rest)).reshape(x.shape)


def train(plan: Plan, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Output, mean and variance; None where the kernels do not take it."""
    count = x.numel() // max(x.shape[plan.axis], 1)
    if count < 2 or plan.eps <= 0:  # torch has no unbiased variance of it, and refuses such an eps
        return None
    mean, var = torch.zeros_like(gamma, requires_grad=False), torch.zeros_like(gamma, requires_grad=False)
    y = _run(plan, x, gamma, beta, mean, var, True)
    return None if y is None else (y, mean, var * ((count - 1) / count))


def infer(plan: Plan, x: Tensor, gamma: Tensor, beta: Tensor, mean: Any, var: Any) -> Tensor | None:
    """Output with given statistics; None where the kernels do not take it."""
    return _run(plan, x, gamma, beta, mean, var, False)
