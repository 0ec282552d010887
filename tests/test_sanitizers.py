"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: a build of their own, minutes to make."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from other_process import run

from fastbn.dispatch import TABLE

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FLAGS = "-fsanitize=address,undefined"
# What this machine can run, and so what must have run.
KERNELS = [kernel.name for kernel in TABLE if kernel.level is not None and not kernel.unusable()]
DTYPES = "float32,float64,float16,bfloat16"

pytestmark = pytest.mark.slow

# Arrays end where their memory ends and start one element late: an element too far is a finding. Caches are as they are,
# and then tiny, so that whole arrays are streamed past them.
OPERATIONS = """
import itertools, sys
import numpy as np
from fastbn.activations import NAMES, Epilogue, lookup
from fastbn.core import ComposedKernel
from fastbn.dispatch import KERNELS
from fastbn.kernels import _plan
from fastbn.kernels.protocol import Affine, Running, Statistics
try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = np.float16
m = KERNELS[sys.argv[1]].module()
assert not KERNELS[sys.argv[1]].unusable()
sizes = (1, 2, 7, 8, 9, 17, 31, 33, 65, 97)
grid = [shape for shape in itertools.product((1, 3, 9), sizes, sizes) if np.prod(shape) < 15_000]
# Small planes of many images, of which some are taken together; rows; one channel; and enough for several units of work.
grid += [(32, 3, 4), (33, 17, 9), (64, 2, 49), (100, 5, 2), (130, 1, 3), (700, 129, 1), (3, 5, 2000), (40, 33, 33)]
grid += [(2, 3, 5000), (300, 65, 1)]
for caches in (None, (512, 2048, 4096)):
    if caches is not None:
        _plan.set_caches(*caches)
        grid = grid[::7] + grid[-10:]
    for dtype, (i, (n, c, s)) in itertools.product((np.float32, np.float64, np.float16, bfloat16), enumerate(grid)):
        compute = np.dtype(np.float64 if dtype is np.float64 else np.float32)
        x, dy, y, d = (np.ones(n * c * s + 1, dtype)[1:].reshape(n, c, s) for _ in range(4))
        w = np.ones(c, compute)
        threads = 3 if i % 2 else 1
        m.stats(x, threads)
        m.normalize(x, y, w, w, w, threads)
        m.inference(x, y, Statistics(w, None, w, 1e-5), Affine(None, w), threads)
        if n * s == 1:
            continue
        mean, mean_lo, invstd, scale, shift = m.forward(x, y, Affine(w, w), 1e-5, Running(w.copy(), w.copy(), 0.1, 1), compute, threads)
        kept = Statistics(mean, mean_lo, invstd)
        m.grad_sums(dy, x, w, threads)
        m.grad_input(dy, x, y, w, w, (w, w), threads)
        m.backward(dy, x, y, kept, scale, threads)
        m.backward(dy, x, None, Statistics(mean, None, invstd), None, threads)
        names = (NAMES[i % len(NAMES)], None) if i % 3 or c > 9 else (*NAMES, None)
        for name, residual in itertools.product(names, (None, dy)):
            if name is None and residual is None:
                continue
            after = Epilogue(name and lookup(name), residual, scale, shift, d if residual is not None else None)
            m.normalize(x, y, w, w, w, threads, after)
            m.inference(x, y, Statistics(w, None, w, 1e-5), Affine(w, w), threads, after)
            m.forward(x, y, Affine(w, w), 1e-5, Running(None, None, 0.1, 1), compute, threads, after)
            if name is not None:
                m.backward(dy, x, y, kept, scale, threads, after)
                m.backward(dy, x, None, kept, scale, threads, after._replace(dresidual=None))
        slope = Epilogue(lookup(("leaky_relu", 0.5)), None, scale, shift, None, True)
        m.backward(dy, x, y, kept, scale, threads, slope)
print("done")
"""

