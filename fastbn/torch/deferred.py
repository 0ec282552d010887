"""What stands for the output of a batch norm until it is known what follows.

- A model's own code runs, whatever it does. Its batch norm returns a `Pending`, which has not been computed; when this meets
  a sum or an activation, they are computed together, in one operation. When it meets anything else, it becomes the tensor
  that it stands for. So results never depend on what somebody foresaw of the code: that decides only where a `Pending` is
  worth it.
- Nothing waits but inside a call of the module whose code holds the batch norm and what follows it (`Scope`). The call ends
  with all computed, what it returns and what nobody asked for. Nor does anything wait where hooks for saved tensors were set
  since: a checkpoint runs what is in it again, and is to find the same operations, but not that call.
- In an `nn.Sequential`, whose code is known, nothing need wait: a layer is called with the activation after it.
- What torch.compile traces goes through torch's own code of a layer, which meets an `Input`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn import Module, Parameter, Sequential

from fastbn.activations import BUILTINS, Builtin
from fastbn.torch.arrays import is_channels_last
from fastbn.torch.derived import Derived, own_class
from fastbn.torch.freezing import stay_frozen
from fastbn.torch.fused import is_ours, run
from fastbn.torch.graph import function_codes, has_hooks
from fastbn.torch.modes import again, mode, saved_hooks
from fastbn.torch.operators import FROM_OUTPUT, IDENTITY, Arguments
from fastbn.torch.parts import Parts
from fastbn.torch.standing import Standing, tensor_of

SCOPE = "_fastbn_scope"  # of a module: its Scope
LAYERS = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
}  # fmt: skip


class Steps(NamedTuple):
    """What is expected to follow a batch norm.

    Attributes
    ----------
    sum, activation : bool
    outside : bool
        Whether they are beyond the layer's own code.
    plain : bool
        Whether the layer's own code is torch's.
    from_output : bool
        Whether a backward may find the input from the output.
    scope : Scope, optional
        Where things are expected: the code of a module around the layer if they are `outside`, else the layer's own.
    compiles : bool
        Whether torch.compile lets the activation meet what waits.
    """

    sum: bool = False
    activation: bool = False
    outside: bool = False
    plain: bool = False
    from_output: bool = False
    scope: Scope | None = None
    compiles: bool = True

    def visit(self, layer: Any) -> Any:
        """The call in which something of a layer may wait, or None."""
        if not (self.sum or self.activation) or (torch.compiler.is_compiling() and not self.compiles):
            return None
        if self.outside and self.scope is not None:
            return self.scope.visit()
        visit = Visit(self.scope, layer)
        return visit if visit.is_fit() else None

    def alone(self) -> Steps:
        """The same where nothing may wait."""
        return self._replace(sum=False, activation=False)


class Visit:
    """A call of a module, and what waits in it.

    Attributes
    ----------
    scope, module : Scope, Module, optional
    is_open : bool
    fits : bool, optional
        Whether something may wait; None before somebody has asked.
    hooks : tuple, optional
        For saved tensors, when the call of a scope's module began.
    waiting : dict of int to Pending or weak reference to one
        By its id. Somebody may still ask for what was computed with what follows it: that is known by a weak reference.
    """

    __slots__ = "fits", "hooks", "is_open", "module", "scope", "waiting"

    def __init__(self, scope: Scope | None = None, module: Any = None):
        self.scope = scope
        self.module = module
        self.is_open = True
        self.fits: bool | None = None
        self.hooks: Any = None
        self.waiting: dict[int, Any] = {}

    def is_fit(self) -> bool:
        """Whether something may wait."""
        if self.fits is None:
            self.fits = self.scope is None or self.scope.fits(self.module)
        return self.fits

    def end(self) -> bool:
        """Compute what waits; return whether somebody may hold something that waited."""
        self.is_open = False
        found = False
        for value in [*self.waiting.values()]:
            pending = value() if type(value) is weakref.ref else value
            if pending is not None and not (pending.released and torch.compiler.is_compiling()):  # which lets nothing die
                found = True
                pending.tensor()
        self.waiting.clear()
        return found

    def give_up(self) -> None:
        """The same after an error, which must not be followed by another one; its traceback may hold what waited."""
        self.is_open = False
        values = [*self.waiting.values()]
        self.waiting.clear()
        for value in values:
            if isinstance(value, Pending):
                with suppress(RuntimeError):
                    value.tensor()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.visits: list[Visit] = []


_thread = _Thread()


class Scope:
    """The code of a module that holds batch norms and what follows them.

    Attributes
    ----------
    places : list
        Name by name, the way from the module to a layer or to what was found to follow one, and its class.
    pairs : set of str
        Of a module whose code is that of `nn.Sequential`: names of layers whose activation comes next.
    depth, waiting : int, list of Pending
        Of calls in what torch.compile traces, which sees no other state.
    """

    def __init__(self) -> None:
        self.places: list[tuple[tuple[str, ...], type]] = []
        self.pairs: set[str] = set()
        self.depth = 0
        self.waiting: list[Pending] = []

    @property
    def is_open(self) -> bool:
        """Whether a call is traced."""
        return self.depth > 0

    def visit(self) -> Any:
        """The call that runs, or None if nothing may wait in it."""
        if torch.compiler.is_compiling():
            return self if self.depth > 0 else None
        for visit in reversed(_thread.visits):
            if visit.scope is self:
                return visit if visit.is_fit() and visit.hooks == saved_hooks() else None
        return None

    def fits(self, module: Any) -> bool:
        """Whether nothing else stands where something followed, and no hook wants to see tensors."""
        for names, kind in self.places:  # noqa: SIM110  which takes half as long as a generator
            if not _leads(module, names, kind):
                return False
        return True

    def traced(self, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        """A call that torch.compile traces."""
        if not self.fits(module):
            return forward(module, *args, **kwargs)
        _unchecked(self.begin)
        try:
            output = forward(module, *args, **kwargs)
            for pending in self.waiting:
                if not pending.released:
                    pending.tensor()
        finally:
            _unchecked(self.end)
        return settled(output)

    def begin(self) -> None:
        """Begin a call that torch.compile traces."""
        self.depth += 1

    def end(self) -> None:
        """End it."""
        self.depth -= 1
        self.waiting.clear()


def _unchecked(function: Callable[..., Any], *args: Any) -> None:
    """Note something where torch.compile traces, also in a checkpoint, out of which it lets no note pass: the call takes it back."""
    from torch._dynamo import utils  # which takes long to import

    note: Any = getattr(utils, "_disable_side_effect_safety_checks_for_current_subtracer", None)
    if note is None:
        function(*args)
    else:
        note(function, *args)


def _as_own(kind: Any, name: str) -> Callable[..., Any]:
    """A method that finds the object of its own class."""

    def method(self: Any, *args: Any) -> Any:
        derived, self.__class__ = self.__class__, kind
        try:
            return getattr(self, name)(*args)
        finally:
            self.__class__ = derived

    return method


class Scoped(Derived):
    """Modules whose code is a scope: nothing that waits leaves a call, whatever the code does."""

    @classmethod
    def members(cls, kind: Any) -> dict[str, Any]:
        """The code of the kind, in a visit."""
        line = is_line(kind)

        @functools.wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            scope: Scope | None = self.__dict__.get(SCOPE)
            if scope is None:  # somebody has made another module of the same class
                return kind.forward(self, *args, **kwargs)
            if torch.compiler.is_compiling():
                return scope.traced(self, kind.forward, args, kwargs)
            visit, visits = Visit(scope, self), _thread.visits
            visit.hooks = saved_hooks()
            depth = len(visits)
            visits.append(visit)
            try:
                output = _line(visit, *args) if line and len(args) == 1 and not kwargs else kind.forward(self, *args, **kwargs)
            except BaseException:
                visit.give_up()
                raise
            finally:
                del visits[depth:]
            return left(self, output) if visit.waiting and visit.end() else output

        # A graph that is changed writes a new forward into its class; one that is copied makes a class for the copy.
        names = ("recompile", "__deepcopy__") if issubclass(kind, fx.GraphModule) else ()
        return {"forward": forward} | {name: _as_own(kind, name) for name in names}


def is_line(kind: Any) -> bool:
    """Whether modules of a class call their parts one after the other."""
    return kind.forward is Sequential.forward and kind.__iter__ is Sequential.__iter__


def _line(visit: Any, x: Any) -> Any:
    """The code of `nn.Sequential`, but that layers are called with the activations after them."""
    modules = iter(visit.module._modules.items())
    pairs = visit.scope.pairs
    for name, module in modules:
        is_pair = name in pairs and is_ours(x) and visit.is_fit() and hasattr(module, "followed")
        after = next(modules, None) if is_pair else None
        x = module(x) if after is None else module.followed(x, after[1])
    return x


def builtin(activation: Any) -> Builtin | None:
    """What a module of torch's computes, if it is an activation that kernels know."""
    name = LAYERS.get(type(activation))
    if name == "leaky_relu":
        slope = activation.negative_slope
        return BUILTINS[name]._replace(parameter=slope) if type(slope) is float and -inf < slope < inf else None
    if name == "relu6":
        return BUILTINS[name] if (activation.min_val, activation.max_val) == (0, 6) else None
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    return BUILTINS[name] if name is not None else None


