"""What all kernel modules have in common, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import core, reference
from fastbn.dispatch import TABLE, Kernel
from fastbn.dtypes import DTYPES

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
        saved = module.forward(x, y, w, b, 1e-5, *running, 0.3, 1, compute, 1)  # type: ignore[attr-defined]
        sums = module.backward(dy, x, dx, *saved[:2], saved[2], w, 1)  # type: ignore[attr-defined]
        module.inference(x, z, m, None, v, w, b, 1e-3, 1)  # type: ignore[attr-defined]
        return [a.tobytes() for a in (*saved, *running, *sums, y, z, dx)]

    assert whole(kernel.module()) == whole(core.Composed(kernel.module()))


@needs_simd
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 1, 6), (3, 40), (1, 7, 2, 3), (2, 6, 7, 4000)])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_plain_calls_equal_checked_ones(name: str, shape: tuple[int, ...], layout: str, given: bool) -> None:
    """Plain arrays take a path of their own, unless a kernel is pinned."""
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    selected = fastbn.dispatch.select(name).name
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(2, 3, shape).astype(dtype) for _ in range(2))
    axis = 1 if layout == "channels_first" else -1
    compute = np.float64 if dtype == np.float64 else np.float32
    w, b, m, v = (rng.uniform(0.5, 2, shape[axis]).astype(compute) for _ in range(4))

    def step() -> list[bytes]:
        found: list[Any] = []
        for vectors in ((w, b), (None, b), (None, None)):
            out = np.empty_like(x) if given else None
            running = m.copy(), v.copy()
            found.append(fastbn.batch_norm(x, m, v, *vectors, layout=layout, out=out))
            found.append(fastbn.batch_norm_elemt(x, m, v, *vectors, layout=layout))
            found.append(fastbn.batch_norm(x, *running, *vectors, training=True, layout=layout))
            y, saved = fastbn.batch_norm_forward(x, *vectors, *running, layout=layout, momentum=0.3, out=out)
            assert (y is out) == given
            found += [y.copy(), *running, saved.mean, saved.mean_lo, saved.invstd, saved.scale, saved.shift, saved.count]
            found += [*fastbn.batch_norm_backward(dy, x, saved, out=out)[:3]]
        return [np.asarray(a).tobytes() for a in found]

    with fastbn.use_kernel(selected):
        checked = step()
    taken = core.plain("normalize", x, layout, None, m, v, w, b, None)
    assert (taken is None) == (fastbn.dispatch.pinned() is not None)
    assert step() == checked


@needs_simd
def test_plain_calls_leave_what_is_not_plain_to_others() -> None:
    x, w = np.ones((2, 3, 4), np.float32), np.ones(3, np.float32)
    module = MODULES[0].module()
    assert module.plain_normalize(x, 1, None, 1, w, w, None, None, 1e-5) is not None
    for a in (x[:, :, ::2], x[:0], x.astype(">f4"), np.asfortranarray(x), x.view(np.recarray)):
        assert module.plain_normalize(a, 1, None, 1, w, w, None, None, 1e-5) is None
    for v in (None, [1.0] * 3, w.astype(np.float64), np.ones(4, np.float32), np.ones(6, np.float32)[::2], np.ones((1, 3), np.float32)):
        assert module.plain_normalize(x, 1, None, 1, v, w, None, None, 1e-5) is None
        assert module.plain_normalize(x, 1, None, 1, w, v, None, None, 1e-5) is None
        assert v is None or module.plain_forward(x, 1, None, 1, v, None, None, None, 0.1, 1, 1e-5) is None
    for axis in (-1, 0, 3):
        assert module.plain_normalize(x, axis, None, 1, w, w, None, None, 1e-5) is None
    locked = x.copy()
    locked.flags.writeable = False
    both = np.ones(25, np.float32)
    shifted = both[1:].reshape(2, 3, 4)
    for out in (locked, x[:1], np.ones((2, 3, 4)), shifted):
        assert module.plain_normalize(both[:24].reshape(2, 3, 4), 1, out, 1, w, w, None, None, 1e-5) is None
    assert module.plain_normalize(x, 1, None, 1, w, w, None, None, 1) is None
    assert module.plain_forward(x, 1, None, 1, None, None, None, None, 1, 1, 1e-5) is None
    assert module.plain_forward(x[:1, :, :1].copy(), 1, None, 1, None, None, None, None, 0.1, 1, 1e-5) is None
    fixed = w.copy()
    fixed.flags.writeable = False
    assert module.plain_forward(x, 1, None, 1, None, None, fixed, None, 0.1, 1, 1e-5) is None
    assert module.plain_backward(x, 1, None, 1, None, w, None, w, w) is None
    assert module.plain_backward(x, 1, None, 1, x[:1], w, None, w, w) is None


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
