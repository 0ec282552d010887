"""What is published: the sdist holds all that is needed to build and to test, the wheel what is needed to run.

CI looks into a wheel with compiled kernels too, and installs it; here nothing is compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What builds, tests and git leave in a checkout.
LEFT = ("*.so", "__pycache__", "build", "dist", "*.egg-info", ".*_cache", ".git*", ".hypothesis", ".venv", "results", "_*.cpp", "*.png")

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("Cython", minversion="3.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, with what a developer's tree may hold besides."""
    folder = tmp_path_factory.mktemp("packaging") / "source"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT))
    for name in ("_simd_v2.cpp", "_simd_v2.cpython-311-x86_64-linux-gnu.so"):
        (folder / "fastbn" / "kernels" / name).touch()
    return folder


def _setup(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTBN_")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments], cwd=source, env=clean | environment, capture_output=True, text=True, check=False
    )


def _wheel(source: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return _setup(source, "bdist_wheel", "--dist-dir", str(folder), **environment)


@pytest.fixture(scope="module")
def unpacked(source: Path) -> Path:
    """The sdist, unpacked."""
    done = _setup(source, "sdist", "--dist-dir", str(source.parent))
    assert done.returncode == 0, done.stderr
    (archive,) = source.parent.glob("*.tar.gz")
    # Newer Pythons want to be told that it is plain data; those before 3.10.12 and 3.11.4 cannot be.
    told = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(archive, source.parent / "unpacked", **told)
    (folder,) = (source.parent / "unpacked").iterdir()
    return folder


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_sdist_holds_every_file_of_the_project(unpacked: Path) -> None:
    ours = {name for name in _files(ROOT) if not any(fnmatch(part, pattern) for part in Path(name).parts for pattern in LEFT)}
    made = {"PKG-INFO", "setup.cfg"}
    held = {name for name in _files(unpacked) if ".egg-info/" not in name}
    assert held - made == ours - made
    needed = {"fastbn/kernels/_cpu.pyx", "fastbn/kernels/pool.cpp", "tests/truth.py", "tests/pool_test.cpp", "tests/conftest.py", ".ci/run"}
    assert needed <= held


def test_a_wheel_without_kernels_is_for_every_platform_and_holds_python_alone(unpacked: Path, tmp_path: Path) -> None:
    done = _wheel(unpacked, tmp_path, FASTBN_NO_EXTENSIONS="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.iterdir()
    assert re.fullmatch(r"fastbn-[\w.]+-py3-none-any\.whl", wheel.name)
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {f"fastbn/{name}" for name in _files(ROOT / "fastbn") if name.endswith((".py", "py.typed"))}


def test_without_a_compiler_the_python_part_is_packed(unpacked: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    done = _wheel(unpacked, tmp_path / "wheel", PATH=str(nowhere), CXX="")
    assert done.returncode == 0, done.stderr
    assert "fastbn: no C++17 compiler was found; the Python part is installed alone" in done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    runs_on_numba(tmp_path / "installed", nowhere)


WITHOUT_COMPILER = """
import numpy as np, fastbn
assert fastbn.dispatch.select("float32").name == "numba", fastbn.dispatch.select("float32").name
x = np.random.default_rng(0).normal(3, 2, (4, 8, 20, 20)).astype(np.float32)
layer = fastbn.BatchNorm2d(8, activation="relu")
y, dx = layer(x), layer.backward(x).dx
with fastbn.use_kernel("reference"):
    layer = fastbn.BatchNorm2d(8, activation="relu")
    np.testing.assert_allclose(y, layer(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, layer.backward(x).dx, rtol=1e-4, atol=1e-5)
print(fastbn.__file__)
"""


def runs_on_numba(installed: Path, nowhere: Path) -> None:
    """What was packed trains a layer, where Numba is, with no program on the path."""
    if find_spec("numba") is None:
        return
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTBN_")}
    environment = clean | {"PATH": str(nowhere), "PYTHONPATH": str(installed), "NUMBA_CACHE_DIR": str(nowhere)}
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, env=environment, cwd=nowhere, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(installed / "fastbn" / "__init__.py")), done.stderr


def test_whoever_publishes_can_insist_on_a_compiler(unpacked: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    done = _wheel(unpacked, tmp_path / "wheel", PATH=str(nowhere), CXX="", FASTBN_REQUIRE_EXTENSIONS="1")
    assert done.returncode != 0
    assert "no C++17 compiler was found, and FASTBN_REQUIRE_EXTENSIONS is set" in done.stderr
    assert not (tmp_path / "wheel").exists()


def test_a_compiler_that_was_asked_for_and_is_none_is_an_error(unpacked: Path, tmp_path: Path) -> None:
    done = _wheel(unpacked, tmp_path / "wheel", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "fastbn: CXX=no-such-compiler compiles no C++17; FASTBN_NO_EXTENSIONS=1 installs the Python part alone" in done.stderr
    assert not (tmp_path / "wheel").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a compiler that is a shell script")
def test_a_kernel_that_does_not_compile_is_an_error(source: Path, tmp_path: Path) -> None:
    """Where there is a compiler, a wheel without kernels would be an accident."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *" /dev/null") exit 0;; *) echo "no Python.h" >&2; exit 1;; esac\n')
    compiler.chmod(0o755)
    few = tmp_path / "source"  # without the big modules, which Cython would translate first
    shutil.copytree(source, few)
    for path in (few / "fastbn" / "kernels").glob("_simd_*.pyx"):
        path.write_text("")
    done = _wheel(few, tmp_path / "wheel", CXX=str(compiler))
    assert done.returncode != 0
    assert "no Python.h" in done.stderr
    assert "fastbn's kernels did not build; FASTBN_NO_EXTENSIONS=1 installs without them." in done.stderr
    assert not (tmp_path / "wheel").exists()


def test_flags_name_the_features_that_are_looked_up() -> None:
    """A module must not be compiled for more than what is asked of the processor before it runs."""
    from fastbn import cpu

    flags = set(re.findall(r'"-m([a-z0-9.]+)"', (ROOT / "setup.py").read_text()))
    assert flags == set().union(*(cpu.LEVELS[level] for level in ("v2", "v3", "v4")))
