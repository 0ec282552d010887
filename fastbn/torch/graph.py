"""What stands before and after the batch norms of a model, as torch.fx finds it.

A model that cannot be traced as a whole is traced in pieces: its children, theirs, and so on. Nothing is called but the
model's own Python code, with stand-ins for tensors. Hooks are not called, nor the code of modules that share a model between
processes: what is in them is traced by itself.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from typing import Self

T = TypeVar("T")
AROUND = "fastbn_around"  # of a node: the call of an autograd.Function or a checkpoint in which it runs
OUTSIDE = "fastbn_outside"  # and how many calls of modules, the model's apart, are around that
STEPS = "_fastbn_steps"  # of a converted layer: what is expected to follow
OF_ROWS = (nn.LayerNorm, nn.RMSNorm)
NORMS = (_NormBase, nn.GroupNorm, *OF_ROWS)
PLAIN = {str, int, float, bool, bytes, type(None)}  # hold nothing
PARALLEL = ("torch.nn.parallel.", "torch.distributed.fsdp.")  # packages whose modules' own code works with other processes
# Further arguments, of which there are none by default: how torch.fx marks their names, and what they are.
OTHERS: dict[Any, tuple[str, type]] = {inspect.Parameter.VAR_POSITIONAL: ("*", tuple), inspect.Parameter.VAR_KEYWORD: ("**", dict)}
# What normalizations are called in graphs, without their namespaces.
CALLS = {
    "batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm", "native_batch_norm", "native_layer_norm", "native_group_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "batch_norm_with_update",
    "batch_norm_with_update_functional", "_fused_rms_norm",
}  # fmt: skip


def check(model: object) -> None:
    """Check that something is a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_called(model: nn.Module, name: str = "") -> None:
    """Check that no layer of a model, or of a part of this name, waits for its first call to learn its sizes."""
    for path, layer in model.named_modules(prefix=name):
        if any(nn.parameter.is_lazy(t) for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))):
            raise ValueError(f"model must have been called once, but {path or 'it'} is a {type(layer).__name__} that never was")


def copied(model: nn.Module) -> Any:
    """A deep copy of a model.

    torch refuses to copy tensors that belong to a graph: those that a hook computes anew for each call, of pruned layers or
    under weight_norm, and outputs that the model's code keeps. The copy has their values.
    """
    held = (item for value in _held(model) for item in _contents(value))
    memo = {id(t): t.detach().clone() for t in held if isinstance(t, torch.Tensor) and not t.is_leaf}
    return copy.deepcopy(model, memo)


class Place(NamedTuple):
    """Where a normalization layer stands.

    Attributes
    ----------
    calls : int
        How often it is called; 0 where nobody knows, because what calls it cannot be traced.
    before, after : str
        Path of the module before and after it, empty where that is no module or not the only one.
    apart : bool
        Whether nothing else reads what the module before it returns.
    before_is, after_is : str
        What they are called: a class, a function, "several", or "the input" and "the output", "of" a part that was traced by itself.
    """

    calls: int = 0
    before: str = ""
    after: str = ""
    apart: bool = False
    before_is: str = "unknown"
    after_is: str = "unknown"


class Graph(NamedTuple):
    """What was found in the pieces of a model.

    Attributes
    ----------
    places : dict of str to Place
        Of the normalization layers, by path.
    calls : dict of str to int
        How often each module is called.
    read : set of str
        Paths of the tensors that the model's code reads itself.
    """

    places: dict[str, Place]
    calls: dict[str, int]
    read: set[str]

    def reads(self, path: str) -> bool:
        """Whether the model's code reads tensors of a module."""
        return any(tensor.startswith(f"{path}.") for tensor in self.read)


