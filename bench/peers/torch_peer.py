"""PyTorch, through the operators that autograd calls, on the same memory.

NHWC arrays are what PyTorch calls the channels_last memory format. Its backward has no form that writes into a given
array, so it makes new outputs either way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastbn
from bench.data import Array, Inputs

Tensor = torch.Tensor


def tensor(a: Array, layout: str) -> Tensor:
    """Wrap an array's memory in a tensor of shape (N, C, H, W)."""
    # bfloat16 comes from a package that PyTorch does not know.
    tensor = torch.from_numpy(a.view("u2")).view(torch.bfloat16) if a.dtype.name == "bfloat16" else torch.from_numpy(a)
    return tensor.permute(0, 3, 1, 2) if layout == "NHWC" else tensor


def array(result: Tensor, inputs: Inputs) -> Array:
    """The tensor's memory as an array in the layout of x; 16-bit values of a package that PyTorch does not know included."""
    last = result.permute(0, 2, 3, 1) if inputs.layout == "NHWC" else result
    if result.dtype == torch.bfloat16:
        return last.contiguous().view(torch.int16).numpy().view(inputs.x.dtype)
    return last.contiguous().numpy()


def _prepare(inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Wrap x and the four vectors; give PyTorch as many threads as fastbn has."""
    torch.set_num_threads(fastbn.get_num_threads())
    return tensor(inputs.x, inputs.layout), [torch.from_numpy(v.copy()) for v in inputs[2:6]]


def _call(inputs: Inputs, out: Array | None, training: bool) -> Callable[[], Tensor]:
    x, (weight, bias, mean, var) = _prepare(inputs)
    if out is None:
        return lambda: torch.batch_norm(x, weight, bias, mean, var, training, 0.1, inputs.eps, False)
    y, write = tensor(out, inputs.layout), torch.ops.aten.native_batch_norm.out
    save_mean, save_invstd = torch.empty(2, len(mean) if training else 0, dtype=mean.dtype)
    return lambda: write(x, weight, bias, mean, var, training, 0.1, inputs.eps, out=y, save_mean=save_mean, save_invstd=save_invstd)[0]


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Tensor]:
    return _call(inputs, out, training=False)


def forward(inputs: Inputs, out: Array | None) -> Callable[[], Tensor]:
    return _call(inputs, out, training=True)


def backward(inputs: Inputs, out: Array | None) -> Callable[[], Tensor]:
    x, (weight, _, mean, var) = _prepare(inputs)
    dy, call = tensor(inputs.dy, inputs.layout), torch.ops.aten.native_batch_norm_backward
    _, save_mean, save_invstd = torch.native_batch_norm(x, weight, None, None, None, True, 0.1, inputs.eps)
    return lambda: call(dy, x, weight, mean, var, save_mean, save_invstd, True, inputs.eps, [True, True, True])[0]
