"""Batch norm with a sum and an activation in one operation: no tensor in between, and none to keep for the backward.

Calls that the operators do not take, and double backward, are composed of torch's own operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function
from torch.utils._device import DeviceContext

from fastbn import checks
from fastbn.activations import Activation
from fastbn.functional import ActivationLike
from fastbn.torch import own
from fastbn.torch.arrays import TYPES
from fastbn.torch.operators import IDENTITY, Arguments, attempt, gradients, gradients_from_output, in_graph, keep, kept
from fastbn.torch.override import is_enabled

# Bytes of x below which the way through Python takes longer than the passes over memory that it saves.
SMALLEST = 512 << 10


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, others: Any) -> Tensor:
        a = Arguments(x, residual, weight, bias, *others)
        found = attempt(a)
        y, saved = (a.composed(), None) if found is None else (found[0], found[1:])
        keep(ctx, a, y, saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, y, saved = kept(ctx)
        wanted = ctx.needs_input_grad[:4]
        found = gradients_from_output(dy, y, a, saved, wanted) if a.x is None else gradients(dy, a, y, saved, wanted)
        return *found, None


def is_ours(x: Tensor, least: int | None = None) -> bool:
    """Whether the operators can be asked for a tensor, and are worth it; what they find in the data is another matter.

    Smaller tensors than `least` bytes, or `SMALLEST`, are not worth it.
    """
    least = SMALLEST if least is None else least
    if not isinstance(x, Tensor) or x.is_nested or not x.is_cpu or x.layout is not torch.strided:
        return False
    if x.dtype not in TYPES or not 2 <= x.dim() <= 16:
        return False
    # An autograd.Function has no rule for functorch and forward mode.
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # which takes long to import
        from torch.onnx import is_in_onnx_export

        if is_in_onnx_export():  # ONNX knows torch's operators alone
            return False
        return not statically_known_true(x.numel() * x.dtype.itemsize < least)
    if x.numel() * x.dtype.itemsize < least or x.numel() == 0:
        return False
    jit: Any = torch.jit  # it has no types
    return not (jit.is_tracing() or torch.autograd.forward_ad._current_level >= 0)


def is_overridden(tensors: tuple[Any, ...]) -> bool:
    """Whether the class of a tensor, or a mode, has code of its own for functions; the mode of a default device has it for new tensors."""
    if not has_torch_function(tensors):
        return False
    modes: Any = torch.overrides._get_current_function_mode_stack  # it has no types
    return any(type(m) is not DeviceContext for m in modes()) or any(t is not None and type(t) not in (Tensor, Parameter) for t in tensors)


def run(a: Arguments) -> Tensor:
    """Compute it, where `is_ours` is true of x, and the arguments are usual."""
    if a.activation.code == 0 and a.residual is None and not a.from_output and is_enabled():
        return a.composed()
    if torch.compiler.is_compiling():
        return in_graph(a)
    tensors = a[:6]
    if is_overridden(tensors):
        return a.composed()
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                y: Tensor = _Fused.apply(*a[:4], a[4:])  # type: ignore[no-untyped-call, unused-ignore]
                return y
    found = attempt(a)
    return a.composed() if found is None else found[0]


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,  # noqa: A002
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    activation: ActivationLike = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.batch_norm` with a sum and an activation in the same pass over memory.

    Parameters
    ----------
    input : Tensor of shape (N, C, ...)
    running_mean, running_var, weight, bias : Tensor of shape (C,), optional
    training : bool
    momentum, eps : float
    activation : str, tuple, fastbn.Activation or function compiled by Numba, optional
        "relu", "relu6", "leaky_relu" or ("leaky_relu", slope), "hardswish", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh"; or your
        own, as in `fastbn.batch_norm`.
    residual : Tensor of the shape of input, optional
        Added before the activation.

    Returns
    -------
    Tensor
        ``activation(batch_norm(input) + residual)``. For small tensors, and calls that fastbn does not take, torch's operators
        compute it in these steps. A function of your own runs in the Numba kernels only, and has no second derivative.

    Raises
    ------
    TypeError, ValueError
        If the activation is unknown, or the residual does not have the shape and dtype of the input. With a function of your own,
        also if a tensor is not a strided one on the CPU, or if a gradient needs a derivative that was not given.
    RuntimeError
        As `torch.nn.functional.batch_norm`.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> fastbn.torch.batch_norm(x, None, None, training=True, activation="relu")
    tensor([[0.0000],
            [1.0000]])
    """
    found = checks.activation(activation) or IDENTITY
    for name, t in (("input", input), ("residual", residual)):
        if not (isinstance(t, Tensor) or (t is None and name == "residual")):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (input.shape, input.dtype, input.device):
        mine, its = (f"{tuple(t.shape)}, {t.dtype}, {t.device}" for t in (input, residual))
        raise ValueError(f"residual must have the shape, dtype and device of input, {mine}, got {its}")
    if isinstance(found, Activation):
        return own.batch_norm(Arguments(input, residual, weight, bias, running_mean, running_var, training, momentum, eps, IDENTITY), found)
    a = Arguments(input, residual, weight, bias, running_mean, running_var, training, momentum, eps, found)
    ours = (found is not IDENTITY or residual is not None) and is_ours(input) and a.is_usual()
    return run(a) if ours and (residual is None or residual.layout is torch.strided) else a.composed()
