"""What all kernel modules have in common, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import fastbn
from fastbn import core, reference
from fastbn.dispatch import TABLE, Kernel

MODULES = [k for k in TABLE if k.level is not None and not k.unusable()]
OPERATIONS = ["stats", "normalize", "grad_sums", "grad_input"]
needs_simd = pytest.mark.skipif(not MODULES, reason="built without a compiler")


def names(kernel: Kernel) -> set[str]:
    return {name for name in dir(kernel.module()) if not name.startswith("_")}


@needs_simd
def test_all_modules_export_the_same_names() -> None:
    assert len({frozenset(names(kernel)) for kernel in MODULES}) == 1
    assert {*OPERATIONS, "inference", "forward", "backward", "plan", "set_caches"} <= names(MODULES[0])
    assert all(hasattr(reference, operation) for operation in OPERATIONS)


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
@pytest.mark.parametrize("shape", [(3, 5, 7), (9, 33, 1), (2, 64, 100)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whole_calls_equal_composed_ones(kernel: Kernel, shape: tuple[int, int, int], dtype: str) -> None:
    """The algebra in C and the one in NumPy give the same bits."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(100, 3, shape).astype(dtype) for _ in range(2))
    compute = np.dtype(dtype)
    w, b, m, v = (rng.uniform(0.5, 2, shape[1]).astype(compute) for _ in range(4))

    def whole(module: object) -> list[bytes]:
        y, z, dx = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        running = m.copy(), v.copy()
        saved = module.forward(x, y, w, b, 1e-5, *running, 0.3, compute, 1)  # type: ignore[attr-defined]
        sums = module.backward(dy, x, dx, *saved[:2], saved[2], w, 1)  # type: ignore[attr-defined]
        module.inference(x, z, m, None, v, w, b, 1e-3, 1)  # type: ignore[attr-defined]
        return [a.tobytes() for a in (*saved, *running, *sums, y, z, dx)]

    assert whole(kernel.module()) == whole(core.Composed(kernel.module()))


@needs_simd
def test_modules_check_their_arguments() -> None:
    """What a wrong call from Python could do to memory is refused."""
    module = MODULES[0].module()
    x = np.ones((2, 3, 4), np.float32)
    w = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="C-contiguous"):
        module.stats(x[:, :, ::2])
    with pytest.raises(ValueError, match="not empty"):
        module.stats(x[:0])
    with pytest.raises(ValueError, match="one shape and dtype"):
        module.normalize(x, np.ones((2, 3, 5), np.float32), w, w, w)
    with pytest.raises(ValueError, match="one shape and dtype"):
        module.normalize(x, np.ones((2, 3, 4)), w, w, w)
    with pytest.raises(ValueError, match="vector of 3 channels"):
        module.normalize(x, x, w, np.ones(3), w)
    with pytest.raises(ValueError, match="vector of 3 channels"):
        module.normalize(x, x, w, w, np.ones(4, np.float32))
    with pytest.raises(TypeError, match="no SIMD kernel for dtype int32"):
        module.stats(np.ones((2, 3, 4), np.int32))


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_environment_pins_a_kernel(kernel: Kernel) -> None:
    code = "import numpy as np, fastbn; print(fastbn.explain('stats', np.ones((2, 3, 4), 'f')))"
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "FASTBN_KERNEL": kernel.name}, capture_output=True, text=True)
    assert f"kernel {kernel.name}" in result.stdout


@needs_simd
def test_explain_names_tiles_and_traffic() -> None:
    x = np.ones((32, 64, 56, 56), np.float32)
    with fastbn.use_kernel(MODULES[0].name):
        text = fastbn.explain("forward", x)
    for word in ("forward_ncsp_f32", "threads", "tiles", "units", "streaming", "traffic"):
        assert word in text