def hooks_of_others(module: Any) -> bool:
    """Whether a module has hooks of somebody else's."""
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(hook is not stay_frozen for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))


def _leads(module: Any, names: tuple[str, ...], kind: type) -> bool:
    """Whether a way leads to a module of a class, and nobody on it wants to see what waits."""
    for name in names:
        module = module._modules.get(name)
        if module is None:
            return False
        if has_hooks(module) and hooks_of_others(module):
            return False
    return (type(module) is kind or own_class(module) is kind) and "forward" not in module.__dict__


HOLDERS: Any = (Standing, dict, list, deque, tuple, set, frozenset)
SHALLOW = 8  # so deep in each other, holders are taken for such as may hold themselves


def settled(output: Any, known: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """What a module returns, with tensors for what waits no longer; `known` has what was looked at, by its id, and what became of it."""
    if isinstance(output, Pending):
        return output if output.visit.is_open else output.tensor()
    if isinstance(output, Standing):
        return output.tensor()
    if isinstance(output, Tensor | Module | type):
        return output
    known = {} if known is None else known
    # PyTorch 2.10 knows no id of what is made in a graph; what lies deep needs one, for it may hold itself.
    remembers = depth > SHALLOW or not torch.compiler.is_compiling()
    if remembers:
        if id(output) in known:
            return known[id(output)][1]
        known[id(output)] = output, output
    became = output
    if isinstance(output, dict):
        for key, value in output.items():
            if (found := settled(value, known, depth + 1)) is not value:
                output[key] = found
    elif isinstance(output, list | deque):
        for i, value in enumerate(output):
            if (found := settled(value, known, depth + 1)) is not value:
                output[i] = found
    elif isinstance(output, tuple | set | frozenset):
        made = [settled(value, known, depth + 1) for value in output]
        if any(one is not value for one, value in zip(made, output, strict=True)):
            became = type(output)(*made) if hasattr(output, "_fields") else type(output)(made)
    else:
        fields = dataclasses.fields(output) if dataclasses.is_dataclass(output) else ()
        for name in [field.name for field in fields] or [*getattr(output, "__dict__", ())]:
            value = getattr(output, name, None)
            if isinstance(value, HOLDERS) and (found := settled(value, known, depth + 1)) is not value:
                object.__setattr__(output, name, found)
    if remembers:
        known[id(output)] = output, became
    return became


def left(module: Any, output: Any) -> Any:
    """What a module returns whose call has ended; what its code has kept are tensors then, too."""
    known: dict[int, Any] = {}
    for part in module.modules():
        settled(part.__dict__, known)
    return settled(output, known)


class Input(Standing):
    """The input of a normalization, on its way through the layer's own code to the function of `torch.nn.functional` that computes it."""

    def __init__(self, x: Tensor, steps: Steps, visit: Any):
        self.x = x
        self.steps = steps
        self.visit = visit
        self.recorded = torch.is_grad_enabled()

    def tensor(self) -> Tensor:
        """The tensor."""
        if self.recorded and not torch.is_grad_enabled():
            _refuse_functions()
        return self.x

    def dim(self) -> int:
        """How many dimensions it has, which every layer asks."""
        return self.x.dim()


class _Call:
    """A normalization that waits."""

    __slots__ = "arguments", "counted", "mode", "versions"

    def __init__(self, arguments: Arguments | Parts):
        self.arguments = arguments
        self.mode = mode()
        known = () if torch.compiler.is_compiling() else arguments[:6]
        self.versions = [t._version if isinstance(t, Tensor) and not t.is_inference() else None for t in known]
        self.counted = False  # running statistics were moved

    def run(self, residual: Tensor | None, activation: Builtin) -> Tensor:
        a: Any = self.arguments
        a = a.followed(residual, activation, self.counted)
        for t, version in zip(a, self.versions, strict=False):
            if version is not None and t is not None and t._version != version:  # statistics that were moved are None
                _refuse(f"{'the input' if t is a.x else 'a parameter or a statistic'} of a normalization")
        self.counted = True
        if mode() == self.mode:
            return _run(a)
        with again(self.mode):
            return _run(a)


def _run(a: Arguments | Parts) -> Tensor:
    return a.run() if type(a) is Parts else run(a)  # type: ignore[arg-type]


def _version(x: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"{what} was changed in place before what follows it was computed; fastbn.torch.revert(model) makes it a layer of torch's again"
    )


class Pending(Standing):
    """The output of a batch norm, and perhaps of a sum."""

    def __init__(self, call: _Call, steps: Steps, visit: Any, residual: Tensor | None = None):
        self.call = call
        self.steps = steps
        self.visit = visit
        self._add(residual)
        self.value: Tensor | None = None
        self.released = False  # nobody waits for it
        if type(visit) is Visit:
            visit.waiting[id(self)] = self
        else:
            _unchecked(visit.waiting.append, self)

    def _add(self, residual: Tensor | None) -> None:
        self.residual = residual
        self.version = 0 if residual is None else _version(residual)

    def tensor(self) -> Tensor:
        """Compute it."""
        if self.value is None:
            if self.call.mode.recorded and not torch.is_grad_enabled():
                _refuse_functions()
            self._release()
            self.value = self._run(IDENTITY)
        return self.value

    def _run(self, activation: Builtin) -> Tensor:
        if self.residual is not None and _version(self.residual) != self.version:
            _refuse("what is added to a normalization")
        return self.call.run(self.residual, activation)

    def _release(self) -> None:
        """Be no longer waited for; but somebody may still hold it."""
        self.released = True
        if type(self.visit) is Visit and not torch.compiler.is_compiling():  # PyTorch 2.10 knows no class of a reference
            self.visit.waiting[id(self)] = weakref.ref(self)

    def _waits(self) -> bool:
        """Whether what comes now may be computed with it."""
        return self.value is None and mode() == self.call.mode

    def has_order_of(self, first: Any) -> bool:
        """Whether a sum that begins with another tensor has the order of memory of the normalization; it has the tensor's."""
        x = self.call.arguments.x
        if not isinstance(first, Tensor) or first.shape != x.shape or first.layout is not x.layout:
            return False
        if first.is_contiguous() and x.is_contiguous():
            return True
        return is_channels_last(first) and is_channels_last(x)

    def plus(self, other: Any, in_place: bool) -> Any:
        """The sum with a residual, or None if it must be computed apart."""
        x = self.call.arguments.x
        other = tensor_of(other)  # which may be this one, and waits no longer then
        if not (self._waits() and self.steps.sum and self.residual is None):
            return None
        if type(other) not in (Tensor, Parameter) and not (torch.compiler.is_compiling() and isinstance(other, Tensor)):
            return None
        if (other.shape, other.dtype, other.device, other.layout) != (x.shape, x.dtype, x.device, x.layout):
            return None
        if in_place:
            self._add(other)
            added = self
        else:
            added = Pending(self.call, self.steps, self.visit, other)
            self._release()
        return added if self.steps.activation else added.tensor()

    def activated(self, name: str, parameter: float, in_place: bool) -> Tensor | None:
        """What an activation makes of it, or None if it must be computed apart."""
        if not (self._waits() and self.steps.activation):
            return None
        if self.residual is not None and name not in FROM_OUTPUT:
            return None
        self._release()
        y = self._run(Builtin(name, parameter, BUILTINS[name].code))
        if in_place:
            self.value = y
        return y


def deferred(a: Arguments | Parts, steps: Steps, visit: Any) -> Any:
    """What stands for a normalization, or its output where nothing may follow."""
    return Pending(_Call(a), steps, visit) if steps.sum or steps.activation else _run(a)


def _refuse_functions() -> None:
    """Raise an error inside of an autograd.Function, which takes for a constant what is no tensor."""
    frame: Any = None if torch.compiler.is_compiling() else sys._getframe(2)
    codes = function_codes() if frame is not None else set()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    if frame is not None:
        raise RuntimeError(
            "an autograd.Function was given the input or the output of a normalization before it was computed, and would lose its "
            "gradient; fastbn.torch.revert(model) makes it a layer of torch's again"
        )
