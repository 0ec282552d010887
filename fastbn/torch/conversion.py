"""Normalizations of a model that run with the sum and the activation after them as one operation.

- A converted layer is its old self, of a class that is derived from its own: the same parameters, buffers, names, hooks.
  Nothing else of a model changes, neither its code nor its activations; these meet what a converted layer returns
  (deferred.py).
- What follows a layer is what torch.fx finds. It need not be what runs: where something else follows, it is computed apart.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

import fastbn.torch.rules  # noqa: F401  by which functions of torch's compute what waits
from fastbn.tables import counted, table
from fastbn.torch.deferred import LAYERS as ACTIVATIONS
from fastbn.torch.deferred import SCOPE, Input, Scope, Scoped, Steps, builtin, deferred, is_line, left, settled
from fastbn.torch.derived import Derived, become, derive, own_class, release
from fastbn.torch.fused import is_ours, is_overridden, run
from fastbn.torch.graph import STEPS, Listed, check, has_hooks, size, unseen
from fastbn.torch.operators import IDENTITY, Arguments
from fastbn.torch.override import is_enabled, ready
from fastbn.torch.parts import kind_of, of_layer
from fastbn.torch.plans import FORWARDS, KINDS, NOBODY, Plan, plans, refuses

jit: Any = torch.jit  # it has no types
_modules: Any = torch_module  # nor has this


def _is_seen(layer: Any, activation: Any) -> bool:
    """Whether a hook, or another way to call the layer, comes between it and an activation."""
    return has_hooks(layer) or has_hooks(activation) or _modules._has_any_global_hook() or layer._compiled_call_impl is not None


class Converted(Derived):
    """What converted layers have in common."""

    @classmethod
    def members(cls, kind: Any) -> dict[str, Any]:
        """A call with the arguments of the kind's own code, where that is not torch's; the first one is the input."""
        if kind.forward in FORWARDS:
            return {}
        _, first, *_ = inspect.signature(kind.forward).parameters

        @functools.wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            steps: Steps | None = self.__dict__.get(STEPS)
            if steps is None or not (args or first in kwargs):
                return kind.forward(self, *args, **kwargs)
            if args:
                return self._by_own_code(args[0], steps, lambda x: kind.forward(self, x, *args[1:], **kwargs))
            return self._by_own_code(kwargs[first], steps, lambda x: kind.forward(self, **kwargs | {first: x}))

        return {"forward": forward}

    def forward(self, input: Tensor) -> Any:  # noqa: A002  as nn.BatchNorm2d
        """Normalize, or return what stands for that."""
        steps: Steps | None = self.__dict__.get(STEPS)
        if steps is None:  # somebody has made another layer of the same class
            return super().forward(input)  # type: ignore[misc]
        if not steps.plain or type(input) is not Tensor or torch.compiler.is_compiling():
            return self._by_own_code(input, steps, super().forward)  # type: ignore[misc]
        a = _arguments(self, input, steps.from_output)
        if a is None:
            return self._by_own_code(input, steps, super().forward)  # type: ignore[misc]
        alone = not (steps.sum or steps.activation)
        if (alone and not steps.from_output and is_enabled()) or not is_ours(input):
            return torch.batch_norm(input, a.weight, a.bias, a.mean, a.var, a.training, a.momentum, a.eps, True)
        if alone or self._is_watched() or (visit := steps.visit(self)) is None:
            return run(a)
        return deferred(a, steps, visit)

    def followed(self, x: Tensor, activation: Any) -> Any:
        """What an activation makes of the output for an x that is the operators'."""
        me: Any = self
        after, steps = builtin(activation), self.__dict__.get(STEPS)
        if after is None or steps is None or type(x) is not Tensor or type(self).forward is not Converted.forward:
            return activation(me(x))
        if _is_seen(me, activation):
            return activation(me(x))
        a = _arguments(self, x, steps.from_output)
        return activation(me(x)) if a is None else run(a._replace(activation=after))

    def _by_own_code(self, input: Tensor, steps: Steps, original: Callable[[Any], Any]) -> Any:  # noqa: A002
        """Run the layer's own code, of which `torch.nn.functional.batch_norm` is deferred."""
        visit = steps.visit(self)
        if visit is None:
            steps = steps.alone()
        if not self._is_ours(input, steps):
            return original(input)
        inner = None if steps.outside else visit  # of the layer's own code, with which it ends
        given = Input(input, steps, visit)
        if torch.compiler.is_compiling():
            found = original(given)
            if inner is not None:
                inner.end()
            return found if visit is not None and steps.outside else settled(found)
        held = weakref.ref(given)
        try:
            found = original(given)
        except BaseException:
            if inner is not None:
                inner.give_up()
            raise
        del given
        return left(self, found) if (inner is not None and inner.end()) or held() is not None else found

    def _is_ours(self, x: Any, steps: Steps) -> bool:
        if torch.compiler.is_compiling():
            return isinstance(x, Tensor) and is_ours(x)
        if type(x) is not Tensor or (is_enabled() and not (steps.sum or steps.activation or steps.from_output)):
            return False
        return not self._is_watched() and is_ours(x)

    def _is_watched(self) -> bool:
        """Whether a hook wants tensors."""
        me: Any = self
        return bool(me._forward_hooks or me._backward_hooks or me._backward_pre_hooks) or _modules._has_any_global_hook()

    def extra_repr(self) -> str:
        """As the layer's own, and what is expected to follow."""
        own: str = super().extra_repr()  # type: ignore[misc]
        steps: Steps | None = self.__dict__.get(STEPS)
        if steps is None:
            return own
        names = [name for name, expected in (("add", steps.sum), ("activation", steps.activation)) if expected]
        kind = kind_of(self) if isinstance(self, ConvertedParts) else "batch_norm"
        return f"{own}, fastbn={' + '.join([kind, *names])}"


