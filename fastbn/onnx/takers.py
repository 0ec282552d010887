"""What can take a batch norm, and what its constants become.

A batch norm is ``y = x * scale + shift`` for each channel. What is linear and stands before it can take both: `BEFORE`. What
is linear and stands after it can take the scale in any case, and the shift where every output sees all of the input:
`AFTER`. Padding with zeros comes after the shift, so a shift that is not zero would be missing there. Each function computes
in float64 and returns a `Change`, or raises `Stays`; it writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastbn.dtypes import DTYPES
from fastbn.layout import Array
from fastbn.onnx.frozen import frozen
from fastbn.onnx.graph import Node, Stays


class Write(NamedTuple):
    """A constant that a node gets."""

    node: Node
    place: int
    value: Array


class Change(NamedTuple):
    """What taking a batch norm means for the nodes beside it.

    Attributes
    ----------
    writes : list of Write
    add : ndarray, optional
        What is to be added to the result, where the node has no constant for it.
    beta : bool
        Whether beta of a Gemm becomes part of its constant, and is 1 from then on.
    """

    writes: list[Write]
    add: Array | None = None
    beta: bool = False


def stored(exact: Array, dtype: np.dtype[Any], axis: int | None = None) -> Array:
    """What a float64 array becomes in a dtype; `Stays` where the numbers of a channel do not fit."""
    if dtype.name not in DTYPES:
        raise Stays(f"a constant beside it is {dtype}")
    with np.errstate(all="ignore"):
        result = exact.astype(dtype)
        lost = np.abs(result.astype(np.float64) - exact)
        others = tuple(i for i in range(exact.ndim) if i != axis) if axis is not None else None
        largest = np.abs(exact).max(axis=others, keepdims=True, initial=0.0)
        if not (lost <= DTYPES[dtype.name].step * largest).all():
            raise Stays(f"what a constant beside it would become does not fit {dtype}")
    return result


def shaped(vector: Array, axis: int, rank: int) -> Array:
    """A vector of channels that broadcasts along an axis."""
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def weights(node: Node, index: int, rank: int | None = None) -> tuple[Array, Array]:
    """A constant of a node: as it is, and in float64."""
    value = node.constant(index)
    if rank is not None and value.ndim != rank:
        raise Stays(f"{node.input(index)} has {value.ndim} axes, not {rank}")
    return value, value.astype(np.float64)


def _matches(count: int, vector: Array, node: Node) -> None:
    if count != vector.size:
        raise Stays(f"{node.own_name} has {count} channels, and it has {vector.size}")


def _bias(node: Node, count: int, like: Array) -> tuple[Array, np.dtype[Any]]:
    """The bias of a node, of zeros where it has none, and the dtype that it is stored in."""
    if not node.input(2):
        return np.zeros(count), like.dtype
    value, wide = weights(node, 2, 1)
    if len(wide) != count:
        raise Stays(f"{node.input(2)} has {len(wide)} numbers, and {node.own_name} {count} channels")
    return wide, value.dtype


def _with_bias(node: Node, weight: tuple[int, Array], bias: Array, dtype: np.dtype[Any]) -> Change:
    """New weights, and a new bias where there was one or must be one."""
    writes = [Write(node, *weight)]
    if node.input(2) or bias.any():
        writes.append(Write(node, 2, stored(bias, dtype)))
    return Change(writes)


def _kernel(node: Node) -> tuple[Array, Array, int]:
    """The weights of a convolution, as they are and in float64, and its groups, which divide them along the first axis."""
    weight, wide = weights(node, 1)
    groups = int(node.attribute("group", 1))
    if wide.ndim < 3 or groups < 1 or len(wide) % groups:
        raise Stays(f"the weights of {node.own_name}, of shape {wide.shape}, are not those of a convolution of {groups} groups")
    return weight, wide, groups


def _conv(node: Node, scale: Array, shift: Array) -> Change:
    weight, wide, _ = _kernel(node)
    _matches(len(wide), scale, node)
    bias, dtype = _bias(node, scale.size, weight)
    new = stored(wide * shaped(scale, 0, wide.ndim), weight.dtype, 0)
    return _with_bias(node, (1, new), bias * scale + shift, dtype)


def _conv_transpose(node: Node, scale: Array, shift: Array) -> Change:
    weight, wide, groups = _kernel(node)
    _matches(wide.shape[1] * groups, scale, node)
    bias, dtype = _bias(node, scale.size, weight)
    # Weights are (inputs, outputs of a group, ...), and the inputs of a group lie one behind the other.
    grouped = wide.reshape(groups, -1, *wide.shape[1:])
    new = stored((grouped * scale.reshape(groups, 1, -1, *[1] * (wide.ndim - 2))).reshape(wide.shape), weight.dtype, 1)
    return _with_bias(node, (1, new), bias * scale + shift, dtype)


def _gemm_terms(node: Node) -> tuple[float, float, int]:
    """Alpha, beta, and the axis of B along which the outputs lie."""
    alpha, beta = (float(node.attribute(name, 1.0)) for name in ("alpha", "beta"))
    return alpha, beta, 0 if node.attribute("transB", 0) else 1


def _gemm_addend(node: Node, beta: float, like: Array) -> tuple[Array, np.dtype[Any]]:
    """``beta * C``, 0 where there is no C, or it is not read."""
    if not node.input(2) or not beta:
        return np.zeros(1), like.dtype
    value, wide = weights(node, 2)
    return beta * wide, value.dtype


def _gemm(node: Node, scale: Array, shift: Array) -> Change:
    weight, wide = weights(node, 1, 2)
    _, beta, axis = _gemm_terms(node)
    _matches(wide.shape[axis], scale, node)
    addend, dtype = _gemm_addend(node, beta, weight)
    new = stored(wide * shaped(scale, axis, 2), weight.dtype, axis)
    return _with_bias(node, (1, new), addend * scale + shift, dtype)._replace(beta=True)


def _matmul(node: Node, scale: Array, shift: Array) -> Change:
    rank = node.scope.rank(node.proto.output[0])
    if rank is None:
        raise Stays(f"how many axes {node.own_name} returns is not known")
    if rank not in (2, 3):
        raise Stays(f"the channels are no columns of {node.own_name}")
    # Channels are the columns of what is on the right; where there are more axes, the rows of what is on the left.
    side = 1 if rank == 2 else 0
    weight, wide = weights(node, side, 2)
    _matches(wide.shape[side], scale, node)
    write = Write(node, side, stored(wide * shaped(scale, side, 2), weight.dtype, side))
    return Change([write], add=stored(shift if side else shift[:, None], weight.dtype) if shift.any() else None)


def _norm(node: Node, scale: Array, shift: Array) -> Change:
    """Another norm with a scale and a bias for each channel."""
    if node.op == "BatchNormalization":
        try:
            frozen(node)
        except Stays as reason:
            raise Stays(f"{node.own_name} before it cannot take it: {reason}") from None
    weight, wide = weights(node, 1, 1)
    _matches(wide.size, scale, node)
    bias, dtype = _bias(node, scale.size, weight)
    known = node.scope.type_of(node.input(0))
    if known is not None and known.dtype.name in DTYPES:  # from opset 15 on, it may be wider than both
        dtype = min(dtype, known.dtype, key=lambda one: DTYPES[one.name].step)
    return _with_bias(node, (1, stored(wide * scale, dtype, 0)), bias * scale + shift, dtype)


Taker = Callable[[Node, Array, Array], Change]
BEFORE: dict[str, Taker] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _norm,
    "InstanceNormalization": _norm,
    "GroupNormalization": _norm,
}


def _pads(node: Node, kernel: tuple[int, ...]) -> bool:
    """Whether a convolution pads its input with zeros."""
    way = node.attribute("auto_pad", b"NOTSET").decode()
    if way == "NOTSET":
        return any(node.attribute("pads", []))
    if way == "VALID":
        return False
    known = node.scope.type_of(node.input(0))
    strides = node.attribute("strides", [1] * len(kernel))
    dilations = node.attribute("dilations", [1] * len(kernel))
    sizes = [None] * len(kernel) if known is None or known.shape is None else known.shape[2:]
    if not len(sizes) == len(strides) == len(dilations) == len(kernel):
        return True
    return any(_padding_of_same(*axis) for axis in zip(sizes, kernel, strides, dilations, strict=True))


def _padding_of_same(size: int | str | None, kernel: int, stride: int, dilation: int) -> bool:
    reach = (kernel - 1) * dilation + 1
    if not isinstance(size, int):
        return reach > 1
    return (-(-size // stride) - 1) * stride + reach > size


def _before_conv(node: Node, data: int, scale: Array, shift: Array) -> Change:
    _is_first(node, data)
    weight, wide, groups = _kernel(node)
    _matches(wide.shape[1] * groups, scale, node)
    if shift.any() and _pads(node, wide.shape[2:]):
        raise Stays(f"{node.own_name} after it pads with zeros, to which its shift must not apply")
    bias, dtype = _bias(node, len(wide), weight)
    grouped = wide.reshape(groups, -1, *wide.shape[1:])
    along = (groups, 1, -1, *[1] * (wide.ndim - 2))
    bias = bias + (grouped * shift.reshape(along)).reshape(len(wide), -1).sum(1)
    new = stored((grouped * scale.reshape(along)).reshape(wide.shape), weight.dtype, 0)
    return _with_bias(node, (1, new), bias, dtype)


def _before_conv_transpose(node: Node, data: int, scale: Array, shift: Array) -> Change:
    _is_first(node, data)
    weight, wide, _ = _kernel(node)
    _matches(len(wide), scale, node)
    if shift.any():
        raise Stays(f"{node.own_name} after it does not bring its shift to every output alike")
    return Change([Write(node, 1, stored(wide * shaped(scale, 0, wide.ndim), weight.dtype))])


def _before_gemm(node: Node, data: int, scale: Array, shift: Array) -> Change:
    _is_first(node, data)
    if node.attribute("transA", 0):
        raise Stays(f"{node.own_name} after it sums over the batch")
    weight, wide = weights(node, 1, 2)
    alpha, beta, outputs = _gemm_terms(node)
    _matches(wide.shape[1 - outputs], scale, node)
    addend, dtype = _gemm_addend(node, beta, weight)
    new = stored(wide * shaped(scale, 1 - outputs, 2), weight.dtype, outputs)
    return _with_bias(node, (1, new), addend + alpha * (shift @ (wide if outputs else wide.T)), dtype)._replace(beta=True)


def _before_matmul(node: Node, data: int, scale: Array, shift: Array) -> Change:
    # The sum is over the columns of the first matrix and the rows of the second: channels are one of these.
    if node.scope.rank(node.input(data)) != 2 + data:
        raise Stays(f"{node.own_name} after it does not sum over its channels, as far as is known")
    outputs = 1 - data
    weight, wide = weights(node, 1 - data, 2)
    _matches(wide.shape[1 - outputs], scale, node)
    new = stored(wide * shaped(scale, 1 - outputs, 2), weight.dtype, outputs)
    added = shift @ wide if outputs else (wide @ shift)[:, None]
    return Change([Write(node, 1 - data, new)], stored(added, weight.dtype) if added.any() else None)


def _is_first(node: Node, data: int) -> None:
    if data != 0:
        raise Stays(f"it is no data but a parameter of {node.own_name} after it")


AFTER: dict[str, Callable[[Node, int, Array, Array], Change]] = {
    "Conv": _before_conv,
    "ConvTranspose": _before_conv_transpose,
    "Gemm": _before_gemm,
    "MatMul": _before_matmul,
}
