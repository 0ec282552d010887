"""What is written for users: every block of Python runs, every command is one, every link leads somewhere."""

from __future__ import annotations

import ast
import io
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What brings a package that a block imports; all else comes with Python or NumPy.
EXTRAS = {
    "torch": "torch", "numba": "numba", "onnx": "onnx", "onnxruntime": "onnx", "keras": "keras", "tensorflow": "keras", "jax": "keras",
    "ml_dtypes": "bf16", "sklearn": "test", "mpi4py": "mpi",
}  # fmt: skip


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _imported(code: str) -> set[str]:
    """The packages that code imports, with what fastbn's adapters need."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            found.add(name.split(".")[0])
            found.update(part for part in name.split(".")[1:] if part in EXTRAS)
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=_name)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras' own conversion of torch tensors
def test_every_block_of_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = _blocks(page, "python")
    monkeypatch.setenv("KERAS_BACKEND", "torch")  # it would look for TensorFlow
    for package in sorted(_imported("\n".join(blocks)) & EXTRAS.keys()):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install 'fastbn[{EXTRAS[package]}]')")
    monkeypatch.chdir(tmp_path)  # some write a file
    names: dict[str, object] = {"__name__": "page"}  # a block may go on where the one before it ended
    try:
        for block in blocks:
            exec(compile(block, _name(page), "exec"), names)  # noqa: S102  our own text
    finally:
        if "torch" in names:
            import_module("fastbn.torch").disable()


def _commands() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for block in _blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from ((page, part.strip()) for part in line.split("#")[0].split("&&") if part.strip())


@pytest.mark.parametrize("length", [{}, {"CONTENT_LENGTH": ""}, {"CONTENT_LENGTH": "0"}, {"CONTENT_LENGTH": "8"}], ids=str)
def test_the_service_answers_what_is_no_array_with_the_reason(length: dict[str, str]) -> None:
    served: dict[str, Any] = {}
    exec(_blocks(ROOT / "docs" / "howto" / "serve.md", "python")[0], served)  # noqa: S102  our own text
    said: list[str] = []
    served["app"]({"PATH_INFO": "/", "wsgi.input": io.BytesIO(b"no array"), **length}, lambda status, _: said.append(status))
    assert said == ["400 Bad Request"]


def test_every_command_of_fastbn_is_one() -> None:
    from fastbn.__main__ import parser_of_commands

    shown = [shlex.split(command)[3:] for _, command in _commands() if command.startswith("python -m fastbn")]
    assert len(shown) > 5
    for arguments in shown:
        parser_of_commands().parse_args(arguments)


def test_every_command_of_the_bench_is_one() -> None:
    pytest.importorskip("rich")
    bench = import_module("bench.__main__")
    shown = [shlex.split(command)[3:] for _, command in _commands() if re.match(r"python -m bench( |$)", command)]
    assert len(shown) > 4
    for arguments in shown:
        if arguments[:1] not in [[name] for name in bench.COMMANDS]:
            bench._parser().parse_args(arguments)
    modules = {match[1] for page in PAGES for match in re.finditer(r"python -m bench\.(\w+)", page.read_text())}
    assert modules <= {path.stem for path in (ROOT / "bench").iterdir()}


def _links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", [page for page in PAGES if _links(page)], ids=_name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    inside = [link for link in _links(page) if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in inside if not (page.parent / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_of_the_repository_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"`((?:docs|examples|tests|bench|fastbn)/[\w/.-]+\.\w+)`", page.read_text()))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_architecture_names_every_file_of_the_library() -> None:
    """In the section of its folder; a header beside its source needs no word of its own, nor do modules that differ by the ISA."""
    found = re.findall(r"^## [^\n]*`([\w/]+)/`\n(.*?)(?=^## )", ARCHITECTURE.read_text(), re.DOTALL | re.MULTILINE)
    sections = {Path("fastbn", "" if name == "fastbn" else name): set(re.findall(r"(\w+)\.\w+", text)) for name, text in found}
    missing = []
    for path in sorted((ROOT / "fastbn").rglob("*.*")):
        is_source = path.suffix in (".py", ".pyx", ".pxi", ".pxd", ".hpp", ".cpp")
        if is_source and path.stem != "__init__" and not path.stem.startswith("_simd_"):
            named = sections.get(path.parent.relative_to(ROOT), set())
            missing += [] if path.stem in named else [str(path.relative_to(ROOT))]
    assert missing == []


def test_the_table_of_constants_has_their_values_and_files() -> None:
    table = ARCHITECTURE.read_text().split("## Constants")[1]
    held = set()
    for names, values, files in re.findall(r"^\| (`[A-Z].*?) \| (.*?) \| (.*?) \|", table, re.MULTILINE):
        named, numbers = re.findall(r"`(\w+)`", names), re.findall(r"\d[\d,]*(?:\^-?\d+)?", values)
        sources = [path for path in (ROOT / "fastbn").rglob("*.*") if f"`{path.name}`" in files]
        text = "".join(path.read_text() for path in sources)
        for name, number in zip(named, numbers, strict=False):  # that of FEW_ROWS is another's
            said = number.replace(",", "").replace("^", ".0 ** ") + (" << 20" if "MiB" in values else "")
            assert " to " in values or re.search(rf"\b{name} *= *{re.escape(said)}(?![\d.])", text), name
            held.add(name)
    assert len(held) > 25


def test_the_reference_has_every_public_name() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert [name for name in fastbn.__all__ if not name.startswith("_") and f"::: fastbn.{name}\n" not in text] == []


def test_guarantees_name_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "guarantees.md").read_text()))
    assert len(named) > 15
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []


def test_the_error_catalogue_quotes_messages_that_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "fastbn").rglob("*.py"))
    rows = re.findall(r"^\| (?:RuntimeWarning )?`([^`]+)`", (ROOT / "docs" / "reference" / "errors.md").read_text(), re.MULTILINE)
    assert len(rows) > 12
    names = r"…|float32|FASTBN_\w+|\d|\b(?:weight|x|running_mean|running_var|kernel|saved|out|mask)\b"  # what a message is filled with
    for row in rows:
        words = max(re.split(names, row), key=len).strip()
        assert words in sources, row


def test_the_documentation_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install 'fastbn[docs]')")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (pip install 'fastbn[docs]')")
    import subprocess
    import sys

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "reference" / "api.html").exists()