class ConvertedParts(Converted):
    """The same of instance, group and layer norm, which are converted where an activation follows, and of root mean squares."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002  as nn.GroupNorm
        """Normalize, or return what stands for that."""
        steps: Steps | None = self.__dict__.get(STEPS)
        if steps is not None and not steps.plain:
            return self._by_own_code(input, steps, self._original)
        visit = None if steps is None or self._is_watched() else steps.visit(self)
        if steps is None or (visit is None and not _pays_alone(self, steps)):
            return self._original(input)
        a = of_layer(self, input)
        if a is None:
            return self._original(input)
        return a.run() if visit is None else deferred(a, steps, visit)

    def _is_ours(self, x: Any, steps: Steps) -> bool:
        known = isinstance(x, Tensor) if torch.compiler.is_compiling() else type(x) is Tensor
        return known and steps.activation and not self._is_watched() and is_ours(x)

    def _original(self, input: Tensor) -> Tensor:  # noqa: A002
        y: Tensor = super(Converted, self).forward(input)  # type: ignore[misc]
        return y

    def followed(self, x: Tensor, activation: Any) -> Any:
        """What an activation makes of the output."""
        me: Any = self
        after = builtin(activation)
        known = after is not None and type(self).forward is ConvertedParts.forward and not _is_seen(me, activation)
        a = of_layer(self, x) if known else None
        return activation(me(x)) if a is None or after is None else a._replace(activation=after).run()


def _pays_alone(layer: Any, steps: Steps) -> bool:
    """Whether a layer of parts is faster with nothing after it, too: of root mean squares torch's own is several operations."""
    return isinstance(layer, nn.RMSNorm) and steps.plain and not torch.compiler.is_compiling()


