"""Named calls, one of each kind: what the instruction counts and the table of small calls are made of.

Every public way through the library that takes another path is here once. Only the public functions are used, so that
the same calls run on any two builds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import fastbn
from bench.cases import NETWORKS, Case
from bench.data import Array, Inputs, inputs

Call = Callable[[], object]

TINY = {layer.name: layer.shape for layer in NETWORKS["tiny"].layers}
# Long planes, long rows, and planes that are shorter than a block: each has loops of its own.
PATTERNS = {"ncsp": ((4, 32, 28, 28), "NCHW"), "nspc": ((4, 32, 28, 28), "NHWC"), "small planes": ((64, 32, 7, 7), "NCHW")}
PLAIN = ("stats", "inference", "forward", "backward")
FUSED = ("inference relu", "inference residual relu", "forward relu", "forward gelu", "backward relu", "backward gelu")
OTHER = ("forward without running", "backward frozen", "backward wrt x", "FrozenBatchNorm", "FrozenBatchNorm relu", "layer")


def aligned(a: Array, boundary: int = 64) -> Array:
    """Copy an array, in its memory order, to where a cache line starts: what is counted must not depend on the place."""
    memory = np.empty(a.nbytes + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    order = sorted(range(a.ndim), key=lambda axis: -a.strides[axis])
    dense = memory[start : start + a.nbytes].view(a.dtype).reshape([a.shape[axis] for axis in order])
    copy = dense.transpose(np.argsort(order))
    copy[...] = a
    return copy


def prepare(shape: tuple[int, int, int, int], layout: str, dtype: str = "float32", strides: bool = False) -> Inputs:
    """Make the arrays of the calls; with `strides`, as NCHW arrays whose memory is channels last."""
    made = inputs(Case("tiny", "x".join(map(str, shape)), shape, 1), "NHWC" if strides else layout, dtype)
    arrays = [aligned(a) for a in made[:6]]
    if strides:
        arrays[:2] = [a.transpose(0, 3, 1, 2) for a in arrays[:2]]
    return Inputs(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5], made.eps, layout)


def calls(given: Inputs) -> dict[str, Call]:
    """Bind each kind of call to its arrays; the outputs are given, too."""
    x, dy, weight, bias, mean, var, eps, layout = given
    y, running_mean, running_var = aligned(x), mean.copy(), var.copy()

    def inference(activation: str | None = None, residual: Array | None = None) -> Call:
        return lambda: fastbn.batch_norm(
            x, mean, var, weight, bias, eps=eps, layout=layout, activation=activation, residual=residual, out=y
        )

    def forward(activation: str | None = None) -> Call:
        return lambda: fastbn.batch_norm_forward(
            x, weight, bias, running_mean, running_var, eps=eps, layout=layout, activation=activation, out=y
        )

    def backward(activation: str | None = None, wrt: tuple[str, ...] = ("x", "weight", "bias"), training: bool = True) -> Call:
        running = mean.copy(), var.copy()
        _, saved = fastbn.batch_norm_forward(x, weight, bias, *running, training, 0.1, eps, layout=layout, activation=activation)
        return lambda: fastbn.batch_norm_backward(dy, x, saved, wrt=wrt, out=y)

    def frozen(activation: str | None = None) -> Call:
        layer = fastbn.FrozenBatchNorm(mean, var, weight, bias, eps=eps, layout=layout, activation=activation)
        return lambda: layer(x, out=y)

    layer = fastbn.BatchNorm2d(len(weight), layout=layout)
    return {
        "stats": lambda: fastbn.batch_norm_stats(x, layout=layout),
        "inference": inference(),
        "forward": forward(),
        "backward": backward(),
        "inference relu": inference("relu"),
        "inference residual relu": inference("relu", dy),
        "forward relu": forward("relu"),
        "forward gelu": forward("gelu"),
        "backward relu": backward("relu"),
        "backward gelu": backward("gelu"),
        "forward without running": lambda: fastbn.batch_norm_forward(x, weight, bias, eps=eps, layout=layout, out=y),
        "backward frozen": backward(training=False),
        "backward wrt x": backward(wrt=("x",)),
        "FrozenBatchNorm": frozen(),
        "FrozenBatchNorm relu": frozen("relu"),
        "layer": lambda: (layer(x, out=y), layer.backward(dy)),
    }


def _named(suffix: str, given: Inputs, names: tuple[str, ...]) -> dict[str, Call]:
    found = calls(given)
    return {f"{name} {suffix}": found[name] for name in names}


def loops() -> dict[str, Call]:
    """Calls in which the loops over the elements take the time, in each pattern of memory and each dtype."""
    every: dict[str, Call] = {}
    for pattern, (shape, layout) in PATTERNS.items():
        plain = prepare(shape, layout)
        every |= _named(pattern, plain, PLAIN if pattern == "small planes" else PLAIN + FUSED + OTHER[1:4])
    for dtype in ("bfloat16", "float64"):
        for pattern in ("ncsp", "nspc"):
            every |= _named(f"{pattern} {dtype}", prepare(*PATTERNS[pattern], dtype), PLAIN)
    return every | _named("strides", prepare(PATTERNS["nspc"][0], "NCHW", strides=True), PLAIN + FUSED)


def small() -> dict[str, Call]:
    """Calls in which the way to the loops takes the time."""
    every: dict[str, Call] = {}
    for size, shape in TINY.items():
        every |= _named(size, prepare(shape, "NCHW"), PLAIN + FUSED + OTHER)
        every |= _named(f"{size} strides", prepare(shape, "NCHW", strides=True), (*PLAIN, "forward relu", "backward relu"))
    every |= _named("1x8x4x4 NHWC", prepare(TINY["1x8x4x4"], "NHWC"), PLAIN)
    return every | _named("1x8x4x4 bfloat16", prepare(TINY["1x8x4x4"], "NCHW", "bfloat16"), PLAIN)
