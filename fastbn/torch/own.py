"""Batch norm with an activation of the user's own, compiled into the Numba kernels: tensors as NumPy arrays, and a derivative.

torch sees one operation whose gradient it can take once. What looks into operations, as torch.compile, torch.func and
tensors without memory do, finds nothing that it could read: torch.compile leaves its graph around the call, the others are
refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbn import functional
from fastbn.activations import Activation
from fastbn.layout import Array
from fastbn.torch.arrays import array_of, computable, eagerly, new_like, on_torchs_threads, overwrite, unreadable, vector
from fastbn.torch.operators import Arguments


def _forward(a: Arguments, activation: Activation, saves: bool) -> tuple[Tensor, Any]:
    """The output and, if it is wanted, what a backward needs."""
    source, residual = computable(a.x), None if a.residual is None else array_of(computable(a.residual))
    y, out = new_like(source)
    running = [vector(t) for t in (a.mean, a.var)]
    if a.training:  # a copy is moved, so that torch sees the change
        running = [None if v is None else v.copy() for v in running]
    (mean, var), weight, bias = running, vector(a.weight), vector(a.bias)
    options: dict[str, Any] = {
        "training": a.training, "momentum": a.momentum, "eps": a.eps, "activation": activation, "residual": residual, "out": out,
    }  # fmt: skip
    saved = None
    with on_torchs_threads():
        if saves:
            _, saved = functional.batch_norm_forward(array_of(source), weight, bias, mean, var, **options)
        else:
            functional.batch_norm(array_of(source), mean, var, weight, bias, **options)
    if a.training:
        overwrite((old, torch.from_numpy(new)) for old, new in zip((a.mean, a.var), running, strict=True) if old is not None)
    return y.to(a.x.dtype), saved


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Activation, *given: Any) -> Tensor:
        a = Arguments(*given)
        y, ctx.saved = _forward(a, activation, saves=True)
        ctx.save_for_backward(a.x)
        ctx.dtypes = [None if t is None else t.dtype for t in (a.x, a.weight, a.bias)]
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needed = zip(("x", "residual", "weight", "bias"), ctx.needs_input_grad[1:], strict=False)
        wanted = tuple(name for name, need in needed if need)
        source = computable(x)
        dx, out = new_like(source) if "x" in wanted else (None, None)
        with on_torchs_threads():
            g = functional.batch_norm_backward(array_of(computable(dy)), array_of(source), ctx.saved, wrt=wanted, out=out)
        gradients = zip((g.dresidual, g.dweight, g.dbias), ctx.dtypes, strict=True)
        return None, None if dx is None else dx.to(x.dtype), *(_tensor(v, dtype) for v, dtype in gradients), *(None,) * 7


def _tensor(a: Array | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient in memory of its own, in the dtype of what it is the gradient of."""
    if a is None:
        return None
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(np.asarray(a).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a).to(dtype)


def _run(activation: Activation, a: Arguments) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (a.x, *a.tensors())):
        if activation.derivative is None:
            raise ValueError(
                f"a gradient needs the derivative of {activation!r}: give activation=fastbn.Activation(function, derivative), or call "
                "this under torch.no_grad()"
            )
        y: Tensor = _Own.apply(activation, *a)  # type: ignore[no-untyped-call, unused-ignore]
        return y
    return _forward(a, activation, saves=False)[0]


def batch_norm(a: Arguments, activation: Activation) -> Tensor:
    """Normalize, add what is to be added, and apply the function.

    Parameters
    ----------
    a : Arguments
        Whose activation is not looked at.
    activation : Activation

    Raises
    ------
    TypeError, ValueError
        Where the kernels cannot read the tensors; as `fastbn.batch_norm`.
    """
    found: Tensor = eagerly(_checked, activation, a)
    return found


def _checked(activation: Activation, a: Arguments) -> Tensor:
    if why := unreadable(dict(zip(a._fields, a[:6], strict=False))):
        raise TypeError(f"an activation of one's own runs on strided floating-point tensors of the CPU, and not {why}")
    if a.x.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions, (N, C, ...), got {tuple(a.x.shape)}")
    for name in ("mean", "var"):
        if (running := getattr(a, name)) is not None and running.requires_grad:
            raise ValueError(f"running_{name} requires a gradient, but batch norm computes none for it: pass running_{name}.detach()")
    return _run(activation, a)
