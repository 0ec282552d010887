"""Normalization of parts with an activation, as one of torch's operators, on arrays of the tensors' memory.

Instance norm is group norm of one channel a group. The work is that of `fastbn.group_norm`, `layer_norm` and `rms_norm`; the
first takes channels last of four and five dimensions where they lie. What is kept for the backward is the input and three
numbers a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from sys import float_info
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastbn import norms
from fastbn.activations import Builtin
from fastbn.results import SavedParts
from fastbn.torch.arrays import array_of, computable, is_channels_last, new_like, on_torchs_threads, vector
from fastbn.torch.fused import is_ours, is_overridden
from fastbn.torch.operators import IDENTITY, LIBRARY, NUMBERS, after, builtin_named, gradients_of, in_words, keep_bias, kept_bias

F = torch.nn.functional


# Bytes of x below which the way through Python takes longer than the passes over memory that it saves.
LEAST = {"instance_norm": 2 << 20, "group_norm": 8 << 20, "layer_norm": 4 << 20, "rms_norm": 1 << 20}
MOST = float_info.max  # as eps


class Norm(NamedTuple):
    """A normalization of parts: fastbn's three functions, torch's own, and what operators of graphs are called with beside tensors."""

    forward: Any
    inference: Any
    backward: Any
    composed: Callable[[Any], Tensor]
    schema: str


def _norm(kind: str, composed: Callable[[Any], Tensor], schema: str) -> Norm:
    return Norm(getattr(norms, f"{kind}_forward"), getattr(norms, kind), getattr(norms, f"{kind}_backward"), composed, schema)


def _of_groups(a: Parts) -> Tensor:
    """By torch's own operators, of which instance norm has second derivatives of many gradients at once, and group norm has not."""
    if a._is_instance():
        return F.instance_norm(a.x, weight=a.weight, bias=a.bias, eps=a.eps)  # type: ignore[arg-type]
    return F.group_norm(a.x, a.parts, a.weight, a.bias, a.eps)  # type: ignore[arg-type]


_ROW = "SymInt[] normalized_shape"  # a number of torch.export's, too
NORMS = {
    "group_norm": _norm("group_norm", _of_groups, "int num_groups, float eps"),
    "layer_norm": _norm("layer_norm", lambda a: F.layer_norm(a.x, a.parts, a.weight, a.bias, a.eps), f"{_ROW}, float eps"),
    "rms_norm": _norm("rms_norm", lambda a: F.rms_norm(a.x, a.parts, a.weight, a.eps), f"{_ROW}, float? eps"),
}