def _arguments(layer: Any, x: Tensor, from_output: bool) -> Arguments | None:
    """What torch's own code of a layer calls batch norm with, once it has counted the batch; None for all that is unusual."""
    state = layer.__dict__
    try:
        training, momentum, eps, tracked = state["training"], state["momentum"], state["eps"], state["track_running_stats"]
        weight, bias = state["_parameters"]["weight"], state["_parameters"]["bias"]
        buffers = state["_buffers"]
        mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:
        return None
    if type(training) is not bool or type(eps) is not float or eps <= 0 or not (momentum is None or type(momentum) is float):
        return None
    if x.dim() < 2 or x.layout is not torch.strided or not x.is_cpu or is_overridden((x, weight, bias, mean, var)) or jit.is_tracing():
        return None
    for t in (weight, bias, mean, var):
        if t is not None and not (isinstance(t, Tensor) and t.is_cpu and t.layout is torch.strided):
            return None
    layer._check_input_dim(x)
    of_batch = training or (mean is None and var is None)
    if (of_batch and x.numel() == x.shape[1]) or (mean is None) != (var is None):
        return None
    if mean is not None and (mean.requires_grad or var.requires_grad):
        return None
    factor = 0.0 if momentum is None else momentum
    if training and tracked and count is not None:
        count.add_(1)
        if momentum is None:
            factor = 1.0 / float(count)
    if training and not tracked:
        mean = var = None
    return Arguments(x, None, weight, bias, mean, var, of_batch, factor, eps, IDENTITY, from_output)


class Layer(NamedTuple):
    """What became of a normalization layer.

    Attributes
    ----------
    path : str
        Its name in the model.
    kind : str
        Its class.
    channels : int
    fused : tuple of str
        What runs with it, as the model calls it.
    why : str
        Why nothing does, or why the layer was left as it was; empty where something does.
    converted : bool
    keeps : str
        What its backward needs: "input" or, with `inplace_abn`, "output".
    """

    path: str
    kind: str
    channels: int
    fused: tuple[str, ...]
    why: str
    converted: bool
    keeps: str


class Conversion(Listed[Layer]):
    """Layers of a model, in its order; printed, a table.

    Attributes
    ----------
    unseen : dict of str to str
        Parts of the model whose normalizations are no layers, by path: what they are.
    """

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """It is no model."""
        raise TypeError("this is the table that convert returned, not the model: convert changes the model in place; call the model")

    def __str__(self) -> str:
        """A table of columns, and what it counts in all."""
        rows = [("path", "kind", "channels", "keeps", "fused with", "why not")]
        for layer in self:
            what = ", ".join(layer.fused) or ("alone" if layer.converted else "left")
            rows.append((layer.path or "(the model)", layer.kind, str(layer.channels), layer.keeps, what, layer.why))
        converted, fused = sum(layer.converted for layer in self), sum(bool(layer.fused) for layer in self)
        return self.of([*table(rows), f"{counted(len(self), 'layer')}, {converted} converted, {fused} fused"])


def convert(model: nn.Module, *, fuse: bool = True, inplace_abn: bool = False) -> Conversion:
    """Run the batch norms of a model with fastbn, and fuse each with the sum and the activation after it.

    Instance, group, layer and RMS norm are fused with an activation after them; RMS norm also runs alone.

    The model keeps its modules, parameters, buffers and names; only the class of a converted layer becomes a class derived from
    its own. You can train, save, copy and compile it as before, and change it: the result is always what the model's code
    says, even if something else follows a layer than was found here. `convert` does not need `enable`. But `enable` is faster
    for batch norms that nothing follows, and applies to all models of a process.

    Parameters
    ----------
    model : Module
    fuse : bool
        False: layers run with fastbn, but are fused with nothing.
    inplace_abn : bool
        In training, keep a layer's output instead of its input; the backward recomputes the input from it. This applies to layers
        that are followed by nothing, or by a leaky_relu with a slope above 0. Usually the next layer keeps that output anyway, so
        half of the memory of both is saved. Layers with weights near 0 keep the input; there are no second derivatives.

    Returns
    -------
    Conversion
        A tuple of `Layer`: what each layer is fused with, or why it is not. Printed, it is a table.

    Raises
    ------
    TypeError
        If model is no Module.
    RuntimeError
        As `enable`.

    See Also
    --------
    revert : undo it.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.BatchNorm2d(8))
    >>> print(fastbn.torch.convert(model))
    path  kind         channels  keeps  fused with  why not
    1     BatchNorm2d  8         input  ReLU
    3     BatchNorm2d  8         input  alone       the model's output follows
    2 layers, 2 converted, 1 fused
    >>> fastbn.torch.revert(model)
    2
    """
    check(model)
    ready()
    revert(model)
    try:
        return _convert(model, fuse, inplace_abn)
    except BaseException:  # a class that lets no other be derived from it, for one
        revert(model)
        raise


