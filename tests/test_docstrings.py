"""Every example in a docstring: they run, and print what they say. Those in texts for users are in `test_docs`."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"fastbn.kernels.numba": "numba", "fastbn.torch": "torch", "fastbn.onnx": "onnx"}  # what modules of such names import
# MPI starts when it is imported, and Keras chooses its backend then: `test_mpi` and `test_keras` run their examples in other processes.
ELSEWHERE = {"fastbn.mpi", "fastbn.keras"}


def _can_be_imported(module: str) -> bool:
    if module in ELSEWHERE:
        return False
    return all(find_spec(package) for name, package in NEEDS.items() if module.startswith(name))


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if _can_be_imported(found.name):
            module = import_module(found.name)
            yield module
            if found.ispkg:
                yield from _modules(module)


def _examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in _modules(fastbn):
        yield from finder.find(module)


EXAMPLES = [example for example in _examples() if example.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_docstring(example: doctest.DocTest) -> None:
    for package in re.findall(r"^ *>>> (?:import|from) (\w+)", example.docstring or "", re.MULTILINE):
        pytest.importorskip(package)
    doctest.DebugRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)


@pytest.mark.skipif(not EXAMPLES, reason="docstrings are stripped (python -OO)")
def test_public_functions_have_examples() -> None:
    shown = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert {"batch_norm", "batch_norm_forward", "BatchNorm2d", "use_kernel", "explain"} <= shown


def _public() -> Iterator[Any]:
    """Functions that users call, classes that they make objects of, and the methods of these."""
    for value in (getattr(fastbn, name) for name in fastbn.__all__):
        if inspect.isclass(value):
            yield from (m for name, m in inspect.getmembers(value, inspect.isroutine) if name == "__init__" or not name.startswith("_"))
        if callable(value):
            yield value


@pytest.mark.parametrize("value", [*_public()], ids=lambda value: value.__qualname__)
def test_hints_are_there_at_run_time(value: Any) -> None:
    """Some programs make command lines, configurations or documentation of them."""
    typing.get_type_hints(value)


def test_deploying_names_every_variable_and_no_other() -> None:
    from fastbn import environment

    named = set(re.findall(r"FASTBN_[A-Z_]+", (ROOT / "docs" / "deploying.md").read_text()))
    assert named == {*environment.EXPECTED, *environment.OF_THE_BUILD}
