"""The extension modules and their compiler flags; everything else is in pyproject.toml.

Each ISA level is a module of its own: inline functions compiled for a wide ISA must not be merged into baseline
code by the linker. FASTBN_NO_EXTENSIONS=1 installs the Python part alone. Where there is no compiler the
extensions are left out, and the library says so once when it runs.
"""

import os
import platform

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

KERNELS = "fastbn/kernels"
# No -ffast-math: it would set flush-to-zero for the whole process. No contraction: the same bits on every ISA.
COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
X86 = {
    "_simd_v2": ["-march=x86-64-v2"],
    "_simd_v3": ["-march=x86-64-v3"],
    "_simd_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
ARM = {"_simd_neon": []}
LEVELS = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine(), {})


def extension(name: str, flags: list[str], sources: tuple[str, ...] = ()) -> Extension:
    """One module under fastbn/kernels, rebuilt when any of the shared sources changes."""
    shared = [f"{KERNELS}/{file}" for file in ("simd.pxi", "simd.hpp", "activation.hpp", "pool.hpp", "_pool.pxd")]
    return Extension(
        f"fastbn.kernels.{name}",
        [f"{KERNELS}/{name}.pyx", *(f"{KERNELS}/{source}" for source in sources)],
        depends=shared,
        include_dirs=[KERNELS, numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_1_25_API_VERSION"),
            # What a loop calls for each block must be part of the loop, or the block goes through memory.
            ("CYTHON_INLINE", "inline __attribute__((always_inline))"),
        ],
        extra_compile_args=COMMON + flags + os.environ.get("FASTBN_CXXFLAGS", "").split(),
        extra_link_args=["-pthread", *os.environ.get("FASTBN_LDFLAGS", "").split()],
        language="c++",
        optional=True,
    )


if os.environ.get("FASTBN_NO_EXTENSIONS", "") in ("", "0"):
    modules = [extension("_cpu", []), extension("_pool", [], ("pool.cpp",))]
    modules += [extension(name, flags) for name, flags in LEVELS.items()]
    cores = os.cpu_count() or 1
    setup(ext_modules=cythonize(modules, nthreads=cores, language_level=3), options={"build_ext": {"parallel": cores}})
else:
    setup()
