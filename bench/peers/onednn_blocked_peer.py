"""oneDNN on its own layout, channels in blocks of a register: what its convolutions give it. Data are put there beforehand."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_char_p, c_int64, c_void_p
from functools import cache

import numpy as np

import fastbn
from bench.data import Array, Inputs
from bench.peers.onednn_peer import _TYPES, Bound, _check, bind, library, version

__all__ = ["array", "backward", "forward", "inference", "library", "version"]


def _block() -> int:
    return 16 if "avx512f" in fastbn.show_config()["processor"]["features"] else 8


@cache
def _tag(name: bytes) -> int:
    text = library().dnnl_fmt_tag2str
    text.restype = c_char_p
    return next(number for number in range(1000) if text(number) == name)


def _to_blocks(a: Array, block: int) -> Array:
    n, c, h, w = a.shape
    return np.ascontiguousarray(a.reshape(n, c // block, block, h, w).transpose(0, 1, 3, 4, 2))


def array(result: Bound, inputs: Inputs) -> Array:
    return np.ascontiguousarray(result.result.transpose(0, 1, 4, 2, 3)).reshape(inputs.x.shape)


def _call(op: str, inputs: Inputs) -> Bound | None:
    x, block = inputs.x, _block()
    if inputs.layout != "NCHW" or x.shape[1] % block or x.dtype.name not in _TYPES:
        return None
    descriptor, dims = c_void_p(), (c_int64 * 4)(*x.shape)
    tag = _tag(f"aBcd{block}b".encode())
    _check(library().dnnl_memory_desc_create_with_tag(byref(descriptor), 4, dims, _TYPES[x.dtype.name], tag))
    blocks, dy = (_to_blocks(a, block) for a in (x, inputs.dy))
    return bind(op, inputs, blocks, dy, np.empty_like(blocks), descriptor)


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Bound] | None:
    return _call("inference", inputs)


def forward(inputs: Inputs, out: Array | None) -> Callable[[], Bound] | None:
    return _call("forward", inputs)


def backward(inputs: Inputs, out: Array | None) -> Callable[[], Bound] | None:
    return _call("backward", inputs)
