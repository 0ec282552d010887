"""fastbn's own operators: batch norm, a sum and an activation as one of torch's operators.

- fastbn::batch_norm_forward and _backward are registered from C (door.cpp), and move running statistics in place. What
  they do not take is an error. Eager models come to them through an autograd.Function (fused.py).
- fastbn::batch_norm and _gradients are what torch.compile and torch.export see: functions of their arguments alone, with
  fake kernels and a derivative, which compute everything. They are written in Python around the other two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbn.activations import BUILTINS, Builtin
from fastbn.torch.arrays import LAST, is_channels_last
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
# Derivatives that need no more than the output. After a sum they are computed from it, in as many passes over memory as
# from the input and the residual, which is not kept then.
FROM_OUTPUT: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "relu": lambda dy, y, _: torch.ops.aten.threshold_backward(dy, y, 0.0),
    "relu6": lambda dy, y, _: torch.ops.aten.hardtanh_backward(dy, y, 0.0, 6.0),
    "leaky_relu": lambda dy, y, slope: torch.ops.aten.leaky_relu_backward(dy, y, slope, True),
}
NUMBERS = (float, int)
IDENTITY = Builtin("identity", 0.0, 0)
LEFT = "fastbn cannot compute this: "

_lock = threading.Lock()
_operators: Any = None


class Arguments(NamedTuple):
    """What `batch_norm` is called with, and whether a backward may find the input from the output."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    training: bool
    momentum: float
    eps: float
    activation: Builtin
    from_output: bool = False

    def tensors(self) -> list[Tensor]:
        """All but x."""
        return [t for t in self[1:6] if t is not None]

    def followed(self, residual: Tensor | None, activation: Builtin, counted: bool) -> Arguments:
        """The same with what follows; running statistics do not move a second time."""
        x, _, weight, bias, mean, var, training, momentum, eps, _, from_output = self
        if counted and training:
            mean = var = None
        return Arguments(x, residual, weight, bias, mean, var, training, momentum, eps, activation, from_output)

    def is_usual(self) -> bool:
        """Whether the arguments are such as the operators take, for an x that they take; else torch says what is wrong, or does it."""
        x, channels = self.x, self.x.shape[1]
        numbers = type(self.training) is bool and type(self.momentum) in NUMBERS and type(self.eps) in NUMBERS and self.eps > 0
        if not numbers or (self.training and x.numel() == channels) or (self.mean is None) != (self.var is None):
            return False
        if not self.training and self.mean is None:
            return False
        dtype = None  # of all vectors
        for t in self[2:6]:
            if t is None:
                continue
            if not isinstance(t, Tensor) or t.layout is not torch.strided or t.device.type != "cpu" or t.shape != (channels,):
                return False
            if dtype is not None and t.dtype is not dtype:
                return False
            dtype = t.dtype
        if self.mean is not None and self.var is not None and (self.mean.requires_grad or self.var.requires_grad):
            return False
        return dtype is None or dtype is x.dtype or (dtype is torch.float32 and x.dtype.itemsize == 2)

    def composed(self) -> Tensor:
        """Compute it by torch's own operators."""
        x, residual, weight, bias, mean, var, training, momentum, eps, activation, _ = self
        return after(F.batch_norm(x, mean, var, weight, bias, training, momentum, eps), residual, activation)

    def is_masked(self) -> bool:
        """Whether the derivative of what follows is had from the output."""
        if self.residual is None:
            return False
        a = self.activation
        return a.name in FROM_OUTPUT and a.parameter >= 0

    def is_invertible(self) -> bool:
        """Whether the input can be had from the output, to some digits at least."""
        if not self.from_output:
            return False
        if not (self.training and (self.activation.code == 0 or self.activation.invertible)) or self.residual is not None:
            return False
        if any(t.dtype not in (torch.float32, torch.float64) for t in (self.weight, self.bias) if t is not None):
            return False
        if self.weight is None:
            return self.x.dtype in (torch.float32, torch.float64)
        # The output is known to its last place, which is one of the bias; the input times the weight must be larger.
        least = torch.finfo(self.x.dtype).tiny if self.bias is None else self.bias.detach().abs() * torch.finfo(self.x.dtype).eps * 8
        return bool((self.weight.detach().abs() > least).all())


