"""What follows each batch norm of a model, and which of it can be computed with the layer.

Of torch.fx's graphs: the sum and the activation that alone read what a layer returns, with nothing between that could tell; and
whether anybody may change the output in place, so that the input could not be had from it.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from fastbn.torch.deferred import LAYERS as ACTIVATIONS
from fastbn.torch.deferred import Steps
from fastbn.torch.derived import is_overlaid
from fastbn.torch.folding import LAYERS, changed
from fastbn.torch.graph import AROUND, OUTSIDE, Piece, has_hooks, pieces, traced
from fastbn.torch.parts import CALLS
from fastbn.torch.parts import LAYERS as OF_PARTS
from fastbn.torch.sync import computes

F = torch.nn.functional
PARTS: Any = tuple(OF_PARTS)
KINDS = (_NormBase, *PARTS)
FORWARDS = (_BatchNorm.forward, _InstanceNorm.forward, *(kind.forward for kind in PARTS))  # torch's own
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
FUNCTIONS = {
    F.relu, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.hardswish, F.silu, F.gelu, F.sigmoid, torch.sigmoid,
    torch.sigmoid_, F.tanh, torch.tanh, torch.tanh_, "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_",
}  # fmt: skip
MASKED = {nn.ReLU, nn.ReLU6, nn.LeakyReLU, F.relu, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, "relu", "relu_"}
# Those that torch.overrides does not list: what waits is no argument for them where torch.compile traces. To torch.fx F.sigmoid is
# the method.
UNLISTED = {nn.Hardswish, F.hardswish, F.sigmoid, "sigmoid", F.tanh, "tanh", F.leaky_relu_, torch.relu_, torch.sigmoid_, torch.tanh_}
LEAKY = {nn.LeakyReLU, F.leaky_relu, F.leaky_relu_}
INPUT_KEPT = {nn.ReLU6, nn.LeakyReLU, F.relu6, F.leaky_relu}  # by torch, and after a sum the output by fastbn
# What torch.fx calls them: it sees `a += b` as `a + b`.
INPLACE = {name for i_name in dir(operator) if f"__{i_name}__" in dir(operator) for name in (i_name, i_name[1:]) if i_name[0] == "i"}
# Return nobody else's memory.
FRESH = {F.conv1d, F.conv2d, F.conv3d, F.linear, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
KNOWN = {"torch", "_operator", "operator", "builtins", "math"}  # modules whose functions change nothing but by their names
FRESH_TOO = {
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.concat,
    torch.stack, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
}  # fmt: skip
FRESH_LAYERS = (
    *KINDS, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip


class Plan(NamedTuple):
    """What follows a layer."""

    steps: Steps = Steps()
    names: tuple[str, ...] = ()
    why: str = ""
    fits_outside: bool = False  # the layer's own code does nothing after it
    steady: bool = False  # the input can be had from the output, which nobody changes in place
    within: nn.Module | None = None  # whose code holds it and what follows
    places: tuple[tuple[tuple[str, ...], type], ...] = ()  # of both: the way from there, and the class


NOBODY = Plan(why="what calls it cannot be traced")


def refuses(layer: Any) -> tuple[str, Plan]:
    """Why a layer cannot be converted, or nothing; and what its own code does with what it has normalized."""
    if is_overlaid(layer):
        return f"{type(layer).__name__} was derived from the class of a converted layer", NOBODY
    if not isinstance(layer, _BatchNorm):
        if not isinstance(layer, PARTS) and type(layer).forward is not _InstanceNorm.forward:
            return f"the code of {type(layer).__name__} is not understood", NOBODY
        if isinstance(layer, _InstanceNorm) and (layer.running_mean is not None or layer.running_var is not None):
            return "it has running statistics", NOBODY
    if isinstance(layer, nn.SyncBatchNorm):
        return "it is synchronized", NOBODY
    if any(nn.parameter.is_lazy(t) for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))):
        return "it was never called", NOBODY
    if why := changed(layer):
        return f"it {why}", NOBODY
    if type(layer).forward in FORWARDS:
        return "", Plan(steps=Steps(plain=not computes(layer)), fits_outside=True)
    piece, functions = traced(layer), {F.batch_norm} if isinstance(layer, _BatchNorm) else CALLS
    inside = [node for node in piece.nodes if node.target in functions] if piece else []
    if piece is None or len(inside) != 1 or _input(inside[0]) is not piece.nodes[0]:  # the layer's own first argument
        return f"the code of {type(layer).__name__} is not understood", NOBODY
    if any(node.meta[AROUND] is not None for node in piece.nodes[0].users):
        return "its own code gives its input to an autograd.Function or a checkpoint", NOBODY
    plan = _follow(piece, inside[0], set(), sums=isinstance(layer, _BatchNorm))
    return "", plan._replace(steps=plan.steps._replace(outside=False), fits_outside=plan.why == _OUTPUT)


def plans(model: nn.Module) -> dict[int, Plan]:
    """What follows each layer that traced code calls, by the layer's id."""
    found: dict[int, Plan] = {}
    calls: Counter[int] = Counter()
    for piece in pieces(model, defaults=True):
        taken: set[fx.Node] = set()
        for node in piece.nodes:
            layer = _module(piece, node)
            if isinstance(layer, KINDS):
                calls[id(layer)] += 1
                found[id(layer)] = _follow(piece, node, taken, sums=isinstance(layer, _BatchNorm))
    return {key: plan if calls[key] == 1 else Plan(why="it is called several times") for key, plan in found.items()}