class Piece(NamedTuple):
    """A piece of a model that torch.fx can trace.

    Attributes
    ----------
    module : Module
    prefix : str
        What stands before the names of its modules.
    nodes : list of Node
        In the order in which they run.
    stored : set of Node
        Those whose output the model's code keeps in a module.
    read : set of str
        Names of the tensors that the model's code reads and that are in no node.
    """

    module: nn.Module
    prefix: str
    nodes: list[fx.Node]
    stored: set[fx.Node]
    read: set[str]

    def edge(self, which: str) -> str:
        """What its "input" or "output" is called: that of a part of the model is not the model's."""
        return f"the {which} of {self.prefix[:-1]}" if self.prefix else f"the {which}"


class _Reads(TorchFunctionMode):
    """Notes the tensors of a model that are computed with while its code is traced: those of `parameters()` are no stand-ins."""

    NO_VALUES = (torch.dtype, torch.device, torch.layout, torch.Size, bool, int, type(None))  # what says nothing of a tensor's values

    def __init__(self, module: nn.Module):
        super().__init__()
        self.names = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, self.NO_VALUES):
            self.found.update(self.names[id(a)] for a in tree_leaves((args, kwargs)) if id(a) in self.names)
        return result


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else an operation in place would be done

    def __init__(self) -> None:
        super().__init__()
        self.codes = function_codes()
        self.asked = False  # the model's code has asked whether a stand-in is a tensor

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = node.meta[AROUND] = in_function(sys._getframe(1), self.codes)
        node.meta[OUTSIDE] = _calls_of_modules(frame)
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NORMS) or has_hooks(m) or _is_parallel(m) or super().is_leaf_module(m, module_qualified_name)


class _Asking:
    """While code is traced: notes who asks whether a stand-in is a tensor. It is told no, and might do something else with a tensor."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.usual = threading.Lock(), 0, builtins.isinstance

    def __enter__(self) -> None:
        with self.lock:
            if not self.blocks:
                self.usual = builtins.isinstance
                vars(builtins)["isinstance"] = self.isinstance
            self.blocks += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.blocks -= 1
            if not self.blocks:
                vars(builtins)["isinstance"] = self.usual

    def isinstance(self, value: Any, kind: Any) -> bool:
        """What it is always; torch's own code and ours may ask what they want to."""
        answer = self.usual(value, kind)
        if not answer and issubclass(type(value), fx.Proxy) and type(value.tracer) is _Tracer:
            frame: Any = sys._getframe(1)
            frame = frame.f_back if frame.f_code is torch.is_tensor.__code__ else frame
            place = str(frame.f_globals.get("__name__"))
            with suppress(TypeError):  # of kinds that only objects can be of
                value.tracer.asked |= not place.startswith(("torch.", "fastbn.")) and issubclass(torch.Tensor, kind)
        return answer


_asking = _Asking()


def has_hooks(module: Any) -> bool:
    """Whether a module has hooks."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"])


def _is_parallel(module: nn.Module) -> bool:
    """Whether a module's code works with other processes, or gathers parameters, which must not happen for stand-ins."""
    return any("forward" in vars(kind) and kind.__module__.startswith(PARALLEL) for kind in type(module).__mro__)


def in_function(frame: Any, codes: set[Any]) -> Any:
    """The innermost frame of an autograd.Function or a checkpoint, from a frame on outwards; None if there is none."""
    while frame is not None and frame.f_code not in codes and frame.f_globals is not vars(checkpoint):
        frame = frame.f_back
    return frame


def _calls_of_modules(frame: Any) -> int:
    count = 0
    while frame is not None:
        count += frame.f_code is fx.Tracer.call_module.__code__
        frame = frame.f_back
    return count


def function_codes() -> set[Any]:
    """The code of every autograd.Function."""
    found, classes = set(), [torch.autograd.Function]
    while classes:
        kind = classes.pop()
        classes += kind.__subclasses__()
        found.add(getattr(kind.forward, "__code__", None))
    return found


