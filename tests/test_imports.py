"""Who may import whom, and what importing the package costs its user."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]  # the sources, wherever fastbn is installed
PACKAGE = Path(fastbn.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module imports only what stands on an earlier line. Kernels know nothing of the library.
ORDER = (
    {"kernels", "tables", "caller", "shown", "hints"},
    {"environment", "floating", "reference", "activations", "dtypes", "cpu", "cgroup", "layout"},
    {"memory", "threads", "checks", "extremes"},
    {"results"},
    {"dispatch"},
    {"introspection", "composed"},
    {"parts"},
    {"parts_gradient"},
    {"core"},
    {"functional"},
    {"norm_calls"},
    {"norms"},
    {"variants"},
    {"sync", "conventions", "nn"},
    {"states"},
    {"layers"},
    {"norm_layers"},
    {"reestimate"},
    {"torch", "onnx", "mpi"},
    {"keras"},
    {"fastbn"},
    {"benchmark"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Where a framework may be imported at all; never by `import fastbn`.
OPTIONAL = {
    "torch": {"torch"},
    "onnx": {"onnx", "onnxruntime", "onnxruntime_extensions"},
    "keras": {"keras"},
    "keras.in_jax": {"keras", "jax"},
    "keras.in_tensorflow": {"tensorflow"},
    "keras.xla": {"jax"},
    "keras.in_torch": {"torch"},
    "mpi": {"mpi4py"},
    "kernels.numba": {"numba"},
    "kernels.numba_apart": {"numba"},
    "kernels.numba_cache": {"numba", "llvmlite"},
    "kernels.numba_function": {"numba", "llvmlite"},
    "kernels.numba_lanes": {"numba", "llvmlite"},
    "kernels.numba_math": {"numba", "llvmlite"},
    "kernels.numba_passes": {"numba"},
    "kernels.numba_threads": {"numba"},
    "threads": {"threadpoolctl"},
    "__main__": {"rich"},
}


def _name(path: Path) -> str:
    """Name of a module below fastbn; the package itself is called fastbn."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "fastbn"


def _for_checking_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _base(node: ast.ImportFrom, path: Path) -> str:
    """What a file imports from."""
    return resolve_name("." * node.level + (node.module or ""), ".".join(("fastbn", *path.relative_to(PACKAGE).parent.parts)))


def _imports(path: Path) -> Iterator[str]:
    """Every module a file imports, inside of functions too, but not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, path)
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "fastbn" else (base,)
        elif not (isinstance(node, ast.stmt) and _for_checking_only(node)):
            waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_nothing_imports_upward(path: Path) -> None:
    name = _name(path).split(".")[0]
    assert name in RANK, f"{name} has no place in the order of modules"
    for imported in _imports(path):
        first, _, rest = imported.partition(".")
        if first != "fastbn" or rest == "__version__":
            continue
        other = rest.split(".")[0] or "fastbn"
        other = other if other in RANK else "fastbn"  # a name of the package itself
        inside = name == other and name in {"kernels", "torch", "keras", "onnx"}  # packages
        assert inside or RANK[other] < RANK[name], f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_numpy_and_the_standard_library_are_needed(path: Path) -> None:
    name = _name(path)
    optional = OPTIONAL.get(name, OPTIONAL.get(name.split(".")[0], set()))
    allowed = {"fastbn", "numpy", *sys.stdlib_module_names} | optional
    assert {imported.split(".")[0] for imported in _imports(path)} <= allowed


def test_the_reference_stands_alone() -> None:
    allowed = {"numpy", *sys.stdlib_module_names}
    assert {imported.split(".")[0] for imported in _imports(PACKAGE / "reference.py")} <= allowed


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_imports_no_framework() -> None:
    loaded = _python("import sys, fastbn; print(*sys.modules)").split()
    assert "fastbn.functional" in loaded
    unwanted = {"numba", "torch", "onnx", "keras", "tensorflow", "mpi4py", "ml_dtypes", "rich", "threadpoolctl"}
    assert not unwanted & {module.split(".")[0] for module in loaded}
    assert not {"fastbn.torch", "fastbn.onnx", "fastbn.keras", "fastbn.mpi", "fastbn.kernels.numba"} & set(loaded)


def _seen_by_packers(path: Path) -> Iterator[str]:
    """What PyInstaller and others take along for a file: whatever an import statement may mean, under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, path)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def test_an_application_is_packed_without_numba_and_frameworks() -> None:
    """Unless it asks for these; they would make it larger by hundreds of megabytes."""
    files = {name if name == "fastbn" else f"fastbn.{name}": path for path in MODULES for name in [_name(path)]}
    waiting, found = ["fastbn"], set[str]()
    while waiting:
        found.add(name := waiting.pop())
        if name in files:
            waiting += set(_seen_by_packers(files[name])) - found
    assert {"fastbn.dispatch", "fastbn.kernels.protocol"} <= found
    assert {name.split(".")[0] for name in found} <= {"fastbn", "numpy", "typing_extensions", "threadpoolctl", *sys.stdlib_module_names}
    assert not {"fastbn.torch", "fastbn.onnx", "fastbn.keras", "fastbn.mpi", "fastbn.kernels.numba"} & found


