"""The cases whose results two builds must give to the bit, and how one is run.

Every operation, dtype, odd shape and memory order, in place or not; all activations where arrays are small, and several
numbers of threads where they are large enough for threads. Only public functions are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple
from zlib import crc32

import numpy as np

import fastbn
from bench.data import DTYPES, Array

SMALL = (
    (2, 1), (5, 3), (7, 33), (257, 17),  # rows of channels: one, fewer than a register, one more, more than a tile
    (2, 3, 1), (3, 5, 7), (0, 3, 4),
    (2, 3, 4, 5), (1, 8, 4, 4), (2, 17, 3, 3), (3, 16, 7, 7), (1, 2, 13, 31), (2, 67, 5, 1),
    (2, 3, 2, 3, 5),
)  # fmt: skip
MEDIUM = ((4099, 37), (2, 130, 27, 23), (3, 17, 33, 29), (65, 33, 8, 8), (1, 3, 301, 307))  # several tiles, units and threads
LARGE = (9, 67, 211, 223)  # more than a last-level cache in float32
MEMORY = ("contiguous", "channels last", "channels last strides", "every other", "odd address")
LAYOUTS = {2: "NC", 3: "NLC", 4: "NHWC", 5: "NDHWC"}
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh")
EPS = 1e-3


class Case(NamedTuple):
    """One call, or a forward with its backward."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    memory: str = "contiguous"
    activation: str | None = None
    residual: bool = False
    in_place: bool = False
    threads: int = 1
    values: str = "normal"

    def __str__(self) -> str:
        how = [self.activation or "", "residual" * self.residual, "in place" * self.in_place, self.values * (self.values != "normal")]
        words = [self.op, self.dtype, "x".join(map(str, self.shape)), self.memory, *filter(None, how)]
        return ", ".join(words) + f", {self.threads} thread{'s' * (self.threads != 1)}"


class Arrays(NamedTuple):
    """What a call is given. `out` is x or dy where the call is in place, else None."""

    x: Array
    dy: Array
    residual: Array | None
    vectors: tuple[Array, Array, Array, Array]  # weight, bias, mean, variance
    layout: str | None
    mask: Array


Results = dict[str, object]


@lru_cache(4)
def _values(shape: tuple[int, ...], dtype: str, values: str) -> tuple[Array, Array, Array]:
    """x, dy and a residual in the order (N, C, ...)."""
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  makes NumPy know the name
    rng = np.random.default_rng(crc32(repr((shape, values)).encode()))
    wide = np.float64 if shape != LARGE else np.float32
    x, dy, residual = (rng.standard_normal(shape, wide) for _ in range(3))
    x += rng.normal(0.0, 3.0, (shape[1], *(1,) * (len(shape) - 2))).astype(wide)
    if values == "hostile":  # by channel: constant, NaN, infinite, huge, subnormal, far from 0
        huge, tiny = (3e4, 1e-7) if dtype == "float16" else (1e30, 1e-42)
        for channel, (factor, offset) in enumerate(((0, 7), (1, 0), (1, 0), (huge, 0), (tiny, 0), (1, 1e4))[: shape[1]]):
            x[:, channel] = factor * x[:, channel] + offset
        for channel, value in enumerate((7, np.nan, np.inf)[: shape[1] * (x.size > 0)]):
            x[-1, channel].flat[0] = value
    return x.astype(dtype, copy=False), dy.astype(dtype, copy=False), residual.astype(dtype, copy=False)


def _place(a: Array, memory: str) -> Array:
    """Copy an array of the order (N, C, ...) into memory of its own, in one of the ways of `MEMORY`."""
    last = np.moveaxis(a, 1, -1)
    if memory == "channels last":
        return last.copy()
    if memory == "channels last strides":
        return np.moveaxis(last.copy(), -1, 1)
    if memory == "every other":
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        return wide[..., ::2]
    odd = memory == "odd address"
    flat = np.empty(a.size + 1, a.dtype)[int(odd) : a.size + int(odd)].reshape(a.shape)
    flat[...] = a
    return flat


def _arrays(case: Case) -> Arrays:
    x, dy, residual = (_place(a, case.memory) for a in _values(case.shape, case.dtype, case.values))
    channels, wide = case.shape[1], np.dtype("float64" if case.dtype == "float64" else "float32")
    rng = np.random.default_rng(channels)
    weight, bias, mean = rng.normal((1.0, 0.0, 0.0), 0.5, (channels, 3)).T.astype(wide)
    variance = rng.lognormal(0.0, 1.0, channels).astype(wide)
    layout = LAYOUTS[len(case.shape)] if case.memory == "channels last" else None
    mask = rng.random((case.shape[0], *case.shape[2:])) < 0.7
    mask.flat[:2] = True
    return Arrays(x, dy, residual if case.residual else None, (weight.copy(), bias.copy(), mean.copy(), variance), layout, mask)


def _stats(a: Arrays, case: Case, mask: Array | None = None) -> Results:
    found = fastbn.batch_norm_stats(a.x, layout=a.layout, mask=mask)
    return {"count": found.count, "mean": found.mean, "var": found.var, "mean_lo": found.mean_lo}