def _held(model: nn.Module) -> Iterator[Any]:
    """Lists, dictionaries and sets that modules hold, in one another, too, and in plain objects, of which none holds another one."""
    seen: dict[int, Any] = {}
    todo: list[Any] = [module.__dict__ for module in model.modules()]
    while todo:
        value = todo.pop()
        if id(value) in seen or callable(value) or isinstance(value, torch.Tensor | fx.Proxy | ModuleType):
            continue
        seen[id(value)] = value
        if isinstance(value, dict | list | set | tuple):
            todo += [inner for inner in ([*value.values()] if isinstance(value, dict) else value) if type(inner) not in PLAIN]
        elif type(value := getattr(value, "__dict__", None)) is dict:
            todo += [inner for inner in [*value.values()] if isinstance(inner, dict | list | set | tuple)]
        if isinstance(value, dict | list | set):
            yield value


def _contents(value: Any) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else [*value]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Undo what the model's code does to what its modules hold, and to random numbers."""
    before = [(value, _contents(value)) for value in _held(model)]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  which old code draws from
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for value, contents in before:
            if [*map(id, _contents(value))] == [*map(id, contents)]:
                continue  # another thread may read it
            value.clear()
            half = len(contents) // 2
            if isinstance(value, dict):
                value.update(zip(contents[:half], contents[half:], strict=True))
            else:
                (value.extend if isinstance(value, list) else value.update)(contents)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Let the model's code find itself in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _stored(model: nn.Module) -> set[fx.Node]:
    """Nodes whose output a module holds after tracing."""
    return {item.node for value in _held(model) for item in _contents(value) if isinstance(item, fx.Proxy)}


def traced(piece: nn.Module, prefix: str = "", *, defaults: bool = False) -> Piece | None:
    """The graph of a module, or None if it cannot be traced.

    Parameters
    ----------
    piece : Module
    prefix : str
        What stands before the names of its modules.
    defaults : bool
        Where it cannot be traced, try again with what optional arguments are by default, and no further ones.
    """
    if "forward" in piece.__dict__ or _is_parallel(piece):  # of the former torch.fx would trace that of its class
        return None
    optional = {}
    if defaults:
        for p in inspect.signature(piece.forward).parameters.values():
            if p.kind in OTHERS:
                marks, nothing = OTHERS[p.kind]
                optional[marks + p.name] = nothing()
            elif p.default is not p.empty:
                optional[p.name] = p.default
    for concrete in [None, optional] if optional else [None]:
        tracer = _Tracer()
        with _untouched(piece), _asking, _Reads(piece) as reads:
            try:
                nodes = list(tracer.trace(piece, concrete).nodes)
            except Exception:  # noqa: S112  the model's own code, which was not written for stand-ins, may raise anything
                continue
            if tracer.asked:
                continue
            return Piece(piece, prefix, nodes, _stored(piece), reads.found)
    return None


def pieces(model: nn.Module, prefix: str = "", *, defaults: bool = False) -> Iterator[Piece]:
    """The largest pieces of a model that can be traced and have normalization layers; one for each call."""
    if not any(True for _ in all_norms(model)) or isinstance(model, NORMS):
        return
    piece = traced(model, prefix, defaults=defaults)
    if piece is not None:
        yield piece
        within = [(str(node.target), model.get_submodule(str(node.target))) for node in piece.nodes if node.op == "call_module"]
    else:
        within = [*model.named_children()]
    for name, child in within:
        yield from pieces(child, f"{prefix}{name}.", defaults=defaults)


def norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every batch norm and instance norm with its path."""
    for path, layer in model.named_modules():
        if isinstance(layer, _NormBase):
            yield path, layer


def all_norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every normalization layer with its path: layer norm, group norm and root mean squares, too."""
    for path, layer in model.named_modules():
        if isinstance(layer, NORMS):
            yield path, layer


def size(layer: Any) -> int:
    """How many channels a normalization layer has."""
    if isinstance(layer, OF_ROWS):
        return prod(layer.normalized_shape)
    return int(layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features)


