"""Functions of NumPy arrays that XLA's programs call on the memory of their own tensors, without a copy.

`jax.pure_callback` makes an array of each argument and copies each result, which takes longer than the normalization. XLA
calls C functions of its "FFI" with a frame that says where tensors lie; ctypes makes such a function of a Python one, and what
stands here is the part of the frame's layout that it needs (``xla/ffi/api/c_api.h`` in the include files that jaxlib brings,
version 0: fields are only ever added at the ends of its structs).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from typing import Any

import jax
import numpy as np

from fastbn.dtypes import resolve
from fastbn.layout import Array

_DTYPES = {10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}  # XLA_FFI_DataType
_METADATA = 1  # XLA_FFI_Extension_Metadata
_INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL


class _Version(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _Extension(Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata)))


class _ErrorArguments(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int))


_CreateError = ctypes.CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))


class _Api(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extension", c_void_p), ("version", _Version), ("internal", c_void_p), ("create_error", _CreateError),
    )  # fmt: skip


class _Buffer(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extension", c_void_p), ("dtype", c_int), ("data", c_void_p), ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )  # fmt: skip


class _Buffers(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extension", c_void_p), ("size", c_int64), ("types", POINTER(c_int)),
        ("items", POINTER(POINTER(_Buffer))),
    )  # fmt: skip


class _Frame(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extension", POINTER(_Extension)), ("api", POINTER(_Api)), ("context", c_void_p), ("stage", c_int),
        ("arguments", _Buffers), ("results", _Buffers),
    )  # fmt: skip


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
_lock = threading.Lock()
_handlers: dict[str, Any] = {}  # which XLA may call for as long as the process lives


def _array(buffer: _Buffer) -> Array:
    dtype, shape = resolve(_DTYPES[buffer.dtype]), tuple(buffer.dims[: buffer.rank])
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    return np.frombuffer(memoryview((ctypes.c_char * size).from_address(buffer.data)), dtype).reshape(shape)


def _arrays(buffers: _Buffers) -> list[Array]:
    return [_array(buffers.items[i].contents) for i in range(buffers.size)]


def _handler(function: Callable[[list[Array], list[Array]], None]) -> Any:
    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        try:
            if frame.extension and frame.extension.contents.type == _METADATA:
                wanted = frame.extension.contents.metadata.contents.version
                wanted.major, wanted.minor = frame.api.contents.version.major, frame.api.contents.version.minor
                return None
            function(_arrays(frame.arguments), _arrays(frame.results))
        except BaseException as error:  # none may go through C
            text = f"{type(error).__name__}: {error}".encode()
            given = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, text, _INTERNAL)
            return frame.api.contents.create_error(ctypes.byref(given))  # type: ignore[no-any-return]
        return None

    return _Handler(handle)


def call(name: str, function: Callable[[list[Array], list[Array]], None], results: Any, *given: Any) -> Any:
    """Call a function of arrays from a program of XLA on the CPU.

    Parameters
    ----------
    name : str
        The function's, for all processes that may read a program which another one compiled.
    function : callable
        Of the arrays of the arguments, which it must not change, and of the results, which it fills.
    results : tuple of jax.ShapeDtypeStruct
    *given : array

    Returns
    -------
    tuple of array
    """
    with _lock:
        if name not in _handlers:
            handler = _handler(function)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
            _handlers[name] = handler
    return jax.ffi.ffi_call(name, results, vmap_method="sequential")(*given)


@cache
def works() -> bool:
    """Whether this JAX calls back as it is expected to; tried once, on a few numbers."""
    if not hasattr(jax, "ffi") or jax.default_backend() != "cpu":
        return False

    def doubled(arguments: list[Array], results: list[Array]) -> None:
        results[0][...] = 2.0 * arguments[0]

    try:
        with jax.ensure_compile_time_eval():
            x = np.arange(6, dtype=np.float32).reshape(2, 3)
            (found,) = jax.jit(lambda x: call("fastbn_try", doubled, (jax.ShapeDtypeStruct(x.shape, x.dtype),), x))(x)
            return bool((np.asarray(found) == 2.0 * x).all())
    except Exception:  # whatever it is, there is another way
        return False