def _masked_stats(a: Arrays, case: Case) -> Results:
    return _stats(a, case, a.mask)


def _inference(a: Arrays, case: Case) -> Results:
    weight, bias, mean, var = a.vectors
    out = a.x if case.in_place else None
    y = fastbn.batch_norm(a.x, mean, var, weight, bias, eps=EPS, layout=a.layout, activation=case.activation, residual=a.residual, out=out)
    return {"y": y}


def _elemt(a: Arrays, case: Case) -> Results:
    weight, bias, mean, var = a.vectors
    out, centers = a.x if case.in_place else None, mean.astype(np.float64) + 1e-9
    y = fastbn.batch_norm_elemt(
        a.x, centers, 1 / np.sqrt(var), weight, bias, layout=a.layout, activation=case.activation, residual=a.residual, out=out
    )
    return {"y": y}


def _frozen_layer(a: Arrays, case: Case) -> Results:
    weight, bias, mean, var = a.vectors
    layer = fastbn.FrozenBatchNorm(mean, var, weight, bias, eps=EPS, layout=a.layout, activation=case.activation)
    first = layer(a.x.copy(order="K"), a.residual)
    return {"y": layer(a.x, a.residual, out=a.x if case.in_place else None), "first y": first}


def _forward(a: Arrays, case: Case, training: bool = True, mask: Array | None = None, plain: bool = False) -> tuple[Results, fastbn.Saved]:
    weight, bias, mean, var = (None,) * 4 if plain else a.vectors
    y, saved = fastbn.batch_norm_forward(
        a.x, weight, bias, mean, var, training, 0.3, EPS,
        layout=a.layout, activation=case.activation, residual=a.residual, mask=mask, out=a.x if case.in_place else None,
    )  # fmt: skip
    return {"y": y, "saved.mean": saved.mean, "saved.invstd": saved.invstd}, saved


def _train(a: Arrays, case: Case) -> Results:
    return _forward(a, case)[0]


def _train_plain(a: Arrays, case: Case) -> Results:
    return _forward(a, case, plain=True)[0]


def _train_masked(a: Arrays, case: Case) -> Results:
    return _forward(a, case, mask=a.mask)[0]


def _eval(a: Arrays, case: Case) -> Results:
    return _forward(a, case, training=False)[0]


def _backward(
    a: Arrays, case: Case, wrt: tuple[str, ...] = ("x", "weight", "bias"), training: bool = True, mask: Array | None = None
) -> Results:
    _, saved = _forward(a, case._replace(in_place=False), training, mask)
    found = fastbn.batch_norm_backward(a.dy, a.x, saved, wrt=wrt, out=a.dy if case.in_place and "x" in wrt else None)
    return found._asdict()


def _backward_frozen(a: Arrays, case: Case) -> Results:
    return _backward(a, case, training=False)


def _backward_masked(a: Arrays, case: Case) -> Results:
    return _backward(a, case, mask=a.mask)


def _backward_x(a: Arrays, case: Case) -> Results:
    return _backward(a, case, ("x",))


def _backward_parameters(a: Arrays, case: Case) -> Results:
    return _backward(a, case, ("weight", "bias"))


def _backward_all(a: Arrays, case: Case) -> Results:
    return _backward(a, case, ("x", "weight", "bias", "residual") if case.residual else ("x", "bias"))


def _backward_from_output(a: Arrays, case: Case) -> Results:
    activation, (weight, *others) = "leaky_relu" if case.activation else None, a.vectors
    a = a._replace(vectors=(np.abs(weight) + np.float32(0.25), *others))  # smaller ones lose the input, and are refused
    found, saved = _forward(a, case._replace(in_place=True, activation=activation))
    return found | fastbn.batch_norm_backward(a.dy, a.x, saved, from_output=True, out=a.dy if case.in_place else None)._asdict()


def _reduce(a: Arrays, case: Case) -> Results:
    _, _, mean, var = a.vectors
    sums = fastbn.batch_norm_backward_reduce(a.dy, a.x, mean, 1 / np.sqrt(var), layout=a.layout)
    return dict(zip(("sum_dy", "sum_dy_xmu"), sums, strict=True))


def _backward_elemt(a: Arrays, case: Case) -> Results:
    weight, bias, mean, var = a.vectors
    out, count = a.dy if case.in_place else None, max(1, prod(case.shape) // case.shape[1])
    dx = fastbn.batch_norm_backward_elemt(a.dy, a.x, mean, 1 / np.sqrt(var), weight, bias, weight, count, layout=a.layout, out=out)
    return {"dx": dx}


def _layer(a: Arrays, case: Case) -> Results:
    kind = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d, 5: fastbn.BatchNorm3d}[a.x.ndim]
    layer = kind(case.shape[1], layout=a.layout, activation=case.activation, dtype=case.dtype)
    first = layer(a.x.copy(order="K"), a.residual)
    y = layer(a.x, a.residual)
    return {"first y": first, "y": y, **layer.backward(a.dy)._asdict(), **layer.state_dict()}


