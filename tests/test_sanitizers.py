"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, for odd sizes at odd addresses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = "-fsanitize=address,undefined"

# Arrays end where their memory ends and start one element late: an element too far is a finding.
SCRIPT = """
import itertools
import numpy as np
from fastbn.activations import Epilogue, lookup
from fastbn.dispatch import TABLE
try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = np.float16
sizes = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 49, 63, 65, 97, 100)
for kernel in TABLE:
    if kernel.level is None or kernel.unusable():
        continue
    m = kernel.module()
    for dtype, n, c, s in itertools.product((np.float32, np.float64, np.float16, bfloat16), (1, 3, 9), sizes, sizes):
        if n * c * s > 30_000:
            continue
        compute = np.dtype(np.float64 if dtype is np.float64 else np.float32)
        x, dy, y = (np.ones(n * c * s + 1, dtype)[1:].reshape(n, c, s) for _ in range(3))
        w = np.ones(c, compute)
        threads = 1 if (n + c + s) % 2 else 3
        m.stats(x, threads)
        m.normalize(x, y, w, w, w, threads)
        m.inference(x, y, w, None, w, None, w, 1e-5, threads)
        mean, mean_lo, invstd, scale, shift = m.forward(x, y, w, w, 1e-5, w.copy(), w.copy(), 0.1, 1, compute, threads)
        m.grad_sums(dy, x, w, threads)
        m.grad_input(dy, x, y, w, w, w, w, threads)
        m.backward(dy, x, y, mean, mean_lo, invstd, scale, threads)
        for activation, residual in ((lookup("relu"), dy), (lookup("gelu"), None), (None, dy)):
            after = Epilogue(activation, residual, scale, shift, y.copy())
            m.normalize(x, y, w, w, w, threads, after)
            m.backward(dy, x, y, mean, mean_lo, invstd, scale, threads, after)
    print(kernel.name, "done")
"""


@pytest.mark.slow
def test_address_and_undefined_behavior(tmp_path: Path) -> None:
    pytest.importorskip("fastbn.kernels._pool", reason="built without a compiler")
    for package in ("Cython", "setuptools"):
        pytest.importorskip(package)
    gcc = shutil.which("gcc")
    if gcc is None or sys.platform != "linux":
        pytest.skip("no gcc")
    # Without forced inlining, which makes instrumented code slow to compile.
    flags = f"{FLAGS} -fno-sanitize-recover=undefined -O1 -UCYTHON_INLINE -DCYTHON_INLINE=inline"
    environment = {**os.environ, "FASTBN_CXXFLAGS": flags, "FASTBN_LDFLAGS": FLAGS}
    source = tmp_path / "source"
    built = shutil.ignore_patterns("*.so", "_*.cpp", "__pycache__")
    shutil.copytree(ROOT / "fastbn", source / "fastbn", ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-j2"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    runtimes = [
        subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=source, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(source), "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]
    assert "done" in result.stdout