class Parts(NamedTuple):
    """What torch's function of a normalization is called with, and what follows; `parts` is num_groups or normalized_shape."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    parts: Any
    eps: float | None
    kind: str = "group_norm"
    activation: Builtin = IDENTITY

    def followed(self, residual: None, activation: Builtin, counted: bool) -> Parts:
        """The same with an activation."""
        return self._replace(activation=activation)

    def is_usual(self) -> bool:
        """Whether fastbn takes it; else torch says what is wrong, or does it."""
        x = self.x
        if not is_ours(x, LEAST["instance_norm" if self._is_instance() else self.kind]) or computable(x) is not x:
            return False
        if not torch.compiler.is_compiling() and is_overridden(self[:3]):
            return False
        if not (self._has_groups() if self.kind == "group_norm" else self._has_rows()):
            return False
        number = type(self.eps) in NUMBERS and 0 <= self.eps <= MOST  # type: ignore[operator]
        if not number and not (self.eps is None and self.kind == "rms_norm"):
            return False
        shape = x.shape[1:2] if self.kind == "group_norm" else torch.Size(self.parts)
        mixes = x.dtype.itemsize == 2 and self.kind != "rms_norm"  # whose output would be of float32
        dtype = x.dtype  # of the weight, and then of the bias, too
        for t in self[1:3]:
            if t is not None:
                if not isinstance(t, Tensor) or not t.is_cpu or t.layout is not torch.strided or t.shape != shape:
                    return False
                if t is self.weight and t.dtype is torch.float32 and mixes:
                    dtype = torch.float32
                if t.dtype is not dtype:
                    return False
        return True

    def _is_instance(self) -> bool:
        return self.kind == "group_norm" and isinstance(self.x, Tensor) and self.x.dim() > 1 and self.parts == self.x.shape[1]

    def _has_groups(self) -> bool:
        x, groups = self.x, self.parts
        if not (x.is_contiguous() or is_channels_last(x)):
            return False  # torch's output is in another order
        if type(groups) is not int or groups < 1 or x.shape[1] % groups:
            return False
        return x.numel() > x.shape[0] * groups  # of one value a group torch has its own opinion

    def _has_rows(self) -> bool:
        x, shape = self.x, self.parts
        known = isinstance(shape, list | tuple) and 0 < len(shape) <= x.dim() and all(type(size) is int for size in shape)
        return known and x.is_contiguous() and x.shape[x.dim() - len(shape) :] == torch.Size(shape)

    def composed(self) -> Tensor:
        """Compute it by torch's own operators."""
        return after(NORMS[self.kind].composed(self), None, self.activation)

    def run(self) -> Tensor:
        """Compute it, where it is usual."""
        if torch.compiler.is_compiling():
            operator = getattr(torch.ops.fastbn, self.kind)
            y: Tensor = operator(*self[:5], *in_words(self.activation))[0]
            return y
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self[:3]):
            if self.kind == "rms_norm" and not self.x.requires_grad:  # torch does not keep it: it may change, or be an inference tensor
                return self.composed()
            return _Fused.apply(*self[:3], self[3:])  # type: ignore[no-untyped-call, no-any-return, unused-ignore]
        return normalize(self, keep=False)[0]


@contextmanager
def _as_operator(name: str) -> Iterator[None]:
    """A call of the kernels, which torch's profiler sees as it sees operators."""
    profiler: Any = torch.autograd.profiler  # it has no types
    with on_torchs_threads(), profiler.record_function(f"fastbn::{name}") if profiler._is_profiler_enabled else nullcontext():
        yield


def normalize(a: Parts, *, keep: bool) -> tuple[Tensor, ...]:
    """Output, and where it is wanted what a backward needs: mean, what it rounds away, one over the deviation."""
    (y, out), norm = new_like(a.x), NORMS[a.kind]
    bias = () if a.kind == "rms_norm" else (vector(a.bias),)
    given: Any = array_of(a.x), a.parts, vector(a.weight), *bias, a.eps
    activation: Any = a.activation.argument if a.activation.code else None
    with _as_operator(f"{a.kind}_forward"):
        if not keep:
            norm.inference(*given, activation=activation, out=out)
            return (y,)
        _, saved = norm.forward(*given, activation=activation, out=out)
    return y, *(torch.from_numpy(v) for v in (saved.mean, saved.mean_lo, saved.invstd))


