"""Instance and group normalization with an activation, as one of torch's operators, on arrays of the tensors' memory.

Instance norm is group norm of one channel a group. The work is that of `fastbn.group_norm`, which takes channels last of four
and five dimensions where they lie; what is kept for the backward is the input and three numbers a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from fastbn.activations import Builtin
from fastbn.norms import group_norm, group_norm_backward, group_norm_forward
from fastbn.results import SavedParts
from fastbn.torch.arrays import LAST, array_of, computable, on_torchs_threads, vector
from fastbn.torch.fused import is_ours
from fastbn.torch.operators import IDENTITY, LIBRARY, NUMBERS, after, builtin_named, gradients_of, in_words, keep_bias, kept_bias

F = torch.nn.functional
# Bytes of x below which the way through Python takes longer than the passes over memory that it saves; torch's own group norm
# is faster than its instance norm.
SMALLEST = 2 << 20
OF_GROUPS = 4  # times as many


class Parts(NamedTuple):
    """What `group_norm` is called with, and what follows."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    groups: int
    eps: float
    activation: Builtin = IDENTITY

    def followed(self, residual: None, activation: Builtin, counted: bool) -> Parts:
        """The same with an activation."""
        return self._replace(activation=activation)

    def is_usual(self) -> bool:
        """Whether fastbn takes it; else torch says what is wrong, or does it."""
        x = self.x
        if not is_ours(x, SMALLEST) or computable(x) is not x:
            return False
        if self.groups != x.shape[1] and not is_ours(x, SMALLEST * OF_GROUPS):
            return False
        if not (x.is_contiguous() or (x.dim() in LAST and x.is_contiguous(memory_format=LAST[x.dim()]))):
            return False  # torch's output is in another order
        if not torch.compiler.is_compiling() and has_torch_function(self[:3]):
            return False
        channels = x.shape[1]
        if type(self.groups) is not int or self.groups < 1 or channels % self.groups or type(self.eps) not in NUMBERS or self.eps < 0:
            return False
        if x.numel() <= x.shape[0] * self.groups:  # one value a group
            return False
        for t in self[1:3]:
            if t is not None:
                if not isinstance(t, Tensor) or not t.is_cpu or t.layout is not torch.strided or t.shape != (channels,):
                    return False
                if t.dtype is not x.dtype and not (t.dtype is torch.float32 and x.dtype.itemsize == 2):
                    return False
        return True

    def composed(self) -> Tensor:
        """Compute it by torch's own operators."""
        return after(F.group_norm(self.x, self.groups, self.weight, self.bias, self.eps), None, self.activation)

    def run(self) -> Tensor:
        """Compute it, where it is usual."""
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.fastbn.group_norm(*self[:5], *in_words(self.activation))[0]
            return y
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self[:3]):
            return _Fused.apply(*self[:3], self[3:])  # type: ignore[no-untyped-call, no-any-return, unused-ignore]
        return normalize(self, keep=False)[0]


def normalize(a: Parts, *, keep: bool) -> tuple[Tensor, ...]:
    """Output, and where it is wanted what a backward needs: mean, what it rounds away, one over the deviation."""
    y = torch.empty_like(a.x)
    given: Any = array_of(a.x), a.groups, vector(a.weight), vector(a.bias), a.eps
    activation: Any = a.activation.argument if a.activation.code else None
    with on_torchs_threads():
        if not keep:
            group_norm(*given, activation=activation, out=array_of(y))
            return (y,)
        _, saved = group_norm_forward(*given, activation=activation, out=array_of(y))
    return y, *(torch.from_numpy(v) for v in (saved.mean, saved.mean_lo, saved.invstd))