def compiled() -> Any:
    """The operators in C, defined by the first call."""
    global _operators
    if _operators is not None:
        return _operators
    with _lock:
        if _operators is None:
            if not ready().define_operators():
                raise RuntimeError(f"PyTorch {torch.__version__} did not let fastbn define its operators")
            fake: Any = torch.library.register_fake
            fake("fastbn::batch_norm_forward")(_fake_forward)
            fake("fastbn::batch_norm_backward")(_fake_backward)
            _operators = torch.ops.fastbn
    return _operators


def _order(x: Tensor) -> Any:
    """The order of memory that torch gives the output of batch norm."""
    kept = x.dim() in LAST and not x.is_contiguous() and (is_channels_last(x) or _has_gaps(x))
    return LAST[x.dim()] if kept else torch.contiguous_format


def _like(x: Tensor) -> Tensor:
    """Of x's shape, in that order."""
    return torch.empty_like(x, memory_format=_order(x))


def _has_gaps(x: Tensor) -> bool:
    """Whether x, which is neither contiguous nor channels last, would be channels last without gaps: as `order_of` in door.cpp."""
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(d) < least or (d == 1 and x.stride(d) == 0) or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * max(x.shape[d], 1)
    return True


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
    residual: Tensor | None, activation: int, parameter: float, of_residual: bool, from_output: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    center = save_mean if training else running_mean
    dtype = (input if center is None else center).dtype
    vectors = [input.new_empty(input.shape[1], dtype=dtype) if wanted else None for wanted in output_mask[1:]]
    return _like(input) if output_mask[0] else None, *vectors, _like(input) if of_residual and activation else None


def after(z: Tensor, residual: Tensor | None, activation: Builtin) -> Tensor:
    """What follows a normalization, by torch's own operators."""
    z = z if residual is None else z + residual
    return ALONE[activation.name](z, activation.parameter) if activation.code else z


def attempt(a: Arguments) -> tuple[Tensor, Tensor, Tensor] | None:
    """Output and what a backward needs, by the kernels; None if they do not take it."""
    if any(t.is_neg() or t._is_zerotensor() for t in (a.x, *a.tensors())):
        return None  # what resolves these before a kernel knows no operator that changes what it does not return
    statistics = a.mean, a.var, a.training, a.momentum, a.eps
    try:
        return compiled().batch_norm_forward.default(  # type: ignore[no-any-return]
            a.x, a.weight, a.bias, *statistics, a.residual, a.activation.code, a.activation.parameter
        )
    except RuntimeError as error:
        if LEFT not in str(error):
            raise
    return None