# Vectors wherever they may start: at odd addresses, strided, backwards, in the other byte order.
VECTORS = """
import sys
import numpy as np
import fastbn
for dtype in (np.float32, np.float64, np.float16):
    compute = np.dtype(np.float64 if dtype is np.float64 else np.float32)
    for c in (1, 3, 8, 17, 65):
        odd = lambda k=compute: np.ones(c * k.itemsize + 1, np.uint8)[1:].view(k)
        x = np.arange(5 * c * 3).astype(dtype).reshape(5, c, 3)
        ones = lambda n, t=compute: np.ones(n, t)
        for make in (odd, lambda: ones(3 * c)[::3], lambda: ones(c)[::-1], lambda: ones(c, compute.newbyteorder())):
            v = [make() for _ in range(6)]
            for a in v:
                a[...] = 1
            for activation in (None, "silu"):
                out = np.empty(x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(x.shape)
                fastbn.batch_norm(x, v[0], v[1], v[2], v[3], activation=activation, out=out)
                fastbn.batch_norm(x, v[0], v[1], v[2], v[3], activation=activation)
                if v[0].dtype.isnative:
                    fastbn.batch_norm(x, v[0], v[1], v[2], v[3], training=True, activation=activation)
                saved = fastbn.batch_norm_forward(x, v[2], v[3], activation=activation)[1]
                fastbn.batch_norm_backward(x, x, saved, out=out)
                fastbn.batch_norm_elemt(x, v[0], v[1], v[2], v[3], activation=activation)
                fastbn.FrozenBatchNorm(v[0], v[1], v[2], v[3], activation=activation)(x)
            sums = fastbn.batch_norm_backward_reduce(x, x, v[0], v[1])
            fastbn.batch_norm_backward_elemt(x, x, v[0], v[1], v[2], v[3], v[4], 15)
print("done")
"""


SOURCE = tempfile.TemporaryDirectory()


@cache
def built() -> tuple[dict[str, str], str]:
    """An environment in which Python imports fastbn built with sanitizers, or why there is none."""
    source = Path(SOURCE.name)
    # With little optimization, and without forced inlining: instrumented code is slow to compile.
    flags = f"{FLAGS} -fno-sanitize-recover=undefined -Og -UCYTHON_INLINE -DCYTHON_INLINE=inline"
    environment = {**os.environ, "FASTBN_CXXFLAGS": flags, "FASTBN_LDFLAGS": FLAGS}
    shutil.copytree(ROOT / "fastbn", source / "fastbn", ignore=shutil.ignore_patterns("*.so", "_*.cpp", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-j2"], environment, source)
    runtimes = [
        subprocess.run([str(shutil.which("gcc")), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(source), str(TESTS)]),
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return found, build.stderr if build.returncode else ""


def sanitized(*arguments: str) -> CompletedProcess[str]:
    """Python with these arguments and the sanitized modules."""
    for module in ("fastbn.kernels._pool", "Cython", "setuptools"):
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("no gcc")
    environment, wrong = built()
    assert not wrong, wrong
    return run([sys.executable, *arguments], environment)


def clean(*arguments: str) -> None:
    """It must import the sanitized modules, say "done", and its sanitizers nothing."""
    result = sanitized(*arguments)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-5000:]
    assert "runtime error" not in result.stderr, result.stderr[-5000:]
    assert result.stdout.splitlines()[-1] == "done"


IMPORT = f"""
import fastbn.kernels._pool, fastbn.kernels._cpu, fastbn.kernels._plan, fastbn.kernels._calls, fastbn.kernels._jobs
from fastbn.dispatch import TABLE
usable = [k.name for k in TABLE if k.level is not None and not k.unusable()]
assert usable == {KERNELS!r}, usable
import sys
files = [m.__file__ for name, m in sys.modules.items() if name.startswith('fastbn.kernels._') and m.__file__.endswith('.so')]
assert len(files) == len(usable) + 5, files
assert all(b'__asan_report_load' in open(f, 'rb').read() for f in files), files
print('done')
"""

# The Python callers check; so a shape that the memory does not have is what is left.
BEYOND = """
import sys
import numpy as np
from fastbn.dispatch import KERNELS
x = np.lib.stride_tricks.as_strided(np.ones(1024, np.float32), (1, 1, 1088), (4352, 4352, 4))
KERNELS[sys.argv[1]].module().stats(x, 1)
"""


def random_calls(kernel: str) -> str:
    pin = ["--kernel", kernel, "--caches", "512", "2048", "4096"] if kernel else []
    return f"import fuzz, sys; sys.exit(fuzz.main(['--seed', '1', '--calls', '1500', '--tight', *{pin!r}]) or print('done'))"


def test_every_kernel_of_this_machine_is_built_with_sanitizers() -> None:
    clean("-c", IMPORT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_operations(kernel: str) -> None:
    clean("-c", OPERATIONS, kernel, DTYPES)


@pytest.mark.parametrize("kernel", [*KERNELS, ""])
def test_calls_at_the_ends_of_memory(kernel: str) -> None:
    clean(str(TESTS / "test_guard_pages.py"), kernel, DTYPES)


def test_vectors_at_odd_addresses() -> None:
    clean("-c", VECTORS)


@pytest.mark.parametrize("kernel", [*KERNELS, ""])
def test_random_calls(kernel: str) -> None:
    clean("-c", random_calls(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_read_beyond_an_array_would_be_seen(kernel: str) -> None:
    """Of whole vectors: GCC does not watch masked loads, as of AVX-512's tails. Guard pages do."""
    result = sanitized("-c", BEYOND, kernel, DTYPES)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
