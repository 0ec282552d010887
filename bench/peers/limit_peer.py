"""What this machine can do: the bytes of a call, read and written in the order of fastbn's plan, without its arithmetic.

A sum reads everything once and adds it up, because a load that nothing uses would be dropped. A map copies; the backward's
reads dy, too. Where channels are resident, both follow each other within a unit; else the map runs backwards over what
each thread read before. Outputs that exceed the last cache are streamed. On fastbn's pool, compiled by Numba.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

import fastbn
from bench.data import Array, Inputs
from fastbn.kernels import numba_threads
from fastbn.kernels.numba_lanes import MEMORY, NUMBERS

try:
    from fastbn.kernels import _plan
except ImportError:  # built without a compiler
    _plan = None

_get, _put = NUMBERS[types.intp].get, NUMBERS[types.intp].put
# A job is a row of integers: where x, dy, out and a place for sums are; images, bytes of one and of the run of it that is
# cut, bytes of a unit; whether to stream; and what to do.
_X, _DY, _OUT, _SUM, _IMAGES, _IMAGE, _RUN, _EACH, _STREAMS, _DO = range(10)
_SUMS, _MAP = 1, 2
_PIECE = 1 << 16  # bytes of a unit where channels are not resident


def _unit_of(storage: str) -> Callable[[int, int], None]:
    """The work of a unit, on memory of one type; 16 bits go in pairs."""
    words = MEMORY[storage]
    load, store, write, splat, total, lanes, size = words.load, words.store, words.write, words.splat, words.total, words.lanes, words.size

    @numba.njit(inline="always")
    def read(address: int, count: int) -> float:
        a = b = c = d = splat(0.0)
        i = 0
        while i + 4 * lanes <= count:
            a = a + load(address, i)
            b = b + load(address, i + lanes)
            c = c + load(address, i + 2 * lanes)
            d = d + load(address, i + 3 * lanes)
            i += 4 * lanes
        while i + lanes <= count:
            a = a + load(address, i)
            i += lanes
        return total(a + b + c + d)

    @numba.njit(inline="always")
    def copy(x: int, dy: int, out: int, count: int, streams: int) -> None:
        last = count - lanes  # the first and the last block overlap what lies between: no tails
        if last < 0:
            return
        store(out, 0, load(x, 0) + load(dy, 0) if dy else load(x, 0))
        i = (-out & 63) // size if streams else 0
        while i <= last:
            write(out, i, load(x, i) + load(dy, i) if dy else load(x, i), lanes, streams)
            i += lanes
        store(out, last, load(x, last) + load(dy, last) if dy else load(x, last))

    def unit(job: int, number: int) -> None:
        image, each, images = _get(job, _IMAGE), _get(job, _EACH), _get(job, _IMAGES)
        start = number * each
        count = min(each, _get(job, _RUN) - start) // size
        x, dy, out = _get(job, _X), _get(job, _DY), _get(job, _OUT)
        do, streams = _get(job, _DO), _get(job, _STREAMS)
        if do & _SUMS:
            found = 0.0
            for n in range(images):
                found += read(x + n * image + start, count)
                if dy:
                    found += read(dy + n * image + start, count)
            _put(_get(job, _SUM), number & 7, np.int64(found != 0.0))
        if do & _MAP:
            for n in range(images - 1, -1, -1):
                at = n * image + start
                copy(x + at, dy + at if dy else 0, out + at, count, streams)

    return unit


@cache
def _compiled(storage: str) -> tuple[Any, Any]:
    made = numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")(_unit_of(storage))
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 2, *[ctypes.c_int64] * 2)(numba_threads.address())
    return run, made


def _call(op: str, inputs: Inputs, out: Array | None) -> Callable[[], Array] | None:
    x, dy = inputs.x, inputs.dy
    if out is None or _plan is None:
        return None
    channels = len(inputs.weight)
    planes = inputs.layout == "NCHW"
    outer, inner = (x.shape[0], x[0, 0].size) if planes else (x.size // channels, 1)
    threads = fastbn.get_num_threads() if x.nbytes >= 128 << 10 else 1
    plan = _plan.plan("normalize" if op == "inference" else op, (outer, channels, inner), x.itemsize, threads)
    run, made = _compiled("float64" if x.itemsize == 8 else "float32")
    sums = np.zeros(8, np.int64)
    units = plan["map"] or plan["sums"]  # one for both where a thread does both on what it has in its cache
    streams = int(units["nontemporal"])
    addresses = [x.ctypes.data, dy.ctypes.data if op == "backward" else 0, out.ctypes.data, sums.ctypes.data]

    def job(images: int, image: int, each: int, do: int) -> tuple[Array, int]:
        return np.array([*addresses, images, image, image, each, streams, do], np.int64), -(-image // each)

    if plan["resident"]:
        each = units["channels_per_unit"] * inner * x.itemsize
        if each < 128 * 8:
            return None  # too little for whole blocks
        steps = [(*job(outer, channels * inner * x.itemsize, each, _SUMS | _MAP), 0)]
    elif x.nbytes < 1024:
        return None
    else:  # whatever the pattern, memory is read from one end to the other
        steps = [(*job(1, x.nbytes, _PIECE, _MAP), int(op != "inference"))]
        if op != "inference":
            steps.insert(0, (*job(1, x.nbytes, _PIECE, _SUMS), 0))
    moves = [(made.address, ints.ctypes.data, units, threads, reverse, 3 * x.nbytes, 0) for ints, units, reverse in steps]

    def call() -> Array:
        for move in moves:
            run(*move)
        return out

    call.keep = steps, sums
    return call


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Array] | None:
    return _call("inference", inputs, out)


def forward(inputs: Inputs, out: Array | None) -> Callable[[], Array] | None:
    return _call("forward", inputs, out)


def backward(inputs: Inputs, out: Array | None) -> Callable[[], Array] | None:
    return _call("backward", inputs, out)
