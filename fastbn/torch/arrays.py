"""Tensors as NumPy arrays of the same memory, for the parts of fastbn.torch that are written over the NumPy API.

`Tensor.numpy()` would make the storage unresizable for good; nothing here leaves a trace at the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbn.dtypes import resolve
from fastbn.layout import Array
from fastbn.memory import ask_for_large_pages
from fastbn.threads import num_threads

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # the orders of memory that torch has a name for, by dimensions
TYPES = {torch.float32: "<f4", torch.float64: "<f8", torch.float16: "<f2", torch.bfloat16: "<V2"}


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor lies in one of these orders; one may be contiguous, too."""
    return tensor.dim() in LAST and tensor.is_contiguous(memory_format=LAST[tensor.dim()])


class _Memory:
    """What NumPy reads an array from; it keeps the tensor alive."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        size, address = tensor.element_size(), tensor.data_ptr()
        if address == 0:
            raise TypeError(f"fastbn reads values in this process's memory, where a {type(tensor).__name__} has none")
        self.__array_interface__ = {
            "version": 3, "data": (address, False), "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()), "typestr": TYPES[tensor.dtype],
        }  # fmt: skip


def computable(tensor: Tensor) -> Tensor:
    """The tensor itself where NumPy knows its dtype; else, for bfloat16 without ml_dtypes, a copy in float32."""
    if tensor.dtype is torch.bfloat16:
        try:
            resolve("bfloat16")
        except TypeError:
            return tensor.float()
    return tensor


def array_of(tensor: Tensor) -> Array:
    """The memory of a strided tensor on the CPU, with the same shape and strides; of its values alone, not of their history.

    Where a tensor's memory does not hold its values, as in the imaginary part of a conjugate, it is that of a copy.
    """
    functorch: Any = torch._C._functorch
    if functorch.is_legacy_batchedtensor(tensor) or functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError("fastbn reads one tensor at a time here, and not many as one: is_grads_batched and vectorize must be False")
    if tensor.numel() == 0:
        return np.empty(tuple(tensor.shape), resolve(str(tensor.dtype).removeprefix("torch.")))
    known: Any = tensor.detach().resolve_neg()
    array: Array = np.asarray(_Memory(known.clone() if known._is_zerotensor() else known))
    return array.view(resolve("bfloat16")) if tensor.dtype is torch.bfloat16 else array


def new_like(tensor: Tensor) -> tuple[Tensor, Array]:
    """An output for what is computed from a tensor, and its memory; new and large memory in large pages."""
    made = torch.empty_like(tensor)
    array = array_of(made)
    ask_for_large_pages(made.data_ptr(), array.nbytes)
    return made, array


_disabled: dict[Any, Any] = {}


def eagerly(function: Any, *arguments: Any) -> Any:
    """Call a function that works on arrays, which torch.compile must not look into."""
    if not torch.compiler.is_compiling():
        return function(*arguments)
    if function not in _disabled:  # to disable takes the import of the compiler, which is there now
        _disabled[function] = torch.compiler.disable(function)  # type: ignore[no-untyped-call, unused-ignore]
    return _disabled[function](*arguments)


def on_torchs_threads() -> AbstractContextManager[None]:
    """As many threads as torch would take: where several processes share a machine, that is where it is said."""
    return num_threads(torch.get_num_threads())


def vector(tensor: Tensor | None) -> Array | None:
    """Values of a parameter or a buffer, in float64 or float32; its own memory where it is in one of these."""
    if tensor is None:
        return None
    known: Any = tensor.detach()
    return array_of(known if known.dtype in (torch.float32, torch.float64) else known.float())


def overwrite(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write values to tensors, where torch counts it: to all of them or, after an error or Ctrl-C, to none."""
    new = list(values)
    old = [(tensor, tensor.clone()) for tensor, _ in new]
    try:
        _write(new)
    except BaseException:
        _write(old)
        raise


def _write(values: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in values:
        # Kernels write to tensors of inference mode everywhere; in Python that is allowed there only.
        with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
            tensor.copy_(value)


def unreadable(tensors: Mapping[str, Tensor | None]) -> str:
    """Why values of tensors cannot be read where a call runs, or nothing."""
    if torch._C._are_functorch_transforms_active():
        return "inside of torch.func's transforms"
    jit: Any = torch.jit  # it has no types
    if jit.is_tracing():
        return "while torch.jit traces or torch.export exports"
    if torch.autograd.forward_ad._current_level >= 0:
        return "in forward-mode differentiation"
    modes: Any = torch._C
    keys = modes._TorchDispatchModeKey
    if any(modes._get_dispatch_mode(mode) is not None for mode in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)):
        return "where torch records operations"
    for name, t in tensors.items():
        if t is None:
            continue
        if type(t) not in (Tensor, torch.nn.Parameter):
            return f"with {name} of type {type(t).__name__}"
        if t.device.type != "cpu" or t.layout is not torch.strided or t.is_nested or t.dtype not in TYPES:
            return f"with {name} of {t.dtype} and {'nested' if t.is_nested else t.layout} on {t.device}"
    return ""
