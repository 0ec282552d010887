"""fastbn, through its public functions."""

from __future__ import annotations

from collections.abc import Callable

import fastbn
from bench.data import Array, Inputs


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    x, _, weight, bias, mean, var, eps, layout = inputs
    return lambda: fastbn.batch_norm(x, mean, var, weight, bias, eps=eps, layout=layout, out=out)


def forward(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    x, _, weight, bias, mean, var, eps, layout = inputs
    mean, var = mean.copy(), var.copy()  # training updates them
    return lambda: fastbn.batch_norm_forward(x, weight, bias, mean, var, eps=eps, layout=layout, out=out)[0]


def backward(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    x, dy, weight, bias, _, _, eps, layout = inputs
    _, saved = fastbn.batch_norm_forward(x, weight, bias, eps=eps, layout=layout)
    return lambda: fastbn.batch_norm_backward(dy, x, saved, out=out).dx