def _module(piece: Piece, node: fx.Node) -> nn.Module | None:
    return piece.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _is_sum(node: fx.Node, one: fx.Node) -> bool:
    """Whether a node adds another tensor to the output of one."""
    if node.op not in {"call_function", "call_method"} or node.target not in SUMS or node.kwargs or len(node.args) != 2:
        return False
    in_place = node.target in (operator.iadd, "add_")
    other = node.args[1] if node.args[0] is one else node.args[0]
    return isinstance(other, fx.Node) and other is not one and (node.args[0] is one or not in_place)


def _activation(piece: Piece, node: fx.Node) -> Any:
    """Class or function of a node that is an activation, or None."""
    layer = _module(piece, node)
    if layer is not None:
        return type(layer) if type(layer) in ACTIVATIONS and "forward" not in layer.__dict__ else None
    return node.target if node.op in {"call_function", "call_method"} and node.target in FUNCTIONS else None


def _name(piece: Piece, node: fx.Node) -> str:
    layer = _module(piece, node)
    return type(layer).__name__ if layer is not None else str(getattr(node.target, "__name__", node.target))


def _passes(piece: Piece, node: fx.Node) -> bool:
    """Whether a node returns what it was given."""
    layer = _module(piece, node)
    return type(layer) is nn.Identity and not changed(layer)


def _at_once(piece: Piece, first: fx.Node, last: fx.Node) -> bool:
    """Whether nothing is computed between two nodes."""
    between = piece.nodes[piece.nodes.index(first) + 1 : piece.nodes.index(last)]
    return all(node.op == "get_attr" or _passes(piece, node) for node in between)


def _is_read(piece: Piece, first: fx.Node, last: fx.Node) -> bool:
    """Whether tensors of a layer are read after its call, up to a node."""
    between = piece.nodes[piece.nodes.index(first) + 1 : piece.nodes.index(last) + 1]
    sources = (source for node in between for source in (node, *node.all_input_nodes))
    read = {str(source.target).rpartition(".")[0] for source in sources if source.op == "get_attr"}
    layer = _module(piece, first)
    return any(piece.module.get_submodule(path) is layer for path in read)