def gradients(
    dy: Tensor, a: Arguments, y: Tensor | None, saved: tuple[Tensor | None, Tensor | None] | None, wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, residual, weight and bias.

    Parameters
    ----------
    dy : Tensor
    a : Arguments
    y : Tensor, optional
        The output, where ``a.is_masked()``; the residual may be None then.
    saved : tuple of Tensor, optional
        What a forward returned. None is a forward that was composed.
    wanted : tuple of bool

    Returns
    -------
    tuple of Tensor
        In training of a graph, as differentiable as torch's own operators make them.
    """
    of_residual = wanted[1]
    if y is not None:
        dy = FROM_OUTPUT[a.activation.name](dy, y, a.activation.parameter)
        a = a._replace(activation=IDENTITY)
    direct = a.activation.code == 0  # the gradient of the sum is dy
    if direct and (of_residual or a.residual is not None):
        a = a._replace(residual=None)
        wanted = wanted[0], False, *wanted[2:]
    if saved is not None and not torch.is_grad_enabled():
        found = _attempt_gradients(dy, a, saved, wanted)
        if found is not None:
            return found[0], dy if direct and of_residual else found[1], *found[2:]
    dx, dresidual, *rest = gradients_of(a._replace(mean=None, var=None) if a.training else a, dy, wanted)
    return dx, dy if direct and of_residual else dresidual, *rest


def gradients_of(a: Any, dy: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the first of some arguments, one for each that may be wanted, by torch's own operators.

    They are taken of aliases: one of the tensors may have been computed from another one, whose gradient that way is not ours. A view
    would not do: its strides differ where there is one image, and torch's kernels then confuse two orders of memory.
    """
    with torch.enable_grad():
        inputs = [t if t is None else torch.ops.aten.alias(t) for t in a[: len(wanted)]]
        z = a._make((*inputs, *a[len(wanted) :])).composed()
    asked = [t for t, w in zip(inputs, wanted, strict=True) if w and t is not None]
    found = iter(torch.autograd.grad(z, asked, dy, create_graph=torch.is_grad_enabled()) if asked else ())
    return tuple(next(found) if w and t is not None else None for t, w in zip(inputs, wanted, strict=True))


def _attempt_gradients(dy: Tensor, a: Arguments, saved: tuple[Tensor | None, Tensor | None], wanted: tuple[bool, ...]) -> Any:
    rest = a.bias, a.residual, a.activation.code, a.activation.parameter, wanted[1], a.from_output
    mask = [wanted[0], wanted[2], wanted[3]]
    try:
        dx, dweight, dbias, dresidual = compiled().batch_norm_backward.default(
            dy, a.x, a.weight, a.mean, a.var, *saved, a.training, a.eps, mask, *rest
        )
    except RuntimeError as error:
        if LEFT not in str(error):
            raise
        return None
    return dx, dresidual, dweight, dbias


def gradients_from_output(dy: Tensor, y: Tensor, a: Arguments, saved: tuple[Tensor, Tensor], wanted: tuple[bool, ...]) -> Any:
    """Gradients of x, weight and bias where x was not kept.

    Before the activation, y is z = (x - mean) invstd weight + bias, which has the mean `bias` and the deviation `weight`. For
    these dx lacks a factor of weight² invstd, which stands for the weight.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("second derivatives need the input of a batch norm, which was not kept: fastbn.torch.convert(inplace_abn=False)")
    mean, invstd = saved
    one = torch.ones_like(invstd) if a.weight is None else a.weight.detach()
    shift = torch.zeros_like(mean) if a.bias is None else a.bias.detach()
    of_z = a._replace(x=y, weight=one * one * invstd, bias=shift, mean=None, var=None)
    found = _attempt_gradients(dy, of_z, (shift, 1 / one), (wanted[0], False, *wanted[2:]))
    if found is not None:
        return found
    slope = a.activation.parameter
    z = torch.where(y < 0, y / slope, y) if a.activation.code else y
    around = (1, -1) + (1,) * (y.dim() - 2)
    x = (z - shift.reshape(around)) / (one * invstd).reshape(around) + mean.reshape(around)
    return gradients(dy, a._replace(x=x.to(y.dtype).requires_grad_(), from_output=False), None, None, wanted)


# What graphs hold.

_library: Any = torch.library.Library  # it has no types
LIBRARY = _library("fastbn", "FRAGMENT")
LIBRARY.define(
    "batch_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
    "float momentum, float eps, str activation, float parameter) -> "
    "(Tensor output, Tensor save_mean, Tensor save_invstd, Tensor running_mean_out, Tensor running_var_out)"
)
LIBRARY.define(
    "batch_norm_gradients(Tensor grad_out, Tensor input, Tensor? residual, Tensor? output, Tensor? weight, Tensor? bias, "
    "Tensor? running_mean, Tensor? running_var, Tensor save_mean, Tensor save_invstd, bool training, float eps, str activation, "
    "float parameter, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)"
)


def builtin_named(name: str, parameter: float) -> Builtin:
    """An activation of a graph, which another version of fastbn may have written."""
    if name == IDENTITY.name:
        return IDENTITY
    if name not in BUILTINS:
        raise ValueError(f"activation must be one of {IDENTITY.name}, {', '.join(BUILTINS)}, got {name!r}")
    return BUILTINS[name]._replace(parameter=parameter)


def is_compiled(x: Tensor) -> bool:
    """Whether the operators in C can be asked."""
    if x.device.type != "cpu":
        return False
    try:
        compiled()
    except RuntimeError:  # a program that was exported elsewhere
        return False
    return True


def _normalize(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,  # noqa: A002
    running_var: Tensor | None, training: bool, momentum: float, eps: float, activation: str, parameter: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    follows = builtin_named(activation, parameter)
    mean, var = (t.clone() if training and t is not None else t for t in (running_mean, running_var))
    found = None
    if is_compiled(input):
        found = attempt(Arguments(input, residual, weight, bias, mean, var, training, momentum, eps, follows))
    if found is None:
        z, *saved = torch.native_batch_norm(input, weight, bias, mean, var, training, momentum, eps)
        found = after(z, residual, follows).contiguous(memory_format=_order(input)), saved[0], saved[1]
    return *found, *(input.new_empty(0) if t is None or not training else t for t in (mean, var))


def _fake_normalize(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,  # noqa: A002
    running_var: Tensor | None, training: bool, momentum: float, eps: float, activation: str, parameter: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = _fake_forward(input, weight, bias, running_mean, running_var, training, momentum, eps, residual, 0, 0.0)
    moved = (input.new_empty(0) if t is None or not training else torch.empty_like(t) for t in (running_mean, running_var))
    return *found, *moved


def _gradients(
    grad_out: Tensor, input: Tensor, residual: Tensor | None, output: Tensor | None, weight: Tensor | None, bias: Tensor | None,  # noqa: A002
    running_mean: Tensor | None, running_var: Tensor | None, save_mean: Tensor, save_invstd: Tensor, training: bool, eps: float,
    activation: str, parameter: float, output_mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    a = Arguments(input, residual, weight, bias, running_mean, running_var, training, 0.0, eps, builtin_named(activation, parameter))
    saved = ((save_mean, save_invstd) if training else (None, None)) if is_compiled(input) else None
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(a[:4], output_mask, strict=True)]
    dx, dresidual, *rest = gradients(grad_out, a._replace(**dict(zip(a._fields, leaves, strict=False))), output, saved, tuple(output_mask))
    # Torch's own operators may have kept the order of grad_out; compiled code relies on that of the fake kernel.
    return *(t if t is None else t.contiguous(memory_format=_order(input)) for t in (dx, dresidual)), *rest


def _fake_gradients(
    grad_out: Tensor, input: Tensor, residual: Tensor | None, output: Tensor | None, weight: Tensor | None, bias: Tensor | None,  # noqa: A002
    running_mean: Tensor | None, running_var: Tensor | None, save_mean: Tensor, save_invstd: Tensor, training: bool, eps: float,
    activation: str, parameter: float, output_mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    like = _like(input), _like(input), weight, bias
    return tuple(torch.empty_like(t) if w and t is not None else None for t, w in zip(like, output_mask, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = Arguments._make((*inputs[:9], builtin_named(*inputs[9:]), False))
    keep(ctx, a, output[0], output[1:3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def keep(ctx: Any, a: Arguments, y: Tensor, saved: Any) -> None:
    """Keep what a backward needs."""
    masked = a.is_masked()
    residual = a.residual if a.activation.code and not masked else None
    # Copies: a call in training moves running statistics in C, which autograd does not notice.
    statistics = [None if a.training or t is None else t.clone() for t in (a.mean, a.var)]
    of_batch = saved if a.training and saved is not None else (None, None)
    from_output = saved is not None and a.is_invertible()
    bias = keep_bias(ctx, a.bias, a.activation)
    ctx.save_for_backward(
        None if from_output else a.x, residual, a.weight, bias, *statistics, *of_batch, y if masked or from_output else None
    )
    ctx.numbers = *a[6:10], from_output
    ctx.composed = saved is None


def kept(ctx: Any) -> tuple[Arguments, Tensor | None, Any]:
    """What `keep` kept."""
    x, residual, weight, bias, *statistics, first, second, y = ctx.saved_tensors
    a = Arguments(x, residual, weight, kept_bias(ctx, bias, ctx.needs_input_grad[3]), *statistics, *ctx.numbers)
    return a, y, None if ctx.composed else (first, second)


def keep_bias(ctx: Any, bias: Tensor | None, activation: Builtin) -> Tensor | None:
    """The bias as a backward needs it.

    Torch's own layers let it change before the backward. So do these, with a copy: but for curved functions, no derivative of a
    gradient depends on the bias.
    """
    ctx.copied = bias if activation.code == 0 or activation.name in FROM_OUTPUT else None
    return bias if bias is None or ctx.copied is None else bias.detach().clone()


class _Copy(torch.autograd.Function):
    """A copy of what may have changed since, whose gradient is that of the original: zeros, where torch has zeros and not None."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, copy: Tensor) -> Tensor:
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def kept_bias(ctx: Any, bias: Tensor | None, wanted: bool) -> Tensor | None:
    """What `keep_bias` kept, from which a gradient can be asked."""
    if bias is None or ctx.copied is None:
        return bias
    if torch.is_grad_enabled() and wanted:
        return _Copy.apply(ctx.copied, bias)  # type: ignore[no-untyped-call, no-any-return, unused-ignore]
    return bias.detach().requires_grad_(wanted)


def _derive(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if dy is None:
        return (None,) * 11
    a, y, saved = kept(ctx)
    wanted = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        return *gradients(dy, a, y, saved, wanted), *nothing
    direct = a.activation.code == 0  # then the residual's gradient is dy, which an operator must not return
    mask = [wanted[0], wanted[1] and not direct, *wanted[2:]]
    first, second = saved if a.training else (dy.new_empty(0), dy.new_empty(0))
    numbers = a.training, a.eps, a.activation.name, a.activation.parameter, mask
    dx, dresidual, dweight, dbias = torch.ops.fastbn.batch_norm_gradients(
        dy, a.x, a.residual, y, a.weight, a.bias, a.mean, a.var, first, second, *numbers
    )
    return dx, dy if direct and wanted[1] else dresidual, dweight, dbias, *nothing


LIBRARY.impl("batch_norm", _normalize, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("fastbn::batch_norm", _fake_normalize, lib=LIBRARY)
torch.library.register_fake("fastbn::batch_norm_gradients", _fake_gradients, lib=LIBRARY)
torch.library.register_autograd("fastbn::batch_norm", _derive, setup_context=_save, lib=LIBRARY)


def in_words(activation: Builtin) -> tuple[str, float]:
    """An activation as graphs hold it. Numbers of fastbn's tables are not read: to torch.compile they may be inputs of the graph."""
    return activation.name, activation.parameter if activation.name == "leaky_relu" else 0.0


def in_graph(a: Arguments) -> Tensor:
    """The same as one node of a graph.

    In training, the node finds the statistics of the batch, from which the running ones move beside it: a compiler may have a backward
    compute a node again, and then what the node reads must not have changed.
    """
    x, residual, weight, bias, *running, training, momentum, eps, activation, _ = a
    batch = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) if training and t is not None else t for t in running]
    arguments = x, residual, weight, bias, *batch, training, 1.0 if training else momentum, eps
    y, _, _, *found = torch.ops.fastbn.batch_norm(*arguments, *in_words(activation))
    if training:
        for old, new in zip(running, found, strict=True):
            if old is not None:
                old.copy_((1 - momentum) * old + momentum * new)
    return y  # type: ignore[no-any-return]
