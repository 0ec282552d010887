"""PyTorch's torch.compile: the code that it makes of the operators, for exactly these shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.data import Array, Inputs
from bench.peers.torch_peer import _prepare, array, tensor

__all__ = ["array", "backward", "forward", "inference", "version"]

torch._dynamo.config.recompile_limit = 10_000  # every row is a shape of its own


def version() -> str:
    return torch.__version__


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _forward(inputs: Inputs, training: bool) -> Callable[[], object]:
    x, vectors = _prepare(inputs)
    eps = inputs.eps
    run = _compiled(
        lambda x, weight, bias, mean, var: torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.1, eps)
    )

    def call() -> object:
        with torch.no_grad():
            return run(x, *vectors)

    return call


def inference(inputs: Inputs, out: Array | None) -> Callable[[], object]:
    return _forward(inputs, training=False)


def forward(inputs: Inputs, out: Array | None) -> Callable[[], object]:
    return _forward(inputs, training=True)


def backward(inputs: Inputs, out: Array | None) -> Callable[[], object]:
    x, (weight, _, mean, var) = _prepare(inputs)
    dy, eps = tensor(inputs.dy, inputs.layout), inputs.eps
    _, save_mean, save_invstd = torch.native_batch_norm(x, weight, None, None, None, True, 0.1, eps)
    operator = torch.ops.aten.native_batch_norm_backward
    run = _compiled(lambda dy, x, w, m, v, sm, si: operator(dy, x, w, m, v, sm, si, True, eps, [True, True, True]))

    def call() -> object:
        with torch.no_grad():
            return run(dy, x, weight, mean, var, save_mean, save_invstd)[0]

    return call
