"""The operations and their peers, for pytest-benchmark: ``pytest bench``.

Each operation, shape, layout and dtype is a group, in which the contenders stand beside each other. ``--benchmark-autosave``
keeps a run, and ``--benchmark-compare --benchmark-compare-fail=median:20%`` holds the next one against it, as in CI:
``pytest bench -k "fastbn and float32"``.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from bench.cases import Case
from bench.data import DTYPES, LAYOUTS, inputs
from bench.peers import BY_NAME, OPS

pytest.importorskip("pytest_benchmark")

# Below the size where threads start; within a second-level cache share; within the last level; beyond it.
SHAPES = [(1, 512, 7, 7), (1, 128, 28, 28), (1, 256, 56, 56), (32, 64, 56, 56)]
CONTENDERS = [name for name in ("copy", "fastbn", "fastbn fresh", "numpy", "torch", "torch fresh") if BY_NAME[name].installed()]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_contender(benchmark, contender, op, layout, dtype, shape):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    given = inputs(Case("resnet50", "bn1", shape, 1), layout, dtype)
    call = BY_NAME[contender].call(op, given, np.empty_like(given.x))
    if call is None:
        pytest.skip(f"{contender} does not take it")
    benchmark.group = f"{op} {'x'.join(map(str, shape))} {layout} {dtype}"
    benchmark(call)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_stats(benchmark, layout, dtype, shape):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = inputs(Case("resnet50", "bn1", shape, 1), layout, dtype).x
    benchmark.group = f"stats {'x'.join(map(str, shape))} {layout} {dtype}"
    benchmark(fastbn.batch_norm_stats, x, layout=layout)
