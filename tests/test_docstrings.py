"""Every example in a docstring: they run, and print what they say. Those in texts for users are in `test_docs`."""

from __future__ import annotations

import doctest
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"fastbn.kernels.numba": "numba", "fastbn.kernels.numba_math": "numba", "fastbn.torch": "torch"}


def _can_be_imported(module: str) -> bool:
    if module == "fastbn.mpi":  # MPI starts when it is imported, and a process has one; `test_mpi` runs its examples in another
        return False
    return all(find_spec(package) for name, package in NEEDS.items() if f"{module}.".startswith(f"{name}."))


def _examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for found in pkgutil.walk_packages(fastbn.__path__, "fastbn."):
        if _can_be_imported(found.name):
            yield from finder.find(import_module(found.name))


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


def test_deploying_names_every_variable_and_no_other() -> None:
    from fastbn import environment

    named = set(re.findall(r"FASTBN_[A-Z_]+", (ROOT / "docs" / "deploying.md").read_text()))
    assert named == {*environment.EXPECTED, *environment.OF_THE_BUILD}
