"""fastbn's FrozenBatchNorm, which knows inference alone."""

from __future__ import annotations

from collections.abc import Callable

import fastbn
from bench.data import Array, Inputs


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    x, _, weight, bias, mean, var, eps, layout = inputs
    layer = fastbn.FrozenBatchNorm(mean, var, weight, bias, eps=eps, layout=layout)
    return lambda: layer(x, out=out)
