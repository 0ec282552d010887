"""oneDNN, through its C interface: plain layouts, where the data lie. ``pip install onednn-cpu-gomp`` brings the library.

Other wheels of oneDNN, or a library of the system, do as well, if their threads are OpenMP's or TBB's; FASTBN_BENCH_DNNL may name
the file. Its batch norm does not update running statistics, which is work that all others do.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from bench.data import Array, Inputs

_PLACES = ("lib/libdnnl.so.3", "lib64/libdnnl.so.3")
_RUNTIMES = {1: "sequential", 2: "OpenMP", 4: "TBB"}
_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
_TRAINING, _INFERENCE, _BACKWARD = 64, 96, 128
_GLOBAL_STATISTICS, _SCALE, _SHIFT = 1, 2, 4
_SRC, _DST, _MEAN, _VARIANCE, _SCALES, _SHIFTS, _DIFF_SRC, _DIFF_DST, _DIFF_SCALES, _DIFF_SHIFTS = 1, 17, 49, 50, 51, 52, 129, 145, 255, 256


class _Version(ctypes.Structure):
    _fields_ = [
        ("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", c_char_p), ("cpu_runtime", c_uint), ("gpu_runtime", c_uint),
    ]  # fmt: skip


class _Argument(ctypes.Structure):
    _fields_ = [("number", c_int), ("memory", c_void_p)]


@cache
def library() -> Any:
    """The library, or None where there is none that runs on plain threads."""
    named = os.environ.get("FASTBN_BENCH_DNNL")
    for path in [Path(named)] if named else [Path(sys.prefix) / place for place in _PLACES]:
        try:
            found = ctypes.CDLL(str(path))
        except OSError:
            continue
        found.dnnl_version.restype = POINTER(_Version)
        if found.dnnl_version().contents.cpu_runtime in _RUNTIMES:
            return found
    return None


def version() -> str:
    v = library().dnnl_version().contents
    return f"{v.major}.{v.minor}.{v.patch} ({_RUNTIMES[v.cpu_runtime]})"


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"oneDNN says {status}")


@cache
def _engine() -> tuple[c_void_p, c_void_p]:
    engine, stream = c_void_p(), c_void_p()
    _check(library().dnnl_engine_create(byref(engine), 1, ctypes.c_size_t(0)))
    _check(library().dnnl_stream_create(byref(stream), engine, 1))
    return engine, stream


def _set_threads(n: int) -> None:
    if library().dnnl_version().contents.cpu_runtime == 2:
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(n)


class Bound:
    """A primitive with its memory: called, it runs. What it says of itself is `name`."""

    def __init__(self, primitive_desc: c_void_p, memories: Sequence[tuple[int, c_void_p]], keep: Sequence[object], result: Array):
        d, (_, self._stream) = library(), _engine()
        self._primitive, self._keep, self.result = c_void_p(), keep, result
        _check(d.dnnl_primitive_create(byref(self._primitive), primitive_desc))
        name = c_char_p()
        d.dnnl_primitive_desc_query(primitive_desc, 8, 0, byref(name))  # impl_info_str
        self.name = (name.value or b"").decode()
        self._arguments = (_Argument * len(memories))(*(_Argument(number, memory) for number, memory in memories))
        self._count = len(memories)
        self._run = d.dnnl_primitive_execute
        self._run.argtypes = [c_void_p, c_void_p, c_int, c_void_p]
        self._wait = d.dnnl_stream_wait
        self._wait.argtypes = [c_void_p]

    def __call__(self) -> Bound:
        """Run, and wait for the end."""
        self._run(self._primitive, self._stream, self._count, self._arguments)
        self._wait(self._stream)
        return self


def plain(inputs: Inputs) -> c_void_p:
    """Describe x as it lies."""
    x, descriptor = inputs.x, c_void_p()
    shape = x.shape if inputs.layout == "NCHW" else (x.shape[0], x.shape[3], *x.shape[1:3])
    steps = x.strides if inputs.layout == "NCHW" else (x.strides[0], x.strides[3], *x.strides[1:3])
    dims, strides = (c_int64 * 4)(*shape), (c_int64 * 4)(*(step // x.itemsize for step in steps))
    _check(library().dnnl_memory_desc_create_with_strides(byref(descriptor), 4, dims, _TYPES[x.dtype.name], strides))
    return descriptor


def memory(descriptor: c_void_p, array: Array) -> c_void_p:
    """Memory of oneDNN's over an array."""
    made = c_void_p()
    _check(library().dnnl_memory_create(byref(made), descriptor, _engine()[0], c_void_p(array.ctypes.data)))
    return made


def _vector(values: Array) -> tuple[c_void_p, Array]:
    descriptor, dims, strides = c_void_p(), (c_int64 * 1)(len(values)), (c_int64 * 1)(1)
    values = np.ascontiguousarray(values, np.float32).copy()
    _check(library().dnnl_memory_desc_create_with_strides(byref(descriptor), 1, dims, 3, strides))
    return memory(descriptor, values), values


def bind(op: str, inputs: Inputs, x: Array, dy: Array, out: Array, descriptor: c_void_p) -> Bound | None:
    """A call on arrays that lie as a descriptor says; None where oneDNN has none."""
    d, (engine, _) = library(), _engine()
    _set_threads(fastbn.get_num_threads())
    flags, eps = _SCALE | _SHIFT, c_float(inputs.eps)
    forward_desc, made = c_void_p(), c_void_p()
    kind = _INFERENCE if op == "inference" else _TRAINING
    flags |= _GLOBAL_STATISTICS if op == "inference" else 0
    create = d.dnnl_batch_normalization_forward_primitive_desc_create
    if create(byref(forward_desc), engine, kind, descriptor, descriptor, eps, flags, None):
        return None
    weight, bias, mean, var = (_vector(v) for v in inputs[2:6])
    source, target = memory(descriptor, x), memory(descriptor, out)
    ahead = [(_SRC, source), (_DST, target), (_MEAN, mean[0]), (_VARIANCE, var[0]), (_SCALES, weight[0]), (_SHIFTS, bias[0])]
    keep = [weight, bias, mean, var, x, dy, out]
    run = Bound(forward_desc, ahead, keep, out)
    if op != "backward":
        return run
    run()  # finds the statistics
    backward_create = d.dnnl_batch_normalization_backward_primitive_desc_create
    if backward_create(byref(made), engine, _BACKWARD, descriptor, descriptor, descriptor, eps, flags, forward_desc, None):
        return None
    dweight, dbias = (_vector(np.zeros_like(v)) for v in inputs[2:4])
    back = [
        (_SRC, source), (_MEAN, mean[0]), (_VARIANCE, var[0]), (_SCALES, weight[0]), (_DIFF_DST, memory(descriptor, dy)),
        (_DIFF_SRC, target), (_DIFF_SCALES, dweight[0]), (_DIFF_SHIFTS, dbias[0]),
    ]  # fmt: skip
    return Bound(made, back, [*keep, dweight, dbias], out)


def array(result: Bound, inputs: Inputs) -> Array:
    return result.result


def _call(op: str, inputs: Inputs, out: Array | None) -> Bound | None:
    if out is None or inputs.x.dtype.name not in _TYPES:
        return None
    return bind(op, inputs, inputs.x, inputs.dy, out, plain(inputs))


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Bound] | None:
    return _call("inference", inputs, out)


def forward(inputs: Inputs, out: Array | None) -> Callable[[], Bound] | None:
    return _call("forward", inputs, out)


def backward(inputs: Inputs, out: Array | None) -> Callable[[], Bound] | None:
    return _call("backward", inputs, out)
