"""The extension modules and their compiler flags; everything else is in pyproject.toml.

Each ISA level is a module of its own: inline functions compiled for a wide ISA must not be merged into baseline
code by the linker. Where there is no C++ compiler the Python part is installed alone, and the library says so once
when it runs; where there is one, a module that does not build is an error. Variables of the build:

FASTBN_NO_EXTENSIONS=1       the Python part alone, in a wheel for every platform
FASTBN_REQUIRE_EXTENSIONS=1  no compiler is an error too: for whoever publishes wheels
FASTBN_CXXFLAGS, FASTBN_LDFLAGS  added to the flags
CXX                          the compiler: GCC 8, Clang 9 or newer
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy
from Cython import __version__ as cython_version
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError
from setuptools.modified import newer_group

KERNELS = "fastbn/kernels"
GENERATED = "build/generated"  # C++ that Cython writes: part of no distribution
# No -ffast-math: it would set flush-to-zero for the whole process. No contraction: the same bits on every ISA.
COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
# No copy of each loop for each condition in it: that makes long code a third longer, takes a third longer to build, and is no faster.
COMMON += ["-fno-unswitch-loops"]
# GCC takes its own AVX-512 header's undefined registers for a fault, 2,000 times. Clang does not know that warning.
COMMON += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-unused-function"]  # the last: Cython's own
# What `fastbn.cpu` looks for before it chooses a module, and no more. Compilers older than -march=x86-64-v3 know these.
V2 = ["-msse4.2", "-mpopcnt"]
V3 = [*V2, "-mavx2", "-mfma", "-mf16c", "-mbmi2"]
V4 = [*V3, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86 = {"_simd_v2": V2, "_simd_v3": V3, "_simd_v4": V4}
ARM = {"_simd_neon": []}
# The platform that is built for, which need not be this one (_PYTHON_HOST_PLATFORM).
LEVELS = {"x86_64": X86, "aarch64": ARM, "arm64": ARM}.get(sysconfig.get_platform().rpartition("-")[2], {})


def is_on(variable: str) -> bool:
    """Whether a variable of the environment is set to something else than 0."""
    return os.environ.get(variable, "") not in ("", "0")


def flags_of(variable: str) -> list[str]:
    """The flags in a variable of the environment."""
    return shlex.split(os.environ.get(variable, ""))


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None where there is none that can compile an empty file."""
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    for command in dict.fromkeys([configured, "c++", "g++", "clang++"]):
        words = shlex.split(command)
        if shutil.which(words[0]):
            test = [*words, "-std=c++17", "-x", "c++", "-fsyntax-only", os.devnull]
            if subprocess.run(test, capture_output=True, check=False).returncode == 0:  # noqa: S603  the user's own compiler
                return words
        if os.environ.get("CXX"):  # no other than the one that was asked for
            return None
    return None


def extension(name: str, flags: list[str], sources: tuple[str, ...] = (), folder: str = KERNELS) -> Extension:
    """One module, rebuilt when any of the shared sources changes."""
    folders = dict.fromkeys([KERNELS, folder])
    shared = [str(path) for each in folders for path in sorted(Path(each).rglob("*")) if path.suffix in {".pxi", ".pxd", ".hpp"}]
    return Extension(
        f"{folder}/{name}".replace("/", "."),
        [f"{folder}/{name}.pyx", *(f"{folder}/{source}" for source in sources)],
        depends=["setup.py", *shared],
        include_dirs=[KERNELS, numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_1_25_API_VERSION"),
            # What a loop calls for each block must be part of the loop, or the block goes through memory.
            ("CYTHON_INLINE", "inline __attribute__((always_inline))"),
        ],
        extra_compile_args=COMMON + flags + flags_of("FASTBN_CXXFLAGS"),
        extra_link_args=["-pthread", *flags_of("FASTBN_LDFLAGS")],
        language="c++",
    )


class BuildKernels(build_ext):
    """Compile what changed, wherever it goes then: into a wheel, and always beside the sources.

    pip may start with an empty folder, so what is compiled stays in one that is named by all that made it. And Python
    that is started in a checkout imports the sources that lie there, whatever is installed: they need kernels, too.
    """

    def run(self) -> None:
        """Compile into the folder that stays, then copy."""
        flags = [(e.extra_compile_args, e.extra_link_args) for e in self.extensions]
        made_by = repr((os.environ.get("CXX"), flags, numpy.__version__, cython_version))
        name = f"{self.plat_name}-{sys.implementation.cache_tag}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
        wanted, self.build_lib, self.build_temp = self.build_lib, f"build/{name}", f"build/{name}/objects"
        # What is compiled for another machine does not belong beside the sources.
        inplace, self.inplace = self.inplace, self.inplace or "_PYTHON_HOST_PLATFORM" not in os.environ
        super().run()
        kept, self.build_lib, self.inplace = self.build_lib, wanted, inplace
        for module in () if inplace else self.extensions:
            file = self.get_ext_filename(self.get_ext_fullname(module.name))
            self.mkpath(str(Path(wanted, file).parent))
            self.copy_file(str(Path(kept, file)), str(Path(wanted, file)))

    def build_extensions(self) -> None:
        """Write the C++ of all modules that changed at once, then compile them."""
        modules = self.extensions
        # Cython and setuptools would also look at NumPy's own files, which are always new where pip builds in isolation.
        self.extensions = [m for m in modules if self.force or newer_group([*m.sources, *m.depends], self.get_ext_fullpath(m.name))]
        written = cythonize(self.extensions, nthreads=cores(), language_level=3, build_dir=GENERATED) if self.extensions else []
        for mine, made in zip(self.extensions, written, strict=True):
            mine.sources = made.sources
        try:
            super().build_extensions()
        except CCompilerError as error:
            message = f"{error}\nfastbn's kernels did not build; FASTBN_NO_EXTENSIONS=1 installs without them."
            raise type(error)(message) from error
        self.extensions = modules


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def modules() -> list[Extension]:
    """What is to be built here."""
    if is_on("FASTBN_NO_EXTENSIONS") or not LEVELS:
        return []
    compiler = find_compiler()
    if compiler is None:
        if os.environ.get("CXX"):
            raise SystemExit(f"fastbn: CXX={os.environ['CXX']} compiles no C++17; FASTBN_NO_EXTENSIONS=1 installs the Python part alone")
        if is_on("FASTBN_REQUIRE_EXTENSIONS"):
            raise SystemExit("fastbn: no C++17 compiler was found, and FASTBN_REQUIRE_EXTENSIONS is set")
        print("fastbn: no C++17 compiler was found; the Python part is installed alone", file=sys.stderr)
        return []
    os.environ["CXX"] = shlex.join(compiler)
    common = [extension("_pool", [], ("pool.cpp", "scratch.cpp")), *(extension(name, []) for name in ("_cpu", "_plan", "_calls", "_jobs"))]
    door = extension("_door", [], ("door.cpp", "attempt.cpp", "parts.cpp", "stable.cpp"), "fastbn/torch")
    door.extra_link_args.append("-ldl")
    return [*common, door, *(extension(name, flags) for name, flags in LEVELS.items())]


# What an sdist holds does not depend on what can be compiled here: see MANIFEST.in.
setup(ext_modules=modules(), cmdclass={"build_ext": BuildKernels}, options={"build_ext": {"parallel": cores()}})
