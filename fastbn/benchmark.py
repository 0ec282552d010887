"""``python -m fastbn bench``: a few calls on this machine, beside a copy of the same tensor and plain NumPy.

It is small, needs NumPy alone, and no checkout. A checkout has ``python -m bench``, with whole networks and every library
with a batch norm that is installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn import cpu, dispatch
from fastbn.layout import Array, LayoutName, pattern
from fastbn.tables import counted

SHAPES = ((1, 64, 56, 56), (1, 512, 7, 7), (8, 256, 28, 28), (8, 64, 112, 112))
OPS = ("inference", "forward", "backward")
TENSORS = {"inference": 2, "forward": 2, "backward": 3}  # read or written once by any implementation: for GB/s
WIDE = 0.25  # a spread of times, between the quartiles, above which a median means little
LEAST_CALLS = 5


class Line(NamedTuple):
    """One operation on one shape.

    Attributes
    ----------
    microseconds : float
        Median of a call into an output that is given.
    gigabytes : float
        GB/s, each tensor counted once.
    copies : float
        The time in units of a copy of the tensor, on one thread.
    over_numpy : float
        How many times as fast as NumPy.
    spread : float
        Between the quartiles of the times, over the median.
    """

    shape: tuple[int, ...]
    layout: str
    dtype: str
    op: str
    microseconds: float
    gigabytes: float
    copies: float
    over_numpy: float
    spread: float


def plain(x: Array, dy: Array, vectors: Sequence[Array], axis: int, eps: float = 1e-5) -> dict[str, Callable[[], Any]]:
    """The operations as one would write them with NumPy, in the arithmetic of the vectors."""
    weight, bias, mean, var = (v.reshape([-1 if i == axis else 1 for i in range(x.ndim)]) for v in vectors)
    axes = tuple(i for i in range(x.ndim) if i != axis)
    out, count = np.empty_like(x), x.size // weight.size

    def affine(center: Array, spread: Array) -> Array:
        scale = weight / np.sqrt(spread + eps)
        wide = x.astype(weight.dtype, copy=False)
        out[...] = (wide - center) * scale + bias
        return out

    def forward() -> Array:
        wide = x.astype(weight.dtype, copy=False)
        return affine(wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True))

    def backward() -> Array:
        wide, gradient = x.astype(weight.dtype, copy=False), dy.astype(weight.dtype, copy=False)
        invstd = 1 / np.sqrt(wide.var(axes, keepdims=True) + eps)
        x_hat = (wide - wide.mean(axes, keepdims=True)) * invstd
        dbias, dweight = gradient.sum(axes, keepdims=True), (gradient * x_hat).sum(axes, keepdims=True)
        out[...] = (gradient - dbias / count - x_hat * (dweight / count)) * (weight * invstd)
        return out

    return {"inference": lambda: affine(mean, var), "forward": forward, "backward": backward}


def ours(x: Array, dy: Array, vectors: Sequence[Array], layout: LayoutName) -> dict[str, Callable[[], Any]]:
    """The same with fastbn, into an output that is given."""
    weight, bias, mean, var = vectors
    out, running = np.empty_like(x), (mean.copy(), var.copy())
    _, saved = fastbn.batch_norm_forward(x, weight, bias, layout=layout)
    return {
        "inference": lambda: fastbn.batch_norm(x, mean, var, weight, bias, layout=layout, out=out),
        "forward": lambda: fastbn.batch_norm_forward(x, weight, bias, *running, layout=layout, out=out),
        "backward": lambda: fastbn.batch_norm_backward(dy, x, saved, out=out),
    }


def times(calls: Sequence[Callable[[], Any]], seconds: float) -> list[tuple[float, float]]:
    """Median and spread of each of some calls, which take turns: a burst of each, of which the first call does not count."""
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = perf_counter() + seconds
    while perf_counter() < end or len(found[-1]) < LEAST_CALLS:
        for call, durations in zip(calls, found, strict=True):
            stop, first = perf_counter() + 2e-3, True
            while perf_counter() < stop or not durations:
                start = perf_counter()
                call()
                if not first:
                    durations.append(perf_counter() - start)
                first = False
            if len(durations) < LEAST_CALLS:  # a call that is longer than its turn
                start = perf_counter()
                call()
                durations.append(perf_counter() - start)
    results = []
    for durations in found:
        low, middle, high = np.percentile(durations, (25, 50, 75))
        results.append((float(middle), float((high - low) / middle)))
    return results


def measure(shape: tuple[int, ...], channels_last: bool, dtype: np.dtype[Any], seconds: float) -> Iterator[Line]:
    """Measure the operations on one shape (N, C, *spatial), with the channels where they are wanted in memory."""
    layout, axis = layout_of(shape, channels_last), len(shape) - 1 if channels_last else 1
    shape = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
    compute = np.float64 if dtype == np.float64 else np.float32
    weight, bias, mean, var = (v.astype(compute) for v in np.abs(rng.standard_normal((4, shape[axis]))) + 0.5)
    vectors, target = (weight, bias, mean, var), np.empty_like(x)
    numpy, fast = plain(x, dy, vectors, axis), ours(x, dy, vectors, layout)
    for op in OPS:
        (copy, _), (other, _), (own, spread) = times([lambda: np.copyto(target, x), numpy[op], fast[op]], seconds / len(OPS))
        yield Line(shape, layout, dtype.name, op, own * 1e6, TENSORS[op] * x.nbytes / own / 1e9, own / copy, other / own, spread)


def shape_of(text: str) -> tuple[int, ...]:
    """Parse a shape (N, C, *spatial), "8,64,56,56" or "8x64x56x56".

    Raises
    ------
    ValueError
        If it is none, or holds more than 2^31 elements.

    Examples
    --------
    >>> from fastbn.benchmark import shape_of
    >>> shape_of("8x64x56x56")
    (8, 64, 56, 56)
    """
    try:
        shape = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not 2 <= len(shape) <= 5 or min(shape) < 1 or math.prod(shape) > 1 << 31:
        raise ValueError(f"a shape has 2 to 5 sizes of at least 1, as in 8,64,56,56, and at most 2^31 elements, got {text!r}")
    if math.prod(shape) == shape[1]:
        raise ValueError(f"a shape holds two values per channel or more, and the channels come second, got {text!r}")
    return shape


def layout_of(shape: tuple[int, ...], channels_last: bool) -> LayoutName:
    """The name of the order of a shape's axes."""
    names: dict[int, tuple[LayoutName, LayoutName]] = {2: ("NC", "NC"), 3: ("NCL", "NLC"), 4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC")}
    return names[len(shape)][channels_last]


# The first line of the table.
HEADER = f"{'shape':<18}{'layout':<7}{'operation':<10}{'us':>9}{'GB/s':>7}{'x copy':>8}{'over NumPy':>12}"


LEGEND = """\
us: the median of a call into an output that is given. x copy: in units of a
copy of the tensor by NumPy. over NumPy: how many times as fast. A question
mark: the times spread over more than a quarter, as on a busy machine."""


def row(line: Line) -> str:
    """A line for a terminal of 80 columns; a question mark where the times spread widely."""
    shape = "x".join(map(str, line.shape))
    doubt = " ?" if line.spread > WIDE else ""
    return (
        f"{shape:<17} {line.layout:<7}{line.op:<10}{line.microseconds:>9.1f}{line.gigabytes:>7.1f}{line.copies:>8.2f}"
        f"{line.over_numpy:>12.1f}{doubt}"
    )


def run(
    shapes: Sequence[tuple[int, ...]] | None, layout: str | None, dtype: str, threads: int | None, seconds: float, as_json: bool
) -> int:
    """Measure, and print a line for each operation as it comes, or all as JSON; the exit status.

    Parameters
    ----------
    shapes : sequence of tuple of int, optional
        None means `SHAPES`.
    layout : str, optional
        "channels_first" or "NCHW", "channels_last" or "NHWC"; None means both.
    dtype : str
    threads : int, optional
        None means as many as a call would use.
    seconds : float
        For all.
    as_json : bool
    """
    storage = np.dtype(import_module("ml_dtypes").bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    memories = (False, True) if layout is None else (pattern(layout) == "nspc",)
    chosen = dict.fromkeys((shape, last and len(shape) > 2) for shape in shapes or SHAPES for last in memories)
    lines: list[Line] = []
    with fastbn.num_threads(fastbn.get_num_threads() if threads is None else threads):
        if not as_json:
            about = f"kernel {dispatch.pinned() or dispatch.select(dtype).name}, {counted(fastbn.get_num_threads(), 'thread')}"
            print(f"fastbn {fastbn.__version__}, {dtype}, {about}\n{cpu.model() or 'unknown processor'}\n\n{HEADER}")
        try:
            for shape, last in chosen:
                for line in measure(shape, last, storage, seconds / len(chosen)):
                    lines.append(line)
                    if not as_json:
                        print(row(line), flush=True)
        finally:  # also of what Ctrl-C has ended
            if as_json:
                print(json.dumps({"config": fastbn.show_config(), "results": [line._asdict() for line in lines]}, indent=2))
            else:
                print(f"\n{LEGEND}")
    return 0