def gradients(dy: Tensor, a: Parts, saved: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias; where they are recorded, or dy is a batch of torch's `vmap`, by torch's own operators."""
    functorch: Any = torch._C._functorch
    if torch.is_grad_enabled() or functorch.is_legacy_batchedtensor(dy) or functorch.is_functorch_wrapped_tensor(dy):
        return gradients_of(a, dy, wanted)
    x = array_of(a.x)
    # A weight may be a view, and a hook for saved tensors may give views back.
    given: Any = (None if t is None else np.ascontiguousarray(vector(t)) for t in (*saved, a.weight, a.bias))
    mean, mean_lo, invstd, *vectors = given
    weight, bias = (None if v is None else v.reshape(-1) for v in vectors)
    groups = a.kind == "group_norm"
    axis, group = (1, x.shape[1] // a.parts) if groups else (x.ndim - len(a.parts), prod(a.parts))
    activation = a.activation if a.activation.code else None
    kept = SavedParts(a.kind, x.shape, x.dtype, axis, group, mean, mean_lo, invstd, weight, bias, activation, None, False)
    dx, out = new_like(a.x) if wanted[0] else (None, None)
    names = [name for name, w in zip(("x", "weight", "bias"), wanted, strict=True) if w]
    with _as_operator(f"{a.kind}_backward"):
        g = NORMS[a.kind].backward(array_of(dy), x, kept, wrt=names, out=out)
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


# What layers call.

LAYERS = {nn.GroupNorm: "group_norm", nn.LayerNorm: "layer_norm", nn.RMSNorm: "rms_norm"}
CALLS = {F.group_norm, F.layer_norm, F.rms_norm}


def kind_of(layer: Any) -> str:
    """Which normalization a layer is; instance norm is one of groups."""
    return next((name for known, name in LAYERS.items() if isinstance(layer, known)), "group_norm")


def of_layer(layer: Any, x: Any) -> Parts | None:
    """What a layer's own code calls its function with; None for all that is unusual."""
    if not isinstance(x, Tensor) or (type(x) is not Tensor and not torch.compiler.is_compiling()):
        return None
    kind = kind_of(layer)
    if kind != "group_norm":
        fits, parts = True, layer.normalized_shape
    elif isinstance(layer, nn.GroupNorm):
        fits, parts = x.dim() > 1 and x.shape[1] == layer.num_channels, layer.num_groups
    else:
        fits = x.dim() == layer._get_no_batch_dim() + 1 and x.shape[1] == layer.num_features
        fits, parts = fits and layer.running_mean is None and layer.running_var is None, layer.num_features
    a = Parts(x, layer.weight, getattr(layer, "bias", None), parts, layer.eps, kind)
    return a if fits and a.is_usual() else None


# What graphs hold.


def _define(kind: str, schema: str) -> None:
    """Define the two operators of a normalization."""
    common = f"Tensor input, Tensor? weight, Tensor? bias, {schema}, str activation, float parameter"
    LIBRARY.define(f"{kind}({common}) -> (Tensor output, Tensor mean, Tensor mean_lo, Tensor invstd)")
    saved = "Tensor mean, Tensor mean_lo, Tensor invstd"
    LIBRARY.define(
        f"{kind}_gradients(Tensor grad_out, {common.replace('bias,', f'bias, {saved},')}, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
    )

    def arguments(x: Tensor, weight: Tensor | None, bias: Tensor | None, parts: Any, eps: float | None, *activation: Any) -> Parts:
        return Parts(x, weight, bias, parts, eps, kind, builtin_named(*activation))

    def forward(*given: Any) -> tuple[Tensor, ...]:
        return normalize(arguments(*given), keep=True)

    def fake_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, parts: Any, *_: Any) -> tuple[Tensor, ...]:
        size = (x.shape[0], parts) if kind == "group_norm" else (x.numel() // prod(parts), 1)
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        return torch.empty_like(x), *(x.new_empty(size, dtype=dtype) for _ in range(3))

    def backward(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        *saved, parts, eps, name, parameter, mask = rest
        with torch.no_grad():
            return gradients(dy, arguments(x, weight, bias, parts, eps, name, parameter), tuple(saved), tuple(mask))

    def fake_backward(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        return tuple(torch.empty_like(t) if w and t is not None else None for t, w in zip((x, weight, bias), rest[-1], strict=True))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias = inputs[:3]
        ctx.save_for_backward(x, weight, keep_bias(ctx, bias, builtin_named(*inputs[5:])), *output[1:])
        ctx.others = inputs[3:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def derive(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, weight, bias, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        bias = kept_bias(ctx, bias, wanted[2])
        if torch.is_grad_enabled():
            found = gradients(dy, arguments(x, weight, bias, *ctx.others), tuple(saved), wanted)
        else:
            operator = getattr(torch.ops.fastbn, f"{kind}_gradients")
            found = operator(dy, x, weight, bias, *saved, *ctx.others, list(wanted))
        return *found, None, None, None, None

    LIBRARY.impl(kind, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{kind}_gradients", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbn::{kind}", fake_forward, lib=LIBRARY)
    torch.library.register_fake(f"fastbn::{kind}_gradients", fake_backward, lib=LIBRARY)
    torch.library.register_autograd(f"fastbn::{kind}", derive, setup_context=save, lib=LIBRARY)


for _kind in NORMS:
    _define(_kind, NORMS[_kind].schema)