def _is_kept(piece: Piece, node: Any) -> bool:
    """Whether nobody else can change in place what a node returns to its only reader."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    return type(_module(piece, node)) in LAYERS or (node.op == "call_function" and node.target in FRESH)


def _hooked(piece: Piece, first: fx.Node, last: fx.Node) -> str:
    """Why a module between two nodes wants to see a tensor, or nothing."""
    stacks = [dict(node.meta.get("nn_module_stack", {})) for node in (first, last)]
    paths = [{str(value[0]) for value in stack.values()} for stack in stacks]
    for path in sorted(paths[0] ^ paths[1]):
        if why := changed(piece.module.get_submodule(path)):
            return f"{path} {why}"
    return ""


def _callers(piece: Piece, node: fx.Node) -> list[str]:
    """Paths of the modules in whose code a node is, from the outermost on."""
    paths = [str(value[0]) for value in node.meta.get("nn_module_stack", {}).values()]
    return paths[:-1] if _module(piece, node) is not None else paths


def _shared(callers: list[list[str]]) -> int:
    """How many of the callers, from the outermost on, nodes have in common."""
    first, *others = callers
    shared = 0
    while shared < len(first) and all(first[: shared + 1] == other[: shared + 1] for other in others):
        shared += 1
    return shared


def _is_repeated(piece: Piece, nodes: list[fx.Node]) -> bool:
    """Whether nodes are in a checkpoint, which runs them again, but not the call of the module in whose code they are."""
    return nodes[0].meta[AROUND] is not None and _shared([_callers(piece, node) for node in nodes]) <= nodes[0].meta[OUTSIDE]


def _within(piece: Piece, nodes: list[fx.Node]) -> dict[str, Any]:
    """The innermost module in whose code nodes are, and the ways from there to those that are modules; nothing if there is none."""
    first, *others = (_callers(piece, node) for node in nodes)
    shared = _shared([first, *others])
    module = piece.module.get_submodule(first[shared - 1] if shared else "")
    names = {id(layer): name for name, layer in module.named_modules()}
    paths = [path for callers in (first, *others) for path in callers[shared:]]
    layers = [piece.module.get_submodule(path) for path in paths] + [layer for node in nodes if (layer := _module(piece, node)) is not None]
    if any(id(layer) not in names for layer in layers):
        return {}
    return {"within": module, "places": tuple({(tuple(names[id(layer)].split(".")), type(layer)): None for layer in layers})}


_OUTPUT = "the model's output follows"


def _beyond(piece: Piece) -> str:
    """Why nothing follows where a piece ends."""
    if not piece.prefix:
        return _OUTPUT
    return f"{piece.prefix[:-1]} has hooks" if has_hooks(piece.module) else f"{piece.edge('output')} follows"


def _follow(piece: Piece, start: fx.Node, taken: set[fx.Node], *, sums: bool = True) -> Plan:
    """What follows a node, and can be computed with it."""
    names: list[str] = []
    steps = Steps(outside=True)
    passed, read = [start], 1
    node, why = start, ""
    while not steps.activation:
        if node in piece.stored:
            why = "the model's code keeps what it returns"
            break
        if len(node.users) != 1:
            why = f"what it returns is read {len(node.users)} times"
            break
        (user,) = node.users
        if _passes(piece, user):
            node = user
            passed.append(user)
            continue
        kind = _activation(piece, user)
        is_sum = sums and _is_sum(user, node) and not steps.sum
        if user.op == "output":
            why = _beyond(piece)
        elif not is_sum and (kind is None or (steps.sum and kind not in MASKED)):
            why = f"{_name(piece, user)} follows"
        elif steps.sum and kind in INPUT_KEPT and any(_is_in_place(piece, reader, user, set()) for reader in user.users):
            why = "what it returns is changed in place"
        elif user in taken:
            why = "the other side of the sum is fused"
        elif user.meta[AROUND] is not start.meta[AROUND]:
            why = "an autograd.Function or a checkpoint is between"
        elif not _at_once(piece, node if steps.sum else start, user) and (steps.sum or not _is_kept(piece, _input(start))):
            why = "its input may change before what follows is computed"
        elif _is_read(piece, start, user):
            why = "its tensors are read before what follows is computed"
        else:
            why = _hooked(piece, start, user)
        if why:
            break
        steps = steps._replace(sum=True) if is_sum else steps._replace(activation=True, compiles=kind not in UNLISTED)
        names.append("add" if is_sum else _name(piece, user))
        passed.append(user)
        read = len(passed)
        node = user
        if is_sum:
            taken.add(user)
    inverts = not names or (names == [_name(piece, node)] and _activation(piece, node) in LEAKY)
    steady = inverts and node not in piece.stored and not _is_changed(piece, node)
    place = _within(piece, passed[:read] if names else passed)
    if names and _is_repeated(piece, passed[:read]):
        return Plan(why="a checkpoint runs it again outside of its module's call")
    if names and not place:
        return Plan(why="a module of somebody else follows")
    return Plan(steps, tuple(names), "" if names else why, steady=steady, **place)


def _is_changed(piece: Piece, node: fx.Node) -> bool:
    """Whether what a node returns may be changed in place by somebody, who may have it from another one."""
    found, todo = {node}, [node]
    while todo:
        one = todo.pop()
        if any(_changes(piece, user, one) for user in one.users):
            return True
        sharing = [user for user in one.users if user not in found and _shares(piece, user)]
        found.update(sharing)
        todo += sharing
    return False


def _changes(piece: Piece, node: fx.Node, one: fx.Node) -> bool:
    """Whether a node may change in place what another one returns: also one whose code is not known."""
    if node.op == "output":
        return piece.prefix != ""  # there is a caller who could not be traced
    if node.op == "call_function" and str(getattr(node.target, "__module__", None) or "torch").partition(".")[0] not in KNOWN:
        return True
    return _is_in_place(piece, node, one, INPLACE if node.op == "call_function" else set())


def _is_in_place(piece: Piece, node: fx.Node, one: fx.Node, names: set[str]) -> bool:
    """Whether a node changes in place what another one returns: by an option, the end of its name, or one of some names."""
    layer: Any = _module(piece, node)
    if layer is not None:
        return bool(getattr(layer, "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") or name in names or node.kwargs.get("inplace", False)
    return bool(in_place) and (one in node.args[:1] or one in node.kwargs.values())


def _shares(piece: Piece, node: fx.Node) -> bool:
    """Whether a node may return memory that it was given: all but those that are known not to."""
    layer = _module(piece, node)
    if layer is not None:
        return type(layer) not in LAYERS and not isinstance(layer, FRESH_LAYERS) and type(layer) not in ACTIVATIONS
    return node.target not in FRESH | FRESH_TOO and node.target not in FUNCTIONS
