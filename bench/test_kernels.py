"""The operations alone, for pytest-benchmark: ``pytest bench`` (``--benchmark-group-by=param:shape`` compares them)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import fastbn
from bench.cases import Case
from bench.data import DTYPES, inputs

pytest.importorskip("pytest_benchmark")

# Below the size where threads start; within a second-level cache share; within the last level; beyond it.
SHAPES = [(1, 512, 7, 7), (1, 128, 28, 28), (1, 256, 56, 56), (32, 64, 56, 56)]
PATTERNS = {"ncsp": "NCHW", "nspc": "NHWC"}
KERNELS = [
    pytest.param(op, pattern, dtype, id=f"{op}_{pattern}_{dtype}")
    for op in ("stats", "normalize", "forward", "backward")
    for pattern in PATTERNS
    for dtype in DTYPES
]


def _call(op: str, shape: tuple[int, int, int, int], pattern: str, dtype: str) -> Callable[[], object]:
    layout = PATTERNS[pattern]
    x, dy, weight, bias, mean, var, eps, _ = inputs(Case("resnet50", "bn1", shape, 1), layout, dtype)
    out = np.empty_like(x)
    _, saved = fastbn.batch_norm_forward(x, weight, bias, eps=eps, layout=layout)
    calls = {
        "stats": lambda: fastbn.batch_norm_stats(x, layout=layout),
        "normalize": lambda: fastbn.batch_norm(x, mean, var, weight, bias, eps=eps, layout=layout, out=out),
        "forward": lambda: fastbn.batch_norm_forward(x, weight, bias, eps=eps, layout=layout, out=out),
        "backward": lambda: fastbn.batch_norm_backward(dy, x, saved, out=out),
    }
    return calls[op]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("op", "pattern", "dtype"), KERNELS)
def test_kernel(benchmark, op, pattern, dtype, shape):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    benchmark(_call(op, shape, pattern, dtype))