def _groups(channels: int) -> int:
    return next(groups for groups in (4, 3, 2, 1) if channels % groups == 0)


def _parts(a: Arrays, case: Case, name: str) -> Results:
    """Another normalization, forward and backward: over parts of images, or over the last axis."""
    by_channels = name in ("instance_norm", "group_norm")
    weight, bias = (v if by_channels else np.resize(v, a.x.shape[-1]) for v in a.vectors[:2])
    given: dict[str, object] = {"weight": weight, "eps": EPS, "activation": case.activation, "residual": a.residual}
    given |= {"layout": a.layout} if by_channels else {"normalized_shape": a.x.shape[-1]}
    given |= {"num_groups": _groups(case.shape[1])} if name == "group_norm" else {}
    given |= {} if name == "rms_norm" else {"bias": bias}
    before = a.x.copy(order="K") if case.in_place else a.x
    y, saved = getattr(fastbn, f"{name}_forward")(a.x, **given, out=a.x if case.in_place else None)
    found = getattr(fastbn, f"{name}_backward")(a.dy, before, saved, out=a.dy if case.in_place else None)
    return {"y": y} | found._asdict()


def _instance_norm(a: Arrays, case: Case) -> Results:
    return _parts(a, case, "instance_norm")


def _group_norm(a: Arrays, case: Case) -> Results:
    return _parts(a, case, "group_norm")


def _layer_norm(a: Arrays, case: Case) -> Results:
    return _parts(a, case, "layer_norm")


def _rms_norm(a: Arrays, case: Case) -> Results:
    return _parts(a, case, "rms_norm")


Op = Callable[[Arrays, Case], Results]
FUSED: dict[str, Op] = {
    "inference": _inference, "elemt": _elemt, "FrozenBatchNorm": _frozen_layer, "forward": _train, "forward, training=False": _eval,
    "backward": _backward, "backward frozen": _backward_frozen, "backward wrt all": _backward_all,
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm, "instance_norm": _instance_norm,
}  # fmt: skip
FUSED_OUT_OF_PLACE: dict[str, Op] = {"backward wrt weight and bias": _backward_parameters, "layer": _layer}
PLAIN: dict[str, Op] = {
    "forward without vectors": _train_plain, "forward with mask": _train_masked, "backward with mask": _backward_masked,
    "backward wrt x": _backward_x, "backward from output": _backward_from_output, "backward_elemt": _backward_elemt,
}  # fmt: skip
PLAIN_OUT_OF_PLACE: dict[str, Op] = {"stats": _stats, "stats with mask": _masked_stats, "backward_reduce": _reduce}
OPS: dict[str, Op] = FUSED | FUSED_OUT_OF_PLACE | PLAIN | PLAIN_OUT_OF_PLACE


def _forms(op: str, dtype: str, shape: tuple[int, ...], memory: str, activations: tuple[str | None, ...]) -> Iterator[Case]:
    """Cases of an operation with every epilogue and in both places, as far as it has them."""
    if op == "instance_norm" and prod(shape[2:]) == 1:
        return  # nothing to normalize over
    fused = op in FUSED or op in FUSED_OUT_OF_PLACE
    for activation in activations if fused else (None,):
        for residual in (False, True) if fused else (False,):
            for in_place in (False,) if op in FUSED_OUT_OF_PLACE or op in PLAIN_OUT_OF_PLACE else (False, True):
                yield Case(op, dtype, shape, memory, activation, residual, in_place)


def cases() -> Iterator[Case]:
    """List all cases, always in the same order."""
    for shape in SMALL:
        for dtype in DTYPES:
            for memory in MEMORY:
                for op in OPS:
                    yield from _forms(op, dtype, shape, memory, ACTIVATIONS)
                    if memory in MEMORY[:2]:
                        for form in _forms(op, dtype, shape, memory, (None, "relu")):
                            yield form._replace(values="hostile")
    for shape in MEDIUM:
        for dtype in DTYPES:
            for memory in MEMORY:
                for op in OPS:
                    for case in _forms(op, dtype, shape, memory, (None, "gelu")):
                        if not case.residual or case.activation:
                            yield from (case._replace(threads=threads) for threads in (1, 3))
    for dtype in ("float32", "bfloat16"):
        for memory in MEMORY[:2]:
            yield from (Case(op, dtype, LARGE, memory, threads=2) for op in ("inference", "forward", "backward"))


def run(case: Case) -> Results:
    """Run one case; the results by name, and what became of the arrays and vectors that it was given."""
    a = _arrays(case)
    with fastbn.num_threads(case.threads):
        found = OPS[case.op](a, case)
    weight, bias, mean, var = a.vectors
    return found | {
        "x afterwards": a.x, "dy afterwards": a.dy, "residual afterwards": a.residual,
        "weight afterwards": weight, "bias afterwards": bias, "running_mean": mean, "running_var": var,
    }  # fmt: skip
