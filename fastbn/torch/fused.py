"""Batch norm with what follows it, in one operation: no tensor between, and none to keep for the backward.

The operators are registered from C (door.cpp); here are their fake kernels and an autograd.Function. What they do not take,
double backward, and what torch.compile and torch.export see is the composition of torch's own operators.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbn import checks
from fastbn.activations import Builtin
from fastbn.functional import ActivationName
from fastbn.torch.override import ready

F = torch.nn.functional
ALONE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "hardswish": lambda z, _: F.hardswish(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "silu": lambda z, _: F.silu(z),
    "tanh": lambda z, _: torch.tanh(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
}
DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
IDENTITY = Builtin("identity", 0.0, 0)
# Bytes of x below which the way through Python takes longer than the passes over memory that it saves.
SMALLEST = 512 << 10
LEFT = "fastbn cannot compute this: "

_lock = threading.Lock()
_operators: Any = None


def _ops() -> Any:
    """The operators, defined by the first call."""
    global _operators
    with _lock:
        if _operators is None:
            if not ready().define_operators():
                raise RuntimeError(f"PyTorch {torch.__version__} did not let fastbn define its operators")
            fake: Any = torch.library.register_fake
            fake("fastbn::batch_norm_forward")(_fake_forward)
            fake("fastbn::batch_norm_backward")(_fake_backward)
            _operators = torch.ops.fastbn
    return _operators


def _like(x: Tensor) -> Tensor:
    """Of x's shape, in the order of memory that torch gives the output of batch norm."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    kept = last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return torch.empty_like(x, memory_format=last if kept else torch.contiguous_format)


def _fake_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,  # noqa: A002
    training: bool, momentum: float, eps: float, residual: Tensor | None, activation: int, parameter: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    vectors = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    dtype, size = (vectors[0] if vectors else input).dtype, input.shape[1] if training else 0
    return _like(input), input.new_empty(size, dtype=dtype), input.new_empty(size, dtype=dtype)


def _fake_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,  # noqa: A002
    save_mean: Tensor | None, save_invstd: Tensor | None, training: bool, eps: float, output_mask: list[bool], bias: Tensor | None,
    residual: Tensor | None, activation: int, parameter: float, of_residual: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    center = save_mean if training else running_mean
    dtype = (input if center is None else center).dtype
    vectors = [input.new_empty(input.shape[1], dtype=dtype) if wanted else None for wanted in output_mask[1:]]
    return _like(input) if output_mask[0] else None, *vectors, _like(input) if of_residual and activation else None


def composed(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    training: bool, momentum: float, eps: float, activation: Builtin,
) -> Tensor:  # fmt: skip
    """The same by torch's own operators."""
    z = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    z = z if residual is None else z + residual
    return ALONE[activation.name](z, activation.parameter) if activation.code else z


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
        var: Tensor | None, training: bool, momentum: float, eps: float, activation: Builtin,
    ) -> Tensor:  # fmt: skip
        code, parameter = activation.code, activation.parameter
        ctx.left = False
        y: Tensor
        saved: tuple[Tensor | None, ...] = None, None
        try:
            y, *found = _ops().batch_norm_forward(x, weight, bias, mean, var, training, momentum, eps, residual, code, parameter)
            saved = tuple(found)
        except RuntimeError as error:
            if LEFT not in str(error):
                raise
            ctx.left = True
            y = composed(x, residual, weight, bias, mean, var, training, momentum, eps, activation)
        statistics = (None, None) if training else (mean, var)
        kept = residual if activation.code else None
        ctx.save_for_backward(x, kept, weight, bias, *statistics, *(saved if training else (None, None)))
        ctx.numbers = training, momentum, eps, activation, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, mean, var, saved_mean, saved_invstd = ctx.saved_tensors
        training, momentum, eps, activation, has_residual = ctx.numbers
        wanted = ctx.needs_input_grad[:4]
        nothing = (None,) * 6
        if not ctx.left and not torch.is_grad_enabled():
            mask = [wanted[0], wanted[2], wanted[3]]
            statistics = saved_mean, saved_invstd, training, eps, mask
            after = bias, residual, activation.code, activation.parameter, wanted[1] and activation.code != 0
            try:
                dx, dweight, dbias, dresidual = _ops().batch_norm_backward(dy, x, weight, mean, var, *statistics, *after)
            except RuntimeError as error:
                if LEFT not in str(error):
                    raise
            else:
                return dx, dy if wanted[1] and not activation.code else dresidual, dweight, dbias, *nothing
        with torch.enable_grad():
            y = composed(x, residual, weight, bias, mean, var, training, momentum, eps, activation)
        inputs = [x, residual, weight, bias]
        asked = [t for t, w in zip(inputs, wanted, strict=True) if w and t is not None]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=torch.is_grad_enabled()) if asked else ())
        grads = [next(found) if w and t is not None else None for t, w in zip(inputs, wanted, strict=True)]
        if has_residual and wanted[1] and not activation.code:
            grads[1] = dy
        return *grads, *nothing


