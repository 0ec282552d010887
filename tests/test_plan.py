"""How calls are cut: every element once, and numeric tiles by the shape alone."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ways import is_direct

import fastbn
from fastbn import activations, cpu
from fastbn.dispatch import TABLE, Kernel
from fastbn.kernels.protocol import Affine, Running
from fastbn.tables import counted

plans = pytest.importorskip("fastbn.kernels._plan", reason="built without a compiler")

MODULES = [kernel for kernel in TABLE if kernel.level is not None and not kernel.unusable()]
CACHES = {"usual": (32 << 10, 512 << 10, 8 << 20), "tiny": (512, 2048, 4096), "huge": (1 << 20, 1 << 26, 1 << 30)}
TILES = ("count", "tiles", "width", "images", "pieces", "piece", "columns", "repeats", "run")
SHAPES = [
    (1, 1, 1), (1, 1, 100_000), (2, 3, 5), (7, 5, 1), (40, 3, 9), (33, 32, 49), (3, 17, 784), (64, 8, 1), (1000, 3, 1), (300, 129, 1),
    (5, 2, 20_000), (2, 64, 4096), (129, 33, 31), (1, 4096, 1), (700, 64, 1),
]  # fmt: skip


@pytest.fixture(params=CACHES)
def caches(request: pytest.FixtureRequest) -> Any:
    plans.set_caches(*CACHES[request.param])
    yield request.param
    plans.set_caches(*cpu.caches())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_numeric_tiles_depend_on_the_shape_alone(shape: tuple[int, int, int]) -> None:
    found = set()
    try:
        for sizes, threads, op in product(CACHES.values(), (1, 2, 64), plans.TRAFFIC):
            plans.set_caches(*sizes)
            plan = plans.plan(op, shape, 4, threads)
            found.add(tuple(plan[name] for name in TILES))
            assert plan == plans.plan(op, shape, 4, threads)
    finally:
        plans.set_caches(*cpu.caches())
    assert len(found) == 1


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_tiles_hold_every_value_once(shape: tuple[int, int, int]) -> None:
    outer, channels, inner = shape
    plan = plans.plan("stats", shape, 4, 1)
    if plan["sums"]["by_columns"]:
        assert plan["sums"]["rows"] * plan["columns"] + plan["sums"]["tail_columns"] == outer * channels * inner
        assert plan["columns"] == plan["repeats"] * channels * plan["run"]
    else:
        assert plan["piece"] * (plan["pieces"] - 1) < inner <= plan["piece"] * plan["pieces"]
        whole = plan["tiles"] // plan["pieces"]
        assert plan["images"] * (whole - 1) < outer <= plan["images"] * whole
    assert plan["count"] == outer * inner


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_every_element_is_summed_and_mapped_once(
    kernel: Kernel, shape: tuple[int, int, int], dtype: str, threads: int, caches: str
) -> None:
    """In place, an element that is mapped twice is one too large; sums of small integers are exact."""
    module, (outer, channels, inner) = kernel.module(), shape
    one, zero = np.ones(channels, dtype), np.zeros(channels, dtype)
    r = np.random.default_rng(0)
    x, dy = (r.integers(0, 4, shape).astype(dtype) for _ in range(2))
    for start in (0, 1):  # where the output starts decides where its cache lines do
        memory = np.empty(x.size + start, dtype)[start:].reshape(shape)
        memory[...] = x
        module.normalize(memory, memory, zero, one, one, threads)
        assert np.array_equal(memory, x + 1)
        memory[...] = dy
        module.grad_input(memory, x, memory, zero, one, (one, zero), threads)
        assert np.array_equal(memory, dy - 1)
    sums = module.grad_sums(dy, x, zero, threads)
    assert np.array_equal(sums[0], dy.sum((0, 2), np.float64))
    assert np.array_equal(sums[1], (x * dy).sum((0, 2), np.float64))
    if outer * inner > 1:
        made = module.forward(x, np.empty_like(x), Affine(), 1.0, Running(None, None, 0.0, 1), np.dtype(dtype), threads)
        mean = module.stats(x, threads)[0]
        assert np.allclose(mean, x.mean((0, 2), np.float64), rtol=1e-7, atol=0)
        assert np.array_equal(made[0], mean.astype(dtype))


@pytest.mark.parametrize("dims", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (-2, 3, 4), (1 << 40,) * 3], ids=str)
def test_there_is_no_plan_for_nothing_nor_for_more_than_there_can_be(dims: tuple[int, int, int]) -> None:
    """C would divide by zero."""
    for shape, itemsize in ((dims, 4), ((2, 3, 4), 0), ((2, 3, 4), -4), ((1, 1, 1), 1 << 62)):
        with pytest.raises(ValueError, match="at most"):
            plans.plan("forward", shape, itemsize, 1)


@pytest.mark.parametrize("op", ["normalize", "forward", "backward"])
def test_large_outputs_are_streamed(op: str) -> None:
    """Outputs of their own, larger than any cache."""
    for inner in (112 * 112, 1):
        for outer, streamed in ((1 << 20, True), (2, False)):
            plan = plans.plan(op, (outer, 64, inner), 4, 2)
            assert (plan["map"] or plan["sums"])["nontemporal"] is streamed
    for inner in (31, 32):  # elements of a plane, and of a block
        plan = plans.plan(op, (8, 1 << 20, inner), 4, 2)
        assert (plan["map"] or plan["sums"])["nontemporal"] is (inner >= 32)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_outputs_are_asked_for_early_where_they_stay_near(op: str) -> None:
    """Not those of a channel that is large for the second-level cache, nor what is streamed."""
    shapes = {
        (8, 320, 64): True, (1, 320, 64): True, (8, 64, 4096): True, (8, 64, 8192): False, (8192, 64, 64): False,
        (64, 65536, 64): False,
    }  # fmt: skip
    try:
        plans.set_caches(32 << 10, 1 << 20, 32 << 20)
        found = {shape: plans.plan(op, shape, 4, 1)["sums"]["early"] for shape in shapes}
        assert plans.plan(op, (64, 1024, 1), 4, 2, True)["sums"]["early"]
    finally:
        plans.set_caches(*cpu.caches())
    assert found == shapes
    assert not plans.plan("stats", (8, 320, 64), 4, 1)["sums"]["early"]


@pytest.mark.parametrize("op", ["normalize", "forward", "backward"])
@pytest.mark.parametrize("rows", [1, 64, 225, 8192])
def test_threads_write_rows_of_their_own(op: str, rows: int) -> None:
    """However few they are: threads that share rows fetch each other's lines. But not to start a host's threads twice in training."""
    plan, hosted = plans.plan(op, (rows, 1024, 1), 4, 2), plans.plan(op, (rows, 1024, 1), 4, 2, True)
    assert not plan["resident"]
    assert plan["map"]["channels_per_unit"] == 1024 or rows == 1
    assert hosted["resident"] == (op != "normalize" and rows <= 256)
    assert plans.plan(op, (rows, 1024, 1), 4, 1, True) == plans.plan(op, (rows, 1024, 1), 4, 1)


@pytest.mark.parametrize("op", ["stats", "normalize", "forward", "backward"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_explain_prints_the_plan(op: str, layout: Any) -> None:
    x = np.zeros((4, 40, 50, 60), np.float32)
    dims = (4, 40, 3000) if layout == "NCHW" else (8000, 60, 1)
    if not MODULES or not is_direct(fastbn.batch_norm_stats, x):
        pytest.skip("no compiled kernel runs here by itself")
    with fastbn.num_threads(2):
        plan, text = plans.plan(op, dims, 4, 2), fastbn.explain(op, x, layout)
    last = plan["map"] or plan["sums"]
    assert f"{counted(plan['tiles'], 'tile')} of" in text
    assert f"{last['units']}" in text.split("units: ")[1].split("\n")[0]
    assert f"streaming: {'yes' if last['nontemporal'] else 'no'}" in text


def test_the_numba_kernels_count_with_the_same_numbers() -> None:
    """Their constants are those of the compiled kernels by name and value, but for the caches, and so are their activations' codes."""
    numba = pytest.importorskip("fastbn.kernels.numba", reason="Numba is not installed")
    sources = (Path(__file__).parents[1] / "fastbn" / "kernels" / name for name in ("plan.hpp", "_plan.pyx", "simd/tiles.pxi"))
    text = "\n".join(path.read_text() for path in sources)
    theirs = dict(re.findall(r"^ *(?:constexpr std::ptrdiff_t )?([A-Z]+(?:_[A-Z]+)*) *= *(\d+)\b", text, re.MULTILINE))
    shared = sorted(name for name in theirs if hasattr(numba, name))
    assert {"BATCH", "BLOCK", "CHAIN", "COLUMNS", "FEW_VALUES", "LONG_ROW", "MANY_ROWS", "PLANES", "TILE", "TILE_ROWS"} <= set(shared)
    assert {name: getattr(numba, name) for name in shared} == {name: int(theirs[name]) for name in shared}
    assert tuple(numba.FUNCTIONS) == activations.NAMES
