"""The normalization nodes of a model as a table: what each is, which neighbor could absorb it, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import onnx
from onnx import ModelProto

from fastbn import checks
from fastbn.layers import FrozenBatchNorm
from fastbn.layout import Array
from fastbn.onnx.folding import Outcome, after, before, fold_all
from fastbn.onnx.frozen import Frozen, frozen
from fastbn.onnx.graph import Model, Node, Stays
from fastbn.onnx.protos import DEFAULT, load
from fastbn.onnx.timing import Timing, measure
from fastbn.tables import counted, table

CHANNELS_LAST = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


class Norm(NamedTuple):
    """One normalization node of a model.

    Attributes
    ----------
    name : str
        The node's name if that is unique, else a unique one. In a subgraph or a function, it begins with the names of the
        enclosing nodes.
    op : str
        Its operator.
    shape : tuple of int, str or None; or None
        Shape of the input, by shape inference: a name or None for axes that are not fixed.
    channels : int or None
    epsilon : float or None
    before, after : str
        The neighbors: operators, "the input", "the output".
    into : str
        The node into which `fold` folds it, with the same results except for rounding; empty if there is none.
    why : str
        Why there is none, or that the node changes nothing.
    share : float or None
        Its share of the run time, if measured. 0 if ONNX Runtime does not run it by itself, because it folds or fuses it
        into another node when it loads the model.
    """

    name: str
    op: str
    shape: tuple[int | str | None, ...] | None
    channels: int | None
    epsilon: float | None
    before: str
    after: str
    into: str
    why: str
    share: float | None = None

    @property
    def state(self) -> str:
        """One of "foldable", "folded" (it changes nothing) and "stays"."""
        return "foldable" if self.into else "folded" if self.why == NOTHING else "stays"

    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        shape = "?" if self.shape is None else "x".join("?" if n is None else str(n) for n in self.shape) or "()"
        share = "-" if self.share is None else f"{100 * self.share:.1f} %" if self.share else "not by itself"
        numbers = ("?" if self.channels is None else str(self.channels)), ("-" if self.epsilon is None else f"{self.epsilon:.3g}")
        fold = f"folds into {self.into}" if self.into else f"{self.state}: {self.why}"
        cells = (self.name, self.op, shape, *numbers, self.before, self.after, share, fold)
        return tuple(_printable(cell) for cell in cells)


def _printable(text: str) -> str:
    """A text of one line: a model may name its nodes by anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


NOTHING = "it changes nothing"
HEADER = "name", "op", "shape", "channels", "epsilon", "before", "after", "time", "in inference"


