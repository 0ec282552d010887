"""Batch norms of inference, folded into the constants of what stands beside them.

a) A batch norm whose parameters are constants is ``y = x * scale + shift`` for each channel, both computed in float64.
b) What can take it stands in `takers`. Between them there may be an Identity, and behind what stands before it the Add of
   a constant, which is how a MatMul gets a bias.
c) Nobody else may read a value that changes: no second node, no subgraph, no caller.
d) Nothing is written before all that can fail has succeeded.
e) The loop goes on until nothing folds any more, so that chains fold from whichever end can.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, helper

from fastbn import checks
from fastbn.layout import Array
from fastbn.onnx.frozen import frozen
from fastbn.onnx.graph import Model, Node, Stays
from fastbn.onnx.protos import load, load_external, said
from fastbn.onnx.takers import AFTER, BEFORE, Change, Write, shaped, stored, weights

INNER = "its statistics are those of the input"


class Outcome(NamedTuple):
    """What became of a normalization node.

    Attributes
    ----------
    into : str
        The node that took it, or nothing.
    why : str
        Why none did, or nothing.
    done : bool
        Whether there was nothing to do: it changes nothing.
    """

    into: str = ""
    why: str = ""
    done: bool = False


def _constant_side(node: Node) -> int | None:
    """Which input of a sum is a constant."""
    for side in (1, 0):
        try:
            node.constant(side)
        except Stays:
            continue
        return side
    return None


def _apply(change: Change) -> None:
    for node, place, value in change.writes:
        node.scope.store(node, place, value)
        if change.beta and place == 2:
            kept = [attribute for attribute in node.proto.attribute if attribute.name != "beta"]
            del node.proto.attribute[:]
            node.proto.attribute.extend(kept)


def _into_before(node: Node, scale: Array, shift: Array) -> str:
    """Fold a batch norm into what stands before it; its name, or nothing where there is nothing that could take it."""
    scope, value = node.scope, node.input(0)
    between = [value]
    addition: tuple[Node, int] | None = None
    while (maker := scope.producer.get(value)) is not None:
        side = _constant_side(maker) if maker.op == "Add" and addition is None else None
        if maker.op == "Identity":
            value = maker.input(0)
        elif side is not None:
            addition = maker, side
            value = maker.input(1 - side)
        else:
            break
        between.append(value)
    if maker is None or maker.op not in BEFORE or maker.proto.output[0] != value:
        return ""
    try:
        for link in between:
            scope.only_reader(link)
    except Stays as reason:
        raise Stays(f"what {maker.own_name} before it returns cannot change: {reason}") from None
    if addition is None:
        change = BEFORE[maker.op](maker, scale, shift)
    else:
        change = BEFORE[maker.op](maker, scale, np.zeros_like(shift))
        change.writes.append(Write(*addition, _sum_with(addition, node, scale, shift)))
    _apply(change)
    last = scope.producer[node.input(0)]
    if change.add is None:
        scope.remove(node)
        scope.rename(last, node.input(0), node.proto.output[0])
    else:
        proto = _add_of(node, node.input(0), change.add, node.proto.output[0])
        scope.remove(node)
        scope.add(node, proto)
    return maker.own_name


def _sum_with(addition: tuple[Node, int], node: Node, scale: Array, shift: Array) -> Array:
    """What becomes of a constant that is added between a linear operator and a batch norm."""
    value, wide = weights(*addition)
    rank = node.scope.rank(addition[0].input(1 - addition[1]))  # the sum has more where the constant has more
    if rank is None or wide.ndim > rank:
        raise Stays(f"how {addition[0].own_name} before it broadcasts is not known")
    return stored(wide * shaped(scale, 1, rank) + shaped(shift, 1, rank), value.dtype)


def _into_after(node: Node, scale: Array, shift: Array) -> str:
    """Fold a batch norm into what stands after it; its name, or nothing where there is nothing that could take it."""
    scope, value = node.scope, node.proto.output[0]
    between = [value]
    while readers := scope.readers.get(value):
        reader = readers[0]
        if reader.op != "Identity":
            break
        value = reader.proto.output[0]
        between.append(value)
    else:
        return ""
    if reader.op not in AFTER:
        return ""
    try:
        for link in between:
            scope.only_reader(link)
    except Stays as reason:
        raise Stays(f"{reader.own_name} after it cannot take it: {reason}") from None
    change = AFTER[reader.op](reader, list(reader.proto.input).index(value), scale, shift)
    added = None if change.add is None else _addition_after(reader, change.add)
    _apply(change)
    if added is not None:
        _apply(Change([added]))
    elif change.add is not None:
        _add_after(reader, change.add)
    first = scope.readers[node.proto.output[0]][0]
    scope.rewire(first, list(first.proto.input).index(node.proto.output[0]), node.input(0))
    scope.remove(node)
    return reader.own_name


def _addition_after(node: Node, value: Array) -> Write | None:
    """What becomes of a constant that is added to what a node returns anyway."""
    try:
        reader = node.scope.only_reader(node.proto.output[0])
    except Stays:
        return None
    side = _constant_side(reader) if reader.op == "Add" else None
    if side is None:
        return None
    old, wide = weights(reader, side)
    return Write(reader, side, stored(wide + value, old.dtype))


def _add_after(node: Node, value: Array) -> None:
    """Add a constant to what a node returns."""
    scope, output = node.scope, node.proto.output[0]
    product = scope.model.unused(f"{output}_product")
    scope.rename(node, output, product)
    scope.add(node, _add_of(node, product, value, output), after=True)


def _add_of(node: Node, read: str, value: Array, output: str) -> NodeProto:
    """The Add of a constant, which is to stand beside a node."""
    constant = node.scope.new_constant(f"{output}_shift", value, node)
    return helper.make_node("Add", [read, constant], [output], name=f"{node.proto.name}_shift" if node.proto.name else "")


def _leave_out(node: Node) -> None:
    """Take out a node that changes nothing."""
    scope, output = node.scope, node.proto.output[0]
    if output in scope.elsewhere:  # the value must be there under this name
        proto = helper.make_node("Identity", [node.input(0)], [output], name=node.proto.name)
        scope.remove(node)
        scope.add(node, proto)
        return
    for reader in list(scope.readers.get(output, [])):
        scope.rewire(reader, list(reader.proto.input).index(output), node.input(0))
    scope.remove(node)


@np.errstate(all="ignore")  # numbers that are not finite fit nothing, which `stored` says
def _fold_one(node: Node) -> Outcome:
    if node.op != "BatchNormalization":
        return Outcome(why=INNER)
    reasons = []
    try:
        known = frozen(node)
        scale, shift = known.affine()
        given = node.scope.type_of(node.input(0))
        if known.changes_nothing(given.dtype if given is not None else np.dtype(np.float64)):
            _leave_out(node)
            return Outcome(done=True)
    except Stays as reason:
        return Outcome(why=str(reason))
    for way in (_into_before, _into_after):
        try:
            if into := way(node, scale, shift):
                return Outcome(into)
        except Stays as reason:  # noqa: PERF203  two ways
            reasons.append(str(reason))
        except ValueError as error:  # of NumPy's, before anything was written: what onnx.checker lets through need not run
            reasons.append(f"constants beside it do not fit each other: {said(error)}")
    return Outcome(why="; ".join(reasons) or f"it stands between {before(node)} and {after(node)}")


def before(node: Node) -> str:
    """What feeds a node: an operator, or where else the value is from."""
    value, scope = node.input(0), node.scope
    while not scope.defines(value) and scope.parent is not None:
        scope = scope.parent
    if value in scope.producer:
        return scope.producer[value].op
    return "the input" if value in scope.inputs else "a constant"


def after(node: Node) -> str:
    """What follows a node: operators, each once, and whoever else reads it."""
    output, scope = node.proto.output[0], node.scope
    found = list(dict.fromkeys(reader.op for reader in scope.readers.get(output, [])))
    found += {"the graph returns it": ["the output"], "a subgraph reads it": ["a subgraph"]}.get(scope.elsewhere.get(output, ""), [])
    return ", ".join(found) or "nothing"


def fold_all(model: Model) -> dict[Node, Outcome]:
    """Fold what can be folded, until nothing can; what became of each normalization node."""
    outcomes: dict[Node, Outcome] = {}
    waiting, progress = list(model.norms), True
    while progress:
        progress = False
        for node in list(waiting):
            outcomes[node] = outcome = _fold_one(node)
            if not outcome.why:
                waiting.remove(node)
                progress = True
    return outcomes


def fold(model: ModelProto | str | os.PathLike[str], rewrite: bool = False) -> ModelProto:
    """Fold the batch norms of inference into neighboring operators, exactly as `check` lists them.

    Conv, ConvTranspose, Gemm, MatMul and norms with a scale and a bias absorb a batch norm after them, even with an Add of a constant
    in between. Conv, Gemm and MatMul absorb one before them, and so does ConvTranspose if the shift is 0. The new constants are computed
    in float64, and stored in the dtype of the absorbing operator's constants, or of its input if that is wider.

    Parameters
    ----------
    model : ModelProto or path
        It is not changed. With a path, external data are loaded.
    rewrite : bool
        Whether to replace float32 and float64 batch norms of inference that cannot be folded by a Mul and an Add, or by a
        depthwise convolution.

    Returns
    -------
    ModelProto
        A new model, with the same inputs and outputs.

    Raises
    ------
    TypeError
        If model is neither a ModelProto nor a path, or rewrite is neither True nor False.
    ValueError
        If there is no such file, it is not a model, or onnx.checker refuses the model.

    See Also
    --------
    check : what can be folded, and why the rest cannot.

    Examples
    --------
    >>> import onnx.parser, fastbn.onnx
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
    ... net (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y)
    ...     <float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2] s = {1, 1}, float[2] b = {0, 0}, float[2] m = {5, 6}, float[2] v = {4, 9}>
    ...     { c = Conv (x, w)   y = BatchNormalization (c, s, b, m, v) }''')
    >>> [node.op_type for node in fastbn.onnx.fold(model).graph.node]
    ['Conv']
    """
    checks.switch("rewrite", rewrite)
    proto, folder = load(model)
    opened = Model(proto, folder)
    outcomes = fold_all(opened)
    if rewrite:
        for node, outcome in outcomes.items():
            if outcome.why and node.op == "BatchNormalization":
                _rewrite(node)
    return load_external(opened.close(), folder)


def _rewrite(node: Node) -> None:
    """Replace a batch norm of inference; where it cannot be, it stays."""
    scope = node.scope
    known = scope.type_of(node.input(0))
    if known is None or known.shape is None:
        return
    rank, dtype = len(known.shape), known.dtype
    if dtype.name not in ("float32", "float64"):  # of 16 bits, the product would be rounded before the sum
        return
    try:
        scale, shift = frozen(node).affine()
        parts = [stored(part, dtype, 0).reshape(-1, *[1] * (rank - 2)) for part in (scale, shift)]
    except Stays:
        return
    depthwise = dtype == np.float32 and _depthwise(node, rank)  # ONNX Runtime has no convolution of float64
    if depthwise:
        parts = [parts[0][:, None], parts[1].ravel()]
    output, name = node.proto.output[0], node.proto.name
    given = [scope.new_constant(f"{output}_{part}", value, node) for part, value in zip(("scale", "shift"), parts, strict=True)]
    if depthwise:
        options: Any = {"group": scale.size, "kernel_shape": [1] * (rank - 2)}
        protos = [helper.make_node("Conv", [node.input(0), *given], [output], name, **options)]
    else:
        product = scope.model.unused(f"{output}_product")
        names = [f"{name}_{part}" if name else "" for part in ("scale", "shift")]
        protos = [
            helper.make_node("Mul", [node.input(0), given[0]], [product], names[0]),
            helper.make_node("Add", [product, given[1]], [output], names[1]),
        ]
    scope.remove(node)
    for proto in protos:
        scope.add(node, proto)


# What ONNX Runtime runs on the blocked layout of its convolutions of images.
BLOCKED = frozenset(
    ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "LeakyRelu", "MaxPool", "Mul", "Relu")
) | {"Sigmoid", "Sum", "Tanh"}  # fmt: skip


def _depthwise(node: Node, rank: int) -> bool:
    """Whether a depthwise convolution is the faster of the two in ONNX Runtime (docs/onnx.md has the times).

    It is one pass where a Mul and an Add are two. But ONNX Runtime reorders images for a convolution, which takes longer than
    both passes where they are not in that order already, as they are behind another convolution.
    """
    if rank != 4:
        return rank > 2
    scope, waiting, seen = node.scope, [node.input(0)], set[str]()
    while waiting:
        value = waiting.pop()
        maker = scope.producer.get(value)
        if maker is None or value in seen:
            continue
        seen.add(value)
        if maker.op == "Conv":
            return True
        if maker.op in BLOCKED:
            waiting.extend(maker.proto.input)
    return False