def _is_taken(x: Tensor, tensors: list[Tensor], eps: float) -> bool:
    """Whether the operators can be asked; what they find in the data is another matter."""
    if x.device.type != "cpu" or x.layout is not torch.strided or x.dtype not in DTYPES or not 2 <= x.dim() <= 16 or x.numel() == 0:
        return False
    if not eps > 0 or any(t.device.type != "cpu" for t in tensors) or torch.overrides.has_torch_function((x, *tensors)):
        return False
    # An autograd.Function has no rule for these.
    jit: Any = torch.jit  # it has no types
    return not (torch._C._are_functorch_transforms_active() or jit.is_tracing() or torch.autograd.forward_ad._current_level >= 0)


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,  # noqa: A002
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    activation: ActivationName | tuple[str, float | str] | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `torch.nn.functional.batch_norm`, with a sum and an activation in the same pass over memory.

    Parameters
    ----------
    input : Tensor of shape (N, C, ...)
    running_mean, running_var, weight, bias : Tensor of shape (C,), optional
    training : bool
    momentum, eps : float
    activation : str or tuple, optional
        "relu", "relu6", "leaky_relu" or ("leaky_relu", slope), "hardswish", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh".
    residual : Tensor of the shape of input, optional
        Added before the activation.

    Returns
    -------
    Tensor
        ``activation(batch_norm(input) + residual)``. Small tensors, and what fastbn does not take, are computed like that.

    Raises
    ------
    TypeError, ValueError
        If there is no such activation, or the residual has another shape or dtype than the input.
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
    found = IDENTITY if activation is None else checks.activation(activation)
    if not isinstance(found, Builtin):
        raise TypeError(f"activation must be a name, or a name and a number, got {activation!r}")
    if residual is not None and (residual.shape, residual.dtype) != (input.shape, input.dtype):
        mine, its = (f"{tuple(t.shape)} and {t.dtype}" for t in (input, residual))
        raise ValueError(f"residual must have the shape and dtype of input, {mine}, got {its}")
    tensors = [t for t in (residual, weight, bias, running_mean, running_var) if t is not None]
    arguments = input, residual, weight, bias, running_mean, running_var, training, momentum, eps, found
    alone = found is IDENTITY and residual is None
    # What torch.compile makes of the composition is one loop, too.
    small = input.numel() * input.itemsize < SMALLEST or (training and input.numel() == input.shape[1])
    if alone or small or torch.compiler.is_compiling() or not _is_taken(input, tensors, eps):
        return composed(*arguments)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (input, *tensors)):
        y: Tensor = _Fused.apply(*arguments)  # type: ignore[no-untyped-call, unused-ignore]
        return y
    try:
        numbers = residual, found.code, found.parameter
        return _ops().batch_norm_forward(input, weight, bias, running_mean, running_var, training, momentum, eps, *numbers)[0]  # type: ignore[no-any-return]
    except RuntimeError as error:
        if LEFT not in str(error):
            raise
        return composed(*arguments)