class Report(tuple[Norm, ...]):
    """Normalization nodes of a model, in its order; printed, a table.

    Attributes
    ----------
    timing : str
        How the shares of the run time were measured, or why they were not.
    """

    timing: str

    def __new__(cls, rows: tuple[Norm, ...] = (), timing: str = "") -> Report:
        """A tuple of rows."""
        report = super().__new__(cls, rows)
        report.timing = timing
        return report

    def __str__(self) -> str:
        """A table of columns, and what it counts in all."""
        if not self:
            return "\n".join(filter(None, ["the model has no normalization nodes", self.timing]))
        counts = {state: sum(row.state == state for row in self) for state in ("foldable", "folded", "stays")}
        nodes = f"{counted(len(self), 'node')}: {counts['foldable']} can be folded, {counts['folded']} are already, {counts['stays']} stay"
        return "\n".join(filter(None, [*table([HEADER, *(row.cells() for row in self)]), nodes, self.timing]))

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts and lists, for JSON."""
        return {"nodes": [{**row._asdict(), "state": row.state} for row in self], "timing": self.timing}


def check(model: ModelProto | str | os.PathLike[str], *, seconds: float = 0.0, inputs: Mapping[str, Array] | None = None) -> Report:
    """List the normalization nodes of a model: what they are, whether they can be folded, and what they cost.

    The list includes nodes in the bodies of If, Loop and Scan and in local functions. The model is not changed.

    Parameters
    ----------
    model : ModelProto or path
    seconds : float
        How long to run the model in ONNX Runtime, to measure each node's share of the time; 0 runs nothing.
    inputs : mapping of str to ndarray, optional
        The inputs of this run. None means random numbers; axes that are not fixed get the length 1 (the first axis) or 224,
        or 64, 48 or 32 if the model does not accept 224.

    Returns
    -------
    Report
        A tuple of `Norm`. Printed, it is a table.

    Raises
    ------
    TypeError
        If model is neither a ModelProto nor a path, seconds is not a number, or inputs is not a mapping.
    ValueError
        If there is no such file, it is not a model, onnx.checker refuses the model, seconds is negative or not
        finite, or there are inputs and no seconds.

    See Also
    --------
    fold : fold the nodes, as the last column says.

    Examples
    --------
    >>> import onnx.parser, fastbn.onnx
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
    ... net (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y)
    ...     <float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2] s = {1, 1}, float[2] b = {0, 0}, float[2] m = {5, 6}, float[2] v = {4, 9}>
    ...     { c = Conv (x, w)   n = BatchNormalization (c, s, b, m, v)   r = Relu (n)   y = InstanceNormalization (r, s, b) }''')
    >>> for norm in fastbn.onnx.check(model):
    ...     print(norm.name, norm.op, norm.shape, norm.channels, norm.before, norm.after, norm.into or norm.why, sep=", ")
    n, BatchNormalization, ('N', 2, 4, 4), 2, Conv, Relu, c
    y, InstanceNormalization, ('N', 2, 4, 4), 2, Relu, the output, its statistics are those of the input
    """
    checks.number("seconds", seconds, 0.0)
    if inputs is not None and not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of names to arrays, got {type(inputs).__name__}")
    if inputs is not None and not seconds:
        raise ValueError("inputs are what the model is run with, and seconds=0 does not run it: give both, or neither")
    proto, folder = load(model)
    opened = Model(proto, folder)
    rows = [_row(node) for node in opened.norms]
    outcomes = fold_all(opened)
    timing = measure(proto, folder, [(node.scope.key, node.index) for node in opened.norms], seconds, inputs) if seconds else Timing()
    rows = [_judged(row, outcomes[node]) for row, node in zip(rows, opened.norms, strict=True)]
    if timing.shares is not None:
        rows = [row._replace(share=share) for row, share in zip(rows, timing.shares, strict=True)]
    return Report(tuple(rows), timing.text)


def _judged(row: Norm, outcome: Outcome) -> Norm:
    return row._replace(into=outcome.into, why=NOTHING if outcome.done else outcome.why)


def _row(node: Node) -> Norm:
    known = [node.scope.type_of(name) for name in (node.input(0), node.proto.output[0])]  # they have one shape
    shape = next((one.shape for one in known if one is not None and one.shape is not None), None)
    return Norm(node.name, node.op, shape, _channels(node, shape), _epsilon(node), before(node), after(node), "", "")


def _channels(node: Node, shape: tuple[int | str | None, ...] | None) -> int | None:
    if node.op in CHANNELS_LAST or node.proto.domain not in DEFAULT:
        found = shape[-1] if shape else None
    else:
        found = shape[1] if shape and len(shape) > 1 else None
    if found is None:  # what scales them has one number for each
        known = node.scope.type_of(node.input(1)) if node.input(1) else None
        found = known.shape[-1] if known is not None and known.shape else None
    return found if isinstance(found, int) else None


def _epsilon(node: Node) -> float | None:
    try:
        attributes = onnx.defs.get_schema(node.proto.op_type, node.scope.opset, "").attributes if node.proto.domain in DEFAULT else {}
    except onnx.defs.SchemaError:  # of ONNX Runtime's alone
        attributes = {}
    known = attributes["epsilon"].default_value.f if "epsilon" in attributes else None
    try:
        found = node.attribute("epsilon", known)
    except Stays:
        return None
    return float(found) if isinstance(found, (int, float)) else None  # of a foreign domain, it may be anything


def extract(model: ModelProto | str | os.PathLike[str]) -> dict[str, FrozenBatchNorm]:
    """Make layers of a model's batch norms, for NumPy arrays.

    Parameters
    ----------
    model : ModelProto or path

    Returns
    -------
    dict of str to FrozenBatchNorm
        By the names that `check` gives the nodes, without nodes that train or whose parameters are not constants.

    Raises
    ------
    TypeError, ValueError
        As `check`, or if a node has a negative epsilon.

    Examples
    --------
    >>> import onnx.parser, fastbn.onnx
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
    ... net (float[N, 2] x) => (float[N, 2] y)
    ...     <float[2] s = {1, 1}, float[2] b = {0, 0}, float[2] m = {5, 6}, float[2] v = {4, 9}>
    ...     { y = BatchNormalization <epsilon = 0.0> (x, s, b, m, v) }''')
    >>> fastbn.onnx.extract(model)
    {'y': FrozenBatchNorm(2 channels, eps=0.0, layout=None, activation=None)}
    """
    found = {}
    for node in Model(*load(model)).norms:
        if node.op == "BatchNormalization":
            try:
                known = frozen(node)
            except Stays:
                continue
            try:
                found[node.name] = _layer(known)
            except ValueError as error:
                raise ValueError(f"model: {node.name} is no batch norm that can be run: {error}") from None
    return found


def _layer(known: Frozen) -> FrozenBatchNorm:
    return FrozenBatchNorm.from_onnx(known.scale, known.bias, known.mean, known.var, epsilon=known.epsilon)
