"""The constants of a BatchNormalization of inference."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastbn.dtypes import DTYPES, lookup
from fastbn.layout import Array
from fastbn.onnx.graph import Node, Stays

EPSILON = 1e-5  # ONNX's default


class Frozen(NamedTuple):
    """The constants of a BatchNormalization of inference."""

    scale: Array
    bias: Array
    mean: Array
    var: Array
    epsilon: float

    def affine(self) -> tuple[Array, Array]:
        """Scale and shift in float64."""
        wide = [v.astype(np.float64) for v in self[:4]]
        with np.errstate(all="ignore"):
            scale = wide[0] / np.sqrt(wide[3] + self.epsilon)
            shift = wide[1] - wide[2] * scale
        if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            raise Stays("its scale or its shift is not finite")
        return scale, shift

    def changes_nothing(self, x: np.dtype[Any]) -> bool:
        """Whether the scale is 1 and the shift is 0, but for what their dtype rounds away, and that of x, too."""
        scale, shift = self.affine()
        last = 2 * min(DTYPES[dtype.name].step for dtype in (x, self.scale.dtype))
        return bool((np.abs(scale - 1) <= last).all() and (np.abs(shift) <= last * np.abs(self.bias.astype(np.float64))).all())


def frozen(node: Node) -> Frozen:
    """The constants of a BatchNormalization of inference; `Stays` for what is none."""
    opset = node.scope.opset
    if opset < 7:
        raise Stays(f"it is of opset {opset}: convert the model to opset 7 or later (onnx.version_converter)")
    if opset >= 14 and node.attribute("training_mode", 0):
        raise Stays("it trains: training_mode is 1")
    if any(list(node.proto.output)[1:]):
        raise Stays("it returns statistics, too" if opset >= 14 else "it trains: it has more than one output")
    if opset < 9 and not node.attribute("spatial", 1):
        raise Stays("spatial is 0: each position has parameters of its own")
    epsilon = float(node.attribute("epsilon", np.float32(EPSILON)))
    vectors = [node.constant(i) for i in range(1, 5)]
    if any(v.ndim != 1 or v.shape != vectors[0].shape for v in vectors):
        raise Stays("its parameters are not vectors of one length")
    if not vectors[0].size:
        raise Stays("it has no channels")
    if any(lookup(v.dtype) is None for v in vectors):
        raise Stays(f"its parameters are not {', '.join(DTYPES)}")
    return Frozen(vectors[0], vectors[1], vectors[2], vectors[3], epsilon)
