"""A model as fastbn reads and changes it: who computes a value, who reads it, and what is constant.

a) A `Model` works on a copy. The user's own ModelProto is never written to.
b) A `Scope` is the main graph, the body of an If, Loop or Scan, or a local function. A body reads values of the scopes
   around it; such a value counts as read elsewhere, and nothing that would change it is done.
c) A constant is what no caller can change: an initializer that is no graph input, or one of IR below 4, where every
   initializer had to be an input; a Constant node; what moves or casts such a value, and its shape.
d) What cannot be done is said by `Stays`, with the reason in words for the user.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fastbn.layout import Array
from fastbn.onnx.protos import DEFAULT, Body, Key, Type, bodies, everything, function_key, names, names_read, opset, said, types

MICROSOFT = "com.microsoft"
NORMS = {  # operator -> the domains that have it
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization"), DEFAULT),
    **dict.fromkeys(("RMSNormalization", "MeanVarianceNormalization", "LpNormalization", "LRN"), DEFAULT),
    "SimplifiedLayerNormalization": DEFAULT,  # ONNX Runtime's, in ONNX' domain
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization"), (MICROSOFT,)),
    **dict.fromkeys(("GroupNorm", "SkipGroupNorm"), (MICROSOFT,)),
    "Normalizer": ("ai.onnx.ml",),
}
# What exporters leave between a constant and its reader. Not DequantizeLinear: its result would take four times the memory.
MOVES = frozenset(
    ("Cast", "CastLike", "Concat", "ConstantOfShape", "Expand", "Flatten", "Identity", "Neg", "Reshape", "Shape", "Slice", "Squeeze",
     "Transpose", "Unsqueeze")
)  # fmt: skip


class Stays(Exception):  # noqa: N818  no error: a reason
    """Why something is left as it is."""


@dataclass(eq=False)
class Node:
    """One node of a scope."""

    proto: NodeProto
    scope: Scope
    index: int
    own_name: str = ""  # the name in the model, or, where it has none, that of its output
    name: str = ""  # one that identifies it in the report
    removed: bool = False

    def __post_init__(self) -> None:
        self.own_name = self.proto.name or next(filter(None, self.proto.output), f"{self.op} {self.index}")

    @property
    def op(self) -> str:
        """Its operator; of a foreign domain, with that; a function of the model's own is none of ONNX's, whatever its name."""
        domain, name = self.proto.domain, self.proto.op_type
        if domain not in DEFAULT:
            return f"{domain}.{name}"
        return f"function {name}" if (domain, name) in self.scope.model.functions else name

    def input(self, index: int) -> str:
        """Name of an input; empty where there is none."""
        return self.proto.input[index] if index < len(self.proto.input) else ""

    def attribute(self, name: str, default: Any) -> Any:
        """Value of an attribute.

        Raises
        ------
        Stays
            If it is one of the function around it, which each call may set.
        """
        for attribute in self.proto.attribute:
            if attribute.name == name:
                if attribute.ref_attr_name:
                    raise Stays(f"{name} of {self.own_name} is an attribute of the function")
                return helper.get_attribute_value(attribute)
        return default

    def constant(self, index: int) -> Array:
        """Value of an input that is constant; else `Stays`."""
        return self.scope.constant(self.input(index))


@dataclass(eq=False)
class Scope:
    """A graph or a function: its nodes in order, and who makes and reads each value."""

    model: Model
    body: Body
    parent: Scope | None
    key: Key
    label: str
    opset: int
    nodes: list[Node] = field(default_factory=list)
    producer: dict[str, Node] = field(default_factory=dict)
    readers: dict[str, list[Node]] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)  # value -> who else reads it
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    sparse: dict[str, onnx.SparseTensorProto] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        body = self.body
        if isinstance(body, GraphProto):
            self.inputs = frozenset(value.name for value in body.input)
            self.initializers = {tensor.name: tensor for tensor in body.initializer}
            self.sparse = {tensor.values.name: tensor for tensor in body.sparse_initializer}
            returned = [value.name for value in body.output]
        else:
            self.inputs, returned = frozenset(body.input), list(body.output)
        for index, proto in enumerate(body.node):
            copy = NodeProto()
            copy.CopyFrom(proto)
            node = Node(copy, self, index)
            self.nodes.append(node)
            self.producer.update((name, node) for name in proto.output if name)
        for node in self.nodes:
            for name in filter(None, node.proto.input):
                self._read(name, node)
        for name in returned:
            self._read(name, None)
        del body.node[:]  # until `close`; a node that is in no graph can be changed and moved freely

    def _read(self, name: str, node: Node | None) -> None:
        """Note that a node reads a value, or, where it is None, that this graph returns it."""
        scope: Scope | None = self
        while scope is not None and not scope.defines(name):
            scope = scope.parent
        if node is not None:
            self.readers.setdefault(name, []).append(node)
        if scope is not None and (scope is not self or node is None):
            scope.elsewhere[name] = "the graph returns it" if scope is self else "a subgraph reads it"

    @property
    def in_function(self) -> bool:
        """Whether it is a local function, or lies in one."""
        return isinstance(self.body, FunctionProto) if self.parent is None else self.parent.in_function

    def defines(self, name: str) -> bool:
        """Whether a value is made here."""
        return name in self.producer or name in self.inputs or name in self.initializers or name in self.sparse

    def type_of(self, name: str) -> Type | None:
        """What shape inference knows of a value."""
        scope: Scope | None = self
        while scope is not None:
            if scope.defines(name):
                return scope.model.types.get((scope.key, name))
            scope = scope.parent
        return None

    def rank(self, name: str) -> int | None:
        """Number of axes of a value, where it is known."""
        known = self.type_of(name)
        return None if known is None or known.shape is None else len(known.shape)

    def is_overridable(self, name: str) -> bool:
        """Whether a value of this graph is an input: with an initializer, which is then what it is by default, from IR 4 on."""
        return name in self.inputs and self.model.proto.ir_version >= 4

    def constant(self, name: str) -> Array:
        """Value of a constant; `Stays` where it is none."""
        if not name:
            raise Stays("it lacks an input")
        if not self.defines(name):
            if self.parent is None:
                raise Stays(f"{name} is not known")
            return self.parent.constant(name)
        if name in self.initializers or name in self.sparse:
            if self.model.proto.training_info:
                raise Stays(f"the model's training_info may change {name}")
            if self.is_overridable(name):
                raise Stays(f"{name} is an input of the graph, too: a caller may override it")
            return self.model.value(self.initializers[name]) if name in self.initializers else self.model.dense(self.sparse[name])
        if name in self.inputs:
            raise Stays(f"{name} is an input of the {'graph' if isinstance(self.body, GraphProto) else 'function'}")
        return self._computed(name, self.producer[name])

    def _computed(self, name: str, node: Node) -> Array:
        if node.op == "Constant":
            return self._of_constant(name, node)
        if node.op not in MOVES:
            raise Stays(f"{name} is computed by {node.op}")
        proto = self._cast(node) if node.op == "CastLike" else node.proto
        inputs = {given: self.constant(given) for given in proto.input if given}
        wanted = [onnx.ValueInfoProto(name=name)]
        graph = helper.make_graph([proto], "constant", [onnx.ValueInfoProto(name=given) for given in inputs], wanted)
        try:
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
            results: Any = ReferenceEvaluator(model).run(None, inputs)
            return np.asarray(results[0])
        except Exception as error:  # whatever is wrong there, the node stays as it is
            raise Stays(f"{name} cannot be computed: {said(error)}") from None

    def _cast(self, node: Node) -> NodeProto:
        """The Cast that a CastLike is: its second input, which may be any value, says no more than the dtype."""
        like = self.type_of(node.input(1))
        if like is None:
            raise Stays(f"the dtype that {node.own_name} casts to is not known")
        return helper.make_node("Cast", [node.input(0)], list(node.proto.output), to=like.kind)

    def _of_constant(self, name: str, node: Node) -> Array:
        for attribute in node.proto.attribute:
            if attribute.ref_attr_name:
                break
            if attribute.name == "value":
                return self.model.value(attribute.t)
            if attribute.name == "sparse_value":
                return self.model.dense(attribute.sparse_tensor)
            if attribute.name in ("value_float", "value_floats"):
                return np.array(helper.get_attribute_value(attribute), np.float32)
            if attribute.name in ("value_int", "value_ints"):
                return np.array(helper.get_attribute_value(attribute), np.int64)
        raise Stays(f"{name} is a Constant that holds no numbers")

    def only_reader(self, name: str) -> Node:
        """The one node that reads a value; `Stays` where there are others, or none."""
        found = self.readers.get(name, [])
        if name in self.elsewhere:
            raise Stays(self.elsewhere[name])
        if len(found) != 1:
            raise Stays(f"it is read {len(found)} times")
        return found[0]

    def rewire(self, node: Node, index: int, name: str) -> None:
        """Let a node read another value."""
        old = node.input(index)
        if old:
            self.readers[old].remove(node)
        while len(node.proto.input) <= index:
            node.proto.input.append("")
        node.proto.input[index] = name
        self.readers.setdefault(name, []).append(node)

    def rename(self, node: Node, old: str, new: str) -> None:
        """Let a node write another value in place of one that nobody reads any more; it has its type."""
        node.proto.output[list(node.proto.output).index(old)] = new
        if (known := self.model.types.get((self.key, old))) is not None:
            self.model.types.setdefault((self.key, new), known)
        self.producer.pop(old, None)
        self.producer[new] = node

    def remove(self, node: Node) -> None:
        """Take a node out."""
        node.removed = True
        self.model.node_names.discard(node.proto.name)
        for name in filter(None, node.proto.input):
            self.readers[name].remove(node)
        for name in filter(None, node.proto.output):
            if self.producer.get(name) is node:
                del self.producer[name]

    def add(self, beside: Node, proto: NodeProto, after: bool = False) -> Node:
        """Put a new node in front of another one, or behind it."""
        if proto.name:
            proto.name = _other(proto.name, self.model.node_names)
        node = Node(proto, self, -1)
        self.nodes.insert(self.nodes.index(beside) + after, node)
        for name in filter(None, proto.input):
            self.readers.setdefault(name, []).append(node)
        self.producer.update((name, node) for name in proto.output if name)
        return node

    def store(self, node: Node, index: int, value: Array) -> None:
        """Give a node a constant as an input.

        The initializer that it had keeps its name where nobody else reads it, and stays as it is where somebody does.
        """
        old = node.input(index)
        own, new = self.initializers.get(old), numpy_helper.from_array(value, old)
        alike = own is not None and (own.dims, own.data_type) == (new.dims, new.data_type) and not self.is_overridable(old)
        if own is not None and alike and old not in self.elsewhere and len(self.readers[old]) == 1:
            own.CopyFrom(new)
        else:
            name = f"{old}_folded" if old else f"{node.proto.output[0]}_bias"
            self.rewire(node, index, self.new_constant(name, value, node))

    def new_constant(self, name: str, value: Array, reader: Node) -> str:
        """Add a constant, and return its name: an initializer where the scope can have one that is no input."""
        name = self.model.unused(name)
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if isinstance(self.body, GraphProto) and self.model.proto.ir_version >= 4:
            self.initializers[name] = self.body.initializer.add()
            self.initializers[name].CopyFrom(tensor)
        else:
            self.add(reader, helper.make_node("Constant", [], [name], value=tensor))
        return name

    def close(self) -> None:
        """Write the nodes back."""
        self.body.node.extend(node.proto for node in self.nodes if not node.removed)
        alive = {name for node in self.nodes if not node.removed for name in node.proto.output}
        keep = alive | self.inputs | set(self.initializers) | set(self.sparse)
        known = [info for info in self.body.value_info if info.name in keep]
        if len(known) < len(self.body.value_info):
            copies = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in known]
            del self.body.value_info[:]
            self.body.value_info.extend(copies)


class Model:
    """A copy of a model, as scopes; `close` makes it a ModelProto again."""

    def __init__(self, proto: ModelProto, folder: str = ""):
        self.folder = folder
        self.proto = ModelProto()
        self.proto.CopyFrom(proto)
        self.types = types(proto)
        self.read_before = names_read(self.proto)
        self.names = names(self.proto)
        self.node_names = {node.name for _, body in everything(self.proto) for node in body.node}
        self.functions = {(f.domain, f.name) for f in proto.functions}
        self.scopes: list[Scope] = []
        self._open(self.proto.graph, None, (), "", opset(proto.opset_import))
        for function in self.proto.functions:
            label = ".".join(filter(None, (function.domain, function.name)))
            self._open(function, None, function_key(function), label, opset(function.opset_import))
        self.norms = [node for scope in self.scopes for node in scope.nodes if self._is_norm(node)]
        self._name_norms()

    def _open(self, body: Body, parent: Scope | None, key: Key, label: str, opset: int) -> None:
        scope = Scope(self, body, parent, key, label, opset)
        self.scopes.append(scope)
        for node in scope.nodes:
            for i, (name, inner) in enumerate(bodies(node.proto)):
                place = "/".join(filter(None, (label, node.own_name, name)))
                self._open(inner, scope, (*key, node.index, i), place, opset)

    def _is_norm(self, node: Node) -> bool:
        domain, op = node.proto.domain, node.proto.op_type
        # One of a domain that the checker does not know may return nothing.
        return domain in NORMS.get(op, ()) and (domain, op) not in self.functions and bool(node.proto.output)

    def _name_norms(self) -> None:
        """Give each node a name of its own: the model's, where it has one and no other node has it."""
        taken: set[str] = set()
        given = [node.own_name if not node.scope.label else f"{node.scope.label}/{node.own_name}" for node in self.norms]
        for node, name in zip(self.norms, given, strict=True):
            if given.count(name) > 1:
                name = f"{name} -> {next(filter(None, node.proto.output), '')}"
            node.name, again = name, 2
            while node.name in taken:
                node.name, again = f"{name} #{again}", again + 1
            taken.add(node.name)

    def unused(self, name: str) -> str:
        """A name like this one that no value of the model has."""
        return _other(name, self.names)

    def value(self, tensor: TensorProto) -> Array:
        """The numbers of a tensor, from its file if they lie there."""
        try:
            return np.asarray(numpy_helper.to_array(tensor, self.folder))
        except Exception as error:  # more or fewer than its shape says; the checker does not look
            raise Stays(f"the numbers of {tensor.name} cannot be read: {said(error)}") from None

    def dense(self, tensor: onnx.SparseTensorProto) -> Array:
        """The numbers of a sparse tensor, with the zeros."""
        values, places = self.value(tensor.values), self.value(tensor.indices)
        result = np.zeros(tuple(tensor.dims), values.dtype)
        if places.ndim == 1:
            result.reshape(-1)[places] = values
        else:
            result[tuple(places.T)] = values
        return result

    def close(self) -> ModelProto:
        """The ModelProto, without the constants that nobody reads any more."""
        for scope in reversed(self.scopes):
            scope.close()
        kept = {value.name for value in self.proto.graph.input} if self.proto.ir_version >= 4 else set()  # a caller may give them
        while dropped := self.read_before - kept - names_read(self.proto):
            if not sum([_drop(body, dropped) for _, body in everything(self.proto)]):
                break
        return self.proto


def _drop(body: Body, dropped: set[str]) -> int:
    """Take constants out that are not read any more; how many."""
    constants = [node.op_type in MOVES | {"Constant"} and node.domain in DEFAULT for node in body.node]
    gone = [i for i, node in enumerate(body.node) if constants[i] and dropped.issuperset(node.output)]
    for i in reversed(gone):
        del body.node[i]
    removed = len(gone)
    if isinstance(body, GraphProto):
        held = {tensor.name for tensor in body.initializer} | {tensor.values.name for tensor in body.sparse_initializer}
        for values, name_of in ((body.initializer, _name), (body.sparse_initializer, lambda t: t.values.name), (body.input, _name)):
            # An input without a default is the caller's, whether it is read or not.
            unread = [i for i, value in enumerate(values) if name_of(value) in dropped & held]
            for i in reversed(unread):
                del values[i]
            removed += len(unread)
    return removed


def _other(name: str, taken: set[str]) -> str:
    """A name like this one that is not taken yet, and is from now on."""
    found, again = name, 2
    while found in taken:
        found, again = f"{name}_{again}", again + 1
    taken.add(found)
    return found


def _name(value: Any) -> str:
    return str(value.name)