def unseen(model: nn.Module) -> dict[str, str]:
    """Parts of a model with normalizations that are no layers, by path: what they are."""
    found: dict[str, str] = {}
    jit: Any = torch.jit  # it has no types
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            names = [str(getattr(node.target, "__name__", "")) for node in module.graph.nodes if node.op == "call_function"]
            count, where = sum(name.partition(".")[0] in CALLS for name in names), "a graph"
        elif isinstance(module, jit.ScriptModule) and not any(_is_in(outer, path) for outer in found):
            graph: Any = getattr(module, "inlined_graph", None)
            if graph is None:  # nothing calls it
                continue
            count, where = sum(len(graph.findAllNodes(f"aten::{name}")) for name in CALLS), "what torch.jit compiled"
        else:
            continue
        if count:
            found[path] = f"calls of normalizations that are no layers, in {where}: {count}"
    return found


def _is_in(outer: str, path: str) -> bool:
    return not outer or path.startswith(f"{outer}.")


class Listed(tuple[T, ...]):
    """Layers of a model, in its order.

    Attributes
    ----------
    unseen : dict of str to str
        Parts of the model whose normalizations are no layers, by path: what they are.
    """

    unseen: dict[str, str]

    def __new__(cls, layers: Iterable[T], unseen: dict[str, str] | None = None) -> Self:
        """Of layers, and what is none."""
        made = super().__new__(cls, layers)
        made.unseen = dict(unseen or {})
        return made

    def of(self, lines: list[str]) -> str:
        """Lines about layers, if there are any, and one for each part that has others."""
        others = [f"{path or 'the model'}: {what}" for path, what in self.unseen.items()]
        return "\n".join([*(lines if self else ["the model has no normalization layers"]), *others])


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether a layer is batch norm, and not instance norm."""
    return isinstance(layer, _BatchNorm)


def trace(model: nn.Module) -> Graph:
    """Find the place of every normalization layer."""
    whole = Graph({}, {}, set())
    if isinstance(model, NORMS):
        whole.places[""] = Place(1, before_is="the input", after_is="the output")
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    for piece in pieces(model):
        _read(piece, whole, names)
    return Graph({path: whole.places.get(path, Place()) for path, _ in all_norms(model)}, whole.calls, whole.read)


def _read(piece: Piece, whole: Graph, names: dict[int, list[str]]) -> None:
    whole.read.update(piece.prefix + name for name in piece.read)
    for node in piece.nodes:
        if node.op == "call_module":
            path = piece.prefix + str(node.target)
            others = names[id(piece.module.get_submodule(str(node.target)))]
            # By a name outside of the piece, which could not be traced, it may be called, too.
            whole.calls[path] = whole.calls.get(path, 0) + 1 + (not all(name.startswith(piece.prefix) for name in others))
        elif node.op == "get_attr":
            whole.read.add(piece.prefix + str(node.target))
    for node in piece.nodes:
        if node.op == "call_module" and isinstance(piece.module.get_submodule(str(node.target)), NORMS):
            path = piece.prefix + str(node.target)
            whole.places[path] = _place(piece, node, whole.calls[path])


def _place(piece: Piece, node: fx.Node, calls: int) -> Place:
    sources, users = node.all_input_nodes, list(node.users)
    before, before_is = _one(piece, sources, "input")
    after, after_is = _one(piece, users, "output")
    apart = len(sources) == 1 and len(sources[0].users) == 1
    return Place(calls, before, after, apart, before_is, after_is)


def _one(piece: Piece, nodes: list[fx.Node], edge: str) -> tuple[str, str]:
    """Path and name of what one node calls."""
    if len(nodes) != 1:
        return "", "several" if nodes else "nothing"
    (node,) = nodes
    if node.op == "call_module":
        return piece.prefix + str(node.target), type(piece.module.get_submodule(str(node.target))).__name__
    if node.op in {"placeholder", "output"}:
        return "", piece.edge(edge)
    return "", str(getattr(node.target, "__name__", node.target))


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    """A dtype's name without its module's."""
    return str(dtype).removeprefix("torch.")