def test_a_framework_is_asked_for_by_its_own_import() -> None:
    code = "import fastbn; fastbn.{}"
    for name, hint in (("torch", "; import fastbn.torch first"), ("onnx", "; import fastbn.onnx first"), ("tensor", "")):
        found = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=False)
        assert f"AttributeError: module 'fastbn' has no attribute '{name}'{hint}" in found.stderr


@pytest.mark.parametrize(
    ("module", "missing", "text"),
    [
        ("fastbn.torch", "torch", "fastbn.torch needs PyTorch (pip install torch): "),
        ("fastbn.onnx", "onnx", "fastbn.onnx needs onnx (pip install onnx): "),
        ("fastbn.keras", "keras", "fastbn.keras needs Keras 3 (pip install keras) and the backend that KERAS_BACKEND names, or else tens"),
    ],
)  # fmt: skip
def test_an_adapter_says_what_it_needs(module: str, missing: str, text: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {text}")


def test_importing_starts_no_thread_and_prints_nothing() -> None:
    code = "import threading, os, fastbn; n = len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 1; print(n)"
    alone = _python(code.replace(", fastbn", ", numpy"))  # numpy's own threads are not ours
    assert _python(code) == alone
    assert _python("import fastbn") == ""


def test_public_names_exist_and_are_sorted() -> None:
    assert len(set(fastbn.__all__)) == len(fastbn.__all__)
    assert sorted(fastbn.__all__) == fastbn.__all__
    for name in fastbn.__all__:
        assert getattr(fastbn, name).__doc__, name


def test_the_package_lists_public_names_only() -> None:
    assert dir(fastbn) == fastbn.__all__


def test_no_text_names_a_place_on_this_machine() -> None:
    here = str(PACKAGE.resolve().parent)
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|mnt|opt)/\w|[A-Z]:\\\\\w")
    for suffix in ("py", "pyi", "pyx", "pxd", "pxi", "hpp", "cpp", "h"):
        for path in PACKAGE.rglob(f"*.{suffix}"):
            text = path.read_text()
            if "Generated by Cython" in text[:100]:
                continue
            assert here not in text, path
            assert not home.search(text), path


def test_compiled_kernels_import_no_library() -> None:
    sources = [path for kind in ("pyx", "pxi", "pxd") for path in (ROOT / "fastbn" / "kernels").rglob(f"*.{kind}")]
    assert sources
    for path in sources:
        upward = re.findall(r"^\s*(?:c?import fastbn|from fastbn(?!\.kernels)\b).*", path.read_text(), re.MULTILINE)
        assert upward == [], path