def gradients(dy: Tensor, a: Parts, saved: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias; where they are recorded, or dy is a batch of torch's `vmap`, by torch's own operators."""
    functorch: Any = torch._C._functorch
    if torch.is_grad_enabled() or functorch.is_legacy_batchedtensor(dy) or functorch.is_functorch_wrapped_tensor(dy):
        return gradients_of(a, dy, wanted)
    x = array_of(a.x)
    mean, mean_lo, invstd = (t.numpy() for t in saved)
    weight, bias, activation = vector(a.weight), vector(a.bias), a.activation if a.activation.code else None
    group = a.x.shape[1] // a.groups
    kept = SavedParts("group_norm", x.shape, x.dtype, 1, group, mean, mean_lo, invstd, weight, bias, activation, None, False)
    dx = torch.empty_like(a.x) if wanted[0] else None
    names = [name for name, w in zip(("x", "weight", "bias"), wanted, strict=True) if w]
    with on_torchs_threads():
        g = group_norm_backward(array_of(dy), x, kept, wrt=names, out=None if dx is None else array_of(dx))
    of = (None if v is None or t is None else torch.from_numpy(v).to(t.dtype) for v, t in zip((g.dweight, g.dbias), a[1:3], strict=True))
    return dx, *of


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, others: Any) -> Tensor:
        a = Parts(x, weight, bias, *others)
        y, *saved = normalize(a, keep=True)
        ctx.save_for_backward(x, weight, keep_bias(ctx, bias, a.activation), *saved)
        ctx.others = others
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *saved = ctx.saved_tensors
        bias = kept_bias(ctx, bias, ctx.needs_input_grad[2])
        return *gradients(dy, Parts(x, weight, bias, *ctx.others), tuple(saved), ctx.needs_input_grad[:3]), None


# What graphs hold.

LIBRARY.define(
    "group_norm(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps, str activation, float parameter) -> "
    "(Tensor output, Tensor mean, Tensor mean_lo, Tensor invstd)"
)
LIBRARY.define(
    "group_norm_gradients(Tensor grad_out, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor mean_lo, Tensor invstd, "
    "int num_groups, float eps, str activation, float parameter, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)


def _normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, activation: str, parameter: float,  # noqa: A002
) -> tuple[Tensor, ...]:  # fmt: skip
    return normalize(Parts(input, weight, bias, num_groups, eps, builtin_named(activation, parameter)), keep=True)


def _fake_normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, activation: str, parameter: float,  # noqa: A002
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    return torch.empty_like(input), *(input.new_empty((input.shape[0], num_groups), dtype=dtype) for _ in range(3))


def _gradients(
    grad_out: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, mean_lo: Tensor, invstd: Tensor,  # noqa: A002
    num_groups: int, eps: float, activation: str, parameter: float, output_mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    a = Parts(input, weight, bias, num_groups, eps, builtin_named(activation, parameter))
    with torch.no_grad():
        return gradients(grad_out, a, (mean, mean_lo, invstd), tuple(output_mask))


def _fake_gradients(
    grad_out: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, mean_lo: Tensor, invstd: Tensor,  # noqa: A002
    num_groups: int, eps: float, activation: str, parameter: float, output_mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    like = input, weight, bias
    return tuple(torch.empty_like(t) if w and t is not None else None for t, w in zip(like, output_mask, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias = inputs[:3]
    ctx.save_for_backward(x, weight, keep_bias(ctx, bias, builtin_named(*inputs[5:])), *output[1:])
    ctx.others = inputs[3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _derive(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, weight, bias, *saved = ctx.saved_tensors
    groups, eps, name, parameter = ctx.others
    wanted = ctx.needs_input_grad[:3]
    bias = kept_bias(ctx, bias, wanted[2])
    if torch.is_grad_enabled():
        found = gradients(dy, Parts(x, weight, bias, groups, eps, builtin_named(name, parameter)), tuple(saved), wanted)
    else:
        found = torch.ops.fastbn.group_norm_gradients(dy, x, weight, bias, *saved, groups, eps, name, parameter, list(wanted))
    return *found, None, None, None, None


LIBRARY.impl("group_norm", _normalize, "CompositeExplicitAutograd")
LIBRARY.impl("group_norm_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("fastbn::group_norm", _fake_normalize, lib=LIBRARY)
torch.library.register_fake("fastbn::group_norm_gradients", _fake_gradients, lib=LIBRARY)
torch.library.register_autograd("fastbn::group_norm", _derive, setup_context=_save, lib=LIBRARY)
