"""fastbn.keras on each of Keras' backends, which a process chooses once: Keras' own tests with our layer, and `keras_backend`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).resolve().parent
BACKENDS = ("numpy", "torch", "tensorflow", "jax")
# What Keras 3.15 tests; later ones may test more.
THEIRS = {
    "test_bn_basics", "test_correctness", "test_input_fully_masked", "test_bachnorm_ignore_masked_values", "test_trainable_behavior",
    "test_large_value_within_autocast_scope", "test_masked_broadcast_normalization", "test_renorm_basics", "test_renorm_inference",
    "test_renorm_correctness", "test_serialization",
}  # fmt: skip


Found = dict[str, dict[str, str]]


def _run(backend: str, folder: Path) -> Found:
    """All tests on a backend: for those of each file, by name, what went wrong, or nothing."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"KERAS_BACKEND": backend, "KERAS_HOME": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3"}
    report = folder / "report.xml"
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", "-c", str(folder / "pytest.ini"), f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, str(HERE / "keras_backend.py"), *options], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: Found = {"theirs": {}, "ours": {}}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  our own
        where = "theirs" if case.attrib["classname"].endswith("BatchNormalizationTest") else "ours"
        wrong = [f"{node.tag}: {node.get('message')}\n{node.text}" for node in case if node.tag in ("failure", "error")]
        found[where][case.attrib["name"]] = "\n".join(wrong)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Found]]]:
    """Those of all backends that are installed, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        installed = [name for name in BACKENDS if find_spec("keras") and find_spec(name)]
        yield {name: pool.submit(_run, name, tmp_path_factory.mktemp(name)) for name in reversed(installed)}  # the longest first


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    for package in ("keras", "jax" if request.param == "numpy" else request.param):  # Keras' numpy backend imports parts of its JAX one
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return str(request.param)


def _all_passed(found: dict[str, str]) -> None:
    wrong = {name: text for name, text in found.items() if text}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


def test_keras_own_tests_pass_with_our_layer(backend: str, runs: dict[str, Future[Found]]) -> None:
    found = runs[backend].result()["theirs"]
    of_training = {"test_bachnorm_ignore_masked_values"} if backend == "numpy" else set()
    assert {name.rstrip("0123456789") for name in found} >= THEIRS - of_training
    _all_passed(found)


def test_what_holds_on_each_backend_holds(backend: str, runs: dict[str, Future[Found]]) -> None:
    found = runs[backend].result()["ours"]
    assert len(found) > 40
    _all_passed(found)