def _convert(model: nn.Module, fuse: bool, inplace_abn: bool) -> Conversion:
    planned = plans(model)
    scopes: dict[nn.Module, Scope] = {}
    found = []
    for path, layer in _layers(model):
        why, inner = refuses(layer)
        plan = Plan(why=why)
        mixin = Converted if isinstance(layer, _BatchNorm) else ConvertedParts
        if not why:
            plan = planned.get(id(layer), NOBODY) if inner.fits_outside else inner
            if not fuse:
                plan = Plan(why="it was not asked for", steady=plan.steady and not plan.names)
            why = plan.why if mixin is ConvertedParts and not _pays_alone(layer, inner.steps) else ""
        if not why:
            keeps_output = inplace_abn and mixin is Converted and plan.steady and inner.fits_outside
            steps = plan.steps._replace(from_output=keeps_output, plain=inner.steps.plain)
            if plan.names and plan.within is not None:
                scope = scopes.setdefault(plan.within, Scope()) if steps.outside else Scope()
                scope.places += plan.places
                if steps.outside:  # what the layer's own code calls sees what waits, too
                    way = next(tuple(name.split(".")) for name, module in plan.within.named_modules() if module is layer)
                    scope.places += [((*way, *names), kind) for names, kind in inner.places]
                steps = steps._replace(scope=scope)
            if not isinstance(layer, mixin):
                become(layer, derive(mixin, type(layer)))
            layer.__dict__[STEPS] = steps
        keeps = "output" if not why and keeps_output else "input"
        found.append(Layer(path, type(layer).__name__, size(layer), plan.names, plan.why, STEPS in layer.__dict__, keeps))
    for module, scope in scopes.items():
        if is_line(own_class(module)):
            scope.pairs = _pairs(module, scope)
        if not isinstance(module, Scoped):
            become(module, derive(Scoped, type(module)))
        module.__dict__[SCOPE] = scope
    return Conversion(found, unseen(model))


def revert(model: nn.Module) -> int:
    """Undo `convert`: give converted layers their own classes back.

    Parameters
    ----------
    model : Module

    Returns
    -------
    int
        How many layers were converted.

    Raises
    ------
    TypeError
        If model is no Module.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    >>> _ = fastbn.torch.convert(model)
    >>> fastbn.torch.revert(model), type(model[0]) is torch.nn.BatchNorm1d
    (1, True)
    """
    check(model)
    count = 0
    for module in model.modules():
        if isinstance(module, Converted | Scoped):
            release(module)
            count += module.__dict__.pop(STEPS, None) is not None  # without it a layer is what it was, whatever its class is
            module.__dict__.pop(SCOPE, None)
    return count


def _pairs(module: Any, scope: Scope) -> set[str]:
    """Names of batch norms of an nn.Sequential that run with the activation that comes next."""
    found, children = set(), [*module._modules.items()]
    for (name, layer), (_, after) in pairwise(children):
        steps = layer.__dict__.get(STEPS)
        is_called = type(layer).__call__ is nn.Module.__call__  # and does nothing else then
        if steps is not None and steps.scope is scope and steps.plain and not steps.sum and type(after) in ACTIVATIONS and is_called:
            found.add(name)
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, layer) for path, layer in model.named_modules() if isinstance(layer, KINDS))
